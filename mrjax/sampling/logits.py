"""Sampling controls: from logits to one drawn token a row, every control a row array.

The order is that of transformers: temperature, top-k, top-p, min-p. All sets are exact
and none needs a sort: a threshold is found by bisection on the 32-bit patterns of the
values, in at most 32 passes. Tokens that tie with the last one kept are all kept (as in
the top-k of transformers; its top-p keeps some of them, by sort order).
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # of the host until a batch is put on the mesh


class Controls(flax.struct.PyTreeNode):
  """Sampling controls of B rows; values are data, so changing them never recompiles.

  Attributes:
    temperature_B: float32; logits are divided by it. 0 takes the most likely token.
    top_k_B: int32; the k most likely tokens are kept. 0 keeps all.
    top_p_B: float32 in (0, 1]; the smallest set of most likely tokens whose
      probability reaches it is kept. 1 keeps all.
    min_p_B: float32 in [0, 1]; tokens at least `min_p` times as likely as the most
      likely one are kept. 0 keeps all.
  """

  temperature_B: Array
  top_k_B: Array
  top_p_B: Array
  min_p_B: Array


def scale_and_filter(logits_BV: jax.Array, controls: Controls) -> jax.Array:
  """Unnormalised probabilities of the sampling distribution, float32 [B, V].

  The most likely token has weight 1 and what a control removes has weight 0. Rows of
  temperature 0 are scaled as if it were 1; `sample` does not look at them.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  temperature_B = jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)
  top_B = logits_BV.max(axis=-1)
  weights_BV = jnp.exp((logits_BV - top_B[:, None]) / temperature_B[:, None])
  weights_BV = jax.lax.cond(
    jnp.any(controls.top_k_B > 0),
    _keep_top_k,
    _keep_all,
    weights_BV,
    logits_BV,
    controls,
  )
  weights_BV = jax.lax.cond(
    jnp.any(controls.top_p_B < 1),
    _keep_top_p,
    _keep_all,
    weights_BV,
    logits_BV,
    controls,
  )
  # After scaling the largest weight is 1, so min-p is a plain threshold.
  return jnp.where(weights_BV >= controls.min_p_B[:, None], weights_BV, 0.0)


def sample(
  logits_BV: jax.Array, controls: Controls, keys_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logits_BV: The model's logits.
    controls: Temperature and filters of each row.
    keys_B: A typed random key for each row, used up by this call.

  Returns:
    Tokens, int32 [B]; their log-probability under the model (before temperature and
    filters), float32 [B]; and under the distribution drawn from (after them), float32
    [B], which is 0 for a greedy row.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  greedy_B = controls.temperature_B <= 0
  best_B = _first_best(logits_BV)

  def draw_all():
    weights_BV = scale_and_filter(logits_BV, controls)
    tokens_B, total_B = draw(weights_BV, keys_B)
    drawn_B = jnp.take_along_axis(weights_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, jnp.log(drawn_B / total_B)

  # A batch without a drawn row skips the filters and the random numbers.
  drawn_B, sampling_logps_B = jax.lax.cond(
    jnp.all(greedy_B), lambda: (best_B, jnp.zeros_like(controls.min_p_B)), draw_all
  )
  tokens_B = jnp.where(greedy_B, best_B, drawn_B)
  sampling_logps_B = jnp.where(greedy_B, 0.0, sampling_logps_B)
  chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
  logps_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
  return tokens_B, logps_B, sampling_logps_B


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws from unnormalised probabilities; a token of weight 0 is never drawn.

  Inverse of the cumulative sum in two levels, a block of tokens first and a token of
  it second, each with its own 24 random bits, so that rare tokens of a big vocabulary
  are not lost to the rounding of one long sum.

  Returns:
    Tokens, int32 [B], and the sum of each row's weights, float32 [B].
  """
  B, V = weights_BV.shape
  block = 1 << max(1, math.ceil(math.log2(V) / 2))
  num_blocks = -(-V // block)
  weights_BV = jnp.pad(weights_BV, ((0, 0), (0, num_blocks * block - V)))
  blocks = weights_BV.reshape(B, num_blocks, block)
  sums = blocks.sum(axis=-1)
  bits_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys_B)
  uniforms_B2 = (bits_B2 >> 8).astype(jnp.float32) * 2.0**-24
  block_B = _invert_cumulative_sum(sums, uniforms_B2[:, 0])
  inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
  place_B = _invert_cumulative_sum(inside, uniforms_B2[:, 1])
  return block_B * block + place_B, sums.sum(axis=-1)


def row_keys(
  seeds_B: Array, problem_hashes_B2: Array, sample_indices_B: Array
) -> jax.Array:
  """A typed random key for each row from what names the row, and from nothing else.

  Args:
    seeds_B: uint32 seed of the request.
    problem_hashes_B2: uint32 halves of a 64-bit hash of the problem's id.
    sample_indices_B: uint32 index of the sample among those of its problem.
  """

  def one(seed, problem_hash, sample_index):
    key = jax.random.key(seed)
    for part in (problem_hash[0], problem_hash[1], sample_index):
      key = jax.random.fold_in(key, part)
    return key

  return jax.vmap(one)(seeds_B, problem_hashes_B2, sample_indices_B)


def _keep_all(weights_BV, logits_BV, controls):
  return weights_BV


def _keep_top_k(weights_BV, logits_BV, controls: Controls):
  # On the logits: distinct ones may share a weight after exp has rounded them.
  keys_BV = _ordered_bits(logits_BV)
  threshold_B = _threshold(
    keys_BV,
    jnp.ones_like(weights_BV),
    controls.top_k_B.astype(jnp.float32),
    off_B=(controls.top_k_B <= 0) | (controls.top_k_B >= logits_BV.shape[-1]),
  )
  return jnp.where(keys_BV >= threshold_B[:, None], weights_BV, 0.0)


def _keep_top_p(weights_BV, logits_BV, controls: Controls):
  keys_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)  # ordered: all >= 0
  target_B = controls.top_p_B * weights_BV.sum(axis=-1)
  threshold_B = _threshold(keys_BV, weights_BV, target_B, off_B=controls.top_p_B >= 1)
  return jnp.where(keys_BV >= threshold_B[:, None], weights_BV, 0.0)


def _ordered_bits(x: jax.Array) -> jax.Array:
  """int32 that compare as the float32 do; adding 0.0 merges the two zeros."""
  bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _threshold(keys_BV, masses_BV, target_B, *, off_B) -> jax.Array:
  """The largest int32 t whose keys >= t have a mass of at least `target`, by row.

  Rows where `off_B` is set get a t that keeps all.
  """
  low_B = keys_BV.min(axis=-1)
  high_B = jnp.where(off_B, low_B, keys_BV.max(axis=-1))

  def halve(bounds):
    low_B, high_B = bounds
    # The mean rounded up, without the overflow of low + high.
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)
    kept_BV = jnp.where(keys_BV >= middle_B[:, None], masses_BV, 0.0)
    enough_B = kept_BV.sum(axis=-1) >= target_B
    return jnp.where(enough_B, middle_B, low_B), jnp.where(
      enough_B, high_B, middle_B - 1
    )

  # Invariant: keys >= low reach the target and keys > high do not.
  return jax.lax.while_loop(
    lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low_B, high_B)
  )[0]


def _invert_cumulative_sum(weights_BM, uniforms_B) -> jax.Array:
  """The first place whose cumulative weight exceeds the uniform part of the total.

  The places of weight 0 are passed over even where rounding (a cumulative sum in
  floating point need not rise monotonously) would stop on one.
  """
  cumulative_BM = jnp.cumsum(weights_BM, axis=-1)
  target_B = uniforms_B * cumulative_BM[:, -1]
  places_BM = jax.lax.broadcasted_iota(jnp.int32, weights_BM.shape, 1)
  M = weights_BM.shape[-1]
  passed_BM = (cumulative_BM > target_B[:, None]) & (weights_BM > 0)
  first_B = jnp.where(passed_BM, places_BM, M).min(axis=-1)
  return jnp.where(first_B < M, first_B, _first_best(weights_BM))


def _first_best(x_BM: jax.Array) -> jax.Array:
  """`argmax` as two plain reductions, five times faster than its one on a CPU."""
  places_BM = jax.lax.broadcasted_iota(jnp.int32, x_BM.shape, 1)
  is_best_BM = x_BM == x_BM.max(axis=-1, keepdims=True)
  first_B = jnp.where(is_best_BM, places_BM, x_BM.shape[-1]).min(axis=-1)
  return jnp.minimum(first_B, x_BM.shape[-1] - 1)  # a row of NaN has no best
