r"""Evaluates a model on a problem set: samples, grades, and sums up with intervals.

Greedy unless --temperature and --num_samples say otherwise. On a laptop, with the
embedded model and problems:

  python -m experiments.evaluate --model=tiny-1m --data='arithmetic:test?size=200' \
    --prompt_template=qa --output_dir=outputs/evaluation

On a TPU VM (not measured yet), GSM8K with eight samples a problem and majority votes:

  python -m experiments.evaluate --model=meta-llama/Llama-3.2-1B-Instruct \
    --data=gsm8k:test --prompt_template=chat --rule=gsm8k --num_samples=8 \
    --temperature=0.7 --max_new_tokens=512 --output_dir=outputs/evaluation

--adapter=outputs/lora evaluates the model with an adapter on it. Run it again with the
same flags after it was stopped, and it goes on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import sample as sample_binary
from mrjax.grading.rules import RULES
from mrjax.grading.tally import format_summary
from mrjax.grading.votes import VOTES
from mrjax.runs import cli, evaluate

_D = evaluate.Config
flags.adopt_module_key_flags(sample_binary)
flags.FLAGS.set_default('temperature', _D.temperature)
flags.DEFINE_enum(
  'rule',
  _D.rule,
  ['', *RULES],
  "Grading rule; empty takes the one for the data's form of answers.",
)
flags.DEFINE_enum(
  'vote',
  _D.vote,
  ['', *VOTES],
  'For maj@k: string_first (a tie goes to the first answer) or equivalence (equal '
  'answers vote together, a tie is drawn by --seed).',
)
flags.DEFINE_string(
  'value_model',
  _D.value_model,
  'Run of train_value, for best_of@k and, with --vote, weighted_maj@k (Q#-RM).',
)


def main(argv: Sequence[str]) -> None:
  del argv
  names = [field.name for field in dataclasses.fields(evaluate.Config)]
  values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
  values['stop'] = sample_binary.parse_stops(values['stop'])
  if summary := evaluate.run(evaluate.Config(**values)):
    print(f'{values["data"]} by {summary["rule"]}: {format_summary(summary)}')


if __name__ == '__main__':
  cli.run(main)
