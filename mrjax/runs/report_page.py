"""Renders the report page from runs: tables here, charts and browser in its scripts."""

import base64
import datetime
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mrjax.runs.report_data import accuracy_by_k, bounds, embed_json, page_data
from mrjax.runs.report_inputs import KINDS, Run

GENERATOR = '<meta name="generator" content="mrjax report">'  # marks a page as ours

_FOLDER = Path(__file__).parent
_SCRIPTS = ('report_charts.js', 'report_browser.js')
_NUM_COLORS = 8  # of report.css
_ABOUT_LENGTH = 48  # characters of a model or data name in a table
_SAME_EVERYWHERE = ('output_dir', 'overwrite')  # say nothing about a run


def render_page(runs: Sequence[Run], *, title: str) -> str:
  """Returns the page as HTML that needs no other file; the same runs, the same bytes.

  Names and texts of the runs are escaped by jinja2, embedded data by `embed_json`, and
  a content security policy allows no script but the page's own.
  """
  css = (_FOLDER / 'report.css').read_text(encoding='utf-8')
  scripts = [(_FOLDER / name).read_text(encoding='utf-8') for name in _SCRIPTS]
  curves = {
    kind: [accuracy_by_k(run, kind) for run in runs] for kind in ('maj', 'pass')
  }
  has = {kind: any(len(curve) > 1 for curve in curves[kind]) for kind in curves}
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.FileSystemLoader(_FOLDER),
  )
  newest = max(run.modified for run in runs)
  date = datetime.datetime.fromtimestamp(newest, datetime.UTC)
  return environment.get_template('report.html').render(
    title=title,
    generator=Markup(GENERATOR),
    date=f'{date:%Y-%m-%d %H:%M} UTC',
    counts=_counts(runs),
    css=Markup(css),
    css_hash=_content_hash(css),
    scripts=[Markup(script) for script in scripts],
    script_hashes=[_content_hash(script) for script in scripts],
    data=Markup(embed_json(page_data(runs))),
    **_result_table(runs),
    notes=_notes(runs),
    has_curves=has['maj'] or has['pass'],
    has_maj=has['maj'],
    has_pass=has['pass'],
    has_lengths=any(run.samples.lengths for run in runs),
    has_losses=any(run.losses for run in runs),
    has_samples=any(run.samples.num_samples for run in runs),
    estimates=_estimates_table(runs),
    levels=_levels_table(runs),
    runs=[
      {
        'name': run.name,
        'color': i % _NUM_COLORS,
        'about': _about(run),
        'facts': _facts(run),
      }
      for i, run in enumerate(runs)
    ],
    settings=_settings_rows(runs),
  )


def _content_hash(text: str) -> str:
  """A source expression of a content security policy (CSP level 2)."""
  digest = hashlib.sha256(text.encode('utf-8')).digest()
  return Markup(f'sha256-{base64.b64encode(digest).decode("ascii")}')


def _counts(runs: Sequence[Run]) -> str:
  parts = [f'{len(runs)} run{"s" if len(runs) > 1 else ""}']
  if samples := sum(run.samples.num_samples for run in runs):
    sizes = {run.samples.num_questions for run in runs} - {0}
    many = 'up to ' if len(sizes) > 1 else ''
    parts += [f'{many}{max(sizes):,} questions each', f'{samples:,} samples']
  return ', '.join(parts)


def _notes(runs: Sequence[Run]) -> list[str]:
  names: dict[str, list[str]] = {}
  for run in runs:
    for note in run.notes:
      names.setdefault(note, []).append(run.name)
  lines = [
    f'{"All runs" if len(who) == len(runs) > 1 else ", ".join(who)}: {note}.'
    for note, who in names.items()
  ]
  if not any(run.metrics for run in runs):
    lines.insert(0, 'No run holds metrics.json or graded samples: no accuracies.')
  elif not any(len(accuracy_by_k(run, 'pass')) > 1 for run in runs):
    lines.append('One sample a question: no curve of accuracy against k.')
  if not any(run.losses for run in runs):
    lines.append('No run holds training metrics (metrics.jsonl): no loss curve.')
  if not any(run.samples.num_samples for run in runs):
    lines.append('No run holds samples: no browser.')
  elif not any(run.samples.lengths for run in runs):
    lines.append('The samples do not tell their length: no histogram.')
  return lines


def _result_table(runs: Sequence[Run]) -> dict[str, Any]:
  rated = [(i, run) for i, run in enumerate(runs) if run.metrics]
  largest = sorted(
    {
      max(k for k, *_ in curve)
      for _, run in rated
      if (curve := accuracy_by_k(run, 'pass'))
    }
  )
  columns = ['pass@1']
  for k in largest:
    names = [f'{kind}@{k}' for kind in ('maj', 'best_of', 'weighted_maj', 'pass')]
    columns += [n for n in names if k > 1 and any(n in run.metrics for _, run in rated)]
  shown = [run.metrics['pass@1'] for _, run in rated if 'pass@1' in run.metrics]
  low, high = _axis([bound for entry in shown for bound in bounds(entry)])
  rows = []
  for i, run in rated:
    metrics = run.metrics
    cells = [_cell(metrics.get(name), low, high) for name in columns]
    unanswered = None
    if metrics.get('num_samples') and metrics.get('num_unanswered') is not None:
      unanswered = metrics['num_unanswered'] / metrics['num_samples']
    rows.append(
      {
        'name': run.name,
        'color': i % _NUM_COLORS,
        'about': _about(run),
        'num_problems': _number(metrics.get('num_problems'), ','),
        'num_samples': _number(metrics.get('num_samples'), ','),
        'accuracies': cells,
        'mean_length': _number(metrics.get('mean_length'), ',.1f'),
        'truncation_rate': _number(metrics.get('truncation_rate'), '.1%'),
        'unanswered': _number(unanswered, '.1%'),
        'mean_kl': _number(metrics.get('mean_kl'), ',.3f'),
      }
    )
  return {
    'results': rows,
    'accuracy_columns': columns,
    'has_values': any('best_of' in name for name in columns),
    'has_kl': any('mean_kl' in run.metrics for _, run in rated),
    'axis': {'low': f'{low:.0%}', 'high': f'{high:.0%}'},
  }


def _axis(values: Sequence[float]) -> tuple[float, float]:
  """The tenths around all values."""
  low = int(10 * min(values, default=0.0)) / 10
  high = -int(-10 * max(values, default=1.0) // 1) / 10
  return low, max(high, low + 0.1)


def _cell(entry: Any, low: float = 0.0, high: float = 1.0) -> dict[str, str] | None:
  if entry is None:
    return None
  value, *interval = bounds(entry)
  x, x_low, x_high = (
    f'{100 * (bound - low) / (high - low):.2f}' for bound in (value, *interval)
  )
  text = f'[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]'
  return {
    'value': f'{value:.1%}',
    'interval': text if isinstance(entry, Mapping) else '',
    'x': x,
    'x_low': x_low,
    'x_high': x_high,
  }


def _number(value: Any, form: str) -> str:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return format(value, form) if is_number else '–'


def _estimates_table(runs: Sequence[Run]) -> dict[str, Any] | None:
  """Every accuracy at k, a row each, a column a run."""
  rated = [run for run in runs if run.metrics]
  names = [
    f'{kind}@{k}'
    for kind in KINDS
    for k in sorted({k for run in rated for k, *_ in accuracy_by_k(run, kind)})
  ]
  if not any(name.startswith('pass@') and name != 'pass@1' for name in names):
    return None
  rows = [
    {'label': name, 'cells': [_cell(run.metrics.get(name)) for run in rated]}
    for name in names
  ]
  return {'title': 'All k', 'names': [run.name for run in rated], 'rows': rows}


def _levels_table(runs: Sequence[Run]) -> dict[str, Any] | None:
  """pass@1 by level of difficulty, where the metrics tell it."""
  known = [
    (run.name, levels)
    for run in runs
    if isinstance(levels := run.metrics.get('by_level'), dict) and levels
  ]
  if not known:
    return None
  rows = [
    {
      'label': f'Level {level}',
      'cells': [_cell(levels.get(level, {}).get('pass@1')) for _, levels in known],
    }
    for level in sorted({level for _, levels in known for level in levels})
  ]
  return {'title': 'pass@1 by level', 'names': [n for n, _ in known], 'rows': rows}


def _about(run: Run) -> str:
  names = [str(run.settings.get(key) or '') for key in ('model', 'adapter', 'data')]
  short = [
    n if len(n) <= _ABOUT_LENGTH else f'…{n[-_ABOUT_LENGTH:]}' for n in names if n
  ]
  return ', '.join(short)


def _facts(run: Run) -> list[tuple[str, str]]:
  known = run.environment
  command, device = known.get('command'), known.get('device')
  if isinstance(command, list):
    command = shlex.join(map(str, command))
  if isinstance(device, dict):
    device = f'{device.get("count", "")} x {device.get("kind", "")}'
  versions = known.get('versions')
  if isinstance(versions, dict):
    versions = ', '.join(f'{k} {v}' for k, v in versions.items() if v is not None)
  facts = {
    'Directory': run.path,
    'Command': command,
    'Model': run.settings.get('model'),
    'Adapter': run.settings.get('adapter'),
    'Data': run.settings.get('data'),
    'Grading rule': run.metrics.get('rule'),
    'Device': device,
    'Packages': versions,
    'Git commit': known.get('git_commit'),
  }
  return [(label, str(value)) for label, value in facts.items() if value]


def _settings_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """One row a flag, those on which the runs differ first."""
  flags = {flag: None for run in runs for flag in run.settings}
  rows = []
  for flag in flags:
    if flag in _SAME_EVERYWHERE:
      continue
    values = [str(run.settings[flag]) if flag in run.settings else '–' for run in runs]
    rows.append({'flag': flag, 'values': values, 'differs': len(set(values)) > 1})
  return sorted(rows, key=lambda row: not row['differs'])
