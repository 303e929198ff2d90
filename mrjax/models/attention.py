"""Attention behind two signatures: whole texts, and new tokens against a cache.

Masks are never passed in: a backend gets the positions, segments and window that
define who sees whom, so that blockwise kernels can skip what is masked. The reference
backend here builds the boolean mask and runs everywhere.
"""

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mrjax.models.attention_blocks import BLOCK, block_attention
from mrjax.models.attention_kernels import (
  cudnn_attention,
  cudnn_fault,
  splash_attention,
)
from mrjax.sharding.mesh import BATCH_AXES, platform

P = jax.sharding.PartitionSpec
BACKENDS = ('auto', 'reference', 'blocks', 'splash', 'cudnn')

_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN
NO_WINDOW = 1 << 30


class Stored(NamedTuple):
  """Keys or values as a cache holds them.

  `values` are [..., S, H]. Where they are int8, `scales` are float32 [..., S], and a
  stored vector stands for `values * scale`; otherwise there are none.
  """

  values: jax.Array
  scales: jax.Array | None = None


class KVPart(NamedTuple):
  """Cached keys and values of one stretch of text, for B rows or for B / n groups.

  A part with P rows serves B = P * n queries: row p is shared by queries
  p * n ... p * n + n - 1, and is read once for all of them.
  """

  k: Stored  # [P, K, S, H]
  v: Stored
  positions_BS: jax.Array  # int32, as each row sees it; -1 marks what it does not see


def attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  *,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float | None = None,
  windows: Collection[int] = (),
  backend: str = 'auto',
) -> jax.Array:
  """Causal self-attention over whole rows of packed or padded text, [B, T, N, H].

  The places of a text are contiguous, and its positions count up by one. On a mesh
  (`jax.set_mesh`) rows are split over the batch axes and heads over `tensor`.

  Args:
    q_BTNH: Queries; keys and values have K heads, each shared by N / K query heads.
    k_BTKH: Keys.
    v_BTKH: Values.
    positions_BT: int32 position of each token within its own text.
    segments_BT: int32 text number of each token; 0 is padding, seen by nobody.
    window: Number of most recent positions visible, the query's own included.
    scale: Multiplies q.k.
    softcap: Where set, scores become softcap * tanh(scores / softcap) (Gemma 2).
    windows: What `window` may be where it is no Python integer.
    backend: See `choose_backend`.

  Returns:
    Outputs in the dtype of `q_BTNH`; rows of padding hold meaningless finite values.
  """
  backend = choose_backend(
    backend,
    platform=platform(),
    dtype=q_BTNH.dtype,
    length=q_BTNH.shape[1],
    head_dim=q_BTNH.shape[3],
    softcap=softcap,
  )
  kwargs: dict[str, Any] = {'scale': scale, 'softcap': softcap}
  if backend == 'reference':
    return reference_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      positions_BT=positions_BT,
      segments_BT=segments_BT,
      window=window,
      **kwargs,
    )
  if isinstance(window, int):
    windows = (window,)
  attend = {
    'blocks': functools.partial(block_attention, **kwargs),
    'splash': functools.partial(splash_attention, windows=windows, **kwargs),
    'cudnn': functools.partial(cudnn_attention, scale=scale),
  }[backend]
  return _on_mesh(attend)(q_BTNH, k_BTKH, v_BTKH, segments_BT, jnp.asarray(window))


def choose_backend(
  name: str,
  *,
  platform: str,
  dtype: Any,
  length: int,
  head_dim: int,
  softcap: float | None,
) -> str:
  """The backend that serves such an attention: `name`, or the best where it is `auto`.

  - `reference`: plain, holds all T x T scores; `auto` for rows of up to 128 places.
  - `blocks`: block-wise, in plain JAX; `auto` on CPUs.
  - `splash`: the kernel for TPUs; `auto` there.
  - `cudnn`: the kernel for GPUs; `auto` there, for bfloat16 without softcap.

  Where the kernel of a platform cannot serve, `auto` says so in one line of the log
  and takes `blocks`.

  Raises:
    ValueError: An unknown name, or a named kernel that cannot serve.
  """
  if name not in BACKENDS:
    raise ValueError(f'attention backend {name!r}: want one of {", ".join(BACKENDS)}.')
  kernel = name
  if name == 'auto':
    kernel = {'tpu': 'splash', 'gpu': 'cudnn'}.get(platform, 'blocks')
    kernel = 'reference' if length <= BLOCK else kernel
  if kernel in ('reference', 'blocks'):
    return kernel
  fault = None
  if platform != {'splash': 'tpu', 'cudnn': 'gpu'}[kernel]:
    fault = f'it does not run on a {platform}'
  elif kernel == 'cudnn':
    fault = cudnn_fault(dtype, length=length, head_dim=head_dim, softcap=softcap)
  if fault is None:
    return kernel
  if name != 'auto':
    raise ValueError(
      f'attention backend {name!r} cannot serve: {fault}. Want auto or blocks.'
    )
  _warn_once(f'Attention runs block-wise in XLA, not by {kernel}: {fault}.')
  return 'blocks'


@functools.cache
def _warn_once(line: str) -> None:
  logging.warning(line)


def _on_mesh(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`attend` by each device on its own rows and heads, on the mesh in force."""

  def run(q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT=segments_BT, window=window)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run
  # In a `shard_map` over rows each device has its own already.
  left = set(mesh.axis_names) - set(mesh.manual_axes)
  batch = tuple(axis for axis in BATCH_AXES if axis in left) or None
  rows, heads = P(batch), P(batch, None, 'tensor', None)
  specs = heads, heads, heads, rows, P()
  return jax.shard_map(
    run, in_specs=specs, out_specs=heads, axis_names=left, check_vma=False
  )


def reference_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  *,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """`attention` by definition, for texts in any order; holds all T x T scores."""
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores = jnp.einsum(
    'BTKGH,BSKH->BKGTS', q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
  )
  distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  seen_BTS = same_BTS & (distance_BTS >= 0) & (distance_BTS < window)
  seen_BTS &= segments_BT[:, None, :] != 0
  scores = jnp.where(seen_BTS[:, None, None], _cap(scores * scale, softcap), _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weights, v_BTKH)
  return out_BTKGH.reshape(B, T, N, H)


TILE = 64  # places of a tile, of `fixed_tiles`


def cached_attention(
  q_BTNH: jax.Array,
  prefix: KVPart,
  own: KVPart,
  *,
  itself: tuple[jax.Array, jax.Array] | None = None,
  positions_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float | None = None,
  fixed_tiles: bool = False,
) -> jax.Array:
  """Attention of T new tokens a row to what is cached, [B, T, N, H].

  The softmax runs over all parts together: each gives its own maximum, sum and weighted
  values, which are then merged exactly.

  Args:
    q_BTNH: Queries of the new tokens.
    prefix: Text that rows share, with a divisor of B rows.
    own: Text of each row alone, with B rows.
    itself: Keys and values [B, T, K, H] of the new tokens, each of which then sees its
      own; None where `own` holds them already.
    positions_BT: int32 positions of the new tokens; a key is seen when its position
      is not -1, not above the query's, and less than `window` below it.
    window: As for `attention`.
    scale: Multiplies q.k.
    softcap: As for `attention`.
    fixed_tiles: Make products in tiles of `TILE` places, which the places of both parts
      must be multiples of. The bits of a row then do not depend on the number of empty
      places, nor on the slot that its prefix stands in.
  """
  B, T, N, H = q_BTNH.shape
  K = own.k.values.shape[1]
  kwargs: dict[str, Any] = {
    'positions_BT': positions_BT,
    'window': window,
    'scale': scale,
    'softcap': softcap,
    'fixed_tiles': fixed_tiles,
  }
  merged = _merge(
    # A lone query would be a matrix-vector product, which sums in an order of its own.
    _attend_to_part(q_BTNH, prefix, min_queries=2 if fixed_tiles else 1, **kwargs),
    # A row always has as many queries of its own. Few are fastest one by one on a CPU.
    _attend_to_part(q_BTNH, own, most_alone=4 if fixed_tiles else 0, **kwargs),
  )
  if itself is not None:
    k_BTKH, v_BTKH = itself
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores_BTKG = (q_BTKGH * k_BTKH[:, :, :, None].astype(jnp.float32)).sum(axis=-1)
    top_BKGT = _cap(scores_BTKG * scale, softcap).transpose(0, 2, 3, 1)
    v_BKGTH = jnp.broadcast_to(
      v_BTKH.transpose(0, 2, 1, 3)[:, :, None], (B, K, N // K, T, H)
    ).astype(jnp.float32)
    merged = _merge(merged, (top_BKGT, jnp.ones_like(top_BKGT), v_BKGTH))
  _, total, out = merged
  out_BKGTH = out / total[..., None]
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _attend_to_part(
  q_BTNH,
  part: KVPart,
  *,
  positions_BT,
  window,
  scale,
  softcap,
  fixed_tiles,
  min_queries=1,
  most_alone=0,
):
  """Maximum and sum [B, K, G, T] and weighted values [B, K, G, T, H] of one part."""
  B, T, N, H = q_BTNH.shape
  P, K, S = part.k.values.shape[:3]
  n, G = B // P, N // K
  Q = n * G * T
  tile = TILE if fixed_tiles else S
  J = S // tile
  k, v = (_split_places(stored, (P, K, J, tile)) for stored in (part.k, part.v))
  q_PKQH = q_BTNH.reshape(P, n, T, K, G, H).transpose(0, 3, 1, 4, 2, 5)
  q_PKQH = q_PKQH.reshape(P, K, Q, H)
  keys_BS, now_BT1 = part.positions_BS, positions_BT[:, :, None]
  distance_BTS = now_BT1 - keys_BS[:, None]
  seen_BTS = (keys_BS[:, None] >= 0) & (distance_BTS >= 0) & (distance_BTS < window)
  seen = seen_BTS.reshape(P, n, 1, T, J, tile).transpose(0, 4, 1, 2, 3, 5)
  seen_PJQs = jnp.broadcast_to(seen, (P, J, n, G, T, tile)).reshape(P, J, Q, tile)

  more = max(0, min_queries - Q)
  q_PKQH = jnp.pad(q_PKQH, ((0, 0), (0, 0), (0, more), (0, 0)))
  seen_PJQs = jnp.pad(seen_PJQs, ((0, 0), (0, 0), (0, more), (0, 0)))
  most = q_PKQH.shape[2]
  if most <= most_alone:
    most = 1
  elif fixed_tiles and H > 128:
    # More at once, over wide heads, could be shared out to threads within their sums.
    most = 64
  firsts = range(0, q_PKQH.shape[2], most)
  scores = jnp.concatenate(
    [_tiled_scores(q_PKQH[:, :, i : i + most], k) for i in firsts], axis=3
  )
  scores = jnp.where(seen_PJQs[:, None], _cap(scores * scale, softcap), _MASKED)
  top_PKQ = scores.max(axis=(2, 4))
  weights = jnp.exp(scores - top_PKQ[:, :, None, :, None])
  weights = jnp.where(seen_PJQs[:, None], weights, 0.0)
  total_PKQ = weights.sum(axis=-1).sum(axis=2)
  out_PKJQH = jnp.concatenate(
    [_tiled_values(weights[:, :, :, i : i + most], v, q_PKQH.dtype) for i in firsts],
    axis=3,
  )
  top_PKQ, total_PKQ, out_PKQH = (
    x[:, :, :Q] for x in (top_PKQ, total_PKQ, out_PKJQH.sum(axis=2))
  )
  by_row = lambda x: (
    x.reshape(P, K, n, G, T, *x.shape[3:])
    .swapaxes(1, 2)
    .reshape(B, K, G, T, *x.shape[3:])
  )
  return by_row(top_PKQ), by_row(total_PKQ), by_row(out_PKQH)


def _split_places(stored: Stored, shape: tuple[int, int, int, int]) -> Stored:
  values = stored.values.reshape(*shape, stored.values.shape[-1])
  scales = None if stored.scales is None else stored.scales.reshape(shape)
  return Stored(values, scales)


def _tiled_scores(q_PKQH, k: Stored):
  """q.k of every tile, float32 [P, K, J, Q, s]."""
  P, K, J = k.values.shape[:3]
  q_PKJQH = jnp.broadcast_to(q_PKQH[:, :, None], (P, K, J, *q_PKQH.shape[2:]))
  scores = jnp.einsum(
    'PKJQH,PKJsH->PKJQs',
    q_PKJQH,
    k.values.astype(q_PKQH.dtype),
    preferred_element_type=jnp.float32,
  )
  return scores if k.scales is None else scores * k.scales[:, :, :, None]


def _tiled_values(weights_PKJQs, v: Stored, dtype):
  """Values of every tile by their weights, float32 [P, K, J, Q, H]."""
  if v.scales is not None:
    weights_PKJQs = weights_PKJQs * v.scales[:, :, :, None]
  return jnp.einsum(
    'PKJQs,PKJsH->PKJQH',
    weights_PKJQs.astype(dtype),
    v.values.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _merge(a, b):
  top = jnp.maximum(a[0], b[0])
  scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
  total = a[1] * scale_a + b[1] * scale_b
  return top, total, a[2] * scale_a[..., None] + b[2] * scale_b[..., None]


def _cap(scores: jax.Array, softcap: float | None) -> jax.Array:
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
