"""Sampling controls: exact sets as transformers has them, and honest draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.sampling.logits import (
  Controls,
  draw,
  mark_seen,
  penalize,
  row_keys,
  sample,
  scale_and_filter,
)

OFF = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'penalty': 1.0}


def controls(rows: list[dict]) -> Controls:
  rows = [OFF | row for row in rows]
  column = lambda name, dtype: jnp.asarray([row[name] for row in rows], dtype)
  return Controls(
    temperature_B=column('temperature', jnp.float32),
    top_k_B=column('top_k', jnp.int32),
    top_p_B=column('top_p', jnp.float32),
    min_p_B=column('min_p', jnp.float32),
    repetition_penalty_B=column('penalty', jnp.float32),
  )


def keys(num_rows: int, *, seed: int = 0) -> jax.Array:
  zeros_B = jnp.zeros(num_rows, jnp.uint32)
  hashes_B2 = jnp.zeros((num_rows, 2), jnp.uint32)
  return row_keys(zeros_B + seed, hashes_B2, jnp.arange(num_rows, dtype=jnp.uint32))


def hf_probabilities(logits_V: np.ndarray, row: dict, seen_ids=()) -> np.ndarray:
  torch = pytest.importorskip('torch')
  from transformers.generation import logits_process as hf

  row = OFF | row
  warpers = hf.LogitsProcessorList()
  if row['penalty'] != 1:
    warpers.append(hf.RepetitionPenaltyLogitsProcessor(row['penalty']))
  warpers.append(hf.TemperatureLogitsWarper(row['temperature']))
  if row['top_k']:
    warpers.append(hf.TopKLogitsWarper(row['top_k']))
  if row['top_p'] < 1:
    warpers.append(hf.TopPLogitsWarper(row['top_p']))
  if row['min_p']:
    warpers.append(hf.MinPLogitsWarper(row['min_p']))
  seen = torch.tensor([list(seen_ids)], dtype=torch.long)
  scores = warpers(seen, torch.from_numpy(logits_V)[None])
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


@pytest.mark.parametrize('vocab_size', [7, 512, 3001])
def test_the_whole_chain_is_that_of_transformers(vocab_size):
  rng = np.random.default_rng(vocab_size + 1)
  kinds = [
    {'penalty': 1.3},
    {'penalty': 0.7},
    {'penalty': 1.2, 'top_p': 0.8},
    {'penalty': 2.5, 'temperature': 0.6, 'top_k': 5},
    {'penalty': 1.1, 'temperature': 1.4, 'top_k': 6, 'top_p': 0.9, 'min_p': 0.03},
    {'temperature': 0.8, 'top_p': 0.95},
  ]
  rows = kinds * 5
  num_tokens = 9
  logits_BV = rng.normal(size=(len(rows), vocab_size)).astype(np.float32) * 3
  text_BT = rng.integers(vocab_size, size=(len(rows), num_tokens)).astype(np.int32)
  length_B = rng.integers(2, num_tokens + 1, size=len(rows))
  padded_BT = np.where(np.arange(num_tokens) < length_B[:, None], text_BT, -1)
  seen_BV = mark_seen(jnp.zeros(logits_BV.shape, bool), jnp.asarray(padded_BT[:, :-1]))
  seen_BV = mark_seen(seen_BV, jnp.asarray(padded_BT[:, -1]))
  made = controls(rows)
  shaped_BV = penalize(jnp.asarray(logits_BV), seen_BV, made.repetition_penalty_B)
  weights_BV = np.asarray(scale_and_filter(shaped_BV, made))
  for i, row in enumerate(rows):
    seen_ids = text_BT[i, : length_B[i]].tolist()
    expected_V = hf_probabilities(logits_BV[i], row, seen_ids)
    np.testing.assert_array_equal(weights_BV[i] > 0, expected_V > 0, str(row))
    np.testing.assert_allclose(
      weights_BV[i] / weights_BV[i].sum(), expected_V, atol=2e-6
    )


def test_a_penalty_by_hand():
  logits_BV = jnp.asarray([[2.0, -2.0, 0.0, 3.0]] * 4)
  seen_BV = mark_seen(
    jnp.zeros((4, 4), bool), jnp.asarray([[0, 1, 2]] * 3 + [[-1] * 3])
  )
  got_BV = penalize(logits_BV, seen_BV, jnp.asarray([1.0, 2.0, 0.5, 2.0]))
  np.testing.assert_array_equal(
    got_BV, [[2, -2, 0, 3], [1, -4, 0, 3], [4, -1, 0, 3], [2, -2, 0, 3]]
  )


def test_without_a_penalty_the_logits_are_not_touched():
  # 1/3 is not exact, so that dividing and multiplying would show in some bit.
  logits_BV = jnp.asarray(
    np.random.default_rng(8).normal(size=(3, 40)) / 3, jnp.float32
  )
  ones_BV, ones_B = jnp.ones((3, 40), bool), jnp.ones(3)
  np.testing.assert_array_equal(penalize(logits_BV, ones_BV, ones_B), logits_BV)
  mixed_BV = penalize(logits_BV, ones_BV, jnp.asarray([1.0, 1.7, 1.0]))
  np.testing.assert_array_equal(mixed_BV[::2], logits_BV[::2])
  assert (np.asarray(mixed_BV)[1] != np.asarray(logits_BV)[1]).all()


def test_shaped_logits_are_drawn_from_and_the_model_s_are_reported():
  logits_BV = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]] * 32))
  shaped_BV = jnp.log(jnp.asarray([[1e-9, 0.2, 0.8]] * 32))
  rows = [{}] * 31 + [{'temperature': 0.0}]
  tokens_B, logps_B, sampling_logps_B = sample(
    logits_BV, controls(rows), keys(32), shaped_BV=shaped_BV
  )
  tokens_B = np.asarray(tokens_B)
  assert set(tokens_B) == {1, 2} and tokens_B[-1] == 2
  np.testing.assert_allclose(np.exp(logps_B), 0.25, 1e-5)
  np.testing.assert_allclose(
    np.exp(sampling_logps_B)[:-1], np.where(tokens_B == 1, 0.2, 0.8)[:-1], 1e-5
  )
  assert sampling_logps_B[-1] == 0


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


def test_thresholds_are_those_of_a_sort():
  # Values close together, and equal: what ends the bisection early must not err.
  rng = np.random.default_rng(9)
  num_rows, vocab_size = 300, 97
  logits_BV = rng.normal(size=(num_rows, vocab_size)) * rng.choice(
    [0.01, 1, 4], (300, 1)
  )
  near_BV = logits_BV[:, :1] + rng.integers(-3, 4, size=logits_BV.shape) * 2.0**-20
  logits_BV = np.where(rng.random(logits_BV.shape) < 0.5, near_BV, logits_BV)
  logits_BV[::3] = np.round(logits_BV[::3] * 4) / 4
  logits_BV = logits_BV.astype(np.float32)
  ks = rng.integers(1, vocab_size, size=num_rows)
  ps = rng.uniform(0.01, 0.99, size=num_rows)
  rows = [{'top_k': k} if k % 2 else {'top_p': p} for k, p in zip(ks, ps)]
  weights_BV = np.asarray(scale_and_filter(jnp.asarray(logits_BV), controls(rows)))
  full_BV = np.asarray(scale_and_filter(jnp.asarray(logits_BV), controls([{}] * 300)))
  for row, logits_V, weights_V, full_V in zip(rows, logits_BV, weights_BV, full_BV):
    if 'top_k' in row:
      expected_V = logits_V >= np.sort(logits_V)[-row['top_k']]
    else:
      descending = np.sort(full_V)[::-1].astype(np.float64)
      reached = np.cumsum(descending) / descending.sum()
      assert abs(reached - row['top_p']).min() > 1e-6  # else float32 may not tell
      expected_V = full_V >= descending[np.argmax(reached >= row['top_p'])]
    np.testing.assert_array_equal(weights_V > 0, expected_V, str(row))


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


def test_a_row_does_not_depend_on_the_number_of_rows():
  rng = np.random.default_rng(4)
  kinds = [
    {'temperature': 0.8, 'top_p': 0.95},
    {},
    {'temperature': 0.0},
    {'top_k': 20, 'penalty': 1.3},
    {'temperature': 1.3, 'top_k': 50, 'top_p': 0.8, 'min_p': 0.02, 'penalty': 0.8},
    {'min_p': 0.1},
  ]
  sampler = jax.jit(_penalised_sample)
  for vocab_size in (67, 512, 1000, 4099):
    rows = (kinds * 22)[:128]
    logits_BV = rng.normal(size=(128, vocab_size)).astype(np.float32) * 3
    seen_BV = rng.random(logits_BV.shape) < 0.2
    made = controls(rows)
    whole = sampler(logits_BV, seen_BV, made, keys(128))
    for size in (1, 7, 64):
      for start in (0, 5, 64):
        part = slice(start, start + size)
        cut = jax.tree.map(lambda x, part=part: x[part], (logits_BV, seen_BV, made))
        for x_B, y_B in zip(whole, sampler(*cut, keys(128)[part])):
          np.testing.assert_array_equal(x_B[part], y_B)
    # And not on its neighbours.
    order = rng.permutation(128)
    moved = jax.tree.map(lambda x, order=order: x[order], (logits_BV, seen_BV, made))
    for x_B, y_B in zip(whole, sampler(*moved, keys(128)[order])):
      np.testing.assert_array_equal(np.asarray(x_B)[order], y_B)


def _penalised_sample(logits_BV, seen_BV, made, keys_B):
  shaped_BV = penalize(logits_BV, seen_BV, made.repetition_penalty_B)
  return sample(logits_BV, made, keys_B, shaped_BV=shaped_BV)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_bad_row_says_so_and_spoils_no_other(bad):
  rng = np.random.default_rng(5)
  rows = [{'top_p': 0.9}, {'top_k': 4}, {}, {'min_p': 0.1}, {'temperature': 0.0}] * 2
  logits_BV = rng.normal(size=(10, 30)).astype(np.float32)
  good = sample(jnp.asarray(logits_BV), controls(rows), keys(10))
  logits_BV[:5, 7] = bad
  tokens_B, logps_B, sampling_logps_B = sample(
    jnp.asarray(logits_BV), controls(rows), keys(10)
  )
  assert not np.isfinite(logps_B[:5]).any()
  assert not np.isfinite(sampling_logps_B[:4]).any()  # 0 for the greedy one
  assert ((tokens_B >= 0) & (tokens_B < 30)).all()
  for x_B, y_B in zip(good, (tokens_B, logps_B, sampling_logps_B)):
    np.testing.assert_array_equal(x_B[5:], y_B[5:])


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
