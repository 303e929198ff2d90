r"""Grades samples by a named rule; streams, so any number of records will do.

Every input record carries `text` and `gold` (a bare answer or a whole solution); for
the rules choice and lema_csqa also `options`. The output holds the same records with
`extracted` and `correct`. Samples without `gold` are graded with --problems:

  python -m experiments.grade --rule=gsm8k --input=outputs/samples \
    --problems=gsm8k:test --output=outputs/graded.jsonl --vote=string_first \
    --metrics=outputs/metrics.json
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.grading.rules import RULES
from mrjax.grading.tally import format_summary
from mrjax.grading.votes import VOTES
from mrjax.runs import cli, grade

_D = grade.Config
_FLAGS = (
  flags.DEFINE_enum('rule', None, list(RULES), 'Grading rule.', required=True),
  flags.DEFINE_string(
    'input', None, 'Directory of sample shards, file or glob.', required=True
  ),
  flags.DEFINE_string('output', None, 'Graded records, JSON Lines.', required=True),
  flags.DEFINE_string('metrics', _D.metrics, 'File for the summary, JSON.'),
  flags.DEFINE_enum(
    'vote',
    _D.vote,
    ['', *VOTES],
    'Majority vote to report: string_first (RFT: raw strings, a tie goes to the first) '
    'or equivalence (Q#: classes under the rule, a tie is drawn by --seed).',
  ),
  flags.DEFINE_string(
    'problems', _D.problems, 'Problems with the golds of records without, NAME:SPLIT.'
  ),
  flags.DEFINE_string('data_root', _D.data_root, 'Local copies of named data sets.'),
  flags.DEFINE_integer('seed', _D.seed, 'Of bootstrap and drawn ties.', lower_bound=0),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace existing outputs.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  config = grade.Config(**values)
  print(f'{config.rule}: {format_summary(grade.run(config))}')


if __name__ == '__main__':
  cli.run(main)
