"""What a grading rule is: where an answer stands in a text, and when two are equal."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from mrjax.grading.boxed import last_boxed

Options = Sequence[str] | None


class GoldError(ValueError):
  """A reference answer that a rule cannot use."""


def _nothing(text: str) -> str | None:
  del text
  return None


@dataclasses.dataclass(frozen=True)
class Rule:
  """One way to grade: find the answer in a text, bring it to a form, compare.

  A reference (`gold`) is read like a text. Where it holds no marker it is taken as it
  stands, except that the answer of a GSM8K reference (`#### 18`) or of a MATH solution
  (the last box) is taken from it under every rule.
  """

  name: str
  """As in `--rule`."""
  marked: Callable[[str], str | None]
  """Returns what the rule's marker points at, None without a marker."""
  clean: Callable[[str, Options], str | None]
  """Returns the comparable form of a found answer, None where it is none."""
  is_equal: Callable[[str, str], bool]
  """Compares two cleaned answers: (predicted, gold)."""
  wants: str = 'an answer'
  """What a gold must hold, for messages."""
  unmarked: Callable[[str], str | None] = _nothing
  """Returns the answer of a text without a marker; not used for golds."""
  clean_gold: Callable[[str, Options], str | None] | None = None
  """Replaces `clean` for golds; None where both sides are cleaned alike."""
  num_threads: int = 1
  """How many comparisons may run at once; above 1 where worker processes compare."""

  def extract(self, text: str, options: Options = None) -> str | None:
    """Returns the answer a text gives, or None where it gives none."""
    found = self.marked(text)
    if found is None:
      found = self.unmarked(text)
    return None if found is None else self.clean(found, options) or None

  def extract_gold(self, gold: str, options: Options = None) -> str:
    """Returns the answer of a reference: a whole solution or a bare answer.

    Raises:
      GoldError: It holds no answer that this rule can compare with.
    """
    return _extract_gold(self, gold, tuple(options) if options is not None else None)

  def grade(
    self, text: str, gold: str, options: Options = None
  ) -> tuple[str | None, bool]:
    """Returns (the answer extracted from a text, whether it is correct)."""
    reference = self.extract_gold(gold, options)
    extracted = self.extract(text, options)
    return extracted, extracted is not None and self.is_equal(extracted, reference)


@functools.lru_cache(maxsize=1 << 13)  # one gold serves all samples of a problem
def _extract_gold(rule: Rule, gold: str, options: tuple[str, ...] | None) -> str:
  found = rule.marked(gold)
  if found is None and '####' in gold:
    found = gold.rpartition('####')[2].strip().replace(',', '')
  if found is None:
    found = last_boxed(gold)
  if found is None:
    found = gold.strip()
  answer = (rule.clean_gold or rule.clean)(found, options)
  if not answer:
    raise GoldError(
      f'gold {gold!r:.80} holds no answer for rule {rule.name!r}, which wants '
      f'{rule.wants}; correct the record or take another rule'
    )
  return answer
