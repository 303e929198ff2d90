r"""The annotated examples a corrector is shown, four for each task of LEMA.

Written for this project; as in the paper the first wrong steps are 2, 2, 1, 3 for
GSM8K and 3, 3, 5, 1 for MATH, and CSQA has no step numbers. Every explanation is of its
own example (one of the published MATH prompt belongs to another).
"""

from mrjax.methods.lema import WrongPath
from mrjax.methods.lema_corrections import Correction
from mrjax.methods.lema_pairs import Pair
from mrjax.records import Problem


def _pair(
  task: str,
  question: str,
  answer: str,
  wrong: tuple[str, ...],
  step: int | None,
  explanation: str,
  solution: tuple[str, ...],
  options: tuple[str, ...] | None = None,
) -> Pair:
  problem = Problem(id='example', question=question, answer=answer, options=options)
  return Pair(WrongPath(problem, task, wrong), Correction(step, explanation, solution))


_GSM8K = (
  _pair(
    'gsm8k',
    'A bakery bakes 12 trays of 15 rolls. It sells 130 rolls in the morning and half '
    'of the rest in the afternoon. How many rolls are left?',
    '25',
    (
      '12 trays of 15 rolls are 12 * 15 = 180 rolls.',
      'After the morning 180 - 130 = 60 rolls are left.',
      'In the afternoon half of them are sold, so 60 / 2 = 30 rolls are left.',
      'The answer is 30.',
    ),
    2,
    'The subtraction is wrong: taking 130 from 180 leaves 50, not 60.',
    (
      'After the morning 180 - 130 = 50 rolls are left.',
      'In the afternoon half of them are sold, so 50 / 2 = 25 rolls are left.',
      'The answer is 25.',
    ),
  ),
  _pair(
    'gsm8k',
    'Nora reads 14 pages on every day from Monday to Friday and twice as many on every '
    'day of the weekend. How many pages does she read in the whole week?',
    '126',
    (
      'From Monday to Friday she reads 5 * 14 = 70 pages.',
      'On the weekend she reads 2 * 14 = 28 pages.',
      'In the whole week she reads 70 + 28 = 98 pages.',
      'The answer is 98.',
    ),
    2,
    'The 28 pages are those of one day, but the weekend has two days.',
    (
      'On a day of the weekend she reads 2 * 14 = 28 pages, so on both days she reads '
      '2 * 28 = 56 pages.',
      'In the whole week she reads 70 + 56 = 126 pages.',
      'The answer is 126.',
    ),
  ),
  _pair(
    'gsm8k',
    'A tank for 240 liters is one third full. How many liters have to be added until '
    'it is three quarters full?',
    '100',
    (
      'One third of the tank is 240 / 4 = 60 liters.',
      'Three quarters of the tank are 240 * 3 / 4 = 180 liters.',
      'So 180 - 60 = 120 liters have to be added.',
      'The answer is 120.',
    ),
    1,
    'A third is found by dividing by 3, but the step divides by 4.',
    (
      'One third of the tank is 240 / 3 = 80 liters.',
      'Three quarters of the tank are 240 * 3 / 4 = 180 liters.',
      'So 180 - 80 = 100 liters have to be added.',
      'The answer is 100.',
    ),
  ),
  _pair(
    'gsm8k',
    'A shirt costs $40 and a pair of trousers costs $15 more. In the sale both are 20% '
    'cheaper. How many dollars do they cost together in the sale?',
    '76',
    (
      'The trousers cost 40 + 15 = 55 dollars.',
      'Without the sale both cost 40 + 55 = 95 dollars.',
      'In the sale they cost 95 - 20 = 75 dollars.',
      'The answer is 75.',
    ),
    3,
    'The price falls by 20 percent of itself, but the step takes away 20 dollars.',
    (
      'The sale takes off 95 * 20 / 100 = 19 dollars.',
      'In the sale they cost 95 - 19 = 76 dollars.',
      'The answer is 76.',
    ),
  ),
)

_MATH = (
  _pair(
    'math',
    'What is the sum of all even positive divisors of 28?',
    '48',
    (
      r'Since $28 = 2^2 \cdot 7$, its positive divisors are $1, 2, 4, 7, 14, 28$.',
      'The even ones are $2, 4, 14$ and $28$.',
      r'Their sum is $2 + 4 + 14 + 28 = \boxed{46}$.',
      'The answer is 46.',
    ),
    3,
    'The four numbers are the right ones, but they add up to 48: $2 + 4 = 6$, '
    '$6 + 14 = 20$ and $20 + 28 = 48$.',
    (r'Their sum is $2 + 4 + 14 + 28 = \boxed{48}$.', 'The answer is 48.'),
  ),
  _pair(
    'math',
    'Find the distance between the points $(2, -1)$ and $(-4, 7)$.',
    '10',
    (
      'The first coordinates differ by $2 - (-4) = 6$.',
      'The second coordinates differ by $7 - (-1) = 8$.',
      r'So the distance is $6 + 8 = \boxed{14}$.',
      'The answer is 14.',
    ),
    3,
    'The two differences are the legs of a right triangle, and the distance is its '
    'hypotenuse, not the sum of the legs.',
    (
      r'So the distance is $\sqrt{6^2 + 8^2} = \sqrt{100} = \boxed{10}$.',
      'The answer is 10.',
    ),
  ),
  _pair(
    'math',
    r'Solve $9 \cdot 3^{2x} = 27^{x-1}$ for $x$.',
    '5',
    (
      'We write all powers with the base 3, where $9 = 3^2$ and $27 = 3^3$.',
      r'The left side is $3^2 \cdot 3^{2x} = 3^{2x+2}$.',
      'The right side is $3^{3(x-1)} = 3^{3x-3}$.',
      'The exponents are equal, so $2x + 2 = 3x - 3$.',
      r'It follows that $x = 2 - 3 = \boxed{-1}$.',
      'The answer is -1.',
    ),
    5,
    'After taking $2x$ from both sides, $2 = x - 3$ is left; then 3 is to be added to '
    'both sides, but the step takes it away.',
    (
      r'Taking $2x$ from both sides gives $2 = x - 3$, so $x = 2 + 3 = \boxed{5}$.',
      'The answer is 5.',
    ),
  ),
  _pair(
    'math',
    'In how many ways can a committee of 3 be chosen from 8 people?',
    '56',
    (
      r'There are $8 \cdot 7 \cdot 6$ ways to name three people in turn, and each of '
      'them is another committee.',
      r'So the number of committees is $8 \cdot 7 \cdot 6 = \boxed{336}$.',
      'The answer is 336.',
    ),
    1,
    'The same three people named in another order are the same committee, so every '
    'committee is counted $3! = 6$ times.',
    (
      r'There are $8 \cdot 7 \cdot 6 = 336$ ways to name three people in turn, and '
      'each committee is named in $3! = 6$ of them.',
      r'So the number of committees is $\frac{336}{6} = \boxed{56}$.',
      'The answer is 56.',
    ),
  ),
)

_REASONS = 'Reasons and Final Answer:'

_CSQA = (
  _pair(
    'csqa',
    'What do careful cooks do with their hands right before they start to cook?',
    'wash them',
    (
      'clap them: Clapping is a sign of applause.',
      'wash them: Hands are washed when they are dirty.',
      'hide them: Hidden hands cannot be used.',
      'raise them: Raised hands ask for attention.',
      'rest them: Rested hands can work for long.',
      _REASONS,
      'Cooking is long and hard work, so a careful cook rests the hands first.',
      'The answer is rest them.',
    ),
    None,
    'The answer thinks of long work only. A careful cook cares that the food stays '
    'clean, and hands that look clean can carry germs too.',
    (
      'clap them: Clapping is a sign of applause and does not help with cooking.',
      'wash them: Washed hands keep dirt and germs out of the food.',
      'hide them: Hidden hands cannot be used for cooking.',
      'raise them: Raised hands ask for attention, which no cook needs.',
      'rest them: Resting is pleasant, but it does not make the food better.',
      _REASONS,
      'Being careful in a kitchen means first of all to be clean.',
      'The answer is wash them.',
    ),
    ('clap them', 'wash them', 'hide them', 'raise them', 'rest them'),
  ),
  _pair(
    'csqa',
    'Where would you look for a spare wheel during a journey by car?',
    'trunk',
    (
      'garage: A garage keeps wheels and tools.',
      'trunk: A trunk holds the bags of the travellers.',
      'roof: A roof can carry boxes.',
      'field: A field lies beside the road.',
      'seat: A seat is for people.',
      _REASONS,
      'Wheels that are not in use are kept in a garage.',
      'The answer is garage.',
    ),
    None,
    'The question is about a journey. A garage at home is out of reach then, while the '
    'spare wheel has to travel along.',
    (
      'garage: A garage keeps wheels, but it stays at home.',
      'trunk: A trunk travels along, and the spare wheel lies under its floor.',
      'roof: A roof can carry boxes, but a wheel is seldom put there.',
      'field: A field lies beside the road and holds no wheels.',
      'seat: A seat is for people.',
      _REASONS,
      'On a journey only what is in the car can be used, and the wheel is kept in the '
      'back of it.',
      'The answer is trunk.',
    ),
    ('garage', 'trunk', 'roof', 'field', 'seat'),
  ),
  _pair(
    'csqa',
    'The lake froze overnight. What did the temperature do?',
    'drop',
    (
      'drop: A dropping temperature makes it colder.',
      'rise: A rising temperature changes the state of water.',
      'sing: A temperature makes no sound.',
      'stay: A steady temperature changes little.',
      'boil: Water boils at a high temperature.',
      _REASONS,
      'The state of the water changed, so the temperature went up.',
      'The answer is rise.',
    ),
    None,
    'A rising temperature does change the state of water, but it melts ice or boils '
    'water. Water turns to ice when it gets colder.',
    (
      'drop: A dropping temperature makes it colder, and cold water turns to ice.',
      'rise: A rising temperature melts ice.',
      'sing: A temperature makes no sound.',
      'stay: A steady temperature leaves the lake as it was.',
      'boil: Water boils at a high temperature, a temperature does not boil.',
      _REASONS,
      'The lake was water and became ice, which takes cold.',
      'The answer is drop.',
    ),
    ('drop', 'rise', 'sing', 'stay', 'boil'),
  ),
  _pair(
    'csqa',
    'Why would somebody borrow a book from a library and not buy it?',
    'to save money',
    (
      'to own it: An owner may keep a book.',
      'to save money: Bought books have a price.',
      'to sell it: A seller gets money.',
      'to read: Books are read.',
      'to write: Writers make books.',
      _REASONS,
      'Whoever borrows a book wants to read it.',
      'The answer is to read.',
    ),
    None,
    'Reading is the reason to want a book at all, bought or borrowed. The question is '
    'why borrowing is chosen over buying.',
    (
      'to own it: A borrowed book belongs to the library.',
      'to save money: Borrowing costs little or nothing, buying costs the price.',
      'to sell it: A borrowed book may not be sold.',
      'to read: A bought book can be read as well.',
      'to write: Writing needs no borrowed book.',
      _REASONS,
      'The difference between borrowing and buying is the price.',
      'The answer is to save money.',
    ),
    ('to own it', 'to save money', 'to sell it', 'to read', 'to write'),
  ),
)

EXAMPLES: dict[str, tuple[Pair, ...]] = {
  'gsm8k': _GSM8K,
  'math': _MATH,
  'csqa': _CSQA,
}
"""The examples by task."""
