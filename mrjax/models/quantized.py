"""Frozen kernels in 4 or 8 bits, and the product with one.

In place of `kernel`, a linear map of I inputs and O outputs holds either

    kernel_nf4           uint8 [I/2, O]    two codes a byte, the first in the high half
    kernel_absmax_codes  uint8 [I/64, O]   largest magnitude of each 64 inputs, as codes
    kernel_absmax_scale  float32 [M]       one for each 256 of these codes
    kernel_absmax_mean   float32 []        added to what the codes stand for

(NF4 with double quantisation, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)
or

    kernel_int8          int8 [I, O]
    kernel_absmax        float32 [O]       largest magnitude of each output's weights

(the weights of LLM.int8, Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
Numbers are bitsandbytes': its matrices are [O, I], so ours are their transposes, and
the blocks of 256 run along I/64 first, then along O. The axes lie over a mesh as those
of the kernel do.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('nf4', 'int8')
LEAVES = (
  'kernel_nf4',
  'kernel_absmax_codes',
  'kernel_absmax_scale',
  'kernel_absmax_mean',
  'kernel_int8',
  'kernel_absmax',
)
BLOCK = 64  # weights that share a magnitude
SCALE_BLOCK = 256  # magnitudes that share a scale
# Quantiles of a normal distribution with zero among them, scaled to [-1, 1]; as
# published, since scipy's quantile function differs between versions in the last bit.
NF4_LEVELS = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ],
  np.float32,
)


def _dynamic_levels() -> np.ndarray:
  """The 256 values of the signed dynamic type, ascending, Dettmers 2016.

  For each of seven powers of ten, 10^-6 to 1, it has the centres of 2^i equal parts of
  [0.1, 1], i = 0 to 6, times the power, with both signs; and 0 and 1. Rounding is
  that of `torch.linspace`, from either end to the middle with one rounding each.
  """
  low, levels = np.float32(0.1), [0.0, 1.0]
  for i in range(7):
    places = np.arange(2**i + 1)
    step = np.float64((1 - low) / np.float32(2**i))
    below = places < len(places) // 2
    edges = np.where(below, low + step * places, 1 - step * places[::-1])
    edges = edges.astype(np.float32)
    centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    levels += [*centres.tolist(), *(-centres).tolist()]
  return np.array(sorted(levels), np.float32)


DYNAMIC_LEVELS = _dynamic_levels()


def stored_shapes(
  kind: str, num_inputs: int, num_outputs: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves that stand for one kernel.

  Raises:
    ValueError: An unknown kind, or inputs that are not whole blocks.
  """
  if kind == 'int8':
    return {
      'kernel_int8': jax.ShapeDtypeStruct((num_inputs, num_outputs), jnp.int8),
      'kernel_absmax': jax.ShapeDtypeStruct((num_outputs,), jnp.float32),
    }
  if kind != 'nf4':
    raise ValueError(f'--quantize={kind}: want one of {", ".join(KINDS)}.')
  if num_inputs % BLOCK:
    raise ValueError(
      f'{num_inputs} inputs are no multiple of {BLOCK}: NF4 blocks would run from one '
      'output into the next. Use --quantize=int8.'
    )
  blocks = num_inputs // BLOCK
  num_scales = math.ceil(blocks * num_outputs / SCALE_BLOCK)
  return {
    'kernel_nf4': jax.ShapeDtypeStruct((num_inputs // 2, num_outputs), jnp.uint8),
    'kernel_absmax_codes': jax.ShapeDtypeStruct((blocks, num_outputs), jnp.uint8),
    'kernel_absmax_scale': jax.ShapeDtypeStruct((num_scales,), jnp.float32),
    'kernel_absmax_mean': jax.ShapeDtypeStruct((), jnp.float32),
  }


def dequantize(leaves: dict[str, jax.Array], dtype) -> jax.Array:
  """The kernel [I, O] that the leaves of one linear map stand for."""
  if 'kernel_int8' in leaves:
    values = leaves['kernel_int8'].astype(jnp.float32)
    return (values * leaves['kernel_absmax'] * np.float32(1 / 127)).astype(dtype)
  codes, num_outputs = leaves['kernel_nf4'], leaves['kernel_nf4'].shape[1]
  codes = jnp.stack([codes >> 4, codes & 15], axis=1).reshape(-1, BLOCK, num_outputs)
  # The 16 values of a block are made once for its 64 weights, each of which then
  # selects one, bit by bit: look-ups in a table are slow where lanes are many. (Were
  # the levels scaled last, XLA would hoist 16 constant arrays of a kernel's size.)
  absmax = _absmax(leaves)[:, None]
  levels: Any = [(level * absmax).astype(dtype) for level in NF4_LEVELS]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    pairs = zip(levels[::2], levels[1::2])
    levels = [jnp.where(is_set, high, low) for low, high in pairs]
  return levels[0].reshape(-1, num_outputs)


@jax.custom_vjp
def matmul(x: jax.Array, leaves: dict[str, jax.Array]) -> jax.Array:
  """x [rows, I] times the kernel, in the dtype of x; only x has a gradient.

  The kernel is made again for the backward pass: kept, it would take the memory that
  quantising saved.
  """
  return x @ dequantize(leaves, x.dtype)


def _matmul_forward(x, leaves):
  return x @ dequantize(leaves, x.dtype), leaves


def _matmul_backward(leaves, dy):
  return dy @ dequantize(leaves, dy.dtype).T, None


matmul.defvjp(_matmul_forward, _matmul_backward)


def _absmax(leaves: dict[str, jax.Array]) -> jax.Array:
  """Largest magnitude of each block, float32 [I/64, O]."""
  codes, scales = leaves['kernel_absmax_codes'], leaves['kernel_absmax_scale']
  blocks, num_outputs = codes.shape
  scales = jnp.broadcast_to(scales[:, None], (len(scales), SCALE_BLOCK)).reshape(-1)
  scales = scales[: codes.size].reshape(num_outputs, blocks).T
  levels = jnp.asarray(DYNAMIC_LEVELS).at[codes].get(mode='promise_in_bounds')
  return levels * scales + leaves['kernel_absmax_mean']
