"""The embedded problem set: generated GSM8K-style word problems with solutions.

A problem is a function of (seed, number) alone. Which split it falls into is decided by
the text of its question, so no question is ever in two splits, whatever the seeds, the
sizes and the forms.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from mrjax.data.stories import Draws, Step, Story
from mrjax.data.story_plots import make_story
from mrjax.records import Problem

# How often a problem has 1, 2, ... 6 steps.
STEP_WEIGHTS: dict[int, float] = {1: 12, 2: 18, 3: 20, 4: 20, 5: 17, 6: 13}
FORMS = ('open', 'choice', 'boxed')
DEFAULT_SIZES = {'train': 2000, 'dev': 500, 'test': 500}

_SPLIT_OF_PERCENT = {
  'train': range(0, 70),
  'dev': range(70, 80),
  'test': range(80, 100),
}
_LETTERS = 'ABCDE'
_MAX_MISSES = 20_000  # candidates in a row that are seen or of another split
_ID = re.compile(
  r'arithmetic-(?P<split>train|dev|test)(-(?P<form>choice|boxed))?'
  r'(-steps(?P<steps>[1-6](\+[1-6])*))?-(?P<seed>\d+)-(?P<number>\d+)'
)


def split_of(question: str) -> str:
  """Returns the split that owns a question: 70% train, 10% dev, 20% test."""
  canonical = ' '.join(question.lower().split())
  percent = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], 'big') % 100
  return next(name for name, part in _SPLIT_OF_PERCENT.items() if percent in part)


def generate_problems(
  split: str,
  *,
  size: int | None = None,
  seed: int = 0,
  form: str = 'open',
  steps: Sequence[int] | None = None,
  step_weights: Mapping[int, float] | None = None,
) -> list[Problem]:
  """Returns `size` distinct problems of a split; the same ones for the same arguments.

  Asking for more keeps the first ones: size 100 is the beginning of size 2000.

  Args:
    split: 'train', 'dev' or 'test'.
    size: Number of problems; None is 2000 for train and 500 for dev and test.
    seed: Another seed draws other problems of the same split; at least 0.
    form: 'open' (GSM8K: the last line is `#### n`), 'choice' (AQuA: five options, the
      last line is `#### B`) or 'boxed' (MATH: the last line is `\\boxed{n}`).
    steps: Numbers of steps wanted, each 1 to 6; None is all.
    step_weights: How often each number of steps comes; None is `STEP_WEIGHTS`. With
      others `distinct_solutions` does not find the problems again.

  Raises:
    ValueError: An unknown split or form, a bad number, or more problems asked for than
      there are.
  """
  _check(split, size, seed, form, steps)
  size = DEFAULT_SIZES[split] if size is None else size
  problems: list[Problem] = []
  seen: set[str] = set()
  misses = 0
  for number in itertools.count():
    if len(problems) == size:
      return problems
    story = _story(seed, number, steps, step_weights or STEP_WEIGHTS)
    if story.question in seen or split_of(story.question) != split:
      misses += 1
      if misses > _MAX_MISSES:
        raise ValueError(
          f'found only {len(problems)} distinct {split!r} problems with steps={steps}, '
          f'want {size}; ask for fewer, or for more step counts'
        )
      continue
    misses = 0
    seen.add(story.question)
    problems.append(_problem(story, split, seed, number, form, steps))
  raise AssertionError('itertools.count never ends')


def distinct_solutions(problem: Problem) -> Iterator[str]:
  """Yields the valid solutions of a generated problem, each with other equations.

  They differ in the order of independent steps, in the order of gains and losses, and
  in the order of the factors of a product or the terms of a sum. The problem is found
  again by its id; a long one has thousands of solutions, so take what you need.

  Raises:
    ValueError: The problem was not made here.
  """
  story = find_story(problem)
  last_line = (problem.solution or '').rpartition('\n')[2]
  seen = set()
  for graph in rearrangements(story.steps):
    for order in _orders(graph):
      chosen = [graph[i] for i in order]
      for flips in itertools.product(*[(False, True)[: 1 + _flips(s)] for s in chosen]):
        lines = [
          write_line(step, step.wordings[0], flip)
          for step, flip in zip(chosen, flips, strict=True)
        ]
        key = tuple(re.findall(r'<<(.*?)>>', ''.join(lines)))
        if key not in seen:
          seen.add(key)
          yield '\n'.join([*lines, last_line])


def find_story(problem: Problem) -> Story:
  """Returns the story of a generated problem, found again by its id.

  Raises:
    ValueError: The problem was not made here.
  """
  match = _ID.fullmatch(problem.id)
  if not match:
    raise ValueError(f'{problem.id!r} is not the id of a generated arithmetic problem')
  steps = match['steps'] and tuple(int(n) for n in match['steps'].split('+'))
  story = _story(int(match['seed']), int(match['number']), steps or None, STEP_WEIGHTS)
  if not problem.question.startswith(story.question):
    raise ValueError(
      f'{problem.id!r} does not ask this question: {problem.question!r:.80}'
    )
  return story


def _check(
  split: str, size: int | None, seed: int, form: str, steps: Sequence[int] | None
) -> None:
  if split not in _SPLIT_OF_PERCENT:
    raise ValueError(
      f'arithmetic has no split {split!r}, only {list(_SPLIT_OF_PERCENT)}'
    )
  if size is not None and size < 1:
    raise ValueError(f'size={size} problems; want at least 1')
  if seed < 0:
    raise ValueError(f'seed={seed}; want at least 0')
  if form not in FORMS:
    raise ValueError(f'arithmetic has no form {form!r}, only {list(FORMS)}')
  if steps is not None and (not steps or not set(steps) <= set(STEP_WEIGHTS)):
    raise ValueError(f'steps={list(steps)}; want numbers from 1 to {max(STEP_WEIGHTS)}')


def _story(
  seed: int,
  number: int,
  steps: Sequence[int] | None,
  step_weights: Mapping[int, float],
) -> Story:
  draws = Draws(f'mrjax arithmetic {seed} {number}')
  weights = {n: w for n, w in step_weights.items() if steps is None or n in steps}
  return make_story(draws, draws.weighted(weights))


def _problem(
  story: Story,
  split: str,
  seed: int,
  number: int,
  form: str,
  steps: Sequence[int] | None,
) -> Problem:
  # Wording and order of the solution have their own stream: the story stays as it is.
  draws = Draws(f'mrjax arithmetic solution {seed} {number}')
  lines = _sample_solution(draws, story.steps)
  question, answer, options = story.question, str(story.answer), None
  last_line = f'#### {answer}'
  if form == 'boxed':
    last_line = f'\\boxed{{{answer}}}'
  elif form == 'choice':
    values = _choices(draws, story)
    options = tuple(f'{letter}){v}' for letter, v in zip(_LETTERS, values, strict=True))
    answer = _LETTERS[values.index(story.answer)]
    last_line = f'#### {answer}'
  name = ['arithmetic', split]
  if form != 'open':
    name.append(form)
  if steps is not None:
    name.append('steps' + '+'.join(str(n) for n in sorted(set(steps))))
  return Problem(
    id='-'.join([*name, str(seed), str(number)]),
    question=question,
    answer=answer,
    solution='\n'.join([*lines, last_line]),
    source='arithmetic',
    options=options,
    level=len(story.steps),
  )


def _sample_solution(draws: Draws, steps: Sequence[Step]) -> list[str]:
  """Returns one solution: the order told as often as all other orders together."""
  if draws.chance(0.5):
    graphs = list(rearrangements(steps))
    steps = draws.pick(graphs)
    done: list[int] = []
    while len(done) < len(steps):
      ready = [
        i
        for i in range(len(steps))
        if i not in done and needed_steps(steps[i]) <= set(done)
      ]
      done.append(draws.pick(ready))
    steps = [steps[i] for i in done]
  return [
    write_line(step, draws.pick(step.wordings), _flips(step) and draws.chance(0.15))
    for step in steps
  ]


def needed_steps(step: Step) -> set[int]:
  """Returns the steps whose results a step uses, by their places in the story."""
  return {term.step for term in step.terms if term.step is not None}


def _flips(step: Step) -> bool:
  """True where the two sides of the step may trade places."""
  return step.operators in ('+', '*') and step.terms[0].value != step.terms[1].value


def write_line(step: Step, wording: str, flip: bool = False) -> str:
  """Returns a line of a solution: the wording with the annotated calculation in it."""
  values = [str(term.value) for term in step.terms]
  if flip:
    values.reverse()
  expression = values[0] + ''.join(
    operator + value for operator, value in zip(step.operators, values[1:], strict=True)
  )
  return wording.format(e=f'{expression}=<<{expression}={step.value}>>{step.value}')


def _orders(steps: Sequence[Step]) -> Iterator[list[int]]:
  """Yields every order of the steps in which a step follows those it needs."""

  def extend(done: list[int]) -> Iterator[list[int]]:
    if len(done) == len(steps):
      yield list(done)
    for i, step in enumerate(steps):
      if i not in done and needed_steps(step) <= set(done):
        yield from extend([*done, i])

  yield from extend([])


def rearrangements(steps: Sequence[Step]) -> Iterator[list[Step]]:
  """Yields the graph as told, then with gains and losses in a row in other orders."""
  runs: list[list[int]] = []
  for i, step in enumerate(steps):
    if not step.shift:
      continue
    # The amount between two shifts may change only if nothing else uses it.
    private = sum(i - 1 in needed_steps(other) for other in steps) == 1
    if i and steps[i - 1].shift and step.terms[0].step == i - 1 and private:
      runs[-1].append(i)
    else:
      runs.append([i])
  for orders in itertools.product(*[itertools.permutations(run) for run in runs]):
    graph = list(steps)
    for run, order in zip(runs, orders, strict=True):
      value = steps[run[0]].terms[0].value
      for place, source in zip(run, order, strict=True):
        operator, change = steps[source].operators, steps[source].terms[1]
        terms = (steps[place].terms[0]._replace(value=value), change)
        value += change.value if operator == '+' else -change.value
        graph[place] = dataclasses.replace(
          steps[place], terms=terms, operators=operator, value=value
        )
    if all(step.value > 0 for step in graph):
      yield graph


def _choices(draws: Draws, story: Story) -> list[int]:
  """Returns five distinct numbers in random order: the answer and likely mistakes."""
  answer = story.answer
  wrong = [s.value for s in story.steps] + [t.value for t in story.steps[-1].terms]
  near = [answer + d for d in (1, -1, 2, -2, 5, -5, 10, -10, 20)] + [answer * 2]
  pool = [
    n
    for n in dict.fromkeys(draws.shuffled(wrong)[:2] + draws.shuffled(near))
    if n > 0 and n != answer
  ]
  return draws.shuffled([answer, *pool[:4]])
