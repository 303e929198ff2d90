"""Attention behind two signatures: whole texts, and new tokens against a cache.

Masks are never passed in: a backend gets the positions, segments and window that
define who sees whom, so that blockwise kernels can skip what is masked. The reference
backend here builds the boolean mask and runs everywhere.
"""

import functools
import logging
from collections.abc import Callable, Collection, Sequence
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


class KVPart(NamedTuple):
  """Cached keys and values of one stretch of text, for B rows or for B / n groups.

  A part with P rows serves B = P * n queries: row p is shared by queries
  p * n ... p * n + n - 1, and is read once for all of them.
  """

  k_PKSH: jax.Array
  v_PKSH: jax.Array
  positions_PS: jax.Array  # int32; -1 marks a place that holds nothing


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
  rows, heads = P(BATCH_AXES), P(BATCH_AXES, None, 'tensor', None)
  specs = heads, heads, heads, rows, P()
  return jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)


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


def cached_attention(
  q_BTNH: jax.Array,
  parts: Sequence[KVPart],
  *,
  positions_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Attention of T new tokens a row to everything in `parts`, [B, T, N, H].

  The softmax runs over all parts together: each part gives its own maximum, sum and
  weighted values, which are then merged exactly. Keys of the new tokens themselves
  must already stand in one of the parts.

  Args:
    q_BTNH: Queries of the new tokens.
    parts: The stretches of cache; each with B rows or a divisor of B (shared).
    positions_BT: int32 positions of the new tokens; a key is seen when its position
      is not -1, not above the query's, and less than `window` below it.
    window: As for `attention`.
    scale: Multiplies q.k.
    softcap: As for `attention`.
  """
  B, T, N, H = q_BTNH.shape
  merged = None
  for part in parts:
    P, K = part.k_PKSH.shape[:2]
    n, G = B // P, N // K
    q = q_BTNH.reshape(P, n, T, K, G, H).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(P, K, n * G * T, H)
    scores = jnp.einsum(
      'PKQH,PKSH->PKQS', q, part.k_PKSH, preferred_element_type=jnp.float32
    )
    scores = _cap(scores * scale, softcap).reshape(P, K, n, G, T, -1)
    keys = part.positions_PS[:, None, None, None, None, :]
    distance = positions_BT.reshape(P, 1, n, 1, T, 1) - keys
    seen = (keys >= 0) & (distance >= 0) & (distance < window)
    scores = jnp.where(seen, scores, _MASKED)
    top = scores.max(axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(axis=-1)
    weights = weights.reshape(P, K, n * G * T, -1).astype(part.v_PKSH.dtype)
    out = jnp.einsum(
      'PKQS,PKSH->PKQH', weights, part.v_PKSH, preferred_element_type=jnp.float32
    )
    # Back to one row a query: [B, K, G, T] and [B, K, G, T, H].
    top, total = (x.transpose(0, 2, 1, 3, 4).reshape(B, K, G, T) for x in (top, total))
    out = out.reshape(P, K, n, G, T, H).transpose(0, 2, 1, 3, 4, 5)
    out = out.reshape(B, K, G, T, H)
    merged = (top, total, out) if merged is None else _merge(merged, (top, total, out))
  if merged is None:
    raise ValueError('cached_attention was given no parts, want at least one.')
  _, total, out = merged
  out_BKGTH = out / total[..., None]
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _merge(a, b):
  top = jnp.maximum(a[0], b[0])
  scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
  total = a[1] * scale_a + b[1] * scale_b
  return top, total, a[2] * scale_a[..., None] + b[2] * scale_b[..., None]


def _cap(scores: jax.Array, softcap: float | None) -> jax.Array:
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
