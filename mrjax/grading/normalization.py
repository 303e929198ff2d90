r"""String normal forms of mathematical answers: two answers are equal when theirs are.

`hendrycks` is the form of the MATH data set's own grader (Hendrycks et al. 2021, arXiv
2103.03874), `minerva` the one of Minerva (Lewkowycz et al. 2022, arXiv 2206.14858, app.
D.1) with the additions of weak-to-strong reasoning (arXiv 2407.13647). Both are kept
with their known oddities, because published numbers depend on them.
"""

import functools
import re

_CACHE_SIZE = 1 << 14  # answers repeat across the samples of a problem
_MAX_CHARACTERS = 2000  # longer "answers" are run-away text: compared as they stand


def hendrycks(answer: str, *, half: bool = True) -> str:
  r"""Returns the normal form of the MATH grader.

  Args:
    answer: An answer in LaTeX.
    half: Write the whole answer `0.5` as `\frac{1}{2}`, as the original does and the
      MoO variant does not.

  Raises:
    ValueError: The original stops with an error here (a unit twice, a command with
      nothing after it); its callers differ in what they make of that.
  """
  return _hendrycks(answer, half) if len(answer) <= _MAX_CHARACTERS else answer


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _hendrycks(answer: str, half: bool) -> str:
  for old, new in _HENDRYCKS_REPLACEMENTS:
    answer = answer.replace(old, new)
  answer = _without_unit(answer)
  answer = answer.replace(r'\%', '').replace(' .', ' 0.').replace('{.', '{0.')
  if answer.startswith('.'):
    answer = '0' + answer
  name, *values = answer.split('=')
  if len(values) == 1 and len(name) <= 2:  # `x = 5` is 5
    answer = values[0]
  answer = _brace_roots(answer).replace(' ', '')
  answer = _brace_fractions(answer)
  if half and answer == '0.5':
    return r'\frac{1}{2}'
  return _slash_to_fraction(answer)


_HENDRYCKS_REPLACEMENTS = (
  ('\n', ''),
  (r'\!', ''),
  (r'\\', '\\'),
  ('tfrac', 'frac'),
  ('dfrac', 'frac'),
  (r'\left', ''),
  (r'\right', ''),
  (r'^{\circ}', ''),
  (r'^\circ', ''),
  (r'\$', ''),
)


def _without_unit(answer: str) -> str:
  # `\text{ ` with a space starts a unit on the right, as in `10\text{ cm}`.
  before, *after = answer.split(r'\text{ ')
  if len(after) > 1:
    raise ValueError(f'two units in {answer!r}')
  return before


def _brace_roots(answer: str) -> str:
  r"""Writes `\sqrt3` as `\sqrt{3}`; of `\sqrt13` only the 1 goes under the root."""
  before, *roots = answer.split(r'\sqrt')
  for root in roots:
    if not root:
      raise ValueError(rf'\sqrt of nothing in {answer!r}')
    before += r'\sqrt' + (root if root[0] == '{' else f'{{{root[0]}}}{root[1:]}')
  return before


def _brace_fractions(answer: str) -> str:
  r"""Writes `\frac12` as `\frac{1}{2}`, one character each; `\frac1{72}` works too."""
  fixed, *fractions = answer.split(r'\frac')
  for fraction in fractions:
    if not fraction:
      raise ValueError(rf'\frac of nothing in {answer!r}')
    if fraction[0] == '{':
      fixed += r'\frac' + fraction
    elif len(fraction) < 2:
      return answer
    elif fraction[1] == '{':
      fixed += rf'\frac{{{fraction[0]}}}{fraction[1:]}'
    else:
      fixed += rf'\frac{{{fraction[0]}}}{{{fraction[1]}}}{fraction[2:]}'
  return fixed


_SLASH = re.compile(r'(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))')


def _slash_to_fraction(answer: str) -> str:
  match = _SLASH.fullmatch(answer)
  if match is None or '-0' in (match[1], match[2]):
    return answer
  return rf'\frac{{{match[1]}}}{{{match[2]}}}'


def minerva(answer: str) -> str:
  r"""Returns the normal form of Minerva with the additions of weak-to-strong.

  Oddities kept: the unit `ft` is deleted everywhere, so `\left` becomes `\le`;
  `\frac1{2}` becomes `\frac{1}{{}2}`; `-3.0` stays; `\dfrac` is not `\frac`.
  """
  return _minerva(answer) if len(answer) <= _MAX_CHARACTERS else answer


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _minerva(answer: str) -> str:
  answer = answer.split('=')[-1]
  for old, new in _MINERVA_REPLACEMENTS:
    answer = answer.replace(old, new)
  for fragment in _MINERVA_DELETIONS:
    answer = answer.replace(fragment, '')
  for pattern, replacement in _MINERVA_PATTERNS:
    answer = pattern.sub(replacement, answer)
  answer = answer.replace('$', '')
  if answer.replace(',', '').isdigit():
    answer = answer.replace(',', '')
  if _TRAILING_ZEROS.fullmatch(answer):
    answer = answer.split('.')[0]
  if _PERCENT.search(answer):
    answer = answer[:-1]
  return answer.lower() if answer in tuple('ABCDEFG') else answer


_MINERVA_REPLACEMENTS = (
  ('an ', ''),
  ('a ', ''),
  ('.$', '$'),
  (r'\$', ''),
  ('\\ ', ''),
  (r'\%', '%'),
  (' ', ''),
  ('mbox', 'text'),
  (r',\text{and}', ','),
  (r'\text{and}', ','),
  (r'\text{m}', r'\text{}'),
)
_MINERVA_DELETIONS = (
  *('square', 'ways', 'integers', 'dollars', 'mph', 'inches', 'ft', 'hours', 'km'),
  *('units', r'\ldots', 'sue', 'points', 'feet', 'minutes', 'digits', 'cents'),
  *('degrees', 'cm', 'gm', 'pounds', 'meters', 'meals', 'edges', 'students'),
  *('childrentickets', 'multiples', r'\text{s}', r'\text{.}', '\\text{\ns}'),
  *(r'\text{}^2', r'\text{}^3', '\\text{\n}', r'\text{}', r'\mathrm{th}', r'^\circ'),
  *(r'^{\circ}', r'\;', r',\!', '{,}', '"', r'\dots'),
)
_MINERVA_PATTERNS = (
  (re.compile(r'.*?(\$.*?\$).*'), r'\1'),  # LaTeX in a sentence
  (re.compile(r'\\text\{(.*?)\}'), r'\1'),
  (re.compile(r'\\textbf\{(.*?)\}'), r'\1'),
  (re.compile(r'\\overline\{(.*?)\}'), r'\1'),
  (re.compile(r'\\boxed\{(.*)\}'), r'\1'),
  (re.compile(r'frac([^{])(.)'), r'frac{\1}{\2}'),
  (re.compile(r'sqrt([^{])'), r'sqrt{\1}'),
)
_TRAILING_ZEROS = re.compile(r'[0-9]+\.00?')
_PERCENT = re.compile(r'[0-9]%$')
