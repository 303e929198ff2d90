r"""RFT: selects a model's own correct solutions as fine-tuning data.

Yuan et al. 2023, arXiv 2308.01825. Of the samples with the right answer whose
annotations all hold, one per distinct list of equations is kept; the human solution
of every problem goes first. With several sample sets the selection runs over all of
them (the paper's U13B and U33B).

  python -m experiments.rft.collect --problems=gsm8k:train --data_root=data \
    --samples=outputs/samples --output=outputs/rft.jsonl --stats=outputs/rft.json

The paper's numbers, for 100 samples a question of LLaMA-7B: 53.3 correct samples and
5.25 paths a question. They were not measured again here.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.data.prompts import TEMPLATES
from mrjax.grading.rules import RULES
from mrjax.methods.rft import DEDUPS
from mrjax.runs import cli, collect

_D = collect.Config
_FLAGS = (
  flags.DEFINE_string('problems', None, 'Problems, NAME:SPLIT.', required=True),
  flags.DEFINE_string(
    'samples',
    None,
    'Sample sets in order, comma-separated: directories, files or globs.',
    required=True,
  ),
  flags.DEFINE_string('output', None, 'SFT records, JSON Lines.', required=True),
  flags.DEFINE_string('stats', _D.stats, 'File for the statistics, JSON.'),
  flags.DEFINE_enum(
    'dedup',
    _D.dedup,
    DEDUPS,
    'One text per list of equations: the farthest from the other kept texts by edit '
    'distance, or the first; none keeps all correct samples.',
  ),
  flags.DEFINE_bool(
    'calculator_check',
    _D.calculator_check,
    'Refuse samples with a false <<a+b=c>>. On, except with --dedup=none.',
  ),
  flags.DEFINE_bool('include_human', _D.include_human, 'Human solutions go first.'),
  flags.DEFINE_enum('prompt_template', _D.prompt_template, TEMPLATES, 'Layout.'),
  flags.DEFINE_string('tokenizer', _D.tokenizer, 'For --prompt_template=chat.'),
  flags.DEFINE_enum('rule', _D.rule, list(RULES), 'What makes a sample correct.'),
  flags.DEFINE_string('data_root', _D.data_root, 'Local copies of named data sets.'),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace existing outputs.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = collect.run(collect.Config(**values))
  print(
    f'{summary["num_correct"]:,} of {summary["num_samples"]:,} samples correct, '
    f'{summary["num_false_annotations"]:,} of them with false annotations; kept '
    f'{summary["num_kept"]:,} for {summary["num_questions"]:,} questions '
    f'({summary["kept_per_question"]:.2f} each, '
    f'{summary["num_questions_unsolved"]:,} unsolved); wrote '
    f'{summary["num_records"]:,} records'
  )


if __name__ == '__main__':
  cli.run(main)
