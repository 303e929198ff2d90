"""Batches for KTO: completions, with mismatched ones in rows of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example

MISMATCHED = 'mismatched_'  # before the names of the arrays of the mismatched texts


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
    return super().__call__(step) | _renamed(self.mismatched(step))

  def one_epoch(self) -> Iterator[dict[str, np.ndarray]]:
    """Every completion once, each batch with one of mismatched texts."""
    for step, batch in enumerate(super().one_epoch()):
      yield batch | _renamed(self.mismatched(step))

  def largest(self) -> dict[str, np.ndarray]:
    return super().largest() | _renamed(self.mismatched.largest())

  def fingerprint(self) -> str:
    return f'{super().fingerprint()}-{self.mismatched.fingerprint()}'


def _renamed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {MISMATCHED + name: x for name, x in batch.items()}
