"""The bounded calculator against Python's own parser and RFT's rule for annotations."""

import ast
import json
import operator
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mrjax.grading import calculator

_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
  ast.USub: operator.neg,
  ast.UAdd: operator.pos,
}


def python_value(expression: str) -> int | float:
  """The value by Python's own grammar, limited to numbers and arithmetic."""

  def value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Expression):
      return value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
      return node.value
    if isinstance(node, ast.UnaryOp):
      return _OPERATORS[type(node.op)](value(node.operand))
    if isinstance(node, ast.BinOp):
      left, right = value(node.left), value(node.right)
      if isinstance(node.op, ast.Pow) and abs(left) > 1 and right > 4096:
        raise ValueError('beyond the bound')
      result = _OPERATORS[type(node.op)](left, right)
      if isinstance(result, complex):
        raise ValueError('complex')
      if isinstance(result, int) and result.bit_length() > calculator.MAX_BITS:
        raise ValueError('beyond the bound')
      return result
    raise ValueError('not arithmetic')

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return value(ast.parse(expression.strip(), mode='eval'))


@pytest.mark.parametrize(
  ('expression', 'value'),
  [
    ('48/2', 24),
    ('-2**2', -4),
    ('2**-1', 0.5),
    ('2**3**2', 512),
    ('7//2*2%3', 0),
    ('-7//2', -4),
    ('-7%3', 2),
    ('1_000+.5+4.', 1004.5),
    ('(1+2)*(3-(4))', -3),
    ('+-+5', -5),
    ('1e3-1.5E+2', 850),
    ('0x10', 16),
    (' 3 + 4 ', 7),
    ('00', 0),
    ('05.5', 5.5),
  ],
)
def test_evaluates_as_python(expression, value):
  result = calculator.evaluate(expression)
  assert result == value
  assert type(result) is type(python_value(expression))


@pytest.mark.parametrize(
  'expression',
  [
    '',
    '05+1',
    '1,000+1',
    '5%',
    '$5',
    '2 x 3',
    '1/0',
    '1%0',
    '0**-1',
    '5 5',
    '2(3)',
    '()',
    '(1',
    '1)',
    '1__0',
    '1_',
    '٣',
    '2^3',
    'abs(-3)',
    'True+1',
    '"5"',
    '__import__("os")',
    '(-8)**.5',
    '1e308**2',
    '9**9**9**9',
    '(2**4000)**2',
    '*'.join(['9' * 100] * 9) + '*9' * 200,
    '(' * 60 + '1' + ')' * 60,
    '-' * 400 + '1',
    '1+' * 600 + '1',
    '1\n+2',
  ],
)
def test_refuses_quickly(expression):
  start = time.perf_counter()
  with pytest.raises(calculator.CalculatorError):
    calculator.evaluate(expression)
  assert time.perf_counter() - start < 0.5


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet='0123456789.+-*/%() _e', max_size=14))
@example('20**950')  # beyond the bound by ten bits
@example('2**4095')
@example('2**4096')
def test_agrees_with_python(expression):
  try:
    expected = python_value(expression)
  except (SyntaxError, ValueError, ArithmeticError):
    expected = None
  try:
    result = calculator.evaluate(expression)
  except calculator.CalculatorError:
    result = None
  assert result == expected or (result != result and expected != expected)


@pytest.mark.parametrize(
  ('equation', 'holds'),
  [
    ('48/2=24', True),
    ('1/3=0.333', True),  # |difference| 3.3e-4
    ('0=0.001', False),  # strictly less
    ('1=1.0009', True),
    ('5', False),
    ('5==5', False),
    ('2+3=5=7', True),  # a third part is ignored
    ('05+1=6', False),
    ('1,000+1=1001', False),
    ('1000=1,000', False),
    ('50%=0.5', False),
    ('$5=5', False),
    ('2x3=6', False),
    ('1/0=0', False),
    ('7//2=3', True),
    ('7%4=3', True),
    ('2**3=8', True),
    ('1_000+1=1001', True),
    ('.5+4.=4.5', True),
    ('2+2=2+2', False),  # the right side must be a number
    ('2+2= 4 ', True),
    ('=4', False),
    ('4=', False),
    ('2**1500=1', False),  # beyond the range of floats
    ('0=nan', False),
    # Left out on purpose: Python would accept these.
    ('2^3=1', False),
    ('abs(-3)=3', False),
    ('True+1=2', False),
    ('"5"=5', False),
  ],
)
def test_equation_holds(equation, holds):
  assert calculator.equation_holds(equation) is holds


def test_equations_are_found_in_order():
  text = 'a <<1+1=2>>2 b <<>> c <<a>b>> d << 3 =3>>'
  assert calculator.equations(text) == ['1+1=2', '', ' 3 =3']
  assert calculator.all_equations_hold('no annotation')
  assert calculator.all_equations_hold('<<1+1=2>> <<2*3=6>>')
  assert not calculator.all_equations_hold('<<1+1=2>> <<2*3=7>>')


def test_huge_annotation_is_false_at_once():
  assert not calculator.equation_holds('1+' * 10**6 + '1=2')


def upstream_holds(equation: str) -> bool:
  try:
    left, right = equation.split('=')[:2]
    return abs(python_value(left) - float(right)) < 1e-3
  except (ValueError, SyntaxError, ArithmeticError):
    return False


def test_gsm8k_references(shared):
  """The regression number of methods/rft.md, and agreement with Python's parser."""
  failing, total = 0, 0
  for name in ('gsm8k_train.jsonl', 'gsm8k_test.jsonl'):
    with open(shared / 'data' / name, encoding='utf-8') as file:
      for line in file:
        for equation in calculator.equations(json.loads(line)['answer']):
          total += 1
          holds = calculator.equation_holds(equation)
          assert holds == upstream_holds(equation), equation
          failing += not holds
  assert (failing, total) == (1, 27998)
