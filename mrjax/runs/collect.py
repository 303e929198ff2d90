"""RFT selection: samples of one or more models in, SFT records and statistics out."""

import dataclasses
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mrjax import records
from mrjax.data.problems import Problem, load_problems
from mrjax.data.prompts import check_template, render_completion, render_prompt
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.grading.calculator import all_equations_hold
from mrjax.grading.rules import get_rule
from mrjax.methods import rft
from mrjax.records import DataError, Record
from mrjax.runs.common import write_json
from mrjax.runs.grade import (
  Gold,
  Item,
  check_outputs,
  golds_of,
  ordered_map,
  read_items,
)

_HUMAN = -1  # the sample index of a reference solution


@dataclasses.dataclass(frozen=True)
class Config:
  """One selection.

  Raises:
    ValueError: An unknown rule, dedup or template, or a path is missing.
  """

  problems: str  # problem source, NAME:SPLIT
  samples: str  # sample sets (directory, file or glob), comma-separated, in order
  output: str  # SFT records, one JSON Lines file
  stats: str = ''  # the statistics as JSON; '' writes none
  dedup: str = 'farthest'  # 'farthest', 'first' or 'none'
  calculator_check: bool | None = None  # None: unless dedup is 'none', as in the paper
  include_human: bool = True  # the reference solution of every problem goes first
  prompt_template: str = 'alpaca'  # layout of the records
  tokenizer: str = ''  # for prompt_template 'chat' alone
  rule: str = 'gsm8k_exact'  # what makes a sample correct
  data_root: str = ''  # local copies of the data sets of `problems`
  overwrite: bool = False  # replace existing outputs

  def __post_init__(self) -> None:
    get_rule(self.rule)
    rft.select_paths([], dedup=self.dedup)
    if not all(self.sample_sets) or len(set(self.sample_sets)) < len(self.sample_sets):
      raise ValueError(
        f'--samples={self.samples!r}: want one or more different sample sets, '
        'e.g. A or A,B'
      )
    if not self.output:
      raise ValueError('--output is empty; name a file')
    if not self.tokenizer:
      check_template(self.prompt_template)

  @property
  def sample_sets(self) -> list[str]:
    return self.samples.split(',')

  @property
  def checks_annotations(self) -> bool:
    if self.calculator_check is None:
      return self.dedup != 'none'
    return self.calculator_check


_REQUIRED = ('problem_id', 'sample_index', 'text')
_MAX_INDEX = (1 << 40) - 1


class _Question:
  """The samples of one problem, packed: 8 bytes each, and the texts still of use.

  A code holds, from the top, set number, sample index, whether it is correct and
  whether its text is kept; so sorted codes are in the order of sampling.
  """

  def __init__(self) -> None:
    self.codes = array('q')
    self.texts: dict[int, bytes] = {}

  def add(self, set_number: int, index: int, correct: bool, text: str | None) -> None:
    code = set_number << 42 | index << 2 | correct << 1 | (text is not None)
    self.codes.append(code)
    if text is not None:
      self.texts[code] = text.encode(errors='surrogatepass')


def run(config: Config) -> dict[str, Any]:
  """Selects samples and returns the statistics of `rft.Statistics`, with the settings.

  Samples carry `problem_id`, `sample_index` and `text`; whether they are correct is
  judged here, whatever a graded file says. They may lie scattered over shards in any
  order: the selection sees the sets in the order given, and each by sample index.
  Records have `prompt`, `completion`, `problem_id` and `sample_index` (-1: the human
  solution); with several sets also `sample_set`, its number.

  Raises:
    DataError: A bad sample, by file and line; nothing is written.
    ValueError: A problem has no answer, or no solution where those are wanted; or
      a set holds a sample twice.
    OutputError: An output exists and `overwrite` is off.
  """
  inputs = [p for spec in config.sample_sets for p in records.expand_inputs(spec)]
  check_outputs(config.output, config.stats, inputs=inputs, overwrite=config.overwrite)
  problems = load_problems(config.problems, data_root=config.data_root or None)
  golds = golds_of(problems, config.problems)
  for problem in problems:
    if config.include_human and problem.solution is None:
      raise ValueError(
        f'problem {problem.id!r} of {config.problems} has no solution; '
        'pass --include_human=false'
      )
  tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
  check_template(config.prompt_template, tokenizer)
  questions = _read_samples(config, golds)
  statistics = rft.Statistics(_seeds(questions.values()), config.sample_sets)

  def selected() -> Iterator[Record]:
    for problem in problems:
      samples = _in_order(problem.id, questions[problem.id], config.sample_sets)
      yield from _select(problem, samples, config, statistics, tokenizer)

  num_records = records.write_jsonl(config.output, selected())
  summary = {
    'num_records': num_records,
    'dedup': config.dedup,
    'calculator_check': config.checks_annotations,
    'rule': config.rule,
  } | statistics.summary()
  if config.stats:
    write_json(config.stats, summary)
  return summary


def _select(
  problem: Problem,
  samples: list[rft.Sample],
  config: Config,
  statistics: rft.Statistics,
  tokenizer: Tokenizer | None,
) -> Iterator[Record]:
  """Yields the SFT records of one problem, and counts them."""
  usable = [sample for sample in samples if sample.text is not None]
  texts = [sample.text or '' for sample in usable]
  kept = rft.select_paths(texts, dedup=config.dedup)
  statistics.add(samples, num_kept=len(kept))
  template = config.prompt_template
  prompt = render_prompt(template, problem, tokenizer=tokenizer).text

  def record(solution: str | None, place: Record) -> Record:
    # Samples get the layout's own spacing, so that they look like human solutions.
    solved = dataclasses.replace(problem, solution=solution)
    completion = render_completion(template, solved, tokenizer=tokenizer)
    return {
      'prompt': prompt,
      'completion': completion,
      'problem_id': problem.id,
    } | place

  if config.include_human:
    yield record(problem.solution, {'sample_index': _HUMAN})
  for index in kept:
    place: Record = {'sample_index': usable[index].sample_index}
    if len(config.sample_sets) > 1:
      place['sample_set'] = usable[index].set_number
    yield record(texts[index].strip(), place)


def _read_samples(config: Config, golds: dict[str, Gold]) -> dict[str, _Question]:
  """Reads and grades all samples; keeps the texts that may be selected."""
  rule = get_rule(config.rule)
  questions = {key: _Question() for key in golds}

  def grade(item: Item) -> tuple[str, int, bool, str | None]:
    record = item.record
    key, index, text = (record[name] for name in _REQUIRED)
    gold = golds.get(key) if isinstance(key, str) else None
    if gold is None:
      what = f'problem_id {key!r:.80} is not in --problems={config.problems}'
    elif type(index) is not int or not 0 <= index <= _MAX_INDEX:  # True is no index
      what = f'sample_index {index!r:.80} is not a whole number >= 0'
    elif not isinstance(text, str):
      what = f'text {text!r:.80} is not a string'
    else:
      try:
        correct = rule.grade(text, gold.answer, gold.options)[1]
      except ValueError as error:
        raise DataError(item.path, item.line, str(error)) from None
      keep = correct and (not config.checks_annotations or all_equations_hold(text))
      return key, index, correct, text if keep else None
    raise DataError(item.path, item.line, what)

  for set_number, spec in enumerate(config.sample_sets):
    items = read_items(records.expand_inputs(spec), required=_REQUIRED)
    for key, index, correct, text in ordered_map(grade, items, rule.num_threads):
      questions[key].add(set_number, index, correct, text)
  return questions


def _seeds(questions: Iterable[_Question]) -> list[tuple[int, int]]:
  """Returns every (set number, sample index) there is, in order."""
  seeds = {code >> 2 for question in questions for code in question.codes}
  return [(seed >> 40, seed & _MAX_INDEX) for seed in sorted(seeds)]


def _in_order(
  problem_id: str, question: _Question, sample_sets: Sequence[str]
) -> list[rft.Sample]:
  """Returns the samples of a problem by set and index.

  Raises:
    ValueError: A set holds a sample twice.
  """
  codes = sorted(question.codes)
  for code, following in itertools.pairwise(codes):
    if code >> 2 == following >> 2:
      raise ValueError(
        f'{sample_sets[code >> 42]} holds sample {code >> 2 & _MAX_INDEX} of problem '
        f'{problem_id!r} twice; list the files of different runs as sets of their own'
      )
  return [
    rft.Sample(
      code >> 42,
      code >> 2 & _MAX_INDEX,
      bool(code & 2),
      question.texts[code].decode(errors='surrogatepass') if code & 1 else None,
    )
    for code in codes
  ]
