"""Grades samples: records in, the same records with `extracted` and `correct` out."""

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mrjax import records
from mrjax.grading import symbolic
from mrjax.grading.rules import RULES, Rule, get_rule
from mrjax.grading.tally import Tally
from mrjax.grading.votes import VOTES
from mrjax.records import DataError, Problem, Record
from mrjax.runs.common import OutputError, make_folder, write_json


@dataclasses.dataclass(frozen=True)
class Config:
  """One grading run.

  Raises:
    ValueError: An unknown rule or vote, or a path is missing.
  """

  rule: str  # a name of mrjax.grading.rules.RULES
  input: str  # directory of sample shards, file or glob
  output: str  # graded records, one JSON Lines file
  metrics: str = ''  # the summary as JSON; '' writes none
  vote: str = ''  # '', 'string_first' or 'equivalence'
  problems: str = ''  # problem source with the golds of records that carry none
  data_root: str = ''  # local copies of the data sets of `problems`
  seed: int = 0  # of the bootstrap and of ties between votes
  overwrite: bool = False  # replace existing outputs

  def __post_init__(self) -> None:
    get_rule(self.rule)
    if self.vote and self.vote not in VOTES:
      raise ValueError(f'--vote={self.vote}: want one of {", ".join(VOTES)}')
    for name in ('input', 'output'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; name a path')


@dataclasses.dataclass(frozen=True)
class Item:
  """A record and where it stands."""

  path: Path
  line: int
  record: Record


@dataclasses.dataclass(frozen=True)
class Gold:
  """The reference of one problem."""

  answer: str
  options: tuple[str, ...] | None
  level: str | int | None


def run(config: Config) -> dict[str, Any]:
  """Grades every record and returns the summary of `Tally.summary`.

  Records are read, graded and written one by one. They carry `text` and either `gold`
  or a `problem_id` of `config.problems`; with 'choice' and 'lema_csqa' also `options`.
  The summary adds `rule` and, for symbolic grading, `num_timeouts` and `num_crashes`:
  samples that were graded as incorrect because the comparison found no end.

  Raises:
    DataError: A record that cannot be graded, by file and line; nothing is written.
    FileNotFoundError: No input.
    OutputError: An output exists and `overwrite` is off.
  """
  rule = get_rule(config.rule)
  paths = records.expand_inputs(config.input)
  check_outputs(config.output, config.metrics, inputs=paths, overwrite=config.overwrite)
  golds = _load_golds(config.problems, config.data_root)
  tally = Tally(config.vote, is_equal=rule.is_equal)
  counts_before = _symbolic_counts(rule)

  def grade(item: Item) -> Record:
    return _grade(item, rule, golds, config.problems)

  def graded() -> Iterator[Record]:
    items = _unique(
      read_items(paths, required=('text', 'problem_id' if golds else 'gold'))
    )
    for record in ordered_map(grade, items, rule.num_threads):
      tally.add(record)
      yield record

  records.write_jsonl(config.output, graded())
  levels = {key: gold.level for key, gold in golds.items() if gold.level is not None}
  summary = {'rule': rule.name} | tally.summary(seed=config.seed, levels=levels)
  for name, count in _symbolic_counts(rule).items():
    summary[name] = count - counts_before[name]
  if config.metrics:
    write_json(config.metrics, summary)
  return summary


def check_output(path: str, *, overwrite: bool) -> None:
  """Makes the folder of an output file; refuses to replace one unasked.

  Raises:
    OutputError: The file exists and `overwrite` is off, it is a directory, or its
      folder cannot be made.
  """
  if not path:
    return
  if Path(path).is_dir():
    raise OutputError(f'{path} is a directory; the output is one file')
  if Path(path).exists() and not overwrite:
    raise OutputError(f'{path} exists; choose another output or pass --overwrite')
  make_folder(Path(path).parent, output=path)


def check_outputs(
  *outputs: str, inputs: Iterable[Path] = (), overwrite: bool = False
) -> None:
  """`check_output` of each, and that none is another one or an input.

  Raises:
    OutputError: See `check_output`; or a file would be written over.
  """
  taken = {path.resolve(): 'the input' for path in inputs}
  for path in filter(None, outputs):
    place = Path(path).resolve()
    if place in taken:
      raise OutputError(f'{path} is {taken[place]} too; name another file')
    taken[place] = 'another output'
    check_output(path, overwrite=overwrite)


def golds_of(problems: Iterable[Problem], source: str) -> dict[str, Gold]:
  """Returns the references of problems by id: the answer, else the whole solution.

  Raises:
    ValueError: A problem has neither; `source` is for the message.
  """
  golds = {}
  for problem in problems:
    answer = problem.answer if problem.answer is not None else problem.solution
    if answer is None:
      raise ValueError(
        f'problem {problem.id!r} of {source} has neither answer nor solution, so its '
        'samples cannot be graded'
      )
    golds[problem.id] = Gold(answer, problem.options, problem.level)
  return golds


def _load_golds(problems: str, data_root: str) -> dict[str, Gold]:
  if not problems:
    return {}
  from mrjax.data.problems import load_problems  # its sources are slow to import

  return golds_of(load_problems(problems, data_root=data_root or None), problems)


_In = TypeVar('_In')
_Out = TypeVar('_Out')


def ordered_map(
  function: Callable[[_In], _Out], items: Iterable[_In], num_threads: int
) -> Iterator[_Out]:
  """Yields function(item) in the order of the items, some of them computed ahead."""
  if num_threads == 1:
    yield from map(function, items)
    return
  pending: deque[Future[_Out]] = deque()
  with ThreadPoolExecutor(num_threads) as pool:
    try:
      for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > 16 * num_threads:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def read_items(paths: Iterable[Path], *, required: Sequence[str]) -> Iterator[Item]:
  """Yields the records of several files, with a progress bar on a terminal."""
  items = (
    Item(path, line, record)
    for path in paths
    for line, record in records.read_numbered(path, required=required)
  )
  if not sys.stderr.isatty():
    return items
  from tqdm import tqdm

  return iter(tqdm(items, unit=' records', desc='grading'))


def _unique(items: Iterable[Item]) -> Iterator[Item]:
  """The items; a sample that comes twice would be counted and vote twice."""
  seen: set[int] = set()  # hashes: a fifth of the memory of the names themselves
  for item in items:
    name = item.record.get('problem_id'), item.record.get('sample_index')
    if None not in name:
      if hash(name) in seen:
        raise DataError(
          item.path,
          item.line,
          f'sample {name[1]} of problem {name[0]!r} is there already; a sample may '
          'come once',
        )
      seen.add(hash(name))
    yield item


def _grade(item: Item, rule: Rule, golds: dict[str, Gold], problems: str) -> Record:
  record = item.record
  gold: Any = record.get('gold')
  options = record.get('options')
  if gold is None:
    known = golds.get(record['problem_id'])
    if known is None:
      raise DataError(
        item.path,
        item.line,
        f'problem_id {record["problem_id"]!r} is not in --problems={problems}',
      )
    gold, options = known.answer, options or known.options
  if isinstance(gold, int | float) and not isinstance(gold, bool):
    gold = str(gold)
  _check_types(item, record | {'gold': gold, 'options': options})
  try:
    extracted, correct = rule.grade(record['text'], gold, options)
  except ValueError as error:
    raise DataError(item.path, item.line, str(error)) from None
  return record | {'gold': gold, 'extracted': extracted, 'correct': correct}


_TYPES = {
  'text': str,
  'gold': str,
  'options': list | tuple,
  'sample_index': int,
  'num_tokens': int,
  'value': int | float,
  'kl_sum': int | float,
}


def _check_types(item: Item, record: Record) -> None:
  for name, kind in _TYPES.items():
    value = record.get(name)
    if value is not None and not isinstance(value, kind):
      raise DataError(
        item.path,
        item.line,
        f'field {name!r} is {type(value).__name__} {value!r:.80}, want '
        f'{getattr(kind, "__name__", kind)}',
      )
  if not all(isinstance(option, str) for option in record['options'] or ()):
    raise DataError(item.path, item.line, "field 'options' must hold strings")


def _symbolic_counts(rule: Rule) -> dict[str, int]:
  if rule is not RULES['boxed_symbolic']:
    return {}
  counts = symbolic.default_verifier().counts
  return {'num_timeouts': counts['timeout'], 'num_crashes': counts['crash']}
