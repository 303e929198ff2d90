"""Tokens are drawn as often as they should be, with all controls in one batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.sampling.logits import Controls, mark_seen, penalize, row_keys, sample

V = 11
SEEN = (0, 3, 4, 8)
LOGITS_V = np.asarray([1.9, -0.7, 0.4, 1.1, -1.3, 0.1, 2.2, -1.8, 0.8, -0.3, 1.4])
DRAWS = 40_000  # of each combination of controls

# Every value of a control with every value of the others: 32 combinations.
KINDS = [
  dict(zip(('penalty', 'temperature', 'top_k', 'top_p', 'min_p'), values))
  for values in itertools.product(
    (1.0, 1.6), (1.0, 0.7), (0, 6), (1.0, 0.85), (0.0, 0.12)
  )
]


def exact_probabilities(kind: dict) -> np.ndarray:
  """By sorting, in float64, straight from the definitions."""
  seen_V = np.isin(np.arange(V), SEEN)
  penalised_V = np.where(
    LOGITS_V < 0, LOGITS_V * kind['penalty'], LOGITS_V / kind['penalty']
  )
  logits_V = np.where(seen_V, penalised_V, LOGITS_V) / kind['temperature']
  p_V = np.exp(logits_V) / np.exp(logits_V).sum()
  order = np.argsort(-p_V)
  if kind['top_k']:
    p_V[order[kind['top_k'] :]] = 0
    p_V /= p_V.sum()
  before = np.cumsum(p_V[order]) - p_V[order]
  p_V[order[before >= kind['top_p']]] = 0
  p_V[p_V < kind['min_p'] * p_V.max()] = 0
  return p_V / p_V.sum()


@functools.cache
def drawn_counts() -> np.ndarray:
  """How often each token was drawn, by kind; one call, the kinds' rows interleaved."""
  rows = np.tile(np.arange(len(KINDS)), DRAWS)
  column = lambda name, dtype: np.asarray([k[name] for k in KINDS], dtype)[rows]
  controls = Controls(
    temperature_B=column('temperature', np.float32),
    top_k_B=column('top_k', np.int32),
    top_p_B=column('top_p', np.float32),
    min_p_B=column('min_p', np.float32),
    repetition_penalty_B=column('penalty', np.float32),
  )
  tokens_B = np.asarray(_draw(controls))
  counts = np.zeros((len(KINDS), V), np.int64)
  np.add.at(counts, (rows, tokens_B), 1)
  return counts


@jax.jit
def _draw(controls: Controls) -> jax.Array:
  B = controls.top_k_B.shape[0]
  logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS_V, jnp.float32), (B, V))
  seen_BV = mark_seen(jnp.zeros((B, V), bool), jnp.tile(jnp.asarray(SEEN), (B, 1)))
  shaped_BV = penalize(logits_BV, seen_BV, controls.repetition_penalty_B)
  seeds_B = jnp.full(B, 5, jnp.uint32)
  hashes_B2 = jnp.zeros((B, 2), jnp.uint32)
  keys_B = row_keys(seeds_B, hashes_B2, jnp.arange(B, dtype=jnp.uint32))
  return sample(logits_BV, controls, keys_B, shaped_BV=shaped_BV)[0]


def chi_square(counts_V: np.ndarray, p_V: np.ndarray) -> tuple[float, int]:
  """Pearson's statistic over the tokens with probability, and degrees of freedom."""
  kept_V = p_V > 0
  expected_V = p_V[kept_V] * counts_V.sum()
  assert expected_V.min() > 20  # where the statistic has its distribution
  statistic = ((counts_V[kept_V] - expected_V) ** 2 / expected_V).sum()
  return float(statistic), int(kept_V.sum()) - 1


def p_value(counts_V: np.ndarray, p_V: np.ndarray) -> float:
  scipy_stats = pytest.importorskip('scipy.stats')
  return float(scipy_stats.chi2.sf(*chi_square(counts_V, p_V)))


@pytest.mark.parametrize('number', range(len(KINDS)), ids=lambda i: str(KINDS[i]))
def test_frequencies_are_the_exact_probabilities(number):
  counts_V, p_V = drawn_counts()[number], exact_probabilities(KINDS[number])
  assert counts_V.sum() == DRAWS
  assert counts_V[p_V == 0].sum() == 0
  # The draws are fixed; that the smallest of 32 honest p-values is below this one
  # happens to one seed in 3,000.
  assert p_value(counts_V, p_V) > 1e-5


def test_all_combinations_together():
  counts = drawn_counts()
  parts = [chi_square(c, exact_probabilities(k)) for c, k in zip(counts, KINDS)]
  statistic, freedom = np.sum(parts, axis=0)
  # Mean and variance of the sum; too small would be as suspect as too big.
  assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_the_test_sees_a_wrong_distribution():
  counts = drawn_counts()
  for name, wrong in (
    ('temperature', 0.93),
    ('penalty', 1.1),
    ('top_p', 0.7),
    ('top_k', 5),
    ('min_p', 0.2),
  ):
    seen = False
    for counts_V, kind in zip(counts, KINDS):
      p_V, wrong_V = (
        exact_probabilities(kind),
        exact_probabilities(kind | {name: wrong}),
      )
      if np.allclose(p_V, wrong_V, atol=1e-3):
        continue  # another control hides the difference
      seen = True
      dropped = counts_V[wrong_V == 0].sum() > 0
      assert dropped or p_value(counts_V, wrong_V) < 1e-5, (name, kind)
    assert seen


def test_half_a_percent_of_weight_in_the_wrong_place_is_seen():
  counts_V, p_V = drawn_counts()[0].copy(), exact_probabilities(KINDS[0])
  moved = DRAWS // 200
  counts_V[6] -= moved
  counts_V[7] += moved
  assert p_value(counts_V, p_V) < 1e-5
