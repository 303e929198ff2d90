"""Batches for KTO: completions, with mismatched ones in rows of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example

MISMATCHED = 'mismatched_'  # before the names of the arrays of the mismatched texts
_BY_TOKEN = ('tokens', 'segments', 'positions', 'loss_mask')


class JudgedBatches(TextBatches):
  """Batches of completions; each has a batch of mismatched texts with it."""

  def __init__(
    self,
    units: Sequence[Sequence[Example]],
    *,
    mismatched: TextBatches,
    **options: Any,
  ):
    """Packs the completions; `options` are those of `TextBatches`."""
    super().__init__(units, **options)
    self.mismatched = mismatched

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    return _joined(super().__call__(step), self.mismatched(step))

  def one_epoch(self) -> Iterator[dict[str, np.ndarray]]:
    """Every completion once, each batch with one of mismatched texts."""
    for step, batch in enumerate(super().one_epoch()):
      yield _joined(batch, self.mismatched(step))

  def largest(self) -> dict[str, np.ndarray]:
    return _joined(super().largest(), self.mismatched.largest())

  def fingerprint(self) -> str:
    return f'{super().fingerprint()}-{self.mismatched.fingerprint()}'


def _joined(
  own: dict[str, np.ndarray], mismatched: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Both, padded to one length: two lengths would be a compilation for every pair."""
  length = max(batch['tokens'].shape[-1] for batch in (own, mismatched))
  return _padded(own, length) | {
    MISMATCHED + name: x for name, x in _padded(mismatched, length).items()
  }


def _padded(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
  spare = length - batch['tokens'].shape[-1]
  return {
    name: np.pad(x, ((0, 0), (0, 0), (0, spare))) if name in _BY_TOKEN else x
    for name, x in batch.items()
  }
