"""The grading rules by name, as `--rule` takes them."""

import functools

from mrjax.grading import extraction, normalization, symbolic
from mrjax.grading.boxed import last_boxed
from mrjax.grading.rule import GoldError, Options, Rule

__all__ = ['RULES', 'GoldError', 'Options', 'Rule', 'get_rule', 'w2s_rule']


def _equal_numbers(predicted: str, gold: str) -> bool:
  return float(predicted) == float(gold)


def _close_numbers(predicted: str, gold: str) -> bool:
  return abs(float(predicted) - float(gold)) < 1e-4


def _equal_strings(predicted: str, gold: str) -> bool:
  return predicted == gold


def _equal_hendrycks(predicted: str, gold: str, *, half: bool) -> bool:
  try:
    return normalization.hendrycks(predicted, half=half) == normalization.hendrycks(
      gold, half=half
    )
  except ValueError:  # as in the original: what has no normal form is compared as is
    return predicted == gold


def w2s_rule(name: str, answer_key: str) -> Rule:
  """Returns the weak-to-strong rule for answers after `answer_key` and a space."""
  return Rule(
    name,
    marked=functools.partial(extraction.w2s_marked, answer_key=answer_key),
    unmarked=extraction.w2s_unmarked,
    clean=extraction.clean_minerva,
    is_equal=_equal_strings,
  )


_ALL = (
  # RFT (arXiv 2308.01825): evaluation allows 1e-4, rejection sampling nothing.
  Rule(
    'gsm8k',
    marked=extraction.gsm8k_marked,
    clean=extraction.clean_number,
    is_equal=_close_numbers,
    wants="a number, bare or after '#### '",
  ),
  Rule(
    'gsm8k_exact',
    marked=extraction.gsm8k_marked,
    clean=extraction.clean_number,
    is_equal=_equal_numbers,
    wants="a number, bare or after '#### '",
  ),
  # OpenAI's own grader (arXiv 2110.14168) compares the digits as a string.
  Rule(
    'openai_gsm8k',
    marked=extraction.openai_marked,
    clean=extraction.clean_number,
    is_equal=_equal_strings,
    wants="a number, bare or after '#### ' or 'A: '",
  ),
  # Q# (arXiv 2502.20548).
  Rule(
    'boxed_strict',
    marked=extraction.boxed_marked,
    clean=extraction.clean_spaces,
    is_equal=_equal_strings,
  ),
  Rule(
    'boxed_symbolic',
    marked=extraction.boxed_marked,
    clean=extraction.clean_spaces,
    is_equal=symbolic.is_equal,
    num_threads=symbolic.MAX_WORKERS,
  ),
  Rule(
    'hendrycks_math',
    marked=last_boxed,
    clean=extraction.clean_spaces,
    is_equal=functools.partial(_equal_hendrycks, half=True),
  ),
  Rule(
    'lema_gsm8k',
    marked=extraction.lema_marked,
    clean=extraction.clean_lema_number,
    clean_gold=extraction.clean_lema_label,
    is_equal=_equal_numbers,
    wants='a number other than 0 (its sign of failure)',
  ),
  Rule(
    'lema_math',
    marked=extraction.lema_math_marked,
    clean=extraction.clean_lema_math,
    is_equal=_equal_strings,
  ),
  Rule(
    'lema_csqa',
    marked=extraction.lema_csqa_marked,
    unmarked=extraction.lema_csqa_unmarked,
    clean=extraction.clean_candidate,
    clean_gold=extraction.clean_candidate_gold,
    is_equal=_equal_strings,
    wants='a candidate or its letter',
  ),
  w2s_rule('w2s_gsm8k', '####'),
  w2s_rule('w2s_math', 'The answer is:'),
  # MoO drops commas from the prediction only: a gold of 57,500 is never met.
  Rule(
    'moo_gsm8k',
    marked=extraction.hash_marked,
    unmarked=str.strip,
    clean=extraction.clean_commas,
    clean_gold=extraction.clean_spaces,
    is_equal=_equal_strings,
  ),
  Rule(
    'moo_math',
    marked=extraction.moo_math_marked,
    unmarked=extraction.last_number,
    clean=extraction.clean_spaces,
    is_equal=functools.partial(_equal_hendrycks, half=False),
  ),
  Rule(
    'choice',
    marked=extraction.choice_marked,
    unmarked=extraction.last_line,
    clean=extraction.clean_choice,
    is_equal=_equal_strings,
    wants='a letter A-E or the text of one option',
  ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}


def get_rule(name: str) -> Rule:
  """Returns a rule by name.

  Raises:
    ValueError: No such rule.
  """
  if name not in RULES:
    raise ValueError(f'unknown grading rule {name!r}; one of {", ".join(RULES)}')
  return RULES[name]
