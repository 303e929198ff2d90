"""The flags that all training commands share."""

from collections.abc import Iterable
from typing import Any

from absl import flags

from mrjax.data.prompts import TEMPLATES
from mrjax.data.sft import OVERLONG_POLICIES
from mrjax.lora.adapters import PRESETS
from mrjax.models.attention import BACKENDS
from mrjax.models.quantized import KINDS
from mrjax.models.remat import POLICIES as REMAT_POLICIES
from mrjax.runs import dry_run
from mrjax.runs.training_config import Config
from mrjax.training.optimizer import SCHEDULES


def define(defaults: type[Config], *, data: str) -> Iterable[flags.FlagHolder[Any]]:
  """Defines the flags of `training_config.Config`.

  For --help, call `flags.adopt_module_key_flags` with this module afterwards.

  Args:
    defaults: The configuration whose defaults they get.
    data: What --data reads, for --help.
  """
  d = defaults
  return (
    flags.DEFINE_string(
      'model', None, 'Embedded name, HF directory, hub id or checkpoint.', required=True
    ),
    flags.DEFINE_string('tokenizer', d.tokenizer, "Empty: the model's own."),
    flags.DEFINE_string('data', None, data, required=True),
    flags.DEFINE_string('data_root', d.data_root, 'Local copies of named data sets.'),
    flags.DEFINE_enum(
      'prompt_template',
      d.prompt_template,
      TEMPLATES,
      'Layout put around prompts and completions; raw takes them as they stand.',
    ),
    flags.DEFINE_string('output_dir', None, 'Run directory.', required=True),
    flags.DEFINE_string('mesh', d.mesh, 'Axis sizes; -1 takes the rest.'),
    flags.DEFINE_enum(
      'dtype',
      d.dtype,
      ['auto', 'float32', 'bfloat16'],
      'Of the computation; auto is bfloat16 but on a CPU. What trains is float32.',
    ),
    flags.DEFINE_enum(
      'remat', d.remat, REMAT_POLICIES, 'What a layer keeps for its backward pass.'
    ),
    flags.DEFINE_enum(
      'attention_backend',
      d.attention_backend,
      BACKENDS,
      'auto: splash on TPUs, cudnn on GPUs, blocks on CPUs, and reference for rows of '
      'up to 128 tokens.',
    ),
    flags.DEFINE_integer(
      'loss_chunk',
      d.loss_chunk,
      'Tokens that go through the head together; 0: as many as is fast.',
      lower_bound=0,
    ),
    flags.DEFINE_integer(
      'seed', d.seed, 'Of the data order, a fresh adapter and dropout.', lower_bound=0
    ),
    flags.DEFINE_string(
      'trainable',
      d.trainable,
      'What trains: all, lora, head, norms, embeddings, last_layers:K, or '
      'regex:PATTERN[;PATTERN...] on parameter paths. Empty: the adapter, or all where '
      'there is none.',
    ),
    flags.DEFINE_string(
      'adapter', d.adapter, 'Adapter that trains on: PEFT directory, mrjax one or run.'
    ),
    flags.DEFINE_integer('lora_rank', d.lora_rank, 'Of a new adapter; 0: none.'),
    flags.DEFINE_float('lora_alpha', d.lora_alpha, 'Scale is alpha / rank.'),
    flags.DEFINE_float(
      'lora_dropout',
      d.lora_dropout,
      "Share of adapter inputs; default 0, or the adapter's own.",
    ),
    flags.DEFINE_bool('lora_rslora', d.lora_rslora, 'Scale is alpha / sqrt(rank).'),
    flags.DEFINE_string(
      'lora_targets',
      d.lora_targets,
      f'Kernels with an adapter: {", ".join(PRESETS)}, or patterns with commas.',
    ),
    flags.DEFINE_float(
      'lora_plus_ratio', d.lora_plus_ratio, 'Learning rate of lora_b over lora_a.'
    ),
    flags.DEFINE_enum(
      'quantize', d.quantize, ['', *KINDS], 'How the frozen kernels are held (QLoRA).'
    ),
    flags.DEFINE_integer('max_length', d.max_length, 'Longest text, tokens.'),
    flags.DEFINE_enum(
      'overlong', d.overlong, OVERLONG_POLICIES, 'What happens to longer texts.'
    ),
    flags.DEFINE_bool('packing', d.packing, 'Several records a row.'),
    flags.DEFINE_integer(
      'batch_size',
      d.batch_size,
      'Rows an optimizer step; without --packing, records. The log says how many '
      'records a packed batch holds.',
    ),
    flags.DEFINE_integer('grad_accumulation', d.grad_accumulation, 'Micro-batches.'),
    flags.DEFINE_float('num_epochs', d.num_epochs, 'Passes over the data.'),
    flags.DEFINE_integer('num_steps', d.num_steps, 'Steps; 0: --num_epochs decides.'),
    flags.DEFINE_float('learning_rate', d.learning_rate, 'Peak.', lower_bound=0.0),
    flags.DEFINE_enum('schedule', d.schedule, SCHEDULES, 'After the warm-up.'),
    flags.DEFINE_integer('warmup_steps', d.warmup_steps, 'Steps of linear rise.'),
    flags.DEFINE_float(
      'warmup_ratio', d.warmup_ratio, 'Share of steps, where warmup_steps is 0.'
    ),
    flags.DEFINE_float('final_lr_ratio', d.final_lr_ratio, 'Last rate over the peak.'),
    flags.DEFINE_float('beta1', d.beta1, 'AdamW.'),
    flags.DEFINE_float('beta2', d.beta2, 'AdamW.'),
    flags.DEFINE_float('epsilon', d.epsilon, 'AdamW.'),
    flags.DEFINE_float('weight_decay', d.weight_decay, 'On matrices only.'),
    flags.DEFINE_float(
      'clip_norm', d.clip_norm, 'Global norm; 0: off. Value models: 5 for V, off for Q.'
    ),
    flags.DEFINE_string('eval_data', d.eval_data, 'Like --data; empty: no evaluation.'),
    flags.DEFINE_integer(
      'eval_every', d.eval_every, 'Steps; 0: before each checkpoint.', lower_bound=0
    ),
    flags.DEFINE_integer(
      'save_every', d.save_every, 'Steps; 0: at the end alone.', lower_bound=0
    ),
    flags.DEFINE_integer(
      'keep_last',
      d.keep_last,
      'Checkpoints kept, beside the one of least evaluation loss.',
      lower_bound=1,
    ),
    flags.DEFINE_integer(
      'keep_every', d.keep_every, 'Keep multiples of so many steps too.', lower_bound=0
    ),
    flags.DEFINE_integer(
      'resume_step',
      d.resume_step,
      'Checkpoint to go on from; later ones are set aside, once. 0: the last.',
      lower_bound=0,
    ),
    flags.DEFINE_integer('log_every', d.log_every, 'Steps.'),
    flags.DEFINE_bool('tensorboard', d.tensorboard, 'Also write TensorBoard files.'),
    flags.DEFINE_string('wandb_project', d.wandb_project, 'Also log there.'),
    flags.DEFINE_string('profile_steps', d.profile_steps, 'FIRST:LAST to trace.'),
    flags.DEFINE_bool('explain_sharding', False, 'Print where each weight lies.'),
    flags.DEFINE_bool(
      'dry_run', False, 'Compile, print the memory plan, load and write nothing.'
    ),
    flags.DEFINE_bool(
      'overwrite', False, 'Delete what --output_dir holds and begin anew.'
    ),
  )


def describe(summary: dict[str, Any]) -> str:
  """What a run ends with, in a line or, after a dry run, a table."""
  if 'compile_seconds' in summary:
    return dry_run.describe(summary)
  text = f'{summary["checkpoint"]}: {summary["steps"]:,} steps'
  if 'loss' not in summary:
    return f'{text}, done before'
  text += f' on {summary["num_records"]:,} records, last loss {summary["loss"]:.4f}'
  if summary['tokens_per_second'] is not None:  # None after a single step
    text += f', {summary["tokens_per_second"]:,.0f} tokens/s'
  if summary['best']:
    text += f', evaluation loss {summary["best"]["loss"]:.4f} at step '
    text += f'{summary["best"]["step"]:,}'
  if summary['stopped']:
    text += '. Stopped by SIGTERM: run the same command to go on.'
  return text
