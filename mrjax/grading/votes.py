"""One answer from the samples of a problem: majority votes and best-of-n."""

import math
import random
from collections.abc import Callable, Sequence

VOTES = ('string_first', 'equivalence')


def string_first(
  answers: Sequence[str | None], *, weights: Sequence[float] | None = None
) -> str | None:
  """Returns the heaviest string, a tie going to the one that came first.

  The vote of RFT (arXiv 2308.01825): strings as extracted, so `18` and `18.0` are two
  answers; samples without an answer (None or empty) do not vote. None without votes.

  Args:
    answers: The extracted answers of one problem.
    weights: As in `equivalence`; without, the most frequent string wins.

  Raises:
    ValueError: As `equivalence`.
  """
  votes = _votes_by_string(answers, weights)
  # The strings are in order of first appearance, and max returns the first of equals.
  return max(votes, key=lambda answer: math.fsum(votes[answer]), default=None)


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
    weights: One per answer, finite and >= 0, of which each class has the sum; 1 each
      without. The vote of Q#-RM weighs a sample by a value model's prediction at its
      EOS token; a sample without a score takes 0. Where all are 0, all classes tie.

  Raises:
    ValueError: Not one weight for each answer, or a weight is negative, infinite or
      NaN, be it of a sample that does not vote.
  """
  classes: dict[str, list[float]] = {}
  for answer, votes in _votes_by_string(answers, weights).items():
    heads = (head for head in classes if is_equal(head, answer))
    classes.setdefault(next(heads, answer), []).extend(votes)
  if not classes:
    return None
  totals = {head: math.fsum(votes) for head, votes in classes.items()}
  heaviest = max(totals.values())
  tied = [head for head, total in totals.items() if total == heaviest]
  return tied[0] if len(tied) == 1 else random.Random(seed).choice(tied)


def best_of(answers: Sequence[str | None], scores: Sequence[float]) -> int | None:
  """Returns the index of the answer with the highest score, the first of equals.

  Samples without an answer (None or empty) cannot win, as they cannot vote, nor can
  those whose score is infinite or NaN. None where that leaves no sample.

  Args:
    answers: The extracted answers of one problem; the texts themselves where every
      sample may win.
    scores: One per answer, of any sign, e.g. a value model's prediction at the EOS
      token (best-of-n of Q#-RM, arXiv 2502.20548); NaN where there is none.

  Raises:
    ValueError: Not one score for each answer.
  """
  if len(scores) != len(answers):
    raise ValueError(
      f'want one score for each of {len(answers)} answers, got {scores!r:.80}'
    )
  eligible = [
    i for i, answer in enumerate(answers) if answer and math.isfinite(scores[i])
  ]
  return max(eligible, key=scores.__getitem__, default=None)


def _votes_by_string(
  answers: Sequence[str | None], weights: Sequence[float] | None
) -> dict[str, list[float]]:
  """Returns the weights of each distinct answer, in order of first appearance.

  Lists and not sums: a class is summed once, by fsum, so that its total, and with it a
  tie, does not depend on the order of the samples. Adding in turn would.
  """
  if weights is None:
    numbers = [1.0] * len(answers)
  else:
    numbers = [float(weight) for weight in weights]  # float32 adds coarser
  if len(numbers) != len(answers):
    raise ValueError(
      f'want one weight for each of {len(answers)} answers, got {weights!r:.80}'
    )
  # NaN compares false; the sum tells of inf, and of weights too large to be added.
  if not all(number >= 0 for number in numbers) or math.isinf(sum(numbers)):
    raise ValueError(f'want finite weights >= 0 with a finite sum, got {weights!r:.80}')
  votes: dict[str, list[float]] = {}
  for answer, number in zip(answers, numbers):
    if answer:
      votes.setdefault(answer, []).append(number)
  return votes
