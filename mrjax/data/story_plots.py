"""The plots of a story: chains, two people, comparisons, shopping, trips.

A plot spends an exact number of steps on moves (`story_moves`) and asks one question.
"""

from collections.abc import Callable

from mrjax.data import story_errands as errands
from mrjax.data import story_moves as moves
from mrjax.data.stories import (
  MAX_VALUE,
  Amount,
  Draws,
  Holding,
  Infeasible,
  Story,
  Teller,
)

_MAX_WORDS = 50


def _new_holding(t: Teller, unit: str = '') -> Holding:
  owner, pronoun = t.person()
  if not unit:
    unit = 'dollars' if t.draws.chance(0.25) else t.thing()
  return Holding(owner, pronoun, unit, Amount(0))


def _pass_events(
  t: Teller, h: Holding, budget: int, *, same_unit: bool = False
) -> None:
  """Lets exactly `budget` steps happen to the holding."""
  last = None
  while budget:
    events = moves.allowed(moves.EVENTS, budget, is_money=h.is_money)
    if same_unit:
      events = [event for event in events if event not in moves.CONVERSIONS]
    event = t.draws.pick([e for e in events if e is not last or e in moves.SHIFTS])
    event(t, h)
    budget -= moves.EVENTS[event]
    last = event


def _open(t: Teller, h: Holding, budget: int) -> int:
  """Opens the holding and returns the steps that are left."""
  opening = t.draws.pick(moves.allowed(moves.OPENINGS, budget, is_money=h.is_money))
  opening(t, h)
  return budget - moves.OPENINGS[opening]


def _end(t: Teller, h: Holding, budget: int) -> None:
  """Spends exactly `budget` (0 or 1) steps on an ending."""
  endings = moves.allowed(moves.ENDINGS, budget, is_money=h.is_money)
  t.draws.pick([e for e in endings if moves.ENDINGS[e] == budget])(t, h)


def _chain(t: Teller, num_steps: int) -> None:
  """One person, one thing after another."""
  h = _new_holding(t)
  left = _open(t, h, num_steps)
  ending = min(left, 1) if t.draws.chance(0.5) else 0
  _pass_events(t, h, left - ending)
  _end(t, h, ending)


def _merge(t: Teller, holdings: list[Holding], budget: int) -> None:
  """Asks for a total or a difference; a budget of two adds an ending."""
  unit = holdings[0].unit
  if budget == 1 and len(holdings) == 2 and t.draws.chance(0.4):
    more, less = sorted(holdings, key=lambda h: -h.amount.value)
    t.tell(f'How many more {unit} does {more.owner} have than {less.owner}?')
    t.compute(
      '-',
      (more.amount, less.amount),
      f'{more.owner} has {{e}} more {unit}.',
      f'The difference is {{e}} {unit}.',
    )
    return
  words = f'Together they have {{e}} {unit}.', f'In all they have {{e}} {unit}.'
  total = t.compute('+' * (len(holdings) - 1), [h.amount for h in holdings], *words)
  they = Holding('they', 'They', unit, total)
  if budget > 1:
    everything = 'the money' if unit == 'dollars' else 'them all'
    t.tell(f'They put {everything} together.')
    _end(t, they, 1)
  else:
    t.tell(
      f'How many {unit} do they have together?', f'How many {unit} do they have in all?'
    )


def _pair(t: Teller, num_steps: int) -> None:
  """Two people, each with a history, then both together or the difference."""
  merge = 2 if num_steps > 2 and t.draws.chance(0.4) else 1
  first = _new_holding(t)
  second = _new_holding(t, first.unit)
  share = t.draws.between(0, num_steps - merge)
  for h, budget in ((first, share), (second, num_steps - merge - share)):
    _pass_events(t, h, _open(t, h, budget), same_unit=True)
  _merge(t, [first, second], merge)


def _relate(t: Teller, h: Holding, other: Holding) -> None:
  """Says how much `h` has by comparison with `other`: one step."""
  v, unit = other.amount.value, h.unit
  many = 'much money' if h.is_money else f'many {unit}'
  s, o = t.subject(h), other.owner
  operators: str
  terms: tuple[Amount | int, ...]
  kind = t.draws.pick(['more', 'fewer', 'times', 'part', 'percent', 'more', 'fewer'])
  less = 'less' if h.is_money else 'fewer'
  if kind == 'more':
    n = t.draws.between(2, 40)
    t.tell(f'{s} has {h.much(n, " more")} than {o}.')
    operators, terms = '+', (other.amount, n)
  elif kind == 'fewer':
    n = t.draws.between(2, min(40, v - 1))
    t.tell(f'{s} has {h.much(n, f" {less}")} than {o}.')
    operators, terms = '-', (other.amount, n)
  elif kind == 'times':
    k = t.draws.pick([k for k in moves.TIMES if v * k <= MAX_VALUE])
    t.tell(f'{s} has {moves.TIMES[k]} as {many} as {o}.')
    operators, terms = '*', (other.amount, k)
  elif kind == 'part':
    k = t.draws.pick([k for k in moves.PARTS if v % k == 0])
    t.tell(f'{s} has {moves.PARTS[k]} as {many} as {o}.')
    operators, terms = '/', (other.amount, k)
  else:
    p = t.draws.pick([p for p in moves.PERCENTS if v * p % 100 == 0])
    t.tell(f'{s} has {p}% as {many} as {o}.')
    operators, terms = '*/', (other.amount, p, 100)
  h.amount = t.compute(operators, terms, *moves.has(h))


def _compare(t: Teller, num_steps: int) -> None:
  """One person, then others by comparison; asks for the last, the sum or the gap."""
  holdings = [_new_holding(t)]
  merge = 0
  if num_steps >= 2 and t.draws.chance(0.6):
    merge = 2 if num_steps >= 3 and t.draws.chance(0.4) else 1
  relations = 2 if num_steps - merge >= 2 and t.draws.chance(0.5) else 1
  history = num_steps - merge - relations
  # The next is compared with what the first ends up with, and so on.
  _pass_events(t, holdings[0], _open(t, holdings[0], history), same_unit=True)
  for _ in range(relations):
    h = _new_holding(t, holdings[0].unit)
    _relate(t, h, holdings[-1])
    holdings.append(h)
  if merge:
    _merge(t, holdings, merge)
    return
  moves.ask_now(t, holdings[-1])


_Plot = Callable[[Teller, int], None]
# Fewest and most steps a plot can tell, and how often it is drawn among those that can.
_PLOTS: dict[_Plot, tuple[int, int, float]] = {
  _chain: (1, 5, 3),
  _pair: (1, 6, 2.5),
  _compare: (1, 6, 2.5),
  errands.shop: (1, 6, 2),
  errands.trip: (1, 6, 1.2),
  errands.day: (1, 3, 0.5),
}


def make_story(draws: Draws, num_steps: int) -> Story:
  """Returns a random story of exactly `num_steps` steps, 1 to 6."""
  plots = {
    plot: w for plot, (low, high, w) in _PLOTS.items() if low <= num_steps <= high
  }
  while True:
    teller = Teller(draws)
    try:
      draws.weighted(plots)(teller, num_steps)
    except Infeasible:
      continue
    question = ' '.join(teller.sentences)
    if len(question.split()) <= _MAX_WORDS:
      return Story(question, tuple(teller.steps))
