r"""Preference optimisation of a Llama-family model: DPO, ORPO, IPO, SimPO or KTO.

Records are TRL's: `prompt`, `chosen` and `rejected` (strings or messages); for KTO
`prompt`, `completion` and `label`, or pairs. On a laptop, with an adapter, whose
reference is the same model with the adapter off:

  python -m experiments.train_preference --loss=dpo --model=outputs/sft --lora_rank=16 \
    --data=pairs.jsonl --eval_data=held_out.jsonl --prompt_template=qa \
    --output_dir=outputs/dpo

All weights, with log-probabilities of the reference computed once beforehand:

  python -m experiments.train_preference --loss=dpo --model=outputs/sft \
    --data=pairs.jsonl --learning_rate=1e-6 --output_dir=outputs/dpo

Weak-to-strong reasoning (arXiv 2407.13647, second stage; not measured yet), by the
defaults of the tool its authors used:

  python -m experiments.train_preference --loss=orpo --model=outputs/stage1 \
    --lora_rank=8 --lora_alpha=16 --data=pairs.jsonl --max_length=1024 \
    --learning_rate=1e-5 --warmup_steps=20 --mesh=data:1,fsdp:-1 --remat=full \
    --output_dir=outputs/stage2

Run it again with the same flags after it was stopped and it goes on from its last
checkpoint.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import training_flags
from mrjax.data.preference_encoding import EQUAL_POLICIES
from mrjax.runs import cli, preference
from mrjax.runs.preference_losses import LOSSES

_D = preference.Config
_FLAGS = (
  *training_flags.define(
    _D, data='Preference records in JSON Lines (file, directory, glob).'
  ),
  flags.DEFINE_enum('loss', _D.loss, list(LOSSES), 'What is minimised.'),
  flags.DEFINE_float(
    'beta',
    _D.beta,
    'Pull towards the reference (dpo, ipo, kto), weight of the odds term (orpo), or '
    'scale of the rewards (simpo, whose paper has 2 to 2.5).',
  ),
  flags.DEFINE_float(
    'label_smoothing', _D.label_smoothing, 'dpo: share of labels taken to be wrong.'
  ),
  flags.DEFINE_float(
    'sft_weight', _D.sft_weight, "dpo: weight of the chosen completions' own loss."
  ),
  flags.DEFINE_float('gamma', _D.gamma, 'simpo: margin between the rewards.'),
  flags.DEFINE_float(
    'desirable_weight', _D.desirable_weight, 'kto: weight of desirable completions.'
  ),
  flags.DEFINE_float(
    'undesirable_weight', _D.undesirable_weight, 'kto: weight of the others.'
  ),
  flags.DEFINE_enum(
    'reference',
    _D.reference,
    preference.REFERENCES,
    'Where the log-probabilities of the reference come from: the model without its '
    'adapter, a second model in memory, or computed once and kept in --output_dir. '
    'auto: the first, where a new adapter trains and no --reference_model is given, '
    'else the last.',
  ),
  flags.DEFINE_string(
    'reference_model',
    _D.reference_model,
    'Empty: --model, with --adapter, as it is before it trains.',
  ),
  flags.DEFINE_enum(
    'equal_pairs',
    _D.equal_pairs,
    EQUAL_POLICIES,
    'What happens to pairs whose chosen and rejected are the same.',
  ),
)

flags.adopt_module_key_flags(training_flags)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  print(training_flags.describe(preference.run(preference.Config(**values))))


if __name__ == '__main__':
  cli.run(main)
