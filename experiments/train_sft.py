r"""Supervised fine-tuning of a Llama-family model, all weights, on any mesh.

On a laptop, with the embedded model and problems:

  python -m experiments.train_sft --model=tiny-1m --data='arithmetic:train?size=500' \
    --prompt_template=qa --num_epochs=1 --learning_rate=5e-4 --output_dir=outputs/sft

On a TPU slice (not measured yet), GSM8K with the setting of RFT (arXiv 2308.01825):

  python -m experiments.train_sft --model=meta-llama/Llama-2-7b-hf --data=gsm8k:train \
    --prompt_template=alpaca --batch_size=128 --num_epochs=3 --learning_rate=2e-5 \
    --warmup_ratio=0.03 --max_length=512 --mesh=data:1,fsdp:-1 --remat=full \
    --output_dir=outputs/sft

Run it again with the same flags after it was stopped and it goes on from its last
checkpoint. --model of the other commands accepts --output_dir.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.data.prompts import TEMPLATES
from mrjax.data.sft import OVERLONG_POLICIES
from mrjax.models.decoder import REMAT_POLICIES
from mrjax.runs import cli, sft
from mrjax.training.optimizer import SCHEDULES

_D = sft.Config
_FLAGS = (
  flags.DEFINE_string(
    'model', None, 'Embedded name, HF directory, hub id or checkpoint.', required=True
  ),
  flags.DEFINE_string('tokenizer', _D.tokenizer, "Empty: the model's own."),
  flags.DEFINE_string(
    'data',
    None,
    'SFT records in JSON Lines (file, directory, glob), or problems as NAME:SPLIT.',
    required=True,
  ),
  flags.DEFINE_string('data_root', _D.data_root, 'Local copies of named data sets.'),
  flags.DEFINE_enum(
    'prompt_template',
    _D.prompt_template,
    TEMPLATES,
    'Layout put around prompts and completions; raw takes them as they stand.',
  ),
  flags.DEFINE_string('output_dir', None, 'Run directory.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_enum(
    'dtype',
    _D.dtype,
    ['auto', 'float32', 'bfloat16'],
    'Of the computation; auto is bfloat16 but on a CPU. Weights are float32.',
  ),
  flags.DEFINE_enum('remat', _D.remat, REMAT_POLICIES, 'Activations to recompute.'),
  flags.DEFINE_integer('seed', _D.seed, 'Of the data order.', lower_bound=0),
  flags.DEFINE_integer('max_length', _D.max_length, 'Longest text, tokens.'),
  flags.DEFINE_enum(
    'overlong', _D.overlong, OVERLONG_POLICIES, 'What happens to longer texts.'
  ),
  flags.DEFINE_integer('batch_size', _D.batch_size, 'Records an optimizer step.'),
  flags.DEFINE_integer('grad_accumulation', _D.grad_accumulation, 'Micro-batches.'),
  flags.DEFINE_float('num_epochs', _D.num_epochs, 'Passes over the data.'),
  flags.DEFINE_integer('num_steps', _D.num_steps, 'Steps; 0: --num_epochs decides.'),
  flags.DEFINE_float('learning_rate', _D.learning_rate, 'Peak.', lower_bound=0.0),
  flags.DEFINE_enum('schedule', _D.schedule, SCHEDULES, 'After the warm-up.'),
  flags.DEFINE_integer('warmup_steps', _D.warmup_steps, 'Steps of linear rise.'),
  flags.DEFINE_float(
    'warmup_ratio', _D.warmup_ratio, 'Share of steps, where warmup_steps is 0.'
  ),
  flags.DEFINE_float('final_lr_ratio', _D.final_lr_ratio, 'Last rate over the peak.'),
  flags.DEFINE_float('beta1', _D.beta1, 'AdamW.'),
  flags.DEFINE_float('beta2', _D.beta2, 'AdamW.'),
  flags.DEFINE_float('epsilon', _D.epsilon, 'AdamW.'),
  flags.DEFINE_float('weight_decay', _D.weight_decay, 'On matrices only.'),
  flags.DEFINE_float('clip_norm', _D.clip_norm, 'Global gradient norm; 0: off.'),
  flags.DEFINE_integer('save_every', _D.save_every, 'Steps; 0: at the end alone.'),
  flags.DEFINE_integer('keep_last', _D.keep_last, 'Checkpoints kept.', lower_bound=1),
  flags.DEFINE_integer('log_every', _D.log_every, 'Steps.'),
  flags.DEFINE_bool('tensorboard', _D.tensorboard, 'Also write TensorBoard files.'),
  flags.DEFINE_string('wandb_project', _D.wandb_project, 'Also log there.'),
  flags.DEFINE_string('profile_steps', _D.profile_steps, 'FIRST:LAST to trace.'),
  flags.DEFINE_bool('explain_sharding', False, 'Print where each weight lies.'),
  flags.DEFINE_bool('overwrite', False, 'Delete what --output_dir holds.'),
)


def describe(summary: dict[str, Any]) -> str:
  """What `sft.run` returns, in one line."""
  text = f'{summary["checkpoint"]}: {summary["steps"]:,} steps'
  if 'loss' not in summary:
    return f'{text}, done before'
  text += f' on {summary["num_records"]:,} records, last loss {summary["loss"]:.4f}'
  speed = summary['tokens_per_second']  # None after a single step
  return text if speed is None else f'{text}, {speed:,.0f} tokens/s'


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  print(describe(sft.run(sft.Config(**values))))


if __name__ == '__main__':
  cli.run(main)
