"""Moves axes between one layer of our leaves and Hugging Face tensors, by slices."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mrjax.checkpoint.weights import WeightRule, block_start, dim_sizes
from mrjax.models.config import DecoderConfig

_READ_BYTES = 32 << 20  # of one tensor that are in host memory beside its destination
_STRIP = 16  # rows moved at once in a transpose, to stay in cache: 8 times faster


def read_ours(
  rule: WeightRule,
  config: DecoderConfig,
  index: Sequence[slice],
  read: Callable[[tuple[slice, ...]], np.ndarray],
  out: np.ndarray,
) -> None:
  """Fills `out` with the part `index` of one layer of our leaf.

  Args:
    rule: The leaf's rule.
    config: The decoder's.
    index: One slice for each of our dimensions.
    read: Returns the given slices of the Hugging Face tensor. It is called for some
      32 MB at a time, so that a large tensor is never in memory twice.
    out: C-contiguous; what is read is cast to its dtype.
  """
  sizes, letters = dim_sizes(config), rule.our_dims.split()
  bounds = {d: s.indices(sizes[d])[:2] for d, s in zip(letters, index)}
  spans = []
  for word in rule.hf_dims.split():
    if any(bounds[d] != (0, sizes[d]) for d in word[1:]):
      raise ValueError(
        f'{rule.ours}: dimension {word[1:]} is split over devices; only the first of '
        f'the dimensions {word}, flattened into one in {rule.hf}, may be.'
      )
    stride = math.prod(sizes[d] for d in word[1:])
    spans.append((bounds[word[0]][0] * stride, bounds[word[0]][1] * stride))
  first = block_start(rule, config) + spans[0][0]
  num_rows = spans[0][1] - spans[0][0]
  columns = [slice(*span) for span in spans[1:]]
  num_columns = math.prod(c.stop - c.start for c in columns)
  flat = _rows_by_columns(rule, out, num_rows, num_columns)
  # By whole rows, since a column slice touches every page of the rows it crosses.
  step = max(1, _READ_BYTES // (4 * math.prod(rule.block_shape(config)[1:])))
  for row in range(0, num_rows, step):
    rows = min(step, num_rows - row)
    block = read((slice(first + row, first + row + rows), *columns))
    block = block.astype(out.dtype, copy=False).reshape(rows, num_columns)
    _copy(flat[row : row + rows], block, by_strips=rule.transposed)


def to_hf(rule: WeightRule, config: DecoderConfig, ours: np.ndarray) -> np.ndarray:
  """The rule's block of the Hugging Face tensor from one layer of our leaf."""
  shape = rule.block_shape(config)
  block, rows = np.empty(shape, ours.dtype), shape[0]
  source = _rows_by_columns(rule, np.ascontiguousarray(ours), rows, ours.size // rows)
  _copy(block.reshape(source.shape), source, by_strips=rule.transposed)
  return block


def _rows_by_columns(
  rule: WeightRule, ours: np.ndarray, rows: int, columns: int
) -> np.ndarray:
  """A view of our array with the axes of the Hugging Face matrix."""
  if rule.transposed:
    return ours.reshape(columns, rows).T
  return ours.reshape(rows, columns)


def _copy(to: np.ndarray, source: np.ndarray, *, by_strips: bool) -> None:
  # As unsigned integers: NumPy's loops for bfloat16 are several times slower.
  bits = np.dtype(f'u{to.dtype.itemsize}')
  to, source = to.view(bits), source.view(bits)
  step = _STRIP if by_strips else max(1, len(to))
  for i in range(0, len(to), step):
    to[i : i + step] = source[i : i + step]
