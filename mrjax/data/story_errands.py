"""The errands of a story: shopping, trips and daily minutes.

Each is a plot of its own: it spends an exact number of steps and asks one question.
"""

from mrjax.data.stories import MAX_VALUE, Amount, Infeasible, Teller

_TREATS = 'a hat', 'a game', 'a shirt', 'a book', 'a toy'
# (does, do, unit, per, time, the whole of it)
_TRIPS = (
  ('reads', 'read', 'pages', 'a day', 'days', 'The book has {n} pages.'),
  ('runs', 'run', 'miles', 'a day', 'days', 'The goal is {n} miles.'),
  ('drives', 'drive', 'miles', 'an hour', 'hours', 'The trip is {n} miles.'),
  ('bikes', 'bike', 'miles', 'an hour', 'hours', 'The trip is {n} miles.'),
  ('writes', 'write', 'pages', 'an hour', 'hours', 'The book has {n} pages.'),
)


def shop(t: Teller, num_steps: int) -> None:
  """Things bought at prices, then a total, a discount, change, or a shared bill."""
  name, pronoun = t.person()
  extras = t.draws.between(0, min(2, num_steps - 1))
  budget = num_steps - extras
  # n lines take n steps and their total one more; a line alone needs no total.
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
    bought.append(f'{t.draws.pick(_TREATS)} for ${price}')
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
  asked: tuple[str, ...] = (
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


def trip(t: Teller, num_steps: int) -> None:
  """A rate kept up for some time, more on top, and what is left of a whole."""
  name, pronoun = t.person()
  verb, do, unit, per, time, whole = t.draws.pick(_TRIPS)
  done = f'{name} {verb} {{e}} {unit}.', f'That is {{e}} {unit}.'
  ending = t.draws.between(0, min(2, num_steps - 1))
  left = num_steps - ending
  amounts: list[Amount] = []
  # n legs take n steps and their total one more; a leg alone needs no total.
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
    in_all = f'In all {name} {verb} {{e}} {unit}.', f'In all that is {{e}} {unit}.'
    amount = t.compute('+' * (len(amounts) - 1), amounts, *in_all)
  if ending == 0:
    t.tell(
      f'How many {unit} does {name} {do} in all?', f'How many {unit} is that in all?'
    )
    return
  if ending == 1:
    n = amount.value + t.draws.between(2, 60)
    t.tell(whole.format(n=n))
    t.tell(
      f'How many {unit} are left?', f'How many more {unit} does {name} have to {do}?'
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


def day(t: Teller, num_steps: int) -> None:
  """The same minutes every day: the time there and back, times the days."""
  name, _ = t.person()
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
