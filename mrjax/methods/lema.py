r"""LEMA: wrong solutions of a model, and their corrections, as pairs to train on.

An et al. 2023, "Learning From Mistakes Makes LLM Better Reasoner", arXiv 2310.20689,
section 2: of sampled solutions those with a wrong final answer are corrected, and a
correction is kept only if its own final answer is right.

Wrong paths come numbered, one `Step i: ...` a line, so that a corrector can name one.
How the authors cut free text into steps is not published; here a line is a step, a
text of one line is cut into sentences, and displayed mathematics stays whole. The last
step reads `The answer is X.`, whatever marker (`#### X`, `A: X`, a box) stood there.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from mrjax.grading.boxed import last_boxed
from mrjax.grading.rules import GoldError, get_rule
from mrjax.methods.lema_corrections import (
  ANSWER,
  TASK_RULES,
  check_task,
  write_body,
)
from mrjax.records import Problem, Record

Counts = dict[str, int]

_RUN_ON = ('\n\nQ: ', '\n\nQuestion: ')  # the model went on to a next question
_LAST_LINE = re.compile(r'(?:####|A:|Answer:)\s*(.*)')
_BOX_ALONE = re.compile(r'\$?\\boxed\{.*\}\$?\.?')
_STEP_NUMBER = re.compile(r'Step\s*\d+\s*[:.]\s*')
# A full stop, then a capital letter, a number or a formula; not after `Mr.` or `A.`.
_SENTENCE = re.compile(
  r'(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)'
  r'(?<=[.!?])\s+(?=[A-Z0-9$\\(])'
)
_ANNOTATION = re.compile(r'<<[^>]*>>')
_DISPLAYS = ((r'\\\[', r'\\\]'), (r'\\begin\{', r'\\end\{'))


@dataclasses.dataclass(frozen=True)
class WrongPath:
  """A solution with a wrong final answer, cut into steps.

  `sample_set` and `sample_index` say which sample it is; for CSQA the steps are lines.
  """

  problem: Problem
  task: str
  steps: tuple[str, ...]
  sample_index: int = 0
  sample_set: int = 0

  @property
  def body(self) -> str:
    """What stands in the braces of a prompt: `Step i: ...` lines, plain for CSQA."""
    return write_body(self.steps, first=None if self.task == 'csqa' else 1)

  def to_record(self) -> Record:
    """Returns the JSON object of this path."""
    record = dataclasses.asdict(self)
    return record | {'problem': self.problem.to_record(), 'steps': list(self.steps)}

  @classmethod
  def from_record(cls, record: Record) -> 'WrongPath':
    """Returns the path of a JSON object; fields it does not know are ignored.

    Raises:
      ValueError: A field is missing or has the wrong type.
    """
    for name, kind in (('problem', dict), ('task', str), ('steps', list)):
      if not isinstance(record.get(name), kind):
        raise ValueError(
          f'field {name!r} of a wrong path is {record.get(name)!r:.60}, want '
          f'{kind.__name__}; write these files with lema.collect_mistakes'
        )
    check_task(record['task'])
    numbers = [record.get(name, 0) for name in ('sample_index', 'sample_set')]
    return cls(
      Problem.from_record(record['problem']),
      record['task'],
      tuple(map(str, record['steps'])),
      *numbers,
    )


def split_steps(text: str, *, answer: str | None = None) -> list[str]:
  """Returns the steps of a free text, the last one `The answer is X.` where it has one.

  X is what follows the marker on the last line (`####`, `A:`), else what follows the
  last `The answer is`, else the last box, else `answer`. Text after a run-on
  `Question:` is cut, as the grading rules cut it, and so is text after the answer.
  Numbers that the steps already have are dropped.
  """
  for heading in _RUN_ON:
    text = text.partition(heading)[0]
  text = text.strip()
  head, _, last = text.rpartition('\n')
  marked = _LAST_LINE.fullmatch(last.strip())
  if marked:
    text, found = head, marked[1]
  elif ANSWER in text:
    text, _, found = text.rpartition(ANSWER)
    found = found.lstrip(': \t').partition('\n')[0]
    text = re.sub(r'Step\s*\d+\s*[:.]\s*$', '', text)  # the number of the answer's step
  else:
    found = last_boxed(text) or answer or ''
    if _BOX_ALONE.fullmatch(last.strip()):  # says nothing but the answer
      text = head
  lines = [line for line in map(str.strip, _whole_lines(text)) if line]
  if len(lines) == 1:
    lines = _SENTENCE.split(lines[0])
  steps = [_STEP_NUMBER.sub('', line, count=1) for line in lines]
  found = found.strip().removesuffix('.').rstrip()
  return [*filter(None, steps), *([f'{ANSWER} {found}.'] if found else [])]


def strip_annotations(text: str) -> str:
  """Returns a solution without its `<<...>>` annotations."""
  return _ANNOTATION.sub('', text)


def is_answered(steps: Sequence[str]) -> bool:
  """Says whether the last step states a final answer."""
  return bool(steps) and steps[-1].startswith(ANSWER)


def is_right(problem: Problem, task: str, steps: Sequence[str]) -> bool:
  """Says whether the final answer of the steps is right by the task's rule.

  Raises:
    GoldError: The problem has no answer the rule can use (0 is none, see the rule).
  """
  gold = problem.answer if problem.answer is not None else problem.solution
  if gold is None:
    raise GoldError(f'problem {problem.id!r} has no answer to judge solutions by')
  return get_rule(TASK_RULES[task]).grade('\n'.join(steps), gold, problem.options)[1]


def lottery(seed: int, *names: object) -> bytes:
  """Returns the lot of a record: those with the smallest ones are drawn.

  It depends on the seed and on what names the record, so a draw depends neither on the
  order of the records nor on which others there are.
  """
  return hashlib.sha256(repr((seed, *names)).encode()).digest()


def select_wrong_paths(
  problems: Iterable[Problem],
  samples: Iterable[Record],
  *,
  task: str,
  distinct: bool = True,
  keep_unanswered: bool = False,
  keep_annotations: bool = True,
  max_per_problem: int | None = None,
  seed: int = 0,
) -> tuple[list[WrongPath], Counts]:
  """Returns the wrong paths among graded samples, in their order, and counts.

  The paper keeps a sample whose extracted answer is not the reference. A sample must
  be graded as wrong and be wrong by the task's rule once it is cut into steps.

  Args:
    problems: Those of the samples.
    samples: Graded samples; `sample_set` tells apart those of several reasoners.
    task: 'gsm8k', 'math' or 'csqa'.
    distinct: Drop a path whose steps another path of the problem has. The paper does
      not say.
    keep_unanswered: Keep samples that state no answer. Upstream reads them as 0, which
      is never right, so they would be wrong paths there; they are mostly cut off.
    keep_annotations: Keep the `<<...>>` of the samples.
    max_per_problem: Keep at most so many of a problem, drawn by the seed; None is all.
    seed: Of that draw.

  Returns:
    The paths and counts: `samples` is the sum of `right`, `right_by_rule` (graded as
    wrong by another rule), `unusable_reference`, `unanswered`, `duplicate`,
    `over_limit` and `kept`; and `problems` with a path kept.

  Raises:
    ValueError: An unknown task, a sample of no problem, or one that is not graded.
  """
  check_task(task)
  if max_per_problem is not None and max_per_problem < 1:
    raise ValueError(f'max_per_problem={max_per_problem}; want at least 1, or None')
  by_id = {problem.id: problem for problem in problems}
  counts = Counter(dict.fromkeys(_PATH_COUNTS, 0))
  paths: list[WrongPath] = []
  seen = set()
  for sample in samples:
    counts['samples'] += 1
    path = _path_of(sample, by_id, task, keep_annotations)
    fate = _fate(sample, path, keep_unanswered)
    if not fate and distinct and (path.problem.id, path.steps) in seen:
      fate = 'duplicate'
    seen.add((path.problem.id, path.steps))
    if fate:
      counts[fate] += 1
    else:
      paths.append(path)
  kept = paths if max_per_problem is None else _draw(paths, max_per_problem, seed)
  counts['over_limit'] = len(paths) - len(kept)
  counts['kept'] = len(kept)
  counts['problems'] = len({path.problem.id for path in kept})
  return kept, dict(counts)


_PATH_COUNTS = (
  'samples',
  'right',
  'right_by_rule',
  'unusable_reference',
  'unanswered',
  'duplicate',
  'over_limit',
  'kept',
  'problems',
)


def _path_of(
  sample: Record, by_id: dict[str, Problem], task: str, keep_annotations: bool
) -> WrongPath:
  key = sample.get('problem_id')
  if not isinstance(key, str) or key not in by_id:
    raise ValueError(f'sample of problem {key!r:.80}, which is not among the problems')
  text, correct = sample.get('text'), sample.get('correct')
  if not isinstance(text, str) or not isinstance(correct, bool):
    raise ValueError(
      f'a sample of problem {key!r:.80} has text {text!r:.40} and correct {correct!r}; '
      'want a graded sample: run experiments.grade first'
    )
  extracted = sample.get('extracted')
  steps = split_steps(text, answer=None if extracted is None else str(extracted))
  if not keep_annotations:
    steps = [strip_annotations(step) for step in steps]
  numbers = sample.get('sample_index', 0), sample.get('sample_set', 0)
  return WrongPath(by_id[key], task, tuple(steps), *numbers)


def _fate(sample: Record, path: WrongPath, keep_unanswered: bool) -> str:
  """Returns what a sample is counted under, '' for a wrong path."""
  if sample['correct']:
    return 'right'
  if not path.steps or not (keep_unanswered or is_answered(path.steps)):
    return 'unanswered'
  try:
    return 'right_by_rule' if is_right(path.problem, path.task, path.steps) else ''
  except GoldError:
    return 'unusable_reference'


def _draw(paths: Sequence[WrongPath], count: int, seed: int) -> list[WrongPath]:
  """Returns at most `count` paths of every problem, in the order given."""
  lots: dict[str, list[bytes]] = {}

  @functools.cache
  def lot(place: int) -> bytes:
    path = paths[place]
    return lottery(seed, path.problem.id, path.sample_set, path.sample_index)

  for place, path in enumerate(paths):
    lots.setdefault(path.problem.id, []).append(lot(place))
  limits = {key: sorted(drawn)[:count][-1] for key, drawn in lots.items()}
  return [p for place, p in enumerate(paths) if lot(place) <= limits[p.problem.id]]


def _whole_lines(text: str) -> Iterator[str]:
  r"""Yields the lines of a text; displayed mathematics (`\[`, `\begin`) as one."""
  pending: list[str] = []
  for line in text.splitlines():
    pending.append(line)
    so_far = '\n'.join(pending)
    if so_far.count('$$') % 2 == 0 and all(
      len(re.findall(opening, so_far)) <= len(re.findall(closing, so_far))
      for opening, closing in _DISPLAYS
    ):
      yield so_far
      pending = []
  yield from pending  # never closed: line by line
