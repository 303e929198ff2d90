"""Reads the samples of a run directory, for the report."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrjax.data.problems import load_problems
from mrjax.grading.tally import Tally
from mrjax.records import DataError, Problem, Record, expand_inputs, read_numbered
from mrjax.runs.report_tokens import TokenWidths


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
  """One sample; None where neither its record nor its problem tells."""

  index: int
  text: str
  extracted: str | None
  correct: bool | None
  gold: str | None
  question: str | None
  options: tuple[str, ...] | None
  num_tokens: int | None
  finish_reason: str | None
  logprob_sum: float | None
  value: float | None = None
  """By a value model, of the whole sample."""
  kl_sum: float | None = None
  token_values: tuple[float | None, ...] | None = None
  token_widths: tuple[int, ...] | None = None
  """Characters of `text` that each token adds; see `TokenWidths.of`."""


@dataclasses.dataclass
class SampleSet:
  """The samples of one run; without any, all is empty."""

  by_problem: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)
  """Those of the first problems, with their texts; each list by sample index."""
  lengths: list[tuple[int, bool | None, bool]] = dataclasses.field(default_factory=list)
  """(tokens, correct, cut at the limit) of every sample with a length."""
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  """`Tally.summary` of the graded samples, votes by string_first."""
  num_samples: int = 0
  num_questions: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)
  """What a reader of the page should know."""
  modified: float = 0.0
  """When the newest file was last written, seconds since 1970."""


def read_samples(
  directory: Path, settings: Mapping[str, Any], *, max_samples: int
) -> SampleSet:
  """Reads `graded*.jsonl`, else `samples*.jsonl`, of a run directory.

  The text of a question is that of its record (`question`), of `problems.jsonl` beside
  it, or of the problems that the flags of the run name; else the `prompt`.

  Args:
    directory: The run directory.
    settings: The flags of the run: `data`, `data_root`, `limit`.
    max_samples: Samples kept with their texts; of a problem, all or none are kept.

  Raises:
    DataError: A bad record, by file and line.
    ValueError: Shards of a set are missing.
  """
  result = SampleSet()
  patterns = [p for p in ('graded*.jsonl', 'samples*.jsonl') if any(directory.glob(p))]
  if not patterns:
    return result
  paths = expand_inputs(directory, pattern=patterns[0])
  result.modified = max(path.stat().st_mtime for path in paths)
  tally = Tally('string_first', is_equal=str.__eq__)
  seen: dict[str, set[int]] = {}
  num_kept = num_graded = 0
  records = _records(paths)
  first = next(records)
  problems = _problems(directory, settings, first[2], result)
  heats = _Heats(settings)
  for path, line, record in itertools.chain([first], records):
    # A record without an id stands for a question of its own.
    key = record.get('problem_id')
    key = f'{path.name}:{line}' if key is None else str(key)
    indices = seen.setdefault(key, set())
    sample = _parse(record, path, line, problems.get(key), len(indices))
    if sample.index in indices:
      raise DataError(
        path, line, f'problem {key!r} has sample_index {sample.index} a second time'
      )
    indices.add(sample.index)
    if sample.correct is not None:
      num_graded += 1
      tally.add(record)
    if sample.num_tokens is not None:
      cut = sample.finish_reason == 'length'
      result.lengths.append((sample.num_tokens, sample.correct, cut))
    if key in result.by_problem or num_kept < max_samples:
      sample = heats.add_widths(sample, record)
      result.by_problem.setdefault(key, []).append(sample)
      num_kept += 1
  for samples in result.by_problem.values():
    samples.sort(key=lambda sample: sample.index)
  result.num_questions = len(seen)
  result.num_samples = sum(map(len, seen.values()))
  result.notes += heats.notes()
  if num_graded:
    result.metrics = tally.summary()
  else:
    result.notes.append('the samples are not graded')
  if len(result.by_problem) < len(seen):
    result.notes.append(
      f'the browser holds {len(result.by_problem):,} of {len(seen):,} questions '
      '(--max_samples); tables and charts cover all'
    )
  return result


class _Heats:
  """Finds the tokens of values in the texts; says where that is not possible."""

  def __init__(self, settings: Mapping[str, Any]):
    self._settings = settings
    self._widths: TokenWidths | None = None
    self._reason = ''
    self._num_found = self._num_missed = 0

  def add_widths(self, sample: Sample, record: Record) -> Sample:
    """The sample with the widths of its tokens; without its values where unknown."""
    if sample.token_values is None:
      return sample
    if self._widths is None and not self._reason:
      try:
        self._widths = TokenWidths(self._settings)
      except (ValueError, OSError, ImportError) as error:
        self._reason = str(error)
    widths = None
    if self._widths:
      widths = self._widths.of(sample.text, record['token_ids'])
    if widths is None:
      self._num_missed += 1
      return dataclasses.replace(sample, token_values=None)
    self._num_found += 1
    return dataclasses.replace(sample, token_widths=tuple(widths))

  def notes(self) -> list[str]:
    if self._reason:
      return [f'the values of tokens are not shown: {self._reason}']
    if self._num_missed:
      return [
        f'the values of tokens are not shown for {self._num_missed:,} of '
        f'{self._num_missed + self._num_found:,} samples, whose tokens do not spell '
        'their text by the tokenizer of the run'
      ]
    return []


def _records(paths: list[Path]) -> Iterator[tuple[Path, int, Record]]:
  for path in paths:
    for line, record in read_numbered(path, required=('text',)):
      yield path, line, record


def _problems(
  directory: Path, settings: Mapping[str, Any], first: Record, result: SampleSet
) -> dict[str, Problem]:
  """The problems of samples, by id; none where the samples tell the question."""
  if isinstance(first.get('question'), str):
    return {}
  path = directory / 'problems.jsonl'
  if path.is_file():
    result.modified = max(result.modified, path.stat().st_mtime)
    return {problem.id: problem for problem in load_problems(f'jsonl:{path}')}
  spec = settings.get('data')
  if not spec or not isinstance(spec, str):
    return {}
  try:
    problems = load_problems(
      spec,
      data_root=settings.get('data_root') or None,
      limit=settings.get('limit') or None,
    )
  except (ValueError, OSError, ImportError) as error:
    result.notes.append(f'the questions are not shown: {error}')
    return {}
  return {problem.id: problem for problem in problems}


_TYPES: dict[str, tuple[type, ...]] = {
  'text': (str,),
  'problem_id': (str, int),
  'sample_index': (int,),
  'extracted': (str,),
  'correct': (bool,),
  'gold': (str, int, float),
  'question': (str,),
  'prompt': (str,),
  'options': (list,),
  'num_tokens': (int,),
  'finish_reason': (str,),
  'logprob_sum': (int, float),
  'value': (int, float),
  'kl_sum': (int, float),
  'values': (list,),
  'token_ids': (list,),
}


def _parse(
  record: Record, path: Path, line: int, problem: Problem | None, arrival: int
) -> Sample:
  """The sample of a record; without an index it is the next of its problem."""
  for name, kinds in _TYPES.items():
    value = record.get(name)
    is_bool = isinstance(value, bool) and bool not in kinds
    if value is not None and (is_bool or not isinstance(value, kinds)):
      wanted = ' or '.join(kind.__name__ for kind in kinds)
      raise DataError(path, line, f'field {name!r} is {value!r:.80}, want {wanted}')
  correct = record.get('correct')
  if correct is not None and 'extracted' not in record:
    raise DataError(path, line, "a record with 'correct' needs 'extracted' too")
  if (record.get('num_tokens') or 0) < 0:
    raise DataError(path, line, f'num_tokens is {record["num_tokens"]}, want >= 0')
  index = record.get('sample_index')
  gold = record.get('gold')
  if gold is None and problem:
    gold = problem.answer if problem.answer is not None else problem.solution
  options = record.get('options') or (problem.options if problem else None)
  return Sample(
    index=arrival if index is None else index,
    text=record['text'],
    extracted=record.get('extracted'),
    correct=correct,
    gold=None if gold is None else str(gold),
    question=problem.question
    if problem
    else record.get('question') or record.get('prompt'),
    options=tuple(map(str, options)) if options else None,
    num_tokens=record.get('num_tokens'),
    finish_reason=record.get('finish_reason'),
    logprob_sum=_finite(record.get('logprob_sum')),
    value=_finite(record.get('value')),
    kl_sum=_finite(record.get('kl_sum')),
    token_values=_token_values(record, path, line),
  )


def _finite(number: float | None) -> float | None:
  return number if number is not None and math.isfinite(number) else None


def _token_values(
  record: Record, path: Path, line: int
) -> tuple[float | None, ...] | None:
  values = record.get('values')
  if values is None:
    return None
  ids = record.get('token_ids') or []
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  if len(ids) != len(values) or not all(v is None or is_number(v) for v in values):
    raise DataError(
      path,
      line,
      f"field 'values' is {values!r:.80} and there are {len(ids)} token_ids; want a "
      'number or null for each of them',
    )
  return tuple(map(_finite, values))
