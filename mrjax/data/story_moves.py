"""The moves of a story: how an amount opens, changes and is asked for.

Every move adds its sentences and its one or two steps to a `Teller`, and moves the
`Holding` on; the tables at the end give each move's number of steps.
"""

from collections.abc import Callable

from mrjax.data.stories import MAX_VALUE, Amount, Holding, Teller

_CONTAINERS = ['boxes', 'bags', 'packs', 'baskets', 'jars']
_TREATS = ['a hat', 'a game', 'a ticket', 'a shirt', 'lunch', 'a toy', 'a book']
_GOALS = ['a bike', 'a game', 'a watch', 'a tent', 'a chair', 'a camera']
PARTS = {2: 'half', 3: 'a third', 4: 'a quarter', 5: 'a fifth'}
TIMES = {2: 'twice', 3: '3 times', 4: '4 times', 5: '5 times'}
PERCENTS = (10, 20, 25, 30, 40, 50, 60, 75)


def has(holding: Holding) -> tuple[str, ...]:
  """Returns the lines that state what a person has."""
  return (
    f'{holding.owner} has {{e}} {holding.unit}.',
    f'Now {holding.owner} has {{e}} {holding.unit}.',
  )


# --- Openings: how the first amount of a holding comes about -------------------------


def _open_given(t: Teller, h: Holding) -> None:
  n = t.draws.between(4, 60)
  h.amount = Amount(n)
  s = t.subject(h)
  if h.is_money:
    t.tell(f'{s} has ${n}.', f'{s} saved ${n}.')
  else:
    t.tell(f'{s} has {n} {h.unit}.', f'{s} starts with {n} {h.unit}.')


def _open_packs(t: Teller, h: Holding) -> None:
  a, b = t.draws.between(2, 9), t.draws.between(2, 12)
  s, box = t.subject(h), t.draws.pick(_CONTAINERS)
  if h.is_money:
    thing = t.thing()
    t.tell(f'{s} sells {a} {thing} for ${b} each.')
    words = (f'{h.owner} gets {{e}} dollars.', f'The {thing} bring {{e}} dollars.')
  else:
    t.tell(
      f'{s} has {a} {box} of {b} {h.unit} each.',
      f'{s} buys {a} {box} with {b} {h.unit} in each.',
      f'{s} fills {a} {box} with {b} {h.unit} each.',
    )
    words = (f'{h.owner} has {{e}} {h.unit}.', f'The {box} hold {{e}} {h.unit}.')
  h.amount = t.compute('*', (a, b), *words)


def _open_rate(t: Teller, h: Holding) -> None:
  a, b = t.draws.between(2, 12), t.draws.between(2, 9)
  s = t.subject(h)
  if h.is_money:
    t.tell(
      f'{s} earns ${a} an hour and works {b} hours.',
      f'{s} works {b} hours at ${a} an hour.',
      f'{s} saves ${a} a week for {b} weeks.',
    )
    words = (f'{h.owner} gets {{e}} dollars.', f'{h.owner} has {{e}} dollars.')
  else:
    t.tell(
      f'{s} makes {a} {h.unit} a day for {b} days.',
      f'For {b} days {s} finds {a} {h.unit} each day.',
    )
    words = (f'{h.owner} has {{e}} {h.unit}.', f'In {b} days that is {{e}} {h.unit}.')
  h.amount = t.compute('*', (a, b), *words)


def _open_two_days(t: Teller, h: Holding) -> None:
  a, b = t.draws.between(3, 40), t.draws.between(3, 40)
  s = t.subject(h)
  get = 'earns' if h.is_money else t.draws.pick(['finds', 'makes', 'buys'])
  t.tell(
    f'{s} {get} {h.much(a)} on Monday and {h.much(b)} on Tuesday.',
    f'On Monday {s} {get} {h.much(a)}, on Tuesday {h.much(b)}.',
  )
  h.amount = t.compute('+', (a, b), *has(h), f'In two days that is {{e}} {h.unit}.')


def _open_shifts(t: Teller, h: Holding) -> None:  # 2 steps, money only
  a, b, c = t.draws.between(2, 6), t.draws.between(2, 6), t.draws.between(2, 9)
  s = t.subject(h)
  t.tell(
    f'{s} works {a} hours a day for {b} days at ${c} an hour.',
    f'For {b} days {s} works {a} hours a day and earns ${c} an hour.',
  )
  hours = t.compute('*', (a, b), f'{h.owner} works {{e}} hours.', 'That is {e} hours.')
  h.amount = t.compute('*', (hours, c), f'{h.owner} earns {{e}} dollars.')


# --- Events: what happens to an amount ------------------------------------------------


def _gain(t: Teller, h: Holding) -> None:
  n = t.draws.between(2, 40)
  s = t.subject(h)
  if h.is_money:
    t.tell(f'{s} earns {h.much(n, " more")}.', f'{s} finds {h.much(n, " more")}.')
  else:
    verb = t.draws.pick(['buys', 'finds', 'gets'])
    t.tell(f'{s} {verb} {h.much(n, " more")}.')
  h.amount = t.compute('+', (h.amount, n), *has(h), shift=True)


def _lose(t: Teller, h: Holding) -> None:
  n = t.draws.between(2, min(40, h.amount.value - 2))
  s = t.subject(h)
  if h.is_money:
    t.tell(f'{s} spends ${n} on {t.draws.pick(_TREATS)}.', f'{s} pays ${n} for lunch.')
  else:
    t.tell(
      f'{s} loses {h.much(n)}.',
      f'{s} sells {h.much(n)}.',
      f'{s} gives {h.much(n)} to a friend.',
    )
  h.amount = t.compute('-', (h.amount, n), *has(h), shift=True)


def _lose_half(t: Teller, h: Holding) -> None:
  s = t.subject(h)
  verb = 'spends' if h.is_money else t.draws.pick(['gives away', 'sells', 'loses'])
  t.tell(f'{s} {verb} half of {h.all_of_it}.')
  h.amount = t.compute('/', (h.amount, 2), *has(h))


def _multiply(t: Teller, h: Holding) -> None:
  k = t.draws.between(2, 4)
  s = t.subject(h, first=False)
  many = 'much' if h.is_money else 'many'
  unit = 'money' if h.is_money else h.unit
  t.tell(f'A week later {s} has {TIMES[k]} as {many} {unit}.')
  h.amount = t.compute('*', (h.amount, k), *has(h))


def _keep_part(t: Teller, h: Holding) -> None:
  k = t.draws.pick([k for k in (3, 4, 5) if h.amount.value % k == 0])
  s = t.subject(h)
  away = 'spends' if h.is_money else 'gives away'
  t.tell(f'{s} keeps {PARTS[k]} of {h.all_of_it} and {away} the rest.')
  h.amount = t.compute('/', (h.amount, k), *has(h), f'{h.owner} keeps {{e}} {h.unit}.')


def _lose_part(t: Teller, h: Holding) -> None:  # 2 steps
  v = h.amount.value
  s = t.subject(h)
  verb = 'spends' if h.is_money else t.draws.pick(['gives away', 'sells', 'loses'])
  if t.draws.chance(0.5):
    k = t.draws.pick([k for k in (3, 4, 5) if v % k == 0])
    t.tell(f'{s} {verb} {PARTS[k]} of {h.all_of_it}.')
    part = t.compute('/', (h.amount, k), f'{h.owner} {verb} {{e}} {h.unit}.')
  else:
    p = t.draws.pick([p for p in PERCENTS if v * p % 100 == 0])
    t.tell(f'{s} {verb} {p}% of {h.all_of_it}.')
    part = t.compute('*/', (h.amount, p, 100), f'{h.owner} {verb} {{e}} {h.unit}.')
  h.amount = t.compute('-', (h.amount, part), *has(h))


def _sell_all(t: Teller, h: Holding) -> None:
  p = t.draws.between(2, min(9, MAX_VALUE // h.amount.value))
  s = t.subject(h)
  t.tell(f'{s} sells all the {h.unit} for ${p} each.')
  h.unit = 'dollars'
  h.amount = t.compute('*', (h.amount, p), f'{h.owner} gets {{e}} dollars.', *has(h))


def _spend_all(t: Teller, h: Holding) -> None:
  p = t.draws.pick([p for p in range(2, 13) if h.amount.value % p == 0])
  s, thing = t.subject(h), t.thing()
  t.tell(f'{s} spends all the money on {thing} that cost ${p} each.')
  h.unit = thing
  h.amount = t.compute('/', (h.amount, p), f'{h.owner} gets {{e}} {thing}.', *has(h))


def _sell_bags(t: Teller, h: Holding) -> None:  # 2 steps
  n = t.draws.pick([n for n in range(2, 13) if h.amount.value % n == 0])
  s, box = t.subject(h), t.draws.pick(_CONTAINERS)
  p = t.draws.between(2, 12)
  t.tell(f'{s} puts the {h.unit} in {box} of {n} and sells the {box} for ${p} each.')
  bags = t.compute('/', (h.amount, n), f'{h.owner} fills {{e}} {box}.')
  h.unit = 'dollars'
  h.amount = t.compute('*', (bags, p), f'{h.owner} gets {{e}} dollars.')


# --- Endings: a last operation with its own question ---------------------------------


def ask_now(t: Teller, h: Holding) -> None:
  """Asks for the amount as it stands; costs no step."""
  who, does = h.owner, h.does
  t.tell(
    f'How many {h.unit} {does} {who} have?',
    f'How many {h.unit} {does} {who} have now?',
    f'How many {h.unit} {does} {who} have in the end?',
  )


def _share(t: Teller, h: Holding) -> None:
  n = t.draws.pick([n for n in range(2, 11) if h.amount.value % n == 0])
  s = t.subject(h)
  share = 'share' if h.owner == 'they' else 'shares'
  t.tell(f'{s} {share} {h.all_of_it} equally among {n} friends.')
  t.tell(
    f'How many {h.unit} does each friend get?', f'How many {h.unit} are there for each?'
  )
  t.compute('/', (h.amount, n), f'Each friend gets {{e}} {h.unit}.')


def _bag(t: Teller, h: Holding) -> None:
  n = t.draws.pick([n for n in range(2, 13) if h.amount.value % n == 0])
  s, box = t.subject(h), t.draws.pick(_CONTAINERS)
  put, fill = ('put', 'fill') if h.owner == 'they' else ('puts', 'fills')
  t.tell(f'{s} {put} the {h.unit} in {box} of {n}.')
  t.tell(
    f'How many {box} {h.does} {h.owner} fill?',
    f'How many {box} {h.does} {h.owner} need?',
  )
  name = 'They' if h.owner == 'they' else h.owner
  t.compute('/', (h.amount, n), f'{name} {fill} {{e}} {box}.')


def _need(t: Teller, h: Holding) -> None:
  goal = h.amount.value + t.draws.between(2, 40)
  s = t.subject(h)
  want, needs = ('want', 'need') if h.owner == 'they' else ('wants', 'needs')
  if h.is_money:
    treat = t.draws.pick(_GOALS)
    t.tell(
      f'{s} {want} {treat} for ${goal}.', f'{s} {want} {treat} that costs ${goal}.'
    )
  else:
    t.tell(f'{s} {want} {goal} {h.unit}.', f'{s} {want} to have {goal} {h.unit}.')
  t.tell(f'How many more {h.unit} {h.does} {h.owner} need?')
  name = 'They' if h.owner == 'they' else h.owner
  t.compute('-', (goal, h.amount), f'{name} {needs} {{e}} more {h.unit}.')


def _red(t: Teller, h: Holding) -> None:
  v = h.amount.value
  colour = t.draws.pick(['red', 'blue', 'green'])
  operators: str
  terms: tuple[Amount | int, ...]
  if t.draws.chance(0.5):
    k = t.draws.pick([k for k in PARTS if v % k == 0])
    part = PARTS[k]
    t.tell(f'{part[0].upper()}{part[1:]} of the {h.unit} are {colour}.')
    operators, terms = '/', (h.amount, k)
  else:
    p = t.draws.pick([p for p in PERCENTS if v * p % 100 == 0])
    t.tell(f'{p}% of the {h.unit} are {colour}.')
    operators, terms = '*/', (h.amount, p, 100)
  t.tell(f'How many {h.unit} are {colour}?', f'How many {colour} {h.unit} are there?')
  t.compute(operators, terms, f'{{e}} {h.unit} are {colour}.')


Move = Callable[[Teller, Holding], None]

# Steps each move takes.
OPENINGS: dict[Move, int] = {
  _open_given: 0,
  _open_packs: 1,
  _open_rate: 1,
  _open_two_days: 1,
  _open_shifts: 2,
}
EVENTS: dict[Move, int] = {
  _gain: 1,
  _lose: 1,
  _lose_half: 1,
  _multiply: 1,
  _keep_part: 1,
  _lose_part: 2,
  _sell_all: 1,
  _spend_all: 1,
  _sell_bags: 2,
}
ENDINGS: dict[Move, int] = {ask_now: 0, _share: 1, _bag: 1, _need: 1, _red: 1}
SHIFTS = {_gain, _lose}
CONVERSIONS = {_sell_all, _spend_all, _sell_bags}
_FOR_MONEY = {_open_shifts, _spend_all}
_FOR_THINGS = {_sell_all, _sell_bags, _bag, _red}


def allowed(table: dict[Move, int], budget: int, *, is_money: bool) -> list[Move]:
  """Returns the moves of the table that take at most `budget` steps and fit."""
  barred = _FOR_THINGS if is_money else _FOR_MONEY
  return [move for move, cost in table.items() if cost <= budget and move not in barred]
