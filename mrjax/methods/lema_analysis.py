"""What LEMA reports: success of the corrector, delta-perplexity, the checkpoint chosen.

An et al. 2023, arXiv 2310.20689, sections 2.2, 4 and 5.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Success(NamedTuple):
  """How many corrections of a level were right."""

  successes: int
  attempts: int

  @property
  def rate(self) -> float:
    return self.successes / self.attempts


def success_by_level(
  attempts: Iterable[tuple[str | int | None, bool]],
) -> dict[str | int | None, Success]:
  """Returns the correction success rate by level of difficulty, in order of level.

  Args:
    attempts: (level of the problem, whether the correction was kept) for every
      correction asked for; malformed ones are failures.
  """
  totals: dict[str | int | None, Success] = {}
  for level, kept in attempts:
    old = totals.get(level, Success(0, 0))
    totals[level] = Success(old.successes + kept, old.attempts + 1)
  order = sorted(totals, key=lambda x: (x is None, isinstance(x, str), _natural(x)))
  return {level: totals[level] for level in order}


def _natural(level: str | int | None) -> tuple[int, str]:
  return (level, '') if isinstance(level, int) else (0, str(level))


def perplexity(logps: Sequence[float]) -> float:
  """Returns exp of the mean negative log-probability of a text's tokens.

  Raises:
    ValueError: No tokens.
  """
  if not logps:
    raise ValueError('a text without tokens has no perplexity; leave it out')
  return math.exp(-math.fsum(logps) / len(logps))


def delta_perplexity(
  wrong: Sequence[Sequence[float]], corrected: Sequence[Sequence[float]]
) -> float:
  """Returns the mean over pairs of PPL(wrong path | q) - PPL(corrected path | q).

  Positive where the model prefers the corrected paths; LEMA raises it.

  Args:
    wrong: Log-probabilities (natural) of the tokens of each wrong path, given its
      question.
    corrected: The same of the corrected paths, in the same order.

  Raises:
    ValueError: Not as many of one as of the other, none, or a path without tokens.
  """
  if len(wrong) != len(corrected) or not wrong:
    raise ValueError(
      f'{len(wrong)} wrong and {len(corrected)} corrected paths; want as many of both, '
      'at least one'
    )
  gaps = [perplexity(w) - perplexity(c) for w, c in zip(wrong, corrected, strict=True)]
  return math.fsum(gaps) / len(gaps)


def choose_checkpoint(dev_accuracies: Mapping[int, float]) -> int:
  """Returns the step of the checkpoint that is best on dev, the first of ties.

  Raises:
    ValueError: No checkpoint, or an accuracy that is no number.
  """
  _check_accuracies(dev_accuracies)
  return max(sorted(dev_accuracies), key=dev_accuracies.__getitem__)


class BestOnTest(NamedTuple):
  """Upstream's report of all checkpoints on the test set."""

  step: int
  best: float
  best_three: float  # mean of the three best; of all where there are fewer
  mean: float


def best_on_test(test_accuracies: Mapping[int, float]) -> BestOnTest:
  """Returns the paper's own choice: the best of all checkpoints *on the test set*.

  It reads the test set to choose, so it is too high; for comparison with the paper
  alone. `choose_checkpoint` is the honest rule.

  Raises:
    ValueError: No checkpoint, or an accuracy that is no number.
  """
  _check_accuracies(test_accuracies)
  ranked = sorted(test_accuracies.values(), reverse=True)
  return BestOnTest(
    choose_checkpoint(test_accuracies),
    ranked[0],
    math.fsum(ranked[:3]) / len(ranked[:3]),
    math.fsum(ranked) / len(ranked),
  )


def _check_accuracies(accuracies: Mapping[int, float]) -> None:
  if not accuracies or not all(map(math.isfinite, accuracies.values())):
    raise ValueError(
      f'want the accuracy of at least one checkpoint, each a number: {accuracies!r:.80}'
    )
