"""Sampling controls: from logits to one drawn token a row, every control a row array.

The order is that of transformers: repetition penalty, temperature, top-k, top-p,
min-p. All sets are exact and none needs a sort: a threshold is found by bisection on
the 32-bit patterns of the values, mostly in a dozen passes and in at most 32. Tokens
that tie with the last one kept are all kept (as in the top-k of transformers; its top-p
keeps some of them, by sort order).

A row's result has the same bits for any number of rows and any neighbours. What XLA
computes is not enough for that: on a CPU it hands reductions of 4,096 values and more,
all rows together, with what surrounds them to a library of its own, whose sums and
exponentials differ in the last bit. `_reduce_rows` and `_log` say how this is avoided.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # of the host until a batch is put on the mesh

# Of a row's sum, relative: far more than a sum of 32 x 32 x 32 float32 in any tree of
# additions is off by (96 roundings of 2^-24).
_SUM_ERROR = 2.0**-17

_MANY_TOKENS = 4096  # a row of so many goes to XLA's library whatever the other rows


class Controls(flax.struct.PyTreeNode):
  """Sampling controls of B rows; values are data, so changing them never recompiles.

  Attributes:
    temperature_B: float32; logits are divided by it. 0 takes the most likely token.
    top_k_B: int32; the k most likely tokens are kept. 0 keeps all.
    top_p_B: float32 in (0, 1]; the smallest set of most likely tokens whose
      probability reaches it is kept. 1 keeps all.
    min_p_B: float32 in [0, 1]; tokens at least `min_p` times as likely as the most
      likely one are kept. 0 keeps all.
    repetition_penalty_B: float32 > 0, for `penalize`, which `sample` leaves to its
      caller; 1 changes nothing.
  """

  temperature_B: Array
  top_k_B: Array
  top_p_B: Array
  min_p_B: Array
  repetition_penalty_B: Array


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: Array) -> jax.Array:
  """Logits whose seen tokens are less likely where the penalty is over 1, float32.

  Section 4.1 of Keskar et al. 2019, https://arxiv.org/abs/1909.05858, as transformers
  has it: of the tokens seen, in the prompt or drawn, positive logits are divided by the
  penalty and negative ones multiplied. A row of penalty 1 keeps its logits bit for bit.

  Args:
    logits_BV: The model's logits.
    seen_BV: bool; see `mark_seen`.
    penalty_B: float32 > 0. Where all are 1 nothing is computed.
  """

  def penalize_seen():
    penalty_B1 = penalty_B[:, None]
    penalised = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, penalised, logits_BV)

  logits_BV = logits_BV.astype(jnp.float32)
  return jax.lax.cond(jnp.any(penalty_B != 1), penalize_seen, lambda: logits_BV)


def mark_seen(seen_BV: jax.Array, tokens: jax.Array) -> jax.Array:
  """`seen_BV` with the tokens of each row set, bool.

  Args:
    seen_BV: bool; all False for a row of which nothing was seen.
    tokens: int32 [B], the token drawn by each row, or [B, T], such as its prompt.
      Negative ones stand for none.
  """
  rows = jnp.arange(seen_BV.shape[0]).reshape(-1, *(1,) * (tokens.ndim - 1))
  places = jnp.where(tokens < 0, seen_BV.shape[1], tokens)
  return seen_BV.at[rows, places].set(True, mode='drop')


def without_filters_where_greedy(controls: Controls) -> Controls:
  """The controls, with the filters off in rows of temperature 0, which ignore them."""
  greedy_B = controls.temperature_B <= 0
  off = lambda value, x_B: jnp.where(greedy_B, value, x_B)
  return controls.replace(
    top_k_B=off(0, controls.top_k_B),
    top_p_B=off(1.0, controls.top_p_B),
    min_p_B=off(0.0, controls.min_p_B),
  )


def scale_and_filter(logits_BV: jax.Array, controls: Controls) -> jax.Array:
  """Unnormalised probabilities of the sampling distribution, float32 [B, V].

  The most likely token has weight 1 and what a control removes has weight 0. Rows of
  temperature 0 are scaled as if it were 1; `sample` does not look at them.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  temperature_B = jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)
  top_B = _reduce_rows(logits_BV, _MAX)
  # Only the thresholds are conditional: the rows pass through memory once a stage.
  least_logit_B = jax.lax.cond(
    jnp.any(controls.top_k_B > 0),
    lambda: _top_k_threshold(logits_BV, controls.top_k_B),
    lambda: jnp.full_like(top_B, -jnp.inf),
  )
  weights_BV = jnp.where(
    logits_BV >= least_logit_B[:, None],
    jnp.exp((logits_BV - top_B[:, None]) / temperature_B[:, None]),
    0.0,
  )
  least_weight_B = jax.lax.cond(
    jnp.any(controls.top_p_B < 1),
    lambda: _top_p_threshold(weights_BV, controls.top_p_B),
    lambda: jnp.zeros_like(top_B),
  )
  # The largest weight is 1, so min-p is a plain threshold.
  least_weight_B = jnp.maximum(least_weight_B, controls.min_p_B)
  return jnp.where(weights_BV >= least_weight_B[:, None], weights_BV, 0.0)


def sample(
  logits_BV: jax.Array,
  controls: Controls,
  keys_B: jax.Array,
  *,
  shaped_BV: jax.Array | None = None,
  weights_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    logits_BV: The model's logits.
    controls: Temperature and filters of each row.
    keys_B: A typed random key for each row, used up by this call.
    shaped_BV: The logits to draw from where they are not the model's own (penalised,
      guided), before temperature and filters.
    weights_BV: What `scale_and_filter` makes of them, where it is known already.

  Returns:
    Tokens, int32 [B]; their log-probability under the model, by `logits_BV`, float32
    [B]; and under the distribution drawn from, after temperature and filters, float32
    [B], which is 0 for a greedy row. A row with a NaN or an infinity above all else has
    log-probabilities that are not finite and some token of the vocabulary.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  shaped_BV = logits_BV if shaped_BV is None else shaped_BV.astype(jnp.float32)
  greedy_B = controls.temperature_B <= 0

  def take_best():
    return _first_best(shaped_BV), jnp.zeros_like(controls.min_p_B)

  def draw_some():
    kept_BV = weights_BV
    if kept_BV is None:
      kept_BV = scale_and_filter(shaped_BV, controls)
    tokens_B, total_B = draw(kept_BV, keys_B)
    drawn_B = jnp.take_along_axis(kept_BV, tokens_B[:, None], axis=-1)[:, 0]
    tokens_B = jax.lax.cond(
      jnp.any(greedy_B),
      lambda: jnp.where(greedy_B, _first_best(shaped_BV), tokens_B),
      lambda: tokens_B,
    )
    return tokens_B, jnp.where(greedy_B, 0.0, _log(drawn_B / total_B))

  # A batch without a drawn row skips the filters and the random numbers, and one
  # without a greedy row the search for the best token.
  tokens_B, sampling_logps_B = jax.lax.cond(jnp.all(greedy_B), take_best, draw_some)
  chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
  top_B = _reduce_rows(logits_BV, _MAX)
  sum_B = _reduce_rows(jnp.exp(logits_BV - top_B[:, None]), _SUM)
  logps_B = chosen_B - top_B - _log(sum_B)
  return tokens_B, logps_B, sampling_logps_B


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws from unnormalised probabilities; a token of weight 0 is never drawn.

  Inverse of the cumulative sum in two levels, each with its own 24 random bits, so
  that rare tokens of a big vocabulary are not lost to the rounding of one long sum:
  first a set of tokens, those that are equal modulo a power of two, then one of them.

  Returns:
    Tokens, int32 [B], and the sum of each row's weights, float32 [B].
  """
  B, V = weights_BV.shape
  num_sets = 1 << max(0, math.floor(math.log2(V) / 2))
  weights_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % num_sets)))
  bits_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys_B)
  uniforms_B2 = (bits_B2 >> 8).astype(jnp.float32) * 2.0**-24
  sums = _fold(weights_BV, num_sets, _SUM)
  set_B, total_B = _invert_cumulative_sum(sums, uniforms_B2[:, 0])
  sets = weights_BV.reshape(B, -1, num_sets)
  chosen = jnp.take_along_axis(sets, set_B[:, None, None], axis=2)[..., 0]
  place_B, _ = _invert_cumulative_sum(chosen, uniforms_B2[:, 1])
  return place_B * num_sets + set_B, total_B


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


def _top_k_threshold(logits_BV: jax.Array, top_k_B: Array) -> jax.Array:
  """The logit of the k-th most likely token; the lowest where k is off."""
  # On the logits: distinct ones may share a weight after exp has rounded them.
  return _threshold(
    logits_BV,
    top_k_B.astype(jnp.float32),
    low_B=_reduce_rows(logits_BV, _MIN),
    high_B=_reduce_rows(logits_BV, _MAX),
    off_B=(top_k_B <= 0) | (top_k_B >= logits_BV.shape[-1]),
    mass=jnp.ones_like,
  )


def _top_p_threshold(weights_BV: jax.Array, top_p_B: Array) -> jax.Array:
  """The weight of the last token of the nucleus; 0 where top-p is off."""
  total_B = _reduce_rows(weights_BV, _SUM)
  # V tokens below a V-th of what may go do not weigh as much as it.
  low_B = jnp.maximum(1 - top_p_B - 2 * _SUM_ERROR, 0) * total_B / weights_BV.shape[-1]
  return _threshold(
    weights_BV,
    top_p_B * total_B,
    low_B=low_B,
    high_B=jnp.ones_like(total_B),
    off_B=top_p_B >= 1,
    mass=lambda weights: weights,
  )


def _threshold(
  values_BV: jax.Array,
  target_B: Array,
  *,
  low_B: jax.Array,
  high_B: jax.Array,
  off_B: Array,
  mass: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """A value t such that those >= t, and no fewer of the largest, reach the target.

  Args:
    values_BV: float32.
    target_B: The mass to reach, by row.
    low_B: Values >= low reach the target.
    high_B: No value is greater.
    off_B: Rows that get t = low.
    mass: Of a value, elementwise; at most as much for a smaller value.
  """
  masses_BV = mass(values_BV)

  def halve(state):
    low_B, high_B, low_mass_B, above_mass_B = state
    searching_B = low_B < high_B
    # The mean rounded up, without the overflow of low + high.
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)
    kept_BV = values_BV >= _from_ordered_bits(middle_B)[:, None]
    mass_B = _reduce_rows(jnp.where(kept_BV, masses_BV, 0.0), _SUM)
    enough_B = mass_B >= target_B
    low_B = jnp.where(searching_B & enough_B, middle_B, low_B)
    high_B = jnp.where(searching_B & ~enough_B, middle_B - 1, high_B)
    low_mass_B = jnp.where(enough_B, mass_B, low_mass_B)
    above_mass_B = jnp.where(enough_B, above_mass_B, mass_B)
    # Settled where there is no mass for two values between the bounds.
    two_B = 2 * mass(_from_ordered_bits(low_B)) - 2 * _SUM_ERROR * low_mass_B
    settled_B = low_mass_B - above_mass_B < two_B
    return low_B, jnp.where(settled_B, low_B, high_B), low_mass_B, above_mass_B

  # Invariant: values >= low have low_mass and reach the target, and values > high have
  # above_mass and do not. At first low_mass is a bound: that of all values.
  low_B = _ordered_bits(low_B)
  high_B = jnp.where(off_B, low_B, _ordered_bits(high_B))
  state = (low_B, high_B, _reduce_rows(masses_BV, _SUM), jnp.zeros_like(target_B))
  low_B, *_ = jax.lax.while_loop(lambda s: jnp.any(s[0] < s[1]), halve, state)
  return _from_ordered_bits(low_B)


class _Reduction(NamedTuple):
  """One reduction, in the forms it is needed in."""

  combine: Callable[..., jax.Array]  # two arrays, elementwise
  accumulate: Callable[..., jax.Array]
  reduce: Callable[..., jax.Array]
  empty: float  # changes nothing


_SUM = _Reduction(jnp.add, jax.lax.cumsum, jnp.sum, 0.0)
_MAX = _Reduction(jnp.maximum, jax.lax.cummax, jnp.max, -math.inf)
_MIN = _Reduction(jnp.minimum, jax.lax.cummin, jnp.min, math.inf)


def _reduce_rows(x_BV: jax.Array, reduction: _Reduction) -> jax.Array:
  """The sum, maximum or minimum of each row, the same bits for any number of rows.

  Rows of few tokens are folded by elementwise operations and then accumulated, which
  XLA does in one fixed order (and faster than its reductions).
  """
  if x_BV.shape[1] >= _MANY_TOKENS:
    return reduction.reduce(x_BV, axis=1)
  return reduction.accumulate(_fold(x_BV, 16, reduction), axis=1)[:, -1]


def _fold(x_BV: jax.Array, width: int, reduction: _Reduction) -> jax.Array:
  """Combines the values of each row whose places are equal modulo `width`."""
  B, V = x_BV.shape
  length = -(-V // width) * width
  if V < _MANY_TOKENS:
    length = width << (length // width - 1).bit_length()
  x_BV = jnp.pad(x_BV, ((0, 0), (0, length - V)), constant_values=reduction.empty)
  if V >= _MANY_TOKENS:
    return reduction.reduce(x_BV.reshape(B, -1, width), axis=1)
  while x_BV.shape[1] > width:
    half = x_BV.shape[1] // 2
    x_BV = reduction.combine(x_BV[:, :half], x_BV[:, half:])
  return x_BV


def _log(x_B: jax.Array) -> jax.Array:
  """Logarithms, padded to whole vectors: XLA takes those of a remainder otherwise."""
  B = x_B.shape[0]
  padded = jnp.log(jnp.pad(x_B, (0, -B % 16), constant_values=1.0))
  return jax.lax.optimization_barrier(padded)[:B]


def _ordered_bits(x: jax.Array) -> jax.Array:
  """int32 that compare as the float32 do; the two zeros are one."""
  x = jnp.where(x == 0, 0.0, x)
  return _flip_negative(jax.lax.bitcast_convert_type(x, jnp.int32))


def _from_ordered_bits(bits: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(_flip_negative(bits), jnp.float32)


def _flip_negative(bits: jax.Array) -> jax.Array:
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _invert_cumulative_sum(weights_BM, uniforms_B) -> tuple[jax.Array, jax.Array]:
  """The first place whose cumulative weight exceeds the uniform part of the total.

  The places of weight 0 are passed over even where rounding (a cumulative sum in
  floating point need not rise monotonously) would stop on one.

  Returns:
    Places, int32 [B], and the total of each row.
  """
  M = weights_BM.shape[-1]
  cumulative_BM = jnp.cumsum(weights_BM, axis=-1)
  total_B = cumulative_BM[:, -1]
  target_B = uniforms_B * total_B
  places_BM = jax.lax.broadcasted_iota(jnp.int32, weights_BM.shape, 1)
  # One minimum for both: the first place beyond the target, else the last with weight.
  ranks_BM = jnp.where(
    cumulative_BM > target_B[:, None], places_BM, 2 * M - 1 - places_BM
  )
  rank_B = jnp.where(weights_BM > 0, ranks_BM, 2 * M - 1).min(axis=-1)
  return jnp.where(rank_B < M, rank_B, 2 * M - 1 - rank_B), total_B


def _first_best(x_BM: jax.Array) -> jax.Array:
  """`argmax` as two plain reductions, five times faster than its one on a CPU."""
  places_BM = jax.lax.broadcasted_iota(jnp.int32, x_BM.shape, 1)
  is_best_BM = x_BM == _reduce_rows(x_BM, _MAX)[:, None]
  first_B = jnp.where(is_best_BM, places_BM, x_BM.shape[-1]).min(axis=-1)
  return jnp.minimum(first_B, x_BM.shape[-1] - 1)  # a row of NaN has no best
