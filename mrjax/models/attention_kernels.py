"""Attention by the kernels of accelerators: splash on TPUs, cuDNN on GPUs.

Both take whole rows on one device, whose texts are contiguous and in order.
"""

import concurrent.futures
import functools
from collections.abc import Collection
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.models.remat import ATTENTION

_LANES = 128  # of a TPU's vector registers: widths and lengths are multiples of it


def splash_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  *,
  segments_BT: jax.Array,
  window: jax.Array | int,
  windows: Collection[int],
  scale: float,
  softcap: float | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`attention.attention` by the splash kernel of JAX.

  Head widths are filled up with zeros to 64 or a multiple of 128, rows with padding to
  a multiple of 128. There is one kernel a window, since its mask is compiled in.

  Args:
    q_BTNH: Queries, keys and values as for `attention`.
    k_BTKH: Keys.
    v_BTKH: Values.
    segments_BT: int32 text number of each token, 0 for padding.
    window: Number of most recent places visible, one of `windows`.
    windows: What `window` may be.
    scale: Multiplies q.k.
    softcap: Where set, scores become softcap * tanh(scores / softcap).
    interpret: Run without a TPU, slowly.

  Raises:
    ValueError: `windows` is empty.
  """
  if not windows:
    raise ValueError('splash attention got no windows; want all that window may be.')
  # Loaded where it is used: Pallas takes a second to import.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
  )

  T, N, H = q_BTNH.shape[1:]
  length = -(-T // _LANES) * _LANES
  width = 64 if H <= 64 else -(-H // _LANES) * _LANES
  block = next(size for size in (512, 256, 128) if length % size == 0)
  blocks = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )

  def arrange(x_BTNH):
    x = jnp.pad(x_BTNH, ((0, 0), (0, length - T), (0, 0), (0, width - H)))
    return x.swapaxes(1, 2)

  q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
  segments_BT = jnp.pad(segments_BT, ((0, 0), (0, length - T)))
  args = *map(arrange, (q_BTNH, k_BTKH, v_BTKH)), segments_BT

  def attend(size: int, q, k, v, segments):
    shape = length, length
    mask = (
      splash_mask.CausalMask(shape)
      if size == T
      else splash_mask.LocalMask(shape, (size - 1, 0), 0)
    )
    kernel = splash.make_splash_mha(
      splash_mask.MultiHeadMask([mask] * N),
      block_sizes=blocks,
      attn_logits_soft_cap=softcap,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=ATTENTION,
      interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))

  # A window of T places or more hides nothing.
  sizes = sorted({min(size, T) for size in windows})
  index = jnp.searchsorted(jnp.asarray(sizes), jnp.minimum(window, T))
  branches = [functools.partial(attend, size) for size in sizes]
  out_BNTH = jax.lax.switch(index, branches, *args)
  return out_BNTH.swapaxes(1, 2)[:, :T, :, :H]


def cudnn_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  *,
  segments_BT: jax.Array,
  window: jax.Array | int,
  scale: float,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """`attention.attention` by cuDNN's flash attention, as far as `cudnn_fault` allows.

  Texts of a row are told apart by a mask [B, 1, T, T]: through `jax.nn`, cuDNN knows
  causal attention and the length of a row, but no packed texts. Blocks above the
  diagonal are skipped.

  Args:
    q_BTNH: Queries, keys and values as for `attention`, bfloat16 or float16.
    k_BTKH: Keys.
    v_BTKH: Values.
    segments_BT: int32 text number of each token, 0 for padding.
    window: Number of most recent places visible, the query's own included.
    scale: Multiplies q.k.
    implementation: `xla` gives the same numbers on any platform.
  """
  places_T = jnp.arange(q_BTNH.shape[1])
  near_TS = places_T[:, None] - places_T < window
  # Padding sees padding, so that no row of the softmax is empty.
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    mask=(same_BTS & near_TS)[:, None],
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )


def cudnn_fault(dtype, *, length: int, head_dim: int, softcap) -> str | None:
  """Why cuDNN cannot serve such an attention here; None where it can.

  What the local GPU and its libraries can do is tried once, on a small example.
  """
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16 or float16, not {jnp.dtype(dtype).name}'
  if softcap is not None:
    return 'it has no softcap on scores'
  if length % 2:
    return f'its masks need rows of even length, not {length}'
  # In a thread of its own: the traces and the mesh in force here are not there.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(_try_cudnn, jnp.dtype(dtype).name, head_dim).result()


@functools.cache
def _try_cudnn(dtype: str, head_dim: int) -> str | None:
  def loss(q, k, v, implementation):
    segments = jnp.tile(jnp.repeat(jnp.arange(1, 5), 16), (2, 1))
    out = cudnn_attention(
      q,
      k,
      v,
      segments_BT=segments,
      window=1 << 30,
      scale=head_dim**-0.5,
      implementation=implementation,
    )
    return jnp.square(out.astype(jnp.float32)).sum()

  try:
    device = jax.local_devices(backend='gpu')[0]
    rng = np.random.default_rng(0)
    q, k, v = (
      jax.device_put(rng.normal(size=(2, 64, n, head_dim)).astype(dtype), device)
      for n in (4, 2, 2)
    )
    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    got, want = jax.device_get((grad(q, k, v, 'cudnn'), grad(q, k, v, 'xla')))
  except Exception as error:  # a library that is missing or broken fails in many ways
    return f'it failed on a small example: {str(error).splitlines()[0]}'
  for a, b in zip(got, want, strict=True):
    a, b = a.astype(np.float32), b.astype(np.float32)
    if not np.abs(a - b).max() <= 0.05 * np.abs(b).max():  # NaN fails too
      return 'its gradients on a small example are not those of XLA'
  return None
