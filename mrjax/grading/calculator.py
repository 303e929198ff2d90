"""Bounded arithmetic: what a model wrote inside `<<...>>` is computed, never executed.

The grammar is Python's for numbers, parentheses, unary signs and `+ - * / // % **`,
with Python's precedence and its integer and float results. Size, nesting, exponents and
the width of integers are bounded, so no text can take long or much memory.
"""

import functools
import re
from collections.abc import Sequence

MAX_CHARACTERS = 1000
MAX_DEPTH = 50
MAX_BITS = 4096  # of an integer; floats stop at 1.8e308 on their own

_TOKEN = re.compile(
  r"""[\ \t\f]*(?:
    (?P<float>(?:[0-9](?:_?[0-9])*\.(?:[0-9](?:_?[0-9])*)?|\.[0-9](?:_?[0-9])*)
      (?:[eE][+-]?[0-9](?:_?[0-9])*)?
      |[0-9](?:_?[0-9])*[eE][+-]?[0-9](?:_?[0-9])*)
    |(?P<int>0[xXoObB][0-9a-fA-F_]+|[0-9](?:_?[0-9])*)
    |(?P<op>\*\*|//|[-+*/%()])
  )""",
  re.VERBOSE,
)
_EQUATION = re.compile(r'<<([^>]*)>>')
_TOLERANCE = 1e-3  # RFT: the two sides of an annotation differ by less

_Number = int | float


class CalculatorError(ValueError):
  """An expression that is not arithmetic, has no value, or is beyond the bounds."""


def evaluate(expression: str) -> int | float:
  """Returns the value of an arithmetic expression, as Python would compute it.

  Raises:
    CalculatorError: A syntax error (a leading zero, a thousands comma, `x` as times),
      a division by zero, an overflow, a complex result, or a bound exceeded.
  """
  if len(expression) > MAX_CHARACTERS:
    raise CalculatorError(
      f'an expression of {len(expression)} characters; at most {MAX_CHARACTERS}'
    )
  parser = _Parser(_tokenize(expression.strip(' \t\f\r\n')))
  try:
    value = parser.sum(0)
  except (ArithmeticError, ValueError) as error:
    raise CalculatorError(f'{expression!r}: {error}') from None
  if parser.position != len(parser.tokens):
    raise CalculatorError(f'{expression!r} is not one arithmetic expression')
  return value


def equations(text: str) -> list[str]:
  """Returns the bodies of the `<<...>>` annotations in order of appearance."""
  return _EQUATION.findall(text)


def equation_holds(equation: str) -> bool:
  """Says whether `left=right` is true to 1e-3, by the rule of RFT (arXiv 2308.01825).

  The left side is computed, the right side must be a number; a part after a second
  `=` is ignored. What cannot be read is false.
  """
  return len(equation) <= MAX_CHARACTERS and _holds(equation)


@functools.lru_cache(maxsize=1 << 14)  # the same few sums return in most samples
def _holds(equation: str) -> bool:
  sides = equation.split('=')
  if len(sides) < 2:
    return False
  try:
    return abs(evaluate(sides[0]) - float(sides[1])) < _TOLERANCE
  except (ValueError, OverflowError):
    return False


def all_equations_hold(text: str) -> bool:
  """Says whether every annotation of a solution is true; vacuously so without any."""
  return all(equation_holds(equation) for equation in equations(text))


def _tokenize(expression: str) -> list[_Number | str]:
  tokens: list[_Number | str] = []
  position = 0
  while position < len(expression):
    match = _TOKEN.match(expression, position)
    if match is None:
      raise CalculatorError(
        f'{expression!r}: cannot read {expression[position:]!r:.40}'
      )
    kind, text = match.lastgroup, match[match.lastgroup or 0]
    try:
      if kind == 'int':
        tokens.append(int(text, 0))  # base 0: Python's literals, so `05` is refused
      else:
        tokens.append(float(text) if kind == 'float' else text)
    except ValueError:
      raise CalculatorError(f'{expression!r}: {text!r} is not a number') from None
    position = match.end()
  return tokens


class _Parser:
  """Recursive descent over Python's precedence levels; computes while it reads."""

  def __init__(self, tokens: Sequence[_Number | str]):
    self.tokens = tokens
    self.position = 0

  def peek(self) -> _Number | str | None:
    return self.tokens[self.position] if self.position < len(self.tokens) else None

  def sum(self, depth: int) -> _Number:
    value = self.product(depth)
    while (operator := self.peek()) in ('+', '-'):
      self.position += 1
      right = self.product(depth)
      value = _bounded(value + right if operator == '+' else value - right)
    return value

  def product(self, depth: int) -> _Number:
    value = self.signed(depth)
    while (operator := self.peek()) in ('*', '/', '//', '%'):
      self.position += 1
      right = self.signed(depth)
      if operator == '*':
        value = _bounded(value * right)
      elif operator == '/':
        value = value / right
      else:
        value = value // right if operator == '//' else value % right
    return value

  def signed(self, depth: int) -> _Number:
    if depth > MAX_DEPTH:
      raise CalculatorError(f'nested deeper than {MAX_DEPTH} levels')
    operator = self.peek()
    if operator in ('+', '-'):
      self.position += 1
      value = self.signed(depth + 1)
      return -value if operator == '-' else value
    return self.power(depth)

  def power(self, depth: int) -> _Number:
    base = self.atom(depth)
    if self.peek() != '**':
      return base
    self.position += 1
    return _power(base, self.signed(depth + 1))  # binds to the right: 2**3**2 is 2**9

  def atom(self, depth: int) -> _Number:
    token = self.peek()
    self.position += 1
    if token == '(':
      value = self.sum(depth + 1)
      if self.peek() != ')':
        raise CalculatorError('a parenthesis is not closed')
      self.position += 1
      return value
    if token is None or isinstance(token, str):
      raise CalculatorError(f'expected a number, found {token!r}')
    return token


def _bounded(value: _Number) -> _Number:
  if isinstance(value, int) and value.bit_length() > MAX_BITS:
    raise CalculatorError(f'an integer of more than {MAX_BITS} bits')
  return value


def _power(base: _Number, exponent: _Number) -> _Number:
  if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
    if abs(base) > 1 and base.bit_length() * exponent > 2 * MAX_BITS:
      raise CalculatorError(f'{base}**{exponent} has more than {MAX_BITS} bits')
    return _bounded(base**exponent)
  value = base**exponent
  if isinstance(value, complex):
    raise CalculatorError(f'{base}**{exponent} is not real')
  return value
