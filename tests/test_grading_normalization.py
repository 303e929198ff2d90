r"""The normal forms of answers, written from the published rules and their oddities."""

import pytest

from mrjax.grading import normalization
from mrjax.grading.boxed import last_boxed, last_braced


@pytest.mark.parametrize(
  ('answer', 'form'),
  [
    (r'\dfrac{3}{4}', r'\frac{3}{4}'),
    (r'\tfrac34', r'\frac{3}{4}'),
    (r'\frac1{72}', r'\frac{1}{72}'),
    (r'\frac{1}2', r'\frac{1}2'),
    (r'\frac\pi2', r'\frac{\}{p}i2'),  # kept: one character each
    (r'\frac1', r'\frac1'),
    (r'3\sqrt13', r'3\sqrt{1}3'),
    (r'\sqrt{13}', r'\sqrt{13}'),
    ('1/2', r'\frac{1}{2}'),
    ('-3/4', r'\frac{-3}{4}'),
    ('a/b', 'a/b'),
    ('01/2', '01/2'),
    ('1/2/3', '1/2/3'),
    ('0.5', r'\frac{1}{2}'),
    ('.5', r'\frac{1}{2}'),
    ('{.7}', '{0.7}'),
    ('x = .25', '0.25'),  # the space goes in front of the dot rule
    ('x=5', '5'),
    ('xyz=5', 'xyz=5'),
    ('x=y=5', 'x=y=5'),
    (r'10\text{ cm}', '10'),
    (r'\text{Evelyn}', r'\text{Evelyn}'),
    (r'90^\circ', '90'),
    (r'90^{\circ}', '90'),
    (r'50\%', '50'),
    (r'\$18', '18'),
    (r'\left( 3, \frac{\pi}{2} \right)', r'(3,\frac{\pi}{2})'),
    ('1\\\\2', r'1\2'),
    (r'1\!000', '1000'),
    ('1{,}000', '1{,}000'),
    ('a\nb', 'ab'),
    ('', ''),
  ],
)
def test_hendrycks(answer, form):
  assert normalization.hendrycks(answer) == form


def test_hendrycks_without_half():
  assert normalization.hendrycks('0.5', half=False) == '0.5'


@pytest.mark.parametrize(
  'answer', [r'\sqrt', r'2\frac', r'1\text{ m}\text{ s}', r'\frac{1}{2}\frac']
)
def test_hendrycks_refuses(answer):
  with pytest.raises(ValueError, match=r'of nothing|two units'):
    normalization.hendrycks(answer)


@pytest.mark.parametrize(
  ('answer', 'form'),
  [
    ('x = 5', '5'),
    ('a=b=7', '7'),
    ('$18', '18'),
    (r'\$18', '18'),
    ('18 dollars', '18'),
    ('18 an apple', '18apple'),
    ('1,234', '1234'),
    ('1,234.5', '1,234.5'),
    ('18.0', '18'),
    ('18.00', '18'),
    ('18.000', '18.000'),
    ('-3.0', '-3.0'),  # kept
    ('50%', '50'),
    (r'50\%', '50'),
    ('12.5%', '12.5'),
    ('x%', 'x%'),
    ('B', 'b'),
    ('G', 'g'),
    ('H', 'H'),
    ('AB', 'AB'),
    (r'\left(1,2\right)', r'\le(1,2\right)'),  # kept: the unit ft
    (r'\frac1{2}', r'\frac{1}{{}2}'),  # kept
    (r'\frac12', r'\frac{1}{2}'),
    (r'\fracab', r'\frac{a}{b}'),
    (r'\sqrt2', r'\sqrt{2}'),
    (r'\sqrt{2}', r'\sqrt{2}'),
    (r'\dfrac{1}{2}', r'\dfrac{1}{2}'),  # kept: not \frac
    ('the sum is $12$ cm', '12'),
    (r'\text{Evelyn}', 'Evelyn'),
    (r'\textbf{(A)}', '(A)'),
    (r'\overline{AB}', 'AB'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'90^\circ', '90'),
    (r'90^{\circ}', '90'),
    (r'1{,}000', '1000'),
    (r'1,\!000', '1000'),
    (r'5\text{ m}^2', '5'),
    (r'x\text{ and }y', 'x,y'),
    (r'x,\text{ and }y', 'x,y'),
    (r'2\text{ and }3', '23'),  # kept: 2,3 then looks like a number
    (r'\mbox{yes}', 'yes'),
    (r'12\mathrm{th}', '12'),
    ('"7"', '7'),
    ('3 hours', '3'),
    ('', ''),
  ],
)
def test_minerva(answer, form):
  assert normalization.minerva(answer) == form


@pytest.mark.parametrize(
  ('text', 'inside'),
  [
    (r'a \boxed{1} b \boxed{\frac{1}{2}} c', r'\frac{1}{2}'),
    (r'\boxed{1} \boxed{2', None),  # cut off: the earlier box does not count
    (r'\boxed{}', ''),
    ('none', None),
    (r'\boxed 5$ x', None),
    (r'\fbox{5}', None),
  ],
)
def test_last_braced(text, inside):
  assert last_braced(text, r'\boxed') == inside


@pytest.mark.parametrize(
  ('text', 'inside'),
  [
    (r'\boxed{2} \fbox{3}', '2'),
    (r'\fbox{3}', '3'),
    (r'$\boxed 5$ apples', '5'),
    (r'\boxed', None),
    ('', None),
  ],
)
def test_last_boxed(text, inside):
  assert last_boxed(text) == inside
