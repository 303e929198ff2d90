"""Accuracy of sampled answers: pass@1, pass@k, votes, with bootstrap intervals."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_CHUNK = 1 << 24  # resampled counts held at once, 128 MB


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over problems with its interval."""

  value: float
  low: float
  high: float

  def to_dict(self) -> dict[str, float]:
    return dataclasses.asdict(self)


def pass_at_k(
  num_samples_P: np.ndarray, num_correct_P: np.ndarray, k: int
) -> np.ndarray:
  """Chance, per problem, that k samples drawn without return hold a correct one.

  The unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021, arXiv 2107.03374,
  as a product, so that no binomial overflows; k = 1 gives the exact mean c / n.

  Raises:
    ValueError: k is below 1 or above the samples of a problem.
  """
  n_P = np.asarray(num_samples_P, np.float64)
  c_P = np.asarray(num_correct_P, np.float64)
  if n_P.size == 0 or k < 1 or k > n_P.min():
    raise ValueError(
      f'pass@{k} needs 1 <= k <= the fewest samples of a problem, '
      f'{int(n_P.min()) if n_P.size else 0}'
    )
  miss_P = np.ones_like(n_P)
  for drawn in range(k):
    miss_P *= np.maximum(n_P - c_P - drawn, 0.0) / (n_P - drawn)
  return 1.0 - miss_P


def any_of_k(correct: Sequence[Sequence[bool]], k: int) -> np.ndarray:
  """Whether the first k samples of each problem hold a correct one, as float64.

  The pass@k of weak-to-strong (arXiv 2407.13647) and of RFT's curves: no estimator.
  """
  return np.array([any(flags[:k]) for flags in correct], np.float64)


def estimate(
  values_P: np.ndarray | Sequence[float],
  *,
  seed: int = 0,
  num_resamples: int = 2000,
  confidence: float = 0.95,
) -> Estimate:
  """Returns the mean of per-problem values with a bootstrap interval over problems.

  Percentile bootstrap (Efron 1979): problems are drawn with return, all samples of a
  problem together, because they are not independent.

  Raises:
    ValueError: No values.
  """
  values_P = np.asarray(values_P, np.float64)
  if not values_P.size:
    raise ValueError('no problems to average over')
  rng = np.random.default_rng(seed)
  size = values_P.size
  # Problems with one value are one cell of a multinomial: 0/1 accuracy has two cells.
  distinct, counts = np.unique(values_P, return_counts=True)
  rows = max(1, _CHUNK // distinct.size)
  means = np.concatenate(
    [
      rng.multinomial(size, counts / size, min(rows, num_resamples - start)) @ distinct
      for start in range(0, num_resamples, rows)
    ]
  )
  tail = 50 * (1 - confidence)
  low, high = np.percentile(means / size, [tail, 100 - tail])
  return Estimate(float(values_P.mean()), float(low), float(high))


def sample_sizes(num_samples: int) -> list[int]:
  """Returns the k that are worth reporting: 1, 2, 4, ... and the number itself."""
  sizes = [1 << power for power in range(num_samples.bit_length())]
  return sizes if sizes[-1] == num_samples else [*sizes, num_samples]
