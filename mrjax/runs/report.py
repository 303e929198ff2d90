"""Writes a page about runs: results, curves, and a browser of questions and samples."""

import dataclasses
from pathlib import Path
from typing import Any

from mrjax.records import replace_atomically
from mrjax.runs.common import OutputError, make_folder
from mrjax.runs.report_inputs import read_run
from mrjax.runs.report_page import GENERATOR, render_page


@dataclasses.dataclass(frozen=True)
class Config:
  """One report.

  Raises:
    ValueError: No runs, or a field out of its range.
  """

  runs: str  # run directories, 'NAME=DIR,NAME=DIR' or 'DIR,DIR'
  output: str = 'report.html'  # the page
  title: str = 'mrjax report'
  max_samples: int = 20_000  # of one run, in the browser

  def __post_init__(self) -> None:
    parse_runs(self.runs)
    if not self.output:
      raise ValueError('--output is empty; name the HTML file')
    if self.max_samples < 1:
      raise ValueError(f'--max_samples={self.max_samples}: want at least 1')


def parse_runs(spec: str) -> dict[str, Path]:
  """Returns run directories by name; without a name it is the directory's own.

  Raises:
    ValueError: No run, an empty part, or a name twice.
  """
  runs: dict[str, Path] = {}
  for part in spec.split(',') if spec.strip() else []:
    part = part.strip()
    name, equals, path = part.partition('=')
    if not equals or Path(part).is_dir():  # a directory's name may hold '='
      name, path = Path(part).resolve().name, part
    name, path = name.strip(), path.strip()
    if not part or not name or not path:
      raise ValueError(f'--runs={spec!r}: {part!r} is not NAME=DIR or DIR')
    if name in runs:
      raise ValueError(
        f'--runs={spec!r}: two runs are named {name!r} ({runs[name]} and {path}); '
        'give them names, as in --runs=before=DIR,after=DIR'
      )
    runs[name] = Path(path)
  if not runs:
    raise ValueError('--runs is empty; name run directories, NAME=DIR,NAME=DIR')
  return runs


def run(config: Config) -> dict[str, Any]:
  """Reads the runs and writes the page, atomically; an older report is replaced.

  Returns:
    `output` (its path), `num_runs`, `num_samples`, `num_bytes` of the page.

  Raises:
    FileNotFoundError: A run directory is missing or holds nothing to report.
    DataError: A damaged file of a run, by name and line.
    OutputError: The output is a directory, a file that is no report, or in a folder
      that cannot be made.
  """
  output = Path(config.output)
  if output.is_dir():
    raise OutputError(f'{output} is a directory; --output is one HTML file')
  if output.exists() and not _is_report(output):
    raise OutputError(
      f'{output} exists and is no report of mrjax: not replaced. Choose another '
      '--output.'
    )
  paths = parse_runs(config.runs)
  runs = [
    read_run(name, path, max_samples=config.max_samples) for name, path in paths.items()
  ]
  make_folder(output.parent, output=output)
  # A flag with half a surrogate pair has no UTF-8; embedded data are escaped already.
  page = render_page(runs, title=config.title).encode('utf-8', errors='replace')
  with replace_atomically(output) as file:
    file.write(page)
  return {
    'output': str(output),
    'num_runs': len(runs),
    'num_samples': sum(run.samples.num_samples for run in runs),
    'num_bytes': len(page),
  }


def _is_report(path: Path) -> bool:
  with path.open('rb') as file:
    return GENERATOR.encode() in file.read(1024)
