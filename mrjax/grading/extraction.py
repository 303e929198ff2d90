r"""Where answers stand in texts, and their comparable forms: one group per rule family.

Functions named `*_marked` return what follows a marker (None without one), functions
named `clean_*` bring that to the form that is compared (None where it is no answer).
"""

import math
import re

from mrjax.grading import boxed, calculator, normalization
from mrjax.grading.rule import Options

# GSM8K: `#### 18` (OpenAI; RFT, arXiv 2308.01825) -----------------------------

_HASH_NUMBER = re.compile(r'#### (-?[0-9.,]+)')
_HASH_OR_A_NUMBER = re.compile(r'(?:#### |^A: )(-?[0-9.,]+)', re.MULTILINE)


def gsm8k_marked(text: str) -> str | None:
  """The number after the first `#### ` (one space) that has one; NUL ends the text."""
  match = _HASH_NUMBER.search(text.partition('\0')[0])
  return match[1] if match else None


def openai_marked(text: str) -> str | None:
  """The number after the first `#### `, or after `A: ` at the start of a line."""
  match = _HASH_OR_A_NUMBER.search(text.partition('\0')[0])
  return match[1] if match else None


def clean_number(found: str, options: Options = None) -> str | None:
  """The digits without commas, `18.` as it is; None when that is not a number."""
  del options
  number = found.replace(',', '')
  try:
    return number if math.isfinite(float(number)) else None
  except ValueError:
    return None


# Boxed answers: Q# (arXiv 2502.20548) and MATH --------------------------------


def boxed_marked(text: str) -> str | None:
  r"""The inside of the last `\boxed{...}`; nothing when its braces do not close."""
  return boxed.last_braced(text, r'\boxed')


def clean_spaces(found: str, options: Options = None) -> str | None:
  del options
  return found.strip()


# LEMA (arXiv 2310.20689) ------------------------------------------------------

_LEMA_MARKER = 'The answer is '
_LOWER_LETTERS = re.compile('[a-z]')


def _lema_cut(text: str) -> str:
  for heading in ('\n\nQ: ', '\n\nQuestion: '):  # the model went on to a next question
    text = text.partition(heading)[0]
  return text.replace('The answer is: ', _LEMA_MARKER)


def lema_marked(text: str) -> str | None:
  """What follows the last `The answer is `, up to the next question."""
  text = _lema_cut(text)
  return text.rpartition(_LEMA_MARKER)[2] if _LEMA_MARKER in text else None


def clean_lema_number(found: str, options: Options = None) -> str | None:
  """The number of an answer in words and units, by LEMA's order of deletions.

  Its consequences are kept: `1e5` is 15, `3 apples and 4 pears` 34, `4 1/2` 20.5.
  """
  del options
  text = found.removesuffix('.').replace('£', '').replace('€', '')
  text = text.removesuffix('.').replace(',', '')
  for separator in ('=', '>>'):
    if separator in text:
      text = text.rpartition(separator)[2].strip()
  text = _LOWER_LETTERS.sub('', text.lower())
  text = text.partition(':')[0].replace('$', '').replace('"', '')
  if '%' in text:
    text = text.strip()
    if not text.endswith('%'):
      return None
    text = text[:-1]
  text = text.removesuffix('/').replace(' ', '')
  try:
    arithmetic = any(operator in text for operator in '+-*/')
    value = float(calculator.evaluate(text) if arithmetic else text)
  except (ValueError, OverflowError):
    return None
  if not math.isfinite(value):
    return None
  return str(int(value)) if value.is_integer() else repr(value)


def clean_lema_label(found: str, options: Options = None) -> str | None:
  """LEMA stands for failure with 0, so a label must be another number."""
  number = clean_lema_number(found, options)
  return None if number is None or float(number) == 0 else number


def lema_math_marked(text: str) -> str | None:
  r"""The answer after the last `The answer is `, else in the last `\boxed{}`."""
  for heading in ('Q:', 'Question:'):
    text = text.partition(heading)[0].strip()
  text = text.replace('The answer is: ', _LEMA_MARKER)
  if _LEMA_MARKER not in text:
    # An \fbox is found where there is no \boxed, but never unwrapped: no answer.
    return boxed.last_braced(text, r'\boxed') if r'\boxed' in text else None
  answer = text.rpartition(_LEMA_MARKER)[2].strip().removesuffix('.')
  answer = answer.replace('$', '').strip()
  if 'boxed{' in answer:
    return boxed.last_braced(answer, r'\boxed') or ''
  return answer


def clean_lema_math(found: str, options: Options = None) -> str | None:
  """The MATH grader's normal form; None where it cannot be made."""
  del options
  try:
    return normalization.hendrycks(found)
  except ValueError:
    return None


def lema_csqa_marked(text: str) -> str | None:
  """What follows the last `The answer is `, without dots at its ends."""
  found = lema_marked(text)
  return None if found is None else found.strip('.')


def lema_csqa_unmarked(text: str) -> str | None:
  """The whole text, where no marker leads to the answer."""
  return _lema_cut(text).strip('.')


def clean_candidate(found: str, options: Options = None) -> str | None:
  """The candidate nearest by edit distance, the first one of equally near ones."""
  from rapidfuzz.distance import Levenshtein  # slow to import, for one rule

  candidates = [text for _, text in split_labels(options)]
  return min(candidates, key=lambda candidate: Levenshtein.distance(found, candidate))


def clean_candidate_gold(found: str, options: Options = None) -> str | None:
  """The candidate of a letter, or the candidate itself."""
  labelled = split_labels(options)
  if found.strip() in dict(labelled).values():
    return found.strip()
  return dict(labelled).get(found.strip()) or clean_candidate(found, options)


# Weak-to-strong (arXiv 2407.13647) --------------------------------------------

_FALLBACK = re.compile(r'The answer is (.*)$')
_NUMBER = re.compile(r'-?[0-9]+(?:\.[0-9]+)?')


def w2s_marked(text: str, answer_key: str) -> str | None:
  """What follows the first `answer_key` and one space on the last line of the text."""
  last_line = text.partition('Question')[0].strip().rpartition('\n')[2]
  _, _, found = last_line.partition(answer_key + ' ')
  return found or None


def w2s_unmarked(text: str) -> str | None:
  """The first number after `The answer is ` on the last line."""
  match = _FALLBACK.search(text.partition('Question')[0].strip())
  number = _NUMBER.search(match[1].replace(',', '')) if match else None
  return number[0] if number else None


def clean_minerva(found: str, options: Options = None) -> str | None:
  """The normal form of Minerva; a stop token in it costs its last characters."""
  del options
  return normalization.minerva(found[: -len('</s>')] if '</s>' in found else found)


# MoO (arXiv 2502.19622) -------------------------------------------------------

_ANY_NUMBER = re.compile(
  r'-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|-?\.[0-9]+'
)


def hash_marked(text: str) -> str | None:
  """What follows the last `####`."""
  return text.rpartition('####')[2].strip() if '####' in text else None


def clean_commas(found: str, options: Options = None) -> str | None:
  del options
  return found.strip().replace(',', '')


def moo_math_marked(text: str) -> str | None:
  """What follows the last `boxed`: inside its braces, or up to the next `$`."""
  if 'boxed' not in text:
    return None
  rest = text.rpartition('boxed')[2]
  if not rest.startswith('{'):
    return rest.partition('$')[0].strip()
  inside = boxed.braced(rest)
  return rest[1:] if inside is None else inside


def last_number(text: str) -> str | None:
  """The last number of a text, thousands commas dropped."""
  numbers = _ANY_NUMBER.findall(text)
  return numbers[-1].replace(',', '') if numbers else None


# Multiple choice --------------------------------------------------------------

_LABEL = re.compile(r'\s*\(?([A-Z])\s*[).:]\s*(.*)', re.DOTALL)
_CHOICE_MARKER = re.compile(r'####|[Aa](?:nswer|NSWER)\s*(?:is\b\s*:?|:)')
_LETTER = re.compile(
  r'(?:[\s*_$({\[:]|\\(?:text|textbf|mathrm|mathbf)\{|[Oo]ption\b|[Cc]hoice\b)*'
  r'(?:([A-E])(?![A-Za-z0-9])|([a-e])(?=[)}\].]|\s*$))'
)


def split_labels(options: Options) -> list[tuple[str, str]]:
  """Returns (letter, text) of every option, whether or not it shows its letter.

  Raises:
    ValueError: No options, or more than letters.
  """
  if not options or len(options) > 26:
    raise ValueError(
      "the rule needs a field 'options' with the list of choices, e.g. "
      f"['A)12', 'B)15'], found {options!r:.80}"
    )
  letters = [chr(ord('A') + index) for index in range(len(options))]
  matches = [_LABEL.match(option) for option in options]
  if all(match and match[1] == letter for match, letter in zip(matches, letters)):
    texts = [match[2].strip() for match in matches if match]
  else:
    texts = [option.strip() for option in options]
  return list(zip(letters, texts))


def choice_marked(text: str) -> str | None:
  r"""The rest of the line after the last marker: `####`, `answer is`, or a box."""
  *_, last = [None, *_CHOICE_MARKER.finditer(text)]
  box = text.rfind(r'\boxed{')
  if box > (last.start() if last else -1):
    return boxed.braced(text[box + len(r'\boxed') :])
  return text[last.end() :].strip().partition('\n')[0] if last else None


def last_line(text: str) -> str | None:
  """The last line of a text, where it is nothing but a choice such as `(B)`."""
  line = text.strip().rpartition('\n')[2].strip()
  match = _LETTER.match(line)
  return line if match and not line[match.end() :].strip(' .)}]*_$') else None


def clean_choice(found: str, options: Options = None) -> str | None:
  """The letter A-E that an answer names, by itself or by the text of its option."""
  labelled = split_labels(options or 'ABCDE')
  plain = _plain(found)
  named = [letter for letter, text in labelled if _plain(text) == plain]
  if len(named) == 1:
    return named[0]
  match = _LETTER.match(found)
  letter = (match[1] or match[2]).upper() if match else None
  return letter if letter in dict(labelled) else None


def _plain(text: str) -> str:
  return text.strip(' \t\n.$').casefold().replace(' ', '')
