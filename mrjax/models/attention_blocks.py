"""Block-wise causal attention in plain JAX: memory grows with T, not with its square.

Queries and keys are cut into blocks. A loop takes each block of queries through the
blocks of keys it needs, from the first that holds its texts (or its window) up to its
own; what lies above the diagonal, in other texts only or in padding is never computed.
The softmax is merged from block to block, and the backward pass computes the scores
again from its logarithm: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1, 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mrjax.models.remat import ATTENTION

BLOCK = 128  # most places of a block
CHUNK_BLOCK = 512  # the same, of `chunk_attention`
_MASKED = -1e30  # finite, so that rows that see nothing stay free of NaN


def block_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  *,
  segments_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float | None = None,
  block: int = BLOCK,
) -> jax.Array:
  """`attention.attention` where the places of a text are contiguous and in order.

  Rows of padding are 0, and their gradients too. Blocks are skipped for all rows of
  the batch together.

  Args:
    q_BTNH: Queries; keys and values have K heads, each shared by N / K query heads.
    k_BTKH: Keys.
    v_BTKH: Values.
    segments_BT: int32 text number of each token, 0 for padding.
    window: Number of most recent places visible, the query's own included.
    scale: Multiplies q.k.
    softcap: Where set, scores become softcap * tanh(scores / softcap).
    block: Most places of a block.
  """
  T = q_BTNH.shape[1]
  num_blocks = -(-T // block)
  block = -(-T // num_blocks // 8) * 8  # as even as eight lanes of a vector allow
  rest = num_blocks * block - T
  pad = lambda x: jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
  segments_BT = pad(segments_BT)
  first_C = _first_blocks(segments_BT, window, num_blocks)
  out_BTNH = _attention(
    scale,
    softcap,
    num_blocks,
    *(pad(x) for x in (q_BTNH, k_BTKH, v_BTKH)),
    segments_BT,
    first_C,
    jnp.asarray(window, jnp.int32),
  )
  return out_BTNH[:, :T]


def chunk_attention(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  *,
  start: jax.Array | int,
  window: int,
  scale: float,
  softcap: float | None = None,
  block: int = CHUNK_BLOCK,
) -> jax.Array:
  """Causal attention of a chunk to the text before it and to itself, [B, T, N, H].

  Blocks of keys after a block of queries, or out of its window, are never read.

  Args:
    q_BTNH: Queries of the places from `start` on.
    k_BKSH: Keys of all places so far, those of the chunk among them.
    v_BKSH: Values.
    start: int32, a multiple of T.
    window: Number of most recent places visible, the query's own included.
    scale: Multiplies q.k.
    softcap: Where set, scores become softcap * tanh(scores / softcap).
    block: Most places of a block; a divisor of T where it is less.
  """
  T, N, K = *q_BTNH.shape[1:3], k_BKSH.shape[1]
  block = min(block, T)
  q_CBKRH = _split(q_BTNH, T // block, K)

  def one_block(i):
    first_place = start + i * block

    def add_keys(j, carry):
      k, v = (
        jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2)
        for x in (k_BKSH, v_BKSH)
      )
      distance_QS = (
        first_place - j * block + jnp.arange(block)[:, None] - jnp.arange(block)
      )
      seen_BQS = ((distance_QS >= 0) & (distance_QS < window))[None]
      scores, _ = _scores(q_CBKRH[i], k, seen_BQS, scale, softcap)
      return _add_keys(carry, scores, v)

    _, total, out = jax.lax.fori_loop(
      jnp.maximum(first_place - window + 1, 0) // block,
      first_place // block + 1,
      add_keys,
      _no_keys(q_CBKRH.shape[1:]),
    )
    return (out / total[..., None]).astype(q_BTNH.dtype)

  return _unsplit(jax.lax.map(one_block, jnp.arange(T // block)), N // K)


def _no_keys(shape):
  """What `_add_keys` begins with: greatest score, sum of weights, weighted values."""
  return (
    jnp.full(shape[:-1], _MASKED, jnp.float32),
    jnp.zeros(shape[:-1], jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )


def _add_keys(carry, scores_BKRS, v_BKSH):
  """One more block of keys in a softmax and the values it weighs."""
  top, total, out = carry
  new_top = jnp.maximum(top, scores_BKRS.max(axis=-1))
  weights = jnp.exp(scores_BKRS - new_top[..., None])
  shrink = jnp.exp(top - new_top)
  total = total * shrink + weights.sum(axis=-1)
  values = jnp.einsum(
    'BKRS,BKSH->BKRH',
    weights.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  return new_top, total, out * shrink[..., None] + values


def _first_blocks(segments_BT: jax.Array, window, num_blocks: int) -> jax.Array:
  """The first block of keys each block of queries needs; past its own for padding."""
  B, T = segments_BT.shape
  places_T = jnp.arange(T)
  starts_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
  first_BT = jax.lax.cummax(jnp.where(starts_BT, places_T, 0), axis=1)
  first_BT = jnp.maximum(first_BT, places_T - window + 1)
  first_BT = jnp.where(segments_BT == 0, T, first_BT)
  first_C = first_BT.reshape(B, num_blocks, -1).min(axis=(0, 2))
  return jnp.minimum(first_C * num_blocks // T, jnp.arange(num_blocks) + 1)


def _split(x_BTNH: jax.Array, num_blocks: int, K: int) -> jax.Array:
  """Blocks with the query heads of a key head folded into rows, [C, B, K, R, H]."""
  B, T, N, H = x_BTNH.shape
  x = x_BTNH.reshape(B, num_blocks, T // num_blocks, K, N // K, H)
  return x.transpose(1, 0, 3, 4, 2, 5).reshape(num_blocks, B, K, -1, H)


def _unsplit(x_CBKRH: jax.Array, G: int) -> jax.Array:
  C, B, K, R, H = x_CBKRH.shape
  x = x_CBKRH.reshape(C, B, K, G, R // G, H).transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(B, C * R // G, K * G, H)


def _scores(q_BKRH, k_BKSH, seen_BQS, scale, softcap):
  """Masked scores, float32 [B, K, R, S], and the tanh of their cap or None."""
  B, K, R, _ = q_BKRH.shape
  scores = scale * jnp.einsum(
    'BKRH,BKSH->BKRS', q_BKRH, k_BKSH, preferred_element_type=jnp.float32
  )
  tanh = None if softcap is None else jnp.tanh(scores / softcap)
  scores = scores if softcap is None else softcap * tanh
  Q, S = seen_BQS.shape[1:]
  scores = scores.reshape(B, K, R // Q, Q, S)
  scores = jnp.where(seen_BQS[:, None, None], scores, _MASKED)
  return scores.reshape(B, K, R, S), tanh


def _seen(segments_CBQ, i, j, window):
  """Which keys of block j the queries of block i see, [B, Q, S]."""
  Q = segments_CBQ.shape[-1]
  distance_QS = (i - j) * Q + jnp.arange(Q)[:, None] - jnp.arange(Q)
  same_BQS = segments_CBQ[i][:, :, None] == segments_CBQ[j][:, None, :]
  return same_BQS & (distance_QS >= 0) & (distance_QS < window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, softcap, num_blocks, q, k, v, segments, first, window):
  args = (scale, softcap, num_blocks, q, k, v, segments, first, window)
  return _attention_fwd(*args)[0]


def _attention_fwd(
  scale, softcap, num_blocks, q_BTNH, k_BTKH, v_BTKH, segments_BT, first_C, window
):
  K, G = k_BTKH.shape[2], q_BTNH.shape[2] // k_BTKH.shape[2]
  q_CBKRH, k_CBKSH, v_CBKSH = (
    _split(x, num_blocks, K) for x in (q_BTNH, k_BTKH, v_BTKH)
  )
  segments_CBQ = segments_BT.reshape(len(segments_BT), num_blocks, -1).swapaxes(0, 1)

  def one_block(i):
    def add_keys(j, carry):
      seen = _seen(segments_CBQ, i, j, window)
      scores, _ = _scores(q_CBKRH[i], k_CBKSH[j], seen, scale, softcap)
      return _add_keys(carry, scores, v_CBKSH[j])

    top, total, out = jax.lax.fori_loop(
      first_C[i], i + 1, add_keys, _no_keys(q_CBKRH.shape[1:])
    )
    real = jnp.tile(segments_CBQ[i] != 0, (1, G))[:, None]
    out = jnp.where(real[..., None], out / total[..., None], 0.0)
    # Infinite where nothing is seen: the backward pass then finds weights of 0.
    return out.astype(q_BTNH.dtype), jnp.where(real, top + jnp.log(total), jnp.inf)

  out_CBKRH, logsum_CBKR = jax.lax.map(one_block, jnp.arange(num_blocks))
  out_BTNH = checkpoint_name(_unsplit(out_CBKRH, G), ATTENTION)
  logsum_CBKR = checkpoint_name(logsum_CBKR, ATTENTION)
  blocks = q_CBKRH, k_CBKSH, v_CBKSH, segments_CBQ, first_C, window
  return out_BTNH, (blocks, out_BTNH, logsum_CBKR)


def _attention_bwd(scale, softcap, num_blocks, residuals, cotangent_BTNH):
  blocks, out_BTNH, logsum_CBKR = residuals
  q_CBKRH, k_CBKSH, v_CBKSH, segments_CBQ, first_C, window = blocks
  K, G = k_CBKSH.shape[2], q_CBKRH.shape[3] // k_CBKSH.shape[3]
  delta_BTN1 = jnp.einsum(
    'BTNH,BTNH->BTN', cotangent_BTNH, out_BTNH, preferred_element_type=jnp.float32
  )[..., None]
  delta_CBKR1 = _split(delta_BTN1, num_blocks, K)
  cotangent_CBKRH = _split(cotangent_BTNH, num_blocks, K)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def one_block(carry, i):
    q, cotangent = q_CBKRH[i], cotangent_CBKRH[i]

    def add_keys(j, carry):
      q_grad, k_grads, v_grads = carry
      k, v = k_CBKSH[j], v_CBKSH[j]
      seen = _seen(segments_CBQ, i, j, window)
      scores, tanh = _scores(q, k, seen, scale, softcap)
      weights = jnp.exp(scores - logsum_CBKR[i][..., None])
      weights_grad = product('BKRH,BKSH->BKRS', cotangent, v)
      scores_grad = scale * weights * (weights_grad - delta_CBKR1[i])
      if tanh is not None:
        scores_grad *= 1 - jnp.square(tanh)
      scores_grad = scores_grad.astype(q.dtype)
      q_grad += product('BKRS,BKSH->BKRH', scores_grad, k)
      k_grads = k_grads.at[j].add(product('BKRS,BKRH->BKSH', scores_grad, q))
      v_grad = product('BKRS,BKRH->BKSH', weights.astype(q.dtype), cotangent)
      return q_grad, k_grads, v_grads.at[j].add(v_grad)

    start = jnp.zeros(q.shape, jnp.float32)
    q_grad, *carry = jax.lax.fori_loop(first_C[i], i + 1, add_keys, (start, *carry))
    return tuple(carry), q_grad.astype(q.dtype)

  zeros = jnp.zeros(k_CBKSH.shape, jnp.float32)
  carry, q_grads = jax.lax.scan(one_block, (zeros, zeros), jnp.arange(num_blocks))
  k_grads, v_grads = (_unsplit(x.astype(q_CBKRH.dtype), 1) for x in carry)
  return _unsplit(q_grads, G), k_grads, v_grads, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
