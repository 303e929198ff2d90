"""Sampling controls: exact sets as transformers has them, and honest draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.sampling.logits import (
  Controls,
  draw,
  row_keys,
  sample,
  scale_and_filter,
)

OFF = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}


def controls(rows: list[dict]) -> Controls:
  rows = [OFF | row for row in rows]
  column = lambda name, dtype: jnp.asarray([row[name] for row in rows], dtype)
  return Controls(
    temperature_B=column('temperature', jnp.float32),
    top_k_B=column('top_k', jnp.int32),
    top_p_B=column('top_p', jnp.float32),
    min_p_B=column('min_p', jnp.float32),
  )


def keys(num_rows: int, *, seed: int = 0) -> jax.Array:
  zeros_B = jnp.zeros(num_rows, jnp.uint32)
  hashes_B2 = jnp.zeros((num_rows, 2), jnp.uint32)
  return row_keys(zeros_B + seed, hashes_B2, jnp.arange(num_rows, dtype=jnp.uint32))


def hf_probabilities(logits_V: np.ndarray, row: dict) -> np.ndarray:
  torch = pytest.importorskip('torch')
  from transformers.generation import logits_process as hf

  row = OFF | row
  warpers = [hf.TemperatureLogitsWarper(row['temperature'])]
  if row['top_k']:
    warpers.append(hf.TopKLogitsWarper(row['top_k']))
  if row['top_p'] < 1:
    warpers.append(hf.TopPLogitsWarper(row['top_p']))
  if row['min_p']:
    warpers.append(hf.MinPLogitsWarper(row['min_p']))
  scores = torch.from_numpy(logits_V)[None]
  for warper in warpers:
    scores = warper(None, scores)
  return torch.softmax(scores[0], dim=-1).numpy()


@pytest.mark.parametrize('vocab_size', [7, 512, 3001])
def test_filters_keep_the_sets_of_transformers(vocab_size):
  rng = np.random.default_rng(vocab_size)
  rows = [
    {},
    {'temperature': 0.3},
    {'top_k': 1},
    {'top_k': 5},
    {'top_k': vocab_size},
    {'top_k': vocab_size + 9},
    {'top_p': 0.95},
    {'top_p': 0.5},
    {'top_p': 1e-6},
    {'top_p': 0.999999},
    {'min_p': 0.1},
    {'min_p': 1.0},
    {'temperature': 0.8, 'top_k': 4, 'top_p': 0.7, 'min_p': 0.2},
    {'temperature': 1.7, 'top_k': 6, 'top_p': 0.9},
    {'temperature': 0.05, 'top_p': 0.9, 'min_p': 0.05},
  ] * 4
  scales = rng.choice([0.1, 1.0, 3.0, 20.0], size=(len(rows), 1))
  logits_BV = (rng.normal(size=(len(rows), vocab_size)) * scales).astype(np.float32)
  weights_BV = np.asarray(scale_and_filter(jnp.asarray(logits_BV), controls(rows)))
  for row, logits_V, weights_V in zip(rows, logits_BV, weights_BV):
    expected_V = hf_probabilities(logits_V, row)
    # Far tails may underflow to 0 in one library and not in the other.
    big_V = (expected_V > 1e-30) | (weights_V > 1e-30)
    np.testing.assert_array_equal(weights_V[big_V] > 0, expected_V[big_V] > 0, str(row))
    np.testing.assert_allclose(weights_V / weights_V.sum(), expected_V, atol=2e-6)


def test_ties_with_the_last_token_kept_are_kept():
  logits_BV = jnp.log(jnp.asarray([[0.1, 0.3, 0.1, 0.3, 0.2], [0.2] * 5]))
  weights_BV = scale_and_filter(logits_BV, controls([{'top_k': 1}, {'top_p': 0.3}]))
  np.testing.assert_array_equal(
    np.asarray(weights_BV) > 0, [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]
  )


def test_top_k_tells_logits_apart_that_share_a_probability():
  logits_BV = jnp.asarray([[0.0, 1e-9, -1e-9, 2e-9]], jnp.float32)
  weights_BV = scale_and_filter(logits_BV, controls([{'top_k': 2}]))
  np.testing.assert_array_equal(np.asarray(weights_BV) > 0, [[0, 1, 0, 1]])


def test_temperature_zero_is_argmax_beside_drawn_rows():
  logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
  logits_BV = logits_BV.at[0, 7].set(9.0).at[0, 30].set(9.0)  # the first one wins
  rows = [{'temperature': 0.0}, {'temperature': 1.0}] * 3
  tokens_B, _, sampling_logps_B = sample(logits_BV, controls(rows), keys(6))
  alone_B, _, _ = sample(logits_BV, controls([rows[0]] * 6), keys(6))
  best_B = np.argmax(logits_BV, axis=-1)
  np.testing.assert_array_equal(alone_B, best_B)
  np.testing.assert_array_equal(tokens_B[::2], best_B[::2])
  assert tokens_B[0] == 7
  np.testing.assert_array_equal(sampling_logps_B[::2], 0.0)


def test_log_probabilities_before_and_after_filters():
  logits_BV = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]] * 64)) + 3.0
  row = {'temperature': 0.5, 'top_k': 2}
  tokens_B, logps_B, sampling_logps_B = sample(
    logits_BV, controls([row] * 64), keys(64)
  )
  tokens_B = np.asarray(tokens_B)
  assert set(tokens_B) == {0, 1}
  np.testing.assert_allclose(np.exp(logps_B), np.where(tokens_B == 0, 0.5, 0.25), 1e-5)
  # Squared and renormalised over two tokens: 1/4 to 1/16.
  np.testing.assert_allclose(
    np.exp(sampling_logps_B), np.where(tokens_B == 0, 0.8, 0.2), 1e-5
  )


@pytest.mark.parametrize(
  'row',
  [
    {},
    {'temperature': 0.6},
    {'top_k': 5},
    {'top_p': 0.8},
    {'min_p': 0.15},
    {'temperature': 1.4, 'top_k': 9, 'top_p': 0.9, 'min_p': 0.05},
  ],
)
def test_drawn_frequencies(row):
  num_draws = 40_000
  logits_V = np.random.default_rng(1).normal(size=13).astype(np.float32) * 1.5
  expected_V = hf_probabilities(logits_V, row)
  logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (num_draws, 13))
  tokens_B, _, _ = sample(logits_BV, controls([row] * num_draws), keys(num_draws))
  counts_V = np.bincount(tokens_B, minlength=13)
  kept_V = expected_V > 0
  assert counts_V[~kept_V].sum() == 0
  wanted_V = expected_V[kept_V] * num_draws
  chi_square = ((counts_V[kept_V] - wanted_V) ** 2 / wanted_V).sum()
  # Mean k - 1 and deviation sqrt(2 (k - 1)); five deviations never happen by chance.
  freedom = kept_V.sum() - 1
  assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 1


def test_a_token_of_weight_zero_is_never_drawn():
  weights_BV = np.zeros((4096, 1000), np.float32)
  only_B = np.random.default_rng(2).integers(1000, size=4096)
  weights_BV[np.arange(4096), only_B] = np.float32(1e-20)
  tokens_B, total_B = draw(jnp.asarray(weights_BV), keys(4096))
  np.testing.assert_array_equal(tokens_B, only_B)
  np.testing.assert_allclose(total_B, 1e-20, rtol=1e-6)


def test_rare_tokens_of_a_big_vocabulary_are_drawn():
  # One token has half of the weight, 150,000 others share the rest evenly.
  vocab_size, num_draws = 150_001, 2_000
  weights_V = np.full(vocab_size, 0.5 / 150_000, np.float32)
  weights_V[77] = 0.5
  sampler = jax.jit(
    lambda keys_B: draw(jnp.broadcast_to(weights_V, (50, vocab_size)), keys_B)[0]
  )
  all_keys = keys(num_draws)
  tokens = [np.asarray(sampler(all_keys[i : i + 50])) for i in range(0, num_draws, 50)]
  rare = np.concatenate(tokens)
  rare = rare[rare != 77]
  assert abs(len(rare) - 1000) < 5 * np.sqrt(500)
  assert np.unique(rare).size > len(rare) - 16  # by chance about 3 come twice
  tenths, _ = np.histogram(rare, bins=10, range=(0, vocab_size))
  assert (abs(tenths - len(rare) / 10) < 5 * np.sqrt(len(rare) / 10)).all()


def test_changing_values_compiles_nothing():
  sampler = jax.jit(lambda *args: sample(*args))  # with a cache of its own
  logits_BV = jnp.zeros((3, 20))
  for row in ({}, {'temperature': 0.0}, {'top_k': 3}, {'top_p': 0.4}, {'min_p': 0.9}):
    sampler(logits_BV, controls([row, {}, row]), keys(3))
  assert sampler._cache_size() == 1


def test_a_row_does_not_see_its_neighbours():
  rng = np.random.default_rng(3)
  logits_BV = jnp.asarray(rng.normal(size=(12, 100)), jnp.float32)
  rows = [{'top_p': 0.7, 'temperature': 0.9}] * 6 + [{'top_k': 3}, {}] * 3
  together = sample(logits_BV, controls(rows), keys(12))
  for i in (0, 5, 6, 11):
    alone = sample(logits_BV[i : i + 1], controls(rows[i : i + 1]), keys(12)[i : i + 1])
    for x_B, y_B in zip(together, alone):
      np.testing.assert_array_equal(x_B[i], y_B[0])


def test_row_keys_differ_by_everything_that_names_a_row():
  def key(seed=0, first=0, second=0, index=0):
    made = row_keys(
      jnp.asarray([seed], jnp.uint32),
      jnp.asarray([[first, second]], jnp.uint32),
      jnp.asarray([index], jnp.uint32),
    )
    return tuple(np.asarray(jax.random.key_data(made))[0].tolist())

  made = [key(), key(seed=1), key(first=1), key(second=1), key(index=1)]
  made += [key(seed=2**32 - 1), key(index=2**32 - 1)]
  assert len(set(made)) == len(made)
  assert key(seed=1) == key(seed=1)
