"""Turns runs into the numbers and columns that the report page embeds."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from mrjax.runs.report_inputs import Run
from mrjax.runs.report_samples import Sample

_MAX_CURVE_POINTS = 1000  # more are not seen on a screen
_MAX_BARS = 40

# What could end a script element, or is no whitespace in JSON but was a line end in
# older scripts; lone surrogates have no UTF-8.
_UNSAFE = re.compile('[<>&\u2028\u2029\ud800-\udfff]')


def embed_json(value: Any) -> str:
  """Compact JSON that is safe inside `<script type="application/json">`.

  `<`, `>` and `&` become escapes, so no `</script>` or `<!--` can occur.
  """
  text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
  return _UNSAFE.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
  """Returns what the scripts of the page draw and search.

  `runs` has one entry a run: `name`, `losses` [[step, loss]], `accuracy`
  {'pass': [[k, value, low, high]], 'maj': ...}, `lengths` (bars, see
  `length_bars`) and `samples` in columns. Texts, answers, finish reasons and questions
  are stored once, and columns hold their places.
  """
  texts, answers, reasons = _Interned(), _Interned(), _Interned()
  questions = _Questions(runs)
  edges = bar_edges([length for run in runs for length, _, _ in run.samples.lengths])
  entries = []
  for run in runs:
    entries.append(
      {
        'name': run.name,
        'losses': thin(run.losses),
        'accuracy': {kind: accuracy_by_k(run, kind) for kind in ('pass', 'maj')},
        'lengths': length_bars(run.samples.lengths, edges),
        'samples': _columns(run, questions, texts, answers, reasons),
      }
    )
  return {
    'runs': entries,
    'edges': edges,
    'questions': questions.columns(),
    'texts': texts.values,
    'answers': answers.values,
    'reasons': reasons.values,
    'value_range': _value_range(runs),
  }


def bounds(entry: Any) -> tuple[float, float, float]:
  """(value, low, high) of an estimate of `metrics.json`; the bounds may lack there."""
  if not isinstance(entry, dict):
    return entry, entry, entry
  value: float = entry['value']
  return value, entry.get('low', value), entry.get('high', value)


def accuracy_by_k(run: Run, kind: str) -> list[tuple[int, float, float, float]]:
  """(k, value, low, high) by k, of one of `report_inputs.KINDS`."""
  return sorted(
    (int(name.partition('@')[2]), *bounds(entry))
    for name, entry in run.metrics.items()
    if name.startswith(f'{kind}@')
  )


def thin(losses: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
  """At most 1,000 points, each the mean of neighbours, at the last of their steps."""
  width = -(-len(losses) // _MAX_CURVE_POINTS)
  points = []
  for start in range(0, len(losses), max(width, 1)):
    group = losses[start : start + width]
    known = [loss for _, loss in group if loss is not None]
    mean = round(sum(known) / len(known), 6) if known else None
    points.append((group[-1][0], mean))
  return points


def bar_edges(lengths: Sequence[int]) -> list[int]:
  """Left edges of bars of one round width from 0, and the last right edge."""
  if not lengths:
    return []
  widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
  top = max(lengths)
  width = next(width for width in widths if top < width * _MAX_BARS)
  return list(range(0, top + width + 1, width))


def length_bars(
  lengths: Sequence[tuple[int, bool | None, bool]], edges: Sequence[int]
) -> dict[str, Any]:
  """Samples in each bar: `right`, `wrong`, `ungraded`, and `cut`, a part of these.

  With the `mean` length; empty without lengths.
  """
  if not lengths:
    return {}
  bars: dict[str, Any] = {
    name: [0] * (len(edges) - 1) for name in ('right', 'wrong', 'ungraded', 'cut')
  }
  bars['mean'] = sum(length for length, _, _ in lengths) / len(lengths)
  names = {True: 'right', False: 'wrong', None: 'ungraded'}
  for length, correct, cut in lengths:
    place = length // (edges[1] - edges[0])
    bars[names[correct]][place] += 1
    bars['cut'][place] += cut
  return bars


class _Interned:
  """Values stored once, known by their place."""

  def __init__(self) -> None:
    self._places: dict[Any, int] = {}

  @property
  def values(self) -> list[Any]:
    return list(self._places)

  def place(self, value: Any) -> int:
    """-1 for None."""
    return -1 if value is None else self._places.setdefault(value, len(self._places))


@dataclasses.dataclass(frozen=True)
class _Question:
  id: str
  text: str | None
  gold: str | None
  options: tuple[str, ...] | None


class _Questions(_Interned):
  """Questions of all runs. The same id with another text or gold is another question.

  A run that does not tell the text takes it from one that does.
  """

  def __init__(self, runs: Sequence[Run]) -> None:
    super().__init__()
    self._texts: dict[str, str] = {}
    self._golds: dict[str, str] = {}
    for run in runs:
      for key, samples in run.samples.by_problem.items():
        for sample in samples[:1]:
          if sample.question is not None:
            self._texts.setdefault(key, sample.question)
          if sample.gold is not None:
            self._golds.setdefault(key, sample.gold)

  def of(self, key: str, sample: Sample) -> int:
    text = self._texts.get(key) if sample.question is None else sample.question
    gold = self._golds.get(key) if sample.gold is None else sample.gold
    return self.place(_Question(key, text, gold, sample.options))

  def columns(self) -> dict[str, list[Any]]:
    return {
      'id': [question.id for question in self.values],
      'text': [question.text for question in self.values],
      'gold': [question.gold for question in self.values],
      'options': [question.options for question in self.values],
    }


def _natural(key: str) -> list[tuple[int, str]]:
  """Sorts `p-2` before `p-10`: samples are written in the order they were finished."""
  parts = re.split('([0-9]+)', key)
  return [(int(p), '') if p.isdecimal() and p.isascii() else (-1, p) for p in parts]


def _columns(
  run: Run,
  questions: _Questions,
  texts: _Interned,
  answers: _Interned,
  reasons: _Interned,
) -> dict[str, Any]:
  """One value a sample, but `question` and `count`, which have one a question."""
  groups = sorted(run.samples.by_problem.items(), key=lambda item: _natural(item[0]))
  if not groups:
    return {}
  samples = [sample for _, group in groups for sample in group]
  marks = {True: 'r', False: 'w', None: 'u'}
  return {
    'question': [questions.of(key, group[0]) for key, group in groups],
    'count': [len(group) for _, group in groups],
    'index': [sample.index for sample in samples],
    'text': [texts.place(sample.text) for sample in samples],
    'answer': [answers.place(sample.extracted) for sample in samples],
    'mark': ''.join(marks[sample.correct] for sample in samples),
    'tokens': [sample.num_tokens for sample in samples],
    'reason': [reasons.place(sample.finish_reason) for sample in samples],
    'logprob': [_rounded(sample.logprob_sum, 2) for sample in samples],
    'value': _where_any([_rounded(sample.value, 3) for sample in samples]),
    'kl': _where_any([_rounded(sample.kl_sum, 3) for sample in samples]),
    # By the place of the sample: most have none.
    'heats': {
      i: {
        'widths': sample.token_widths,
        'values': [_rounded(value, 3) for value in sample.token_values],
      }
      for i, sample in enumerate(samples)
      if sample.token_values and sample.token_widths
    },
  }


def _rounded(number: float | None, digits: int) -> float | None:
  return None if number is None else round(number, digits)


def _where_any(values: list[float | None]) -> list[float | None] | None:
  """The values; None where all are None, so that they take no place."""
  return None if all(value is None for value in values) else values


def _value_range(runs: Sequence[Run]) -> tuple[float, float]:
  """What the colours of values span: 0 to 1, and further where values are."""
  values = [
    value
    for run in runs
    for samples in run.samples.by_problem.values()
    for sample in samples
    for value in sample.token_values or ()
    if value is not None
  ]
  return round(min([0.0, *values]), 3), round(max([1.0, *values]), 3)
