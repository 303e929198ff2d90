"""Reads what a run directory holds, for the report."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrjax.records import DataError, read_numbered
from mrjax.runs.report_samples import SampleSet, read_samples

# Kinds of accuracy: `maj@8` is one of the kind 'maj'.
KINDS = ('pass', 'maj', 'best_of', 'weighted_maj')


@dataclasses.dataclass
class Run:
  """One run directory. What it does not hold is empty."""

  name: str
  path: Path
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  """The flags: `config` of config.json."""
  environment: dict[str, Any] = dataclasses.field(default_factory=dict)
  """The rest of config.json: command, versions, git commit, device."""
  losses: list[tuple[int, float | None]] = dataclasses.field(default_factory=list)
  """(step, loss) by step; None where the loss is not finite."""
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  """As `Tally.summary` gives it."""
  samples: SampleSet = dataclasses.field(default_factory=SampleSet)
  notes: list[str] = dataclasses.field(default_factory=list)
  """What a reader of the page should know."""
  modified: float = 0.0
  """When the newest file read was last written, seconds since 1970."""


def read_run(name: str, path: Path, *, max_samples: int) -> Run:
  """Reads `config.json`, `metrics.jsonl`, `metrics.json` and the samples of a run.

  Graded samples without a `metrics.json` are summed up here.

  Args:
    name: Shown on the page.
    path: The run directory.
    max_samples: See `read_samples`.

  Raises:
    FileNotFoundError: No such directory, or nothing in it to report.
    DataError: A damaged file, by name and line.
    ValueError: Shards of samples are missing.
  """
  if not path.is_dir():
    what = 'is a file, not a directory' if path.exists() else 'does not exist'
    raise FileNotFoundError(
      f'run {name!r}: {path} {what}; --runs wants run directories, as in '
      '--runs=before=outputs/before,after=outputs/after'
    )
  run = Run(name, path)
  _read_config(run)
  _read_losses(run)
  _read_metrics(run)
  run.samples = read_samples(path, run.settings, max_samples=max_samples)
  run.notes += run.samples.notes
  run.modified = max(run.modified, run.samples.modified)
  if run.samples.metrics and not run.metrics:
    run.metrics = run.samples.metrics
    run.notes.append(
      'no metrics.json; the numbers were computed here from the graded samples, votes '
      'by string_first'
    )
  if not (run.losses or run.metrics or run.samples.num_samples):
    raise FileNotFoundError(
      f'run {name!r}: {path} holds nothing to report: no loss in metrics.jsonl, no '
      'metrics.json, no graded*.jsonl, no samples*.jsonl'
    )
  return run


def _open(run: Run, name: str) -> Path | None:
  """The file of a run, whose time of writing then counts, or None without it."""
  path = run.path / name
  if not path.is_file():
    return None
  run.modified = max(run.modified, path.stat().st_mtime)
  return path


def _read_object(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes().decode('utf-8'))
  except UnicodeDecodeError as error:
    raise DataError(path, 1, f'not UTF-8 ({error})') from None
  except json.JSONDecodeError as error:
    message = f'not valid JSON ({error.msg} at column {error.colno})'
    raise DataError(path, error.lineno, message) from None
  if not isinstance(value, dict):
    raise DataError(path, 1, f'want a JSON object, found {type(value).__name__}')
  return value


def _read_config(run: Run) -> None:
  if not (path := _open(run, 'config.json')):
    run.notes.append('no config.json, so the flags are not known')
    return
  run.environment = _read_object(path)
  settings = run.environment.pop('config', {})
  if not isinstance(settings, dict):
    raise DataError(path, 1, "field 'config' must be an object of flags")
  run.settings = settings


def _read_losses(run: Run) -> None:
  path = _open(run, 'metrics.jsonl')
  if not path or not path.stat().st_size:
    return
  losses: dict[int, float | None] = {}
  for line, record in read_numbered(path):
    step, loss = record.get('step'), record.get('loss')
    if loss is None:
      continue
    if not _is_number(loss) or not isinstance(step, int) or isinstance(step, bool):
      raise DataError(
        path, line, f'want numbers, got step {step!r:.40} and loss {loss!r:.40}'
      )
    # A resumed run may log a step again: the last line counts.
    losses[step] = float(loss) if math.isfinite(loss) else None
  run.losses = sorted(losses.items(), key=lambda item: item[0])


def _read_metrics(run: Run) -> None:
  if not (path := _open(run, 'metrics.json')):
    return
  metrics = _read_object(path)
  by_level = metrics.get('by_level', {})
  if not isinstance(by_level, dict) or not all(
    isinstance(values, dict) for values in by_level.values()
  ):
    raise DataError(path, 1, f"'by_level' is {by_level!r:.80}, want objects by level")
  for values in (metrics, *by_level.values()):
    for name, entry in values.items():
      if name.partition('@')[0] in KINDS and '@' in name:
        _check_estimate(path, name, entry)
  for name in ('num_timeouts', 'num_crashes'):
    if metrics.get(name):
      run.notes.append(
        f'{name} of the grading is {metrics[name]}; these count as wrong'
      )
  if not _is_number(metrics.get('mean_kl', 0.0)):
    raise DataError(path, 1, f"'mean_kl' is {metrics['mean_kl']!r:.80}, want a number")
  run.metrics = metrics


def _check_estimate(path: Path, name: str, entry: Any) -> None:
  parts = entry if isinstance(entry, Mapping) else {'value': entry}
  numbers = [parts.get('value'), parts.get('low', 0.0), parts.get('high', 0.0)]
  is_share = all(_is_number(number) and 0 <= number <= 1 for number in numbers)
  if not name.partition('@')[2].isdigit() or not is_share:
    raise DataError(
      path, 1, f'{name!r} is {entry!r:.80}, want {{"value", "low", "high"}} in [0, 1]'
    )


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
