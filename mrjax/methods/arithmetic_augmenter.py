"""A scripted author of new questions for the embedded arithmetic problems.

It stands where MuggleMath (arXiv 2310.05506) has GPT-4: it takes the text of a request
and gives a numbered list with bold labels, one new question of each kind. What can be
done by rule is done: numbers are changed in the story itself, the other four kinds ask
on from the number that the story asks for. Every new question has a known answer, all
its quantities are whole, and it belongs to the split of the old one.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mrjax.data.arithmetic import find_story, split_of, write_line
from mrjax.data.stories import Amount, Draws, Infeasible, Step, Story, apply
from mrjax.data.story_moves import PARTS, PERCENTS
from mrjax.records import Problem

_TRIES = 200  # draws of numbers before a change is given up
_NUMBER = re.compile(r'\d+')


class _Tail(NamedTuple):
  """What is asked on from a story's answer, and the steps it takes.

  Each step is (operators, numbers); None stands for the result before it.
  """

  text: str
  steps: tuple[tuple[str, tuple[int | None, ...]], ...]


class ArithmeticAugmenter:
  """Answers requests for new questions about the problems it was given.

  Args:
    problems: Generated ones (`arithmetic`); a choice question becomes an open one.
    seed: Another seed writes other questions.
  """

  def __init__(self, problems: Iterable[Problem], *, seed: int = 0):
    self._problems = {problem.question: problem for problem in problems}
    self._seed = seed

  def __call__(self, prompt: str) -> str:
    """Returns the list for the known question that ends last in the prompt.

    The kinds are those that the prompt lists by number and label, and all where it
    lists none. A kind that the numbers do not allow is left out.

    Raises:
      ValueError: The prompt holds no question that this author knows.
    """
    places = {
      (prompt.rfind(question) + len(question), len(question)): question
      for question in self._problems
      if question in prompt
    }
    if not places:
      raise ValueError(
        f'none of the {len(self._problems)} questions of this author is in the request '
        f'{prompt[-80:]!r}; give it the problems to rewrite'
      )
    problem = self._problems[places[max(places)]]
    new = augment(problem, seed=self._seed)
    lines = [
      f'{number}. **{LABELS[kind]}**: {new[kind].question}'
      for number, kind in enumerate(_asked(prompt), start=1)
      if kind in new
    ]
    return '\n'.join(lines)


def augment(problem: Problem, *, seed: int = 0) -> dict[str, Problem]:
  """Returns new problems with answers and solutions, by kind of change.

  The draws depend on the seed and the id of the problem alone.

  Raises:
    ValueError: The problem was not made by `arithmetic`.
  """
  story = find_story(problem)
  new = {}
  for kind, change in _CHANGES.items():
    draws = Draws(f'mrjax augmenter {seed} {problem.id} {kind}')
    changed = _try(change, story, draws)
    if changed is not None:
      lines = [write_line(step, step.wordings[0]) for step in changed.steps]
      new[kind] = Problem(
        id=f'{problem.id}/{kind}-{seed}',
        question=changed.question,
        answer=str(changed.answer),
        solution='\n'.join([*lines, f'#### {changed.answer}']),
        source='arithmetic-augmented',
        level=len(changed.steps),
      )
  return new


def _try(
  change: Callable[[Story, Draws], Story], story: Story, draws: Draws
) -> Story | None:
  for _ in range(_TRIES):
    try:
      return change(story, draws)
    except Infeasible:
      continue
  return None


def _asked(prompt: str) -> list[str]:
  """Returns the kinds that a prompt lists, `1. LABEL` a line; all where it does not."""
  kinds = {label: kind for kind, label in LABELS.items()}
  listed = re.findall(r'^\d+\. ([^\n*:]+?)[ \t]*$', prompt, re.MULTILINE)
  asked = [kinds[label] for label in listed if label in kinds]
  return list(dict.fromkeys(asked)) or list(LABELS)


# --- New numbers in the story itself ----------------------------------------


def _change_numbers(story: Story, draws: Draws) -> Story:
  """Draws some of the given numbers anew.

  A number can be changed where it stands for one given amount alone and is written in
  digits: then all its places in the text mean that amount. (`half` is a 2 and `20%` a
  division by 100 that the text does not write.)
  """
  # One amount may be a term of two steps; then both hold the same object.
  terms = {id(t): t for s in story.steps for t in s.terms if t.step is None}
  given = Counter(term.value for term in terms.values())
  written = [int(number) for number in _NUMBER.findall(story.question)]
  movable = [v for v in dict.fromkeys(written) if given[v] == 1]
  chosen = [v for v in movable if draws.chance(0.7)] or [draws.pick(movable)]
  new = {v: _other(v, story.question, draws) for v in chosen}

  def rewrite(text: str) -> str:
    return _NUMBER.sub(lambda m: str(new.get(int(m[0]), m[0])), text)

  steps: list[Step] = []
  for step in story.steps:
    changed = tuple(
      Amount(new.get(t.value, t.value))
      if t.step is None
      else Amount(steps[t.step].value, t.step)
      for t in step.terms
    )
    value = apply(step.operators, [term.value for term in changed])
    wordings = tuple(map(rewrite, step.wordings))
    steps.append(
      dataclasses.replace(step, terms=changed, value=value, wordings=wordings)
    )
  question = rewrite(story.question)
  # With other numbers it may be a question of another split, which must stay unseen.
  if question == story.question or split_of(question) != split_of(story.question):
    raise Infeasible
  return Story(question, tuple(steps))


def _other(value: int, question: str, draws: Draws) -> int:
  """Returns another number of about the same size; a percentage for a percentage."""
  if re.search(rf'(?<!\d){value}%', question):
    return draws.pick([p for p in PERCENTS if p != value])
  return draws.pick([n for n in range(max(2, value // 2), 2 * value + 1) if n != value])


# --- Questions that go on from the answer -----------------------------------


def _extended(tail: Callable[[int, Draws], _Tail]) -> Callable[[Story, Draws], Story]:
  """Returns the change that asks a story's question, and then on from its answer."""

  def change(story: Story, draws: Draws) -> Story:
    text, added = tail(story.answer, draws)
    steps = list(story.steps)
    for number, (operators, numbers) in enumerate(added):
      before = Amount(steps[-1].value, len(steps) - 1)
      terms = tuple(before if n is None else Amount(n) for n in numbers)
      value = apply(operators, [term.value for term in terms])
      last = number == len(added) - 1
      wording = 'The result is {e}.' if last else 'That is {e}.'
      steps.append(Step(terms, operators, value, (wording,)))
    return Story(f'{story.question} {text}', tuple(steps))

  return change


def _fractions(answer: int, draws: Draws) -> _Tail:
  del answer  # parts that do not come out whole are drawn again
  k = draws.pick(list(PARTS))
  if draws.chance(0.4):
    return _Tail(f'What is {PARTS[k]} of that number?', (('/', (None, k)),))
  if draws.chance(0.3):
    text = f'That number is {PARTS[k]} of another number. What is the other number?'
    return _Tail(text, (('*', (None, k)),))
  p = draws.pick(PERCENTS)
  return _Tail(f'What is {p}% of that number?', (('*/', (None, p, 100)),))


def _concepts(answer: int, draws: Draws) -> _Tail:
  n = draws.between(2, max(3, answer))
  return _Tail(
    f'What is the average of that number and {n}?',
    (('+', (None, n)), ('/', (None, 2))),
  )


def _condition(answer: int, draws: Draws) -> _Tail:
  limit, n = draws.between(2, 2 * answer), draws.between(2, max(3, answer // 2))
  operator = '-' if answer > limit else '+'
  return _Tail(
    f'If that number is greater than {limit}, take {n} away from it, otherwise add {n} '
    'to it. What is the result?',
    ((operator, (None, n)),),
  )


def _complexity(answer: int, draws: Draws) -> _Tail:
  k, b = draws.between(2, 5), draws.between(2, 30)
  if draws.chance(0.5):
    a, operators = draws.between(2, answer), '-*+'
    text = f'Take {a} away from that number, multiply the rest by {k} and add {b}.'
  else:
    a, operators = draws.between(2, answer + 20), '+/-'
    text = f'Add {a} to that number, divide the sum by {k} and take {b} away.'
  steps = tuple((o, (None, n)) for o, n in zip(operators, (a, k, b), strict=True))
  return _Tail(f'{text} What is the result?', steps)


LABELS = {
  'numbers': 'Change specific numbers',
  'fractions': 'Introduce fractions or percentages',
  'concepts': 'Combine multiple concepts',
  'condition': 'Include a conditional statement',
  'complexity': 'Increase the complexity',
}
"""The kinds of change and their labels, in MuggleMath's order."""

_CHANGES: dict[str, Callable[[Story, Draws], Story]] = {
  'numbers': _change_numbers,
  'fractions': _extended(_fractions),
  'concepts': _extended(_concepts),
  'condition': _extended(_condition),
  'complexity': _extended(_complexity),
}
