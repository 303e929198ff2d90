"""A scripted corrector for the embedded arithmetic problems: it finds errors by sums.

It stands where LEMA (arXiv 2310.20689) has GPT-4: it takes the text of a corrector's
prompt and gives the text of a correction. Being an expert on these problems alone, it
knows their graphs of steps, and follows a solution through every valid order of them.
The first step that leaves all orders is the wrong one: an equation that does not hold,
a quantity that no order computes at that place, a number from nowhere, or a final
answer that does not follow.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mrjax.data.arithmetic import (
  find_story,
  needed_steps,
  rearrangements,
  write_line,
)
from mrjax.data.stories import Step
from mrjax.grading.boxed import last_boxed
from mrjax.grading.calculator import equation_holds, equations
from mrjax.methods.lema import strip_annotations
from mrjax.methods.lema_corrections import ANSWER, Correction
from mrjax.methods.lema_prompts import correction_completion, parse_query
from mrjax.records import Problem

NOTHING_WRONG = ' There is no incorrect step.'
"""What the corrector writes about a solution in which it finds nothing."""

_NUMBER = re.compile(r'\d+(?:\.\d+)?')
_TERM = r'\(*\$?\d+(?:\.\d+)?\)*'
_VISIBLE = re.compile(
  rf'(?<![\d.])({_TERM}(?:\s*[-+*/]\s*{_TERM})+)\s*=\s*\$?(-?\d+(?:\.\d+)?)'
)
_FINAL = re.compile(rf'(?:{ANSWER}:?|####|^A:)\s*(.*?)\.?\s*$', re.MULTILINE)
_TOLERANCE = 1e-3  # as in `calculator.equation_holds`


class _State(NamedTuple):
  """A valid order of the steps, as far as a solution has followed it."""

  graph: tuple[Step, ...]
  done: frozenset[int]


class _Equation(NamedTuple):
  """A calculation by its numbers in order of size and its result."""

  numbers: tuple[float, ...]
  value: float


class ArithmeticCorrector:
  """Answers correctors' prompts about the problems it was given.

  Args:
    problems: Generated ones (`arithmetic`), as open questions or boxed.
  """

  def __init__(self, problems: Iterable[Problem]):
    self._problems = {problem.question: problem for problem in problems}

  def __call__(self, prompt: str) -> str:
    """Returns what follows `Incorrect Step:`, for the last problem of the prompt.

    Raises:
      ValueError: The prompt holds no problem, or none that this corrector knows.
    """
    question, steps = parse_query(prompt)
    problem = self._problems.get(question)
    if problem is None:
      raise ValueError(
        f'the question {question!r:.80} is none of the {len(self._problems)} problems '
        'of this corrector; give it the problems that the solutions are of'
      )
    correction = correct_solution(problem, steps)
    return NOTHING_WRONG if correction is None else correction_completion(correction)


def correct_solution(problem: Problem, steps: Sequence[str]) -> Correction | None:
  """Returns the correction of a solution, None where nothing in it is wrong.

  A solution that breaks off without an answer is wrong in its last step, if in none
  before.

  Args:
    problem: A generated arithmetic problem.
    steps: Of the solution, the final answer the last.

  Raises:
    ValueError: The problem was not made by `arithmetic`, or has no answer.
  """
  if problem.answer is None:
    raise ValueError(f'problem {problem.id!r} has no answer to correct solutions by')
  story = find_story(problem)
  states = [_State(tuple(g), frozenset()) for g in rearrangements(story.steps)]
  known = _known_numbers(problem.question, states)
  answered = False
  previous = states
  for number, step in enumerate(steps, start=1):
    previous = states
    states, fault = _follow(step, states, known)
    final = _FINAL.search(step)
    if final and not fault:
      answered = True
      if not _same(final[1], problem.answer):
        fault = 'The answer {found} does not follow from the steps.'.format(
          found=final[1] or '(none)'
        )
    if fault:
      return _corrected(problem, previous[0], number, fault, steps)
  if answered or not steps:
    return None
  fault = 'The solution breaks off here and gives no answer.'
  return _corrected(problem, previous[0], len(steps), fault, steps)


def _follow(
  step: str, states: Sequence[_State], known: set[float]
) -> tuple[list[_State], str]:
  """Returns the orders that a step goes on with, or what is wrong with it."""
  plain = strip_annotations(step)
  visible = ['='.join(sides).replace('$', '') for sides in _VISIBLE.findall(plain)]
  annotated = equations(step)
  for equation in (*annotated, *visible):
    if not equation_holds(equation):
      return [], f'The calculation {equation} is wrong.'
  read = [_read(equation) for equation in annotated or visible]
  if annotated:
    for equation in visible:
      if _read(equation) not in read:
        return [], f'The step writes {equation}, but computes {annotated[0]}.'
  found = list(states)
  named = _named(plain, states[0].graph)
  for text, computed in zip(annotated or visible, read, strict=True):
    found = [after for state in found for after in _advance(state, computed, named)]
    if not found:
      return [], _explain(text, states)
  if not read and not _FINAL.search(step):
    numbers = [float(n) for n in _NUMBER.findall(plain)]
    for n in numbers:
      if n not in known:
        return [], f'The number {n:g} does not come from the question or from a step.'
    # A plain statement may give the result of a step that was done in the head.
    for n in numbers:
      found += [after for state in found for after in _stated(state, n)]
  return found, ''


def _read(equation: str) -> _Equation:
  left, right = equation.split('=')[:2]
  return _Equation(tuple(sorted(map(float, _NUMBER.findall(left)))), float(right))


def _named(plain: str, graph: Sequence[Step]) -> set[int]:
  """Returns the steps whose words a line has: `The pears cost` is not the plums'."""
  words = _VISIBLE.sub('{e}', plain, count=1)
  return {place for place, step in enumerate(graph) if words in step.wordings}


def _advance(state: _State, equation: _Equation, named: set[int]) -> Iterator[_State]:
  """Yields the states after an equation: a step, or several computed in one line.

  Where the words of the line are those of some steps, it can be one of them only.
  """
  graph, done = state
  for place, step in enumerate(graph):
    if place in done or (named and place not in named):
      continue
    if abs(step.value - equation.value) >= _TOLERANCE:
      continue
    for numbers, computed in _ways(graph, place, done):
      if tuple(sorted(numbers)) == equation.numbers:
        yield _State(graph, done | computed)


def _ways(
  graph: Sequence[Step], place: int, done: frozenset[int]
) -> Iterator[tuple[tuple[float, ...], frozenset[int]]]:
  """Yields (numbers, steps computed) of each way to write a step as one calculation.

  A term that is the result of a step stands as that number if the step is done, and
  may stand as the calculation of it in any case.
  """

  def extend(
    terms: int,
  ) -> Iterator[tuple[tuple[float, ...], frozenset[int]]]:
    if not terms:
      yield (), frozenset({place})
      return
    term = graph[place].terms[terms - 1]
    last: list[tuple[tuple[float, ...], frozenset[int]]] = []
    if term.step is None or term.step in done:
      last.append(((float(term.value),), frozenset()))
    if term.step is not None:
      last.extend(_ways(graph, term.step, done))
    for numbers, computed in extend(terms - 1):
      for more, also in last:
        yield numbers + more, computed | also

  yield from extend(len(graph[place].terms))


def _stated(state: _State, number: float) -> Iterator[_State]:
  for place, step in enumerate(state.graph):
    ready = place not in state.done and needed_steps(step) <= state.done
    if ready and step.value == number:
      yield _State(state.graph, state.done | {place})


def _known_numbers(question: str, states: Iterable[_State]) -> set[float]:
  """Returns the numbers of the question and of every valid order."""
  known = {float(n) for n in _NUMBER.findall(question)}
  for graph, _ in states:
    for step in graph:
      known |= {float(step.value), *(float(term.value) for term in step.terms)}
  return known


def _explain(equation: str, states: Sequence[_State]) -> str:
  ready = _remaining(states[0])
  if not ready:
    return f'The calculation {equation} is not needed, all steps are done before it.'
  right = strip_annotations(write_line(ready[0], '{e}'))
  return f'The calculation {equation} does not fit the question; {right} does.'


def _remaining(state: _State) -> list[Step]:
  return [step for i, step in enumerate(state.graph) if i not in state.done]


def _corrected(
  problem: Problem,
  state: _State,
  number: int,
  explanation: str,
  steps: Sequence[str],
) -> Correction:
  """Returns the correction from step `number` on, in the style of the solution."""
  lines = [write_line(step, step.wordings[0]) for step in _remaining(state)]
  if not any('<<' in step for step in steps):
    lines = [strip_annotations(line) for line in lines]
  lines.append(f'{ANSWER} {problem.answer}.')
  return Correction(number, explanation, tuple(lines))


def _same(found: str, answer: str) -> bool:
  found = (last_boxed(found) or found).strip().strip('$')
  try:
    return abs(float(found.replace(',', '')) - float(answer)) < _TOLERANCE
  except ValueError:
    return found == answer
