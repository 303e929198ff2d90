"""The plots of a story: chains, two people, comparisons, shopping, trips.

A plot spends an exact number of steps on moves (`story_moves`) and asks one question.
"""

from collections.abc import Callable

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

_MAX_WORDS = 60
_TREAT = 'a hat', 'a game', 'a shirt', 'a book', 'a toy'


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
  """Asks for a total or a difference: one step, and with more budget an ending of it."""
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
    t.tell(
      'They put them all together.'
      if unit != 'dollars'
      else 'They put the money together.'
    )
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
  # The others are compared with what the first person ends up with.
  _pass_events(t, holdings[0], _open(t, holdings[0], history), same_unit=True)
  if history and t.sentences[-1].startswith(('Then', 'A week')):
    pass
  for _ in range(relations):
    h = _new_holding(t, holdings[0].unit)
    _relate(t, h, t.draws.pick(holdings) if not merge else holdings[-1])
    holdings.append(h)
  if merge:
    _merge(t, holdings, merge)
  else:
    if (
      holdings[-1].amount.step != len(t.steps) - 1
      or (relations == 2
      and (t.steps[-1].terms[0].step != len(t.steps) - 2))
    ):
      raise Infeasible  # a relation that the question does not need
    moves.ask_now(t, holdings[-1])


def _shop(t: Teller, num_steps: int) -> None:
  """Things bought at prices, then a total, a discount, change, or a shared bill."""
  name, pronoun = t.person()
  # (steps of the lines bought, whether a fixed price comes on top, steps after)
  extras = t.draws.between(0, min(2, num_steps - 1))
  budget = num_steps - extras
  # n lines cost n steps and their total one more; one line has no total.
  fixed = budget == 2 or (budget > 2 and t.draws.chance(0.3))
  lines = budget if budget == 1 else budget - 1
  if lines > 3:
    raise Infeasible
  bought, costs = [], []
  for _ in range(lines):
    thing, a, p = t.thing(), t.draws.between(2, 9), t.draws.between(2, 9)
    bought.append(
      t.draws.pick([f'{a} {thing} for ${p} each', f'{a} {thing} at ${p} each'])
    )
    costs.append(t.compute('*', (a, p), f'The {thing} cost {{e}} dollars.'))
  if fixed:
    price = t.draws.between(3, 30)
    bought.append(f'{t.draws.pick(_TREAT)} for ${price}')
    costs.append(Amount(price))
  listing = bought[0]
  if len(bought) > 1:
    listing = ', '.join(bought[:-1]) + ' and ' + bought[-1]
  t.tell(f'{name} buys {listing}.')
  cost = costs[0]
  if len(costs) > 1:
    cost = t.compute(
      '+' * (len(costs) - 1),
      costs,
      'The total is {e} dollars.',
      f'{name} spends {{e}} dollars.',
    )
  asked = (
    f'How many dollars does {name} spend?',
    f'How many dollars does {name} pay?',
    'How many dollars is that in all?',
  )
  if extras == 2:
    p = t.draws.pick([p for p in (10, 20, 25, 30, 40, 50) if cost.value * p % 100 == 0])
    t.tell(f'{t.pick_subject(name, pronoun)} gets {p}% off.', f'There is {p}% off.')
    off = t.compute('*/', (cost, p, 100), 'That is {e} dollars off.')
    t.compute('-', (cost, off), f'{name} pays {{e}} dollars.')
    asked = (f'How many dollars does {name} pay?',)
  elif extras == 1:
    asked = _settle(t, name, pronoun, cost)
  t.tell(*asked)


def _settle(t: Teller, name: str, pronoun: str, cost: Amount) -> tuple[str, ...]:
  s = t.pick_subject(name, pronoun)
  kind = t.draws.pick(['change', 'left', 'coupon', 'split'])
  if kind == 'change':
    paid = t.draws.pick([n for n in (10, 20, 50, 100, 150, 200) if n > cost.value])
    t.tell(f'{s} pays with ${paid}.')
    t.compute('-', (paid, cost), f'{name} gets {{e}} dollars back.')
    return (f'How many dollars does {name} get back?',)
  if kind == 'left':
    had = cost.value + t.draws.between(2, 40)
    t.tell(f'{s} had ${had}.')
    t.compute('-', (had, cost), f'{name} has {{e}} dollars left.')
    return (f'How many dollars does {name} have left?',)
  if kind == 'coupon':
    off = t.draws.between(2, min(20, cost.value - 1))
    t.tell(f'{s} has a coupon for ${off} off.', f'{s} gets ${off} off.')
    t.compute('-', (cost, off), f'{name} pays {{e}} dollars.')
    return (f'How many dollars does {name} pay?',)
  n = t.draws.pick([n for n in range(2, 9) if cost.value % n == 0])
  t.tell(f'{n} friends share the cost equally.')
  t.compute('/', (cost, n), 'Each friend pays {e} dollars.')
  return ('How many dollars does each friend pay?',)


_TRIPS = (
  ('reads', 'pages', 'a day', 'days', 'The book has {n} pages.'),
  ('runs', 'miles', 'a day', 'days', 'The goal is {n} miles.'),
  ('drives', 'miles', 'an hour', 'hours', 'The trip is {n} miles.'),
  ('bikes', 'miles', 'an hour', 'hours', 'The trip is {n} miles.'),
  ('writes', 'pages', 'an hour', 'hours', 'The book has {n} pages.'),
)


def _trip(t: Teller, num_steps: int) -> None:
  """A rate kept up for some time, more on top, and what is left of a whole."""
  name, pronoun = t.person()
  verb, unit, per, time, whole = t.draws.pick(_TRIPS)
  done = f'{name} {verb} {{e}} {unit}.', f'That is {{e}} {unit}.'
  ending = t.draws.between(0, min(2, num_steps - 1))
  left = num_steps - ending
  amounts: list[Amount] = []
  # Legs: one step each, plus one step for their total.
  legs = left if left == 1 else left - 1
  extra = left == 2
  if legs > 3:
    raise Infeasible
  for leg in range(legs):
    a, b = t.draws.between(2, 12), t.draws.between(2, 8)
    s = name if leg == 0 else f'Then {pronoun.lower()}'
    t.tell(f'{s} {verb} {a} {unit} {per} for {b} {time}.')
    amounts.append(t.compute('*', (a, b), *done))
  if extra:
    n = t.draws.between(2, 40)
    t.tell(f'Then {pronoun.lower()} {verb} {n} more {unit}.')
    amounts.append(Amount(n))
  amount = amounts[0]
  if len(amounts) > 1:
    amount = t.compute(
      '+' * (len(amounts) - 1),
      amounts,
      *(
        f'In all {d[0].lower() if not d.startswith(name) else d[0]}{d[1:]}'
        for d in done
      ),
    )
  base = {
    'reads': 'read',
    'runs': 'run',
    'drives': 'drive',
    'bikes': 'bike',
    'writes': 'write',
  }[verb]
  if ending == 0:
    t.tell(
      f'How many {unit} does {name} {base} in all?', f'How many {unit} is that in all?'
    )
    return
  if ending == 1:
    n = amount.value + t.draws.between(2, 60)
    t.tell(whole.format(n=n))
    t.tell(
      f'How many {unit} are left?', f'How many more {unit} does {name} have to {base}?'
    )
    t.compute('-', (n, amount), f'{{e}} {unit} are left.')
    return
  pace, spell = t.draws.between(2, 12), t.draws.between(2, 9)
  n = amount.value + pace * spell
  t.tell(whole.format(n=n))
  t.tell(f'The rest goes at {pace} {unit} {per}.')
  t.tell(f'How many {time} does the rest take?')
  rest = t.compute('-', (n, amount), f'{{e}} {unit} are left.')
  t.compute('/', (rest, pace), f'The rest takes {{e}} {time}.')


def _day(t: Teller, num_steps: int) -> None:
  """The same minutes every day: the time there and back, times the days."""
  name, pronoun = t.person()
  a, b = t.draws.between(3, 20), t.draws.between(3, 20)
  t.tell(
    f'{name} walks {a} minutes to school and {b} minutes home each day.',
    f'Each day {name} plays for {a} minutes and reads for {b} minutes.',
  )
  amount = t.compute(
    '+', (a, b), 'Each day takes {e} minutes.', 'That is {e} minutes a day.'
  )
  if num_steps == 1:
    t.tell('How many minutes is that a day?')
    return
  days = t.draws.between(2, min(7, MAX_VALUE // amount.value))
  amount = t.compute('*', (amount, days), f'In {days} days that is {{e}} minutes.')
  if num_steps == 2:
    t.tell(f'How many minutes is that in {days} days?')
    return
  name2, _ = t.person()
  n = t.draws.between(2, 40)
  t.tell(f'In {days} days {name2} takes {n} minutes less than {name}.')
  t.tell(f'How many minutes does {name2} take?')
  t.compute('-', (amount, n), f'{name2} takes {{e}} minutes.')


_Plot = Callable[[Teller, int], None]
# Fewest and most steps a plot can tell, and how often it is drawn among those that can.
_PLOTS: dict[_Plot, tuple[int, int, float]] = {
  _chain: (1, 5, 3),
  _pair: (1, 6, 2.5),
  _compare: (1, 6, 2.5),
  _shop: (1, 6, 2),
  _trip: (1, 6, 1.2),
  _day: (1, 3, 0.5),
}
