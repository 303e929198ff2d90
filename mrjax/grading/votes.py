"""Majority votes over the answers extracted from the samples of one problem."""

import collections
import random
from collections.abc import Callable, Sequence

VOTES = ('string_first', 'equivalence')


def string_first(answers: Sequence[str | None]) -> str | None:
  """Returns the most frequent string, a tie going to the one that came first.

  The vote of RFT (arXiv 2308.01825): strings as extracted, so `18` and `18.0` are two
  answers; samples without an answer (None or empty) do not vote. None without votes.
  """
  counts = collections.Counter(answer for answer in answers if answer)
  # Counter keeps the order of first appearance, and max returns the first of equals.
  return max(counts, key=counts.__getitem__) if counts else None


def equivalence(
  answers: Sequence[str | None],
  is_equal: Callable[[str, str], bool],
  *,
  seed: int | str,
  weights: Sequence[float] | None = None,
) -> str | None:
  """Returns the first answer of the heaviest class of equal answers.

  The vote of Q# (arXiv 2502.20548): an answer joins the first class whose first member
  it equals under the rule, tried as is_equal(first member, answer); ties are drawn at
  random by the seed; samples without an answer do not vote. None without votes.

  Args:
    answers: The extracted answers of one problem.
    is_equal: The rule's comparison, (predicted, gold).
    seed: Of the draw among tied classes; a string may carry the problem id.
    weights: One per answer, >= 0, e.g. the value of a reward model; 1 each without.

  Raises:
    ValueError: As many weights as answers are wanted, and none negative.
  """
  if weights is None:
    weights = [1.0] * len(answers)
  if len(weights) != len(answers) or any(weight < 0 for weight in weights):
    raise ValueError(
      f'want one weight >= 0 for each of {len(answers)} answers, got {weights!r:.80}'
    )
  class_of: dict[str, str] = {}  # equal strings need one comparison in all
  totals: dict[str, float] = {}
  for answer, weight in zip(answers, weights):
    if not answer:
      continue
    if answer not in class_of:
      heads = (head for head in totals if head == answer or is_equal(head, answer))
      class_of[answer] = next(heads, answer)
    head = class_of[answer]
    totals[head] = totals.get(head, 0.0) + weight
  if not totals:
    return None
  heaviest = max(totals.values())
  tied = [head for head, total in totals.items() if total == heaviest]
  return tied[0] if len(tied) == 1 else random.Random(seed).choice(tied)
