"""Whole texts in batches of few shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mrjax.sampling.plan import text_bucket
from mrjax.sampling.prefill import CHUNK


class TextBatch(NamedTuple):
  """Texts that are read together.

  Attributes:
    numbers: Which texts; those of the first rows.
    tokens_BT: int32, right-padded; T is a power of two, at least 32.
    lengths_B: int32 number of real tokens; rows without a text have one.
  """

  numbers: list[int]
  tokens_BT: np.ndarray
  lengths_B: np.ndarray


def text_batches(
  texts: Sequence[Sequence[int]], *, max_batch: int, shards: int
) -> Iterator[TextBatch]:
  """Every text once, longest first, so that those of a batch are about as long.

  Args:
    texts: Token ids, none empty.
    max_batch: Most texts of a batch; fewer where they are long.
    shards: Parts that a batch is split into; divides its size.
  """
  order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
  start = 0
  while start < len(order):
    bucket = text_bucket(len(texts[order[start]]))
    most = min(max_batch // shards, max(1, CHUNK // bucket))
    size = shards * min(most, -(-len(order) // shards))
    numbers = order[start : start + size]
    tokens_BT = np.zeros((size, bucket), np.int32)
    lengths_B = np.ones(size, np.int32)
    for row, number in enumerate(numbers):
      text = texts[number]
      tokens_BT[row, : len(text)] = text
      lengths_B[row] = len(text)
    yield TextBatch(numbers, tokens_BT, lengths_B)
    start += size
