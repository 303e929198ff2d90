r"""Writes one HTML page about runs; it needs no network and no other file.

Result table with intervals, accuracy against k, lengths, loss curves, and a browser of
questions and samples, from whatever the run directories hold (`metrics.json`,
`graded*.jsonl` or `samples*.jsonl`, `metrics.jsonl`, `config.json`):

  python -m experiments.report --output=report.html \
    --runs=before=outputs/before,sft=outputs/sft,after=outputs/after
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, report

_D = report.Config
_FLAGS: tuple[flags.FlagHolder[Any], ...] = (
  flags.DEFINE_string(
    'runs', None, 'Run directories: NAME=DIR,NAME=DIR or DIR,DIR.', required=True
  ),
  flags.DEFINE_string(
    'output', _D.output, 'The page, HTML; an older report is replaced.'
  ),
  flags.DEFINE_string('title', _D.title, 'Heading of the page.'),
  flags.DEFINE_integer(
    'max_samples',
    _D.max_samples,
    'Samples of one run in the browser, those of its first questions; tables and '
    'charts cover all.',
    lower_bound=1,
  ),
)


def main(argv: Sequence[str]) -> None:
  del argv
  summary = report.run(report.Config(**{flag.name: flag.value for flag in _FLAGS}))
  print(
    f'{summary["output"]}: {summary["num_runs"]} runs, {summary["num_samples"]:,} '
    f'samples, {summary["num_bytes"] / 1e6:.1f} MB'
  )


if __name__ == '__main__':
  cli.run(main)
