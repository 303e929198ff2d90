"""Estimators against enumeration and against their known sampling distribution."""

import itertools
import math

import numpy as np
import pytest

from mrjax.grading import metrics


@pytest.mark.parametrize(('n', 'c', 'k'), [(5, 2, 3), (5, 0, 2), (5, 5, 1), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_draws(n, c, k):
  draws = list(itertools.combinations(range(n), k))
  share = sum(min(draw) < c for draw in draws) / len(draws)
  result = metrics.pass_at_k(np.array([n]), np.array([c]), k)
  np.testing.assert_allclose(result, [share], rtol=1e-12)


def test_pass_at_k_of_large_counts():
  result = metrics.pass_at_k(np.array([2000]), np.array([3]), 1000)
  exact = 1 - math.comb(1997, 1000) / math.comb(2000, 1000)
  np.testing.assert_allclose(result, [exact], rtol=1e-12)


def test_pass_at_1_is_the_mean():
  n_P, c_P = np.array([4, 8]), np.array([1, 6])
  np.testing.assert_array_equal(metrics.pass_at_k(n_P, c_P, 1), [0.25, 0.75])


def test_pass_at_k_refuses_too_large_k():
  with pytest.raises(ValueError, match=r'pass@5 needs 1 <= k <= .* 4'):
    metrics.pass_at_k(np.array([4, 8]), np.array([1, 6]), 5)


def test_any_of_k():
  flags = [[False, True, False], [False, False, True]]
  np.testing.assert_array_equal(metrics.any_of_k(flags, 2), [1, 0])


def test_interval_matches_the_binomial():
  values_P = np.repeat([0.0, 1.0], [600, 400])
  result = metrics.estimate(values_P, seed=1)
  half = 1.96 * math.sqrt(0.4 * 0.6 / 1000)
  assert result.value == 0.4
  assert abs(result.low - (0.4 - half)) < 0.004
  assert abs(result.high - (0.4 + half)) < 0.004
  assert result == metrics.estimate(values_P, seed=1)
  assert result != metrics.estimate(values_P, seed=2)


def test_interval_of_continuous_values_matches_plain_resampling():
  rng = np.random.default_rng(0)
  values_P = rng.random(300)
  result = metrics.estimate(values_P)
  means = [rng.choice(values_P, 300).mean() for _ in range(3000)]
  np.testing.assert_allclose(
    [result.low, result.high], np.percentile(means, [2.5, 97.5]), atol=0.004
  )


def test_interval_in_chunks_has_the_right_number_of_resamples(monkeypatch):
  monkeypatch.setattr(metrics, '_CHUNK', 7)
  result = metrics.estimate([0.0, 1.0, 1.0], num_resamples=501)
  assert (result.low, result.high) == (0.0, 1.0)


def test_interval_of_one_value():
  result = metrics.estimate([1.0, 1.0])
  assert (result.value, result.low, result.high) == (1.0, 1.0, 1.0)
  with pytest.raises(ValueError, match='no problems'):
    metrics.estimate([])


def test_sample_sizes():
  assert metrics.sample_sizes(1) == [1]
  assert metrics.sample_sizes(8) == [1, 2, 4, 8]
  assert metrics.sample_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]
