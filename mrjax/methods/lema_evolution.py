"""Correction-centric evolution: new questions made from those that were corrected.

An et al. 2023, arXiv 2310.20689, section 5 and appendix: seeds are drawn from the
questions of the correction data (some reasoner failed and the corrector succeeded), a
model rewrites each, and its reference answer is the majority of three sampled answers.
A second round takes the same seeds, and wrong paths of the models tuned in the first.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mrjax.grading.rules import GoldError, get_rule
from mrjax.grading.votes import equivalence
from mrjax.methods.lema import Counts, lottery
from mrjax.methods.lema_corrections import TASK_RULES, Rejected, check_task
from mrjax.methods.lema_pairs import Pair
from mrjax.records import Problem

SEEDS = ('from-corrections', 'all')
_GIVEN, _CREATED = '#Given Question#', '#Created Question#'
_HEADING = re.compile(r'#\s*(Given|Created)\s+Question\s*#\s*:?', re.IGNORECASE)

_REWRITE = (
  'You are a teacher who writes exercises. Read the given question and create a new '
  'one. It shall be related to the given one, but differ from it in content and in '
  'wording. It shall make sense by itself, and its answer shall be a number.'
)


@dataclasses.dataclass(frozen=True)
class Seed:
  """A question to rewrite; `number` tells apart the seeds of one question."""

  problem: Problem
  number: int

  @property
  def id(self) -> str:
    """The id of the problem that is created from this seed."""
    return f'{self.problem.id}/evolved-{self.number}'


def draw_seeds(
  problems: Sequence[Problem],
  pairs: Sequence[Pair],
  *,
  seeds: str = 'from-corrections',
  n: int = 10_000,
  seed: int = 0,
) -> list[Seed]:
  """Returns `n` seeds for the rewriting.

  'from-corrections' draws from the pairs, so that a question with many pairs comes more
  often (our reading: the paper does not say); 'all' from the problems. Nothing is drawn
  again before everything was drawn once.

  Raises:
    ValueError: An unknown kind of seeds, n below 1, or nothing to draw from.
  """
  if seeds not in SEEDS:
    raise ValueError(f'unknown seeds {seeds!r}; want one of {", ".join(SEEDS)}')
  if n < 1:
    raise ValueError(f'n={n} seeds; want at least 1')
  entries: list[tuple[Problem, tuple[object, ...]]]
  if seeds == 'all':
    entries = [(problem, ('all', problem.id)) for problem in problems]
  else:
    entries = [
      (
        pair.path.problem,
        (pair.path.problem.id, pair.path.sample_set, pair.path.sample_index),
      )
      for pair in pairs
    ]
  if not entries:
    raise ValueError(f'seeds={seeds!r}: there is nothing to draw from')
  drawn: list[Seed] = []
  numbers: Counter[str] = Counter()
  for turn in range(-(-n // len(entries))):
    lots = [lottery(seed, turn, *names) for _, names in entries]
    for place in sorted(range(len(entries)), key=lots.__getitem__)[: n - len(drawn)]:
      problem = entries[place][0]
      drawn.append(Seed(problem, numbers[problem.id]))
      numbers[problem.id] += 1
  return drawn


def rewrite_prompt(question: str) -> str:
  """Returns the prompt for a new question; it ends at the new one's heading."""
  return f'{_REWRITE}\n\n{_GIVEN}:\n{question}\n\n{_CREATED}:\n'


def parse_created(text: str, *, given: str) -> str:
  """Returns the question a model created.

  It stands after the first `#Created Question#`, or at the start where the model does
  not repeat the heading, and ends where another heading begins.

  Raises:
    Rejected: `no_question` (nothing there), or `unchanged` (the given one again).
  """
  headings = list(_HEADING.finditer(text))
  created = [m for m in headings if m[1].lower() == 'created']
  start = created[0].end() if created else 0
  end = min((m.start() for m in headings if m.start() >= start), default=len(text))
  question = text[start:end].strip()
  if not question:
    raise Rejected('no_question', f'no question in {text!r:.80}')
  if _plain(question) == _plain(given):
    raise Rejected('unchanged', f'{question!r:.80}')
  return question


def created_problems(
  rewritten: Iterable[tuple[Seed, str]],
) -> tuple[list[Problem], Counts]:
  """Returns the new problems, without answers, and counts.

  The counts are `seeds` (given), `no_question`, `unchanged`, `duplicate` (a question
  that was created before) and `kept`.
  """
  counts: Counter[str] = Counter(
    seeds=0, no_question=0, unchanged=0, duplicate=0, kept=0
  )
  problems: list[Problem] = []
  seen = set()
  for seed, text in rewritten:
    counts['seeds'] += 1
    try:
      question = parse_created(text, given=seed.problem.question)
    except Rejected as rejected:
      counts[rejected.reason] += 1
      continue
    counts['duplicate' if _plain(question) in seen else 'kept'] += 1
    if _plain(question) not in seen:
      problems.append(Problem(seed.id, question, source='evolved'))
    seen.add(_plain(question))
  return problems, dict(counts)


def reference_answer(
  texts: Sequence[str], *, task: str, problem_id: str = '', seed: int = 0
) -> str | None:
  """Returns the majority answer of sampled solutions; None where all answers differ.

  At least two solutions must agree under the task's rule; a solution without an answer
  agrees with none. Ties (of four votes or more) are drawn by seed and problem.
  """
  check_task(task)
  rule = get_rule(TASK_RULES[task])
  answers = [rule.extract(text) for text in texts]
  winner = equivalence(answers, rule.is_equal, seed=f'{seed} {problem_id}')
  if winner is None:
    return None
  votes = sum(bool(a) and rule.is_equal(winner, a or '') for a in answers)
  return winner if votes >= 2 else None


def voted_problems(
  problems: Iterable[Problem],
  texts: Mapping[str, Sequence[str]],
  *,
  task: str,
  votes: int = 3,
  seed: int = 0,
) -> tuple[list[Problem], Counts]:
  """Returns the problems with a majority answer, and counts.

  Args:
    problems: Created ones.
    texts: Sampled solutions by problem id; the first `votes` of them vote.
    task: 'gsm8k' or 'math'; CSQA has nothing to vote on without candidates.
    votes: Solutions of a problem, at least 2.
    seed: Of tied votes.

  Returns:
    The problems and counts: `problems` is the sum of `all_differ`,
    `unusable_answer` (the rule takes no such reference, e.g. 0) and `kept`.

  Raises:
    ValueError: Too few votes, fewer solutions than votes, or task 'csqa'.
  """
  check_task(task)
  if task == 'csqa' or votes < 2:
    raise ValueError(
      f'task={task}, votes={votes}; want gsm8k or math, and at least 2 votes'
    )
  kept: list[Problem] = []
  counts: Counter[str] = Counter(problems=0, all_differ=0, unusable_answer=0, kept=0)
  for problem in problems:
    counts['problems'] += 1
    given = texts.get(problem.id, ())
    if len(given) < votes:
      raise ValueError(
        f'problem {problem.id!r} has {len(given)} solutions, want votes={votes}; '
        'sample more, or vote with fewer'
      )
    answer = reference_answer(
      given[:votes], task=task, problem_id=problem.id, seed=seed
    )
    fate = 'all_differ' if answer is None else 'kept'
    if answer is not None and not _is_gold(task, answer):
      fate = 'unusable_answer'
    counts[fate] += 1
    if fate == 'kept':
      kept.append(dataclasses.replace(problem, answer=answer))
  return kept, dict(counts)


def _is_gold(task: str, answer: str) -> bool:
  try:
    return bool(get_rule(TASK_RULES[task]).extract_gold(answer))
  except GoldError:
    return False


def _plain(question: str) -> str:
  return ' '.join(question.casefold().split())
