"""Word problems as graphs of arithmetic steps: the wording and the composition.

A story is told sentence by sentence while its graph of steps grows: who holds how much
of what, what happens to it, and what is asked. Every move below adds sentences and
steps for one or two operations, so problems of any length compose from the same moves.
The vocabulary is small on purpose: a tiny model with a tiny tokenizer can read it.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar('T')

MAX_VALUE = 200  # quantities stay small enough for a tiny model to compute with

# Short words: a tokenizer of 512 entries holds most of them whole.
_MEN = 'Tom Ben Sam Leo Max Dan Ian Ron Ken Ali Ray Jon'
_WOMEN = 'Ann Mia Eva Zoe Amy Ivy Kim Sue Meg Liz Joy Ada'
_OBJECTS = (
  'pens cards books coins eggs stamps shells cakes balls beads toys cups plums pears '
  'nuts hats keys rings kites stones dolls figs limes pins buns pies masks bells lamps '
  'apples'
)
_PEOPLE = tuple(
  (name, pronoun)
  for names, pronoun in ((_MEN, 'He'), (_WOMEN, 'She'))
  for name in names.split()
)
_THINGS = tuple(_OBJECTS.split())


class Infeasible(Exception):
  """No small whole numbers fit the move; the story is started again."""


class Draws:
  """Random draws that are the same on every Python version.

  Only `random()` of a string-seeded generator is used: the `random` module promises its
  stream to stay as it is, and promises nothing of the kind for `choice` or `shuffle`.
  """

  def __init__(self, seed: str):
    self._random = random.Random(seed).random

  def below(self, bound: int) -> int:
    """Returns an integer in [0, bound)."""
    return int(self._random() * bound)

  def between(self, low: int, high: int) -> int:
    """Returns an integer in [low, high]; infeasible when there is none."""
    if high < low:
      raise Infeasible
    return low + self.below(high - low + 1)

  def chance(self, probability: float) -> bool:
    return self._random() < probability

  def pick(self, items: Sequence[T]) -> T:
    if not items:
      raise Infeasible
    return items[self.below(len(items))]

  def shuffled(self, items: Sequence[T]) -> list[T]:
    """Returns the items in random order (Fisher-Yates)."""
    shuffled = list(items)
    for i in range(len(shuffled) - 1, 0, -1):
      j = self.below(i + 1)
      shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled

  def weighted(self, weights: Mapping[T, float]) -> T:
    """Returns a key with probability proportional to its weight."""
    point = self._random() * sum(weights.values())
    for key, weight in weights.items():
      point -= weight
      if point < 0:
        return key
    return key


class Amount(NamedTuple):
  """A number of the story: given (`step` is None) or the result of a step."""

  value: int
  step: int | None = None


@dataclasses.dataclass(frozen=True)
class Step:
  """One calculation: `terms` joined by `operators`, read from the left.

  `wordings` are lines with `{e}` for the annotated expression. `shift` marks the gain
  or loss of a given number, which may trade places with its neighbours of that kind.
  """

  terms: tuple[Amount, ...]
  operators: str
  value: int
  wordings: tuple[str, ...]
  shift: bool = False


@dataclasses.dataclass(frozen=True)
class Story:
  """A question and the graph of its steps, in the order told; the last step answers."""

  question: str
  steps: tuple[Step, ...]

  @property
  def answer(self) -> int:
    return self.steps[-1].value


def apply(operators: str, values: Sequence[int]) -> int:
  """Returns `v0 op v1 op v2...` from the left; every result is a whole number >= 2.

  Raises:
    Infeasible: Some result is not, or is too large to be asked of a tiny model.
  """
  result = values[0]
  for operator, value in zip(operators, values[1:], strict=True):
    if operator == '+':
      result += value
    elif operator == '-':
      result -= value
    elif operator == '*':
      result *= value
    elif result % value:
      raise Infeasible
    else:
      result //= value
    if result < 2:  # 'has 1 apples' would be wrong English
      raise Infeasible
  if result > MAX_VALUE:
    raise Infeasible
  return result


@dataclasses.dataclass
class Holding:
  """What the story follows: how much of a unit somebody has."""

  owner: str
  pronoun: str
  unit: str  # 'apples'; 'dollars' for money
  amount: Amount

  @property
  def is_money(self) -> bool:
    return self.unit == 'dollars'

  @property
  def does(self) -> str:
    return 'do' if self.owner == 'they' else 'does'

  def much(self, number: int, more: str = '') -> str:
    return f'${number}{more}' if self.is_money else f'{number}{more} {self.unit}'

  @property
  def all_of_it(self) -> str:
    return 'the money' if self.is_money else f'the {self.unit}'


class Teller:
  """A story while it is told."""

  def __init__(self, draws: Draws):
    self.draws = draws
    self.sentences: list[str] = []
    self.steps: list[Step] = []
    self.people = draws.shuffled(_PEOPLE)[:4]
    self.things = draws.shuffled(_THINGS)[:4]
    self._last_subject = ''

  def tell(self, *wordings: str) -> None:
    self.sentences.append(self.draws.pick(wordings))

  def subject(self, holding: Holding, *, first: bool = True) -> str:
    """Returns the name, or the pronoun where the last subject was the same person.

    `first` says whether the word begins its sentence.
    """
    again = self._last_subject == holding.owner
    self._last_subject = holding.owner
    if holding.owner == 'they':
      return 'They'
    pronoun = holding.pronoun if first else holding.pronoun.lower()
    return pronoun if again and self.draws.chance(0.6) else holding.owner

  def compute(
    self,
    operators: str,
    terms: Sequence[Amount | int],
    *wordings: str,
    shift: bool = False,
  ) -> Amount:
    amounts = tuple(t if isinstance(t, Amount) else Amount(t) for t in terms)
    value = apply(operators, [amount.value for amount in amounts])
    self.steps.append(Step(amounts, operators, value, wordings, shift))
    return Amount(value, len(self.steps) - 1)

  def pick_subject(self, name: str, pronoun: str) -> str:
    return pronoun if self.draws.chance(0.6) else name

  def person(self) -> tuple[str, str]:
    return self.people.pop()

  def thing(self) -> str:
    return self.things.pop()
