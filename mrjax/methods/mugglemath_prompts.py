"""MuggleMath's requests for new questions: the ways to change one, and the messages.

Li et al. 2023, arXiv 2310.05506; all prompts and examples are our own wording, and the
marks of the MATH form are our own too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mrjax.records import Record


class QueryType(NamedTuple):
  """A way to change a question: its label in prompts, and an example of it."""

  label: str
  example: str


_EXAMPLE = (
  'Lena bakes 24 muffins and packs them into boxes of 6. She sells each box for $5. '
  'How much money does she make when all boxes are sold?'
)
# In the paper's order. Its best single type is the last.
QUERY_TYPES: dict[str, QueryType] = {
  'numbers': QueryType(
    'Change specific numbers',
    'Lena bakes 45 muffins and packs them into boxes of 9. She sells each box for $7. '
    'How much money does she make when all boxes are sold?',
  ),
  'fractions': QueryType(
    'Introduce fractions or percentages',
    'Lena bakes 24 muffins, but 1/4 of them burn. She packs the others into boxes of 6 '
    'and sells each box for $5. How much money does she make when all boxes are sold?',
  ),
  'concepts': QueryType(
    'Combine multiple concepts',
    'Lena bakes 24 muffins in 2 hours and packs them into boxes of 6 in another half '
    'hour. She sells each box for $5. How much money does she make per hour of work '
    'when all boxes are sold?',
  ),
  'condition': QueryType(
    'Include a conditional statement',
    'Lena bakes 24 muffins and packs them into boxes of 6. A box costs $5, but if a '
    'customer takes more than 2 boxes, every further box costs $4. How much money does '
    'she make when one customer buys all boxes?',
  ),
  'complexity': QueryType(
    'Increase the complexity',
    'Lena bakes 24 muffins on Monday and twice as many on Tuesday. She packs them into '
    'boxes of 6, keeps 2 boxes for her family and sells the others for $5 each. The '
    'ingredients of one muffin cost her $0.25. How much profit does she make?',
  ),
}

_TEACHER = (
  'You are a mathematics teacher who writes new exercises. From the question you are '
  'given, write {count} new, one for each of these ways to change it:\n{ways}\n'
  'Every new question must be complete in itself and have one numerical answer. Give '
  'no solutions.'
)
_MATH_TEACHER = (
  'You are a mathematics teacher who writes exercises for a competition class. From '
  'the problem you are given, write {count} new problems, each with a full solution. '
  'These ways to change a problem are suggestions:\n{ways}\nWhere one of them does not '
  'suit the problem, change it in a way that does and name that way instead. End each '
  'solution with the final answer in \\boxed{{}}. Write each problem in this form, its '
  'own number in all three marks:\n\n'
  '[Problem 1: Change specific numbers]\n'
  'What is the sum of the roots of $x^2 - 9x + 14 = 0$?\n'
  '[Solution 1]\n'
  'The equation factors as $(x - 2)(x - 7) = 0$, so its roots are $2$ and $7$. The sum '
  'is $2 + 7 = \\boxed{{9}}$.\n'
  '[End 1]'
)


def query_messages(
  question: str, *, types: Sequence[str] = tuple(QUERY_TYPES)
) -> list[Record]:
  """Returns the request for one new question of each type, as chat messages.

  The teacher's example is shown as a turn of its own, so that the answer takes its
  form: a numbered list with bold labels, as `parse_queries` reads it.

  Raises:
    ValueError: No types, an unknown one, or one twice.
  """
  chosen = check_types(types)
  example = '\n'.join(
    f'{number}. **{kind.label}**: {kind.example}'
    for number, kind in enumerate(chosen, start=1)
  )
  return [
    _message('system', _TEACHER.format(count=len(chosen), ways=_ways(chosen))),
    _message('user', _EXAMPLE),
    _message('assistant', example),
    _message('user', question),
  ]


def math_query_messages(
  question: str, *, types: Sequence[str] = tuple(QUERY_TYPES)
) -> list[Record]:
  """Returns the request for as many problems with solutions as there are types.

  Raises:
    ValueError: As `query_messages`.
  """
  chosen = check_types(types)
  return [
    _message('system', _MATH_TEACHER.format(count=len(chosen), ways=_ways(chosen))),
    _message('user', question),
  ]


def check_types(types: Sequence[str]) -> list[QueryType]:
  """Returns the types of these names.

  Raises:
    ValueError: No types, an unknown one, or one twice.
  """
  if not types or len(set(types)) < len(types) or not set(types) <= set(QUERY_TYPES):
    raise ValueError(
      f'types={list(types)}: want one or more of {", ".join(QUERY_TYPES)}, each once'
    )
  return [QUERY_TYPES[name] for name in types]


def _ways(chosen: Sequence[QueryType]) -> str:
  return '\n'.join(f'{n}. {kind.label}' for n, kind in enumerate(chosen, start=1))


def _message(role: str, content: str) -> Record:
  return {'role': role, 'content': content}
