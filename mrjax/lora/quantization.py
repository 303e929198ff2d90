"""Kernels into 4 or 8 bits, on the host: what `models.quantized` reads.

Rounding is bitsandbytes': inputs are multiplied by the float32 reciprocal of their
block's largest magnitude and go to the nearest level, the lower one at a midpoint. Two
things differ. A block of zeros has the code of zero (there, 0/0 gives the code of -1,
which double quantisation makes a small number). And the mean of the magnitudes is
rounded once from float64, where bitsandbytes' sum in float32 depends on the device.
"""

import math
from typing import Any

import jax
import numpy as np

from mrjax import trees
from mrjax.models.config import DecoderConfig
from mrjax.models.layers import linear_dims
from mrjax.models.quantized import (
  BLOCK,
  DYNAMIC_LEVELS,
  NF4_LEVELS,
  SCALE_BLOCK,
  stored_shapes,
)

PyTree = trees.PyTree
_CHUNK = 1 << 16  # weights handled at a time: they stay in cache


def quantized_shapes(shapes: PyTree, config: DecoderConfig, kind: str) -> PyTree:
  """A tree of shapes (scanned form) with the layers' kernels quantised.

  Embeddings, heads, norms and biases stay as they are.

  Raises:
    ValueError: See `stored_shapes`; the message names the kernel.
  """
  leaves = trees.flatten(shapes)
  for module, dims in linear_dims(config).items():
    name = f'layers/{module}'
    try:
      stored = stored_shapes(kind, *map(math.prod, dims))
    except ValueError as error:
      raise ValueError(f'{name}/kernel cannot be quantised: {error}') from None
    del leaves[f'{name}/kernel']
    for leaf, one in stored.items():
      leaves[f'{name}/{leaf}'] = jax.ShapeDtypeStruct(
        (config.num_layers, *one.shape), one.dtype
      )
  return trees.unflatten(leaves)


def quantize(weight_OI: np.ndarray, kind: str) -> dict[str, np.ndarray]:
  """The leaves of one linear map for its weight as Hugging Face stores it.

  Args:
    weight_OI: Any float dtype.
    kind: One of `quantized.KINDS`.

  Raises:
    ValueError: As `stored_shapes`; or a weight that is no finite number.
  """
  shapes = stored_shapes(kind, *weight_OI.shape[::-1])
  if kind == 'int8':
    leaves = _quantize_int8(weight_OI)
  else:
    leaves = _quantize_nf4(weight_OI)
  assert {n: (x.shape, x.dtype) for n, x in leaves.items()} == {
    n: (x.shape, x.dtype) for n, x in shapes.items()
  }
  return leaves


def _quantize_int8(weight_OI: np.ndarray) -> dict[str, np.ndarray]:
  num_outputs, num_inputs = weight_OI.shape
  codes_IO = np.empty((num_inputs, num_outputs), np.int8)
  absmax_O = np.empty(num_outputs, np.float32)
  step = max(1, _CHUNK // num_inputs)
  for o in range(0, num_outputs, step):
    rows = weight_OI[o : o + step].astype(np.float32)
    absmax_O[o : o + step] = _finite_absmax(rows)
    scale = _reciprocal(absmax_O[o : o + step], 127)
    codes_IO[:, o : o + step] = np.rint(rows * scale[:, None]).T
  return {'kernel_int8': codes_IO, 'kernel_absmax': absmax_O}


def _quantize_nf4(weight_OI: np.ndarray) -> dict[str, np.ndarray]:
  num_outputs, num_inputs = weight_OI.shape
  packed_IO = np.empty((num_inputs // 2, num_outputs), np.uint8)
  absmax_OB = np.empty((num_outputs, num_inputs // BLOCK), np.float32)
  thresholds = _midpoints(NF4_LEVELS)
  step = max(1, _CHUNK // num_inputs)
  for o in range(0, num_outputs, step):
    blocks = weight_OI[o : o + step].astype(np.float32)
    blocks = blocks.reshape(len(blocks), -1, BLOCK)
    absmax = _finite_absmax(blocks)
    absmax_OB[o : o + step] = absmax
    blocks *= _reciprocal(absmax, 1)[..., None]
    codes = np.zeros(blocks.shape, np.uint8)
    for threshold in thresholds:
      codes += blocks > threshold
    pairs = codes.reshape(len(codes), num_inputs // 2, 2)
    packed_IO[:, o : o + step] = (pairs[..., 0] << 4 | pairs[..., 1]).T
  mean = np.float32(absmax_OB.mean(dtype=np.float64))
  absmax_codes, scales = _quantize_blockwise((absmax_OB - mean).reshape(-1))
  return {
    'kernel_nf4': packed_IO,
    'kernel_absmax_codes': np.ascontiguousarray(
      absmax_codes.reshape(absmax_OB.shape).T
    ),
    'kernel_absmax_scale': scales,
    'kernel_absmax_mean': np.asarray(mean),
  }


def _quantize_blockwise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """uint8 codes of float32 values, and the largest magnitude of each 256 of them."""
  padded = np.pad(values, (0, -len(values) % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
  scales = np.abs(padded).max(axis=1)
  normed = padded * _reciprocal(scales, 1)[:, None]
  codes = np.searchsorted(_midpoints(DYNAMIC_LEVELS), normed.reshape(-1))
  return codes[: len(values)].astype(np.uint8), scales


def _midpoints(levels: np.ndarray) -> np.ndarray:
  return (levels[:-1] + levels[1:]) * np.float32(0.5)


def _finite_absmax(x: np.ndarray) -> np.ndarray:
  absmax = np.abs(x).max(axis=-1)
  if not np.isfinite(absmax).all():
    raise ValueError('it holds NaN or infinity')
  return absmax


def _reciprocal(absmax: np.ndarray, numerator: float) -> np.ndarray:
  """float32 `numerator / absmax`; 0 for 0, so that what it scales stays 0."""
  out = np.zeros_like(absmax)
  one: Any = np.float32(numerator)
  return np.divide(one, absmax, out=out, where=absmax > 0)
