"""Lists of token ids to padded arrays of a few fixed lengths."""

from collections.abc import Sequence

import numpy as np

from mrjax.data.sft import Example


def bucket_length(length: int, *, multiple: int, max_length: int) -> int:
  """Returns the smallest multiple that holds `length` tokens, `max_length` at most.

  A bounded set of lengths is a bounded set of compilations: max_length / multiple.

  Raises:
    ValueError: `length` is more than `max_length`.
  """
  if length > max_length:
    raise ValueError(f'{length} tokens do not fit into max_length={max_length}')
  return min(-(-length // multiple) * multiple, max_length)


def pad_batch(
  examples: Sequence[Example], *, max_length: int, multiple: int = 64
) -> dict[str, np.ndarray]:
  """Returns the examples as rows of one array each, padded on the right.

  Args:
    examples: At least one; none longer than `max_length`.
    max_length: Longest row there may be, in tokens.
    multiple: Row lengths are multiples of it, or `max_length`.

  Returns:
    'tokens' int32 [B, T], 0 where padded; 'segments' int32 [B, T], 1 on tokens and 0 on
    padding; 'loss_mask' bool [B, T], True on supervised tokens.
  """
  if not examples:
    raise ValueError('a batch needs at least one example')
  longest = max(len(example.ids) for example in examples)
  shape = (
    len(examples),
    bucket_length(longest, multiple=multiple, max_length=max_length),
  )
  batch = {
    'tokens': np.zeros(shape, np.int32),
    'segments': np.zeros(shape, np.int32),
    'loss_mask': np.zeros(shape, bool),
  }
  for row, example in enumerate(examples):
    batch['tokens'][row, : len(example.ids)] = example.ids
    batch['segments'][row, : len(example.ids)] = 1
    batch['loss_mask'][row, : len(example.ids)] = example.loss_mask
  return batch
