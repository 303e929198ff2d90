"""Texts to the arrays of a step: rows of one or many texts, of a few fixed lengths."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mrjax.data import packing as packing_lib
from mrjax.data.order import batch_places
from mrjax.data.sft import Example

_BUCKET = 64  # rows of one text are padded to a multiple of it


def bucket_length(length: int, *, multiple: int, max_length: int) -> int:
  """Returns the smallest multiple that holds `length` tokens, `max_length` at most.

  A bounded set of lengths is a bounded set of compilations: max_length / multiple.

  Raises:
    ValueError: `length` is more than `max_length`.
  """
  if length > max_length:
    raise ValueError(f'{length} tokens do not fit into max_length={max_length}')
  return min(-(-length // multiple) * multiple, max_length)


def make_rows(
  rows: Sequence[Sequence[Example]], *, length: int
) -> dict[str, np.ndarray]:
  """Returns rows of texts one after the other, padded on the right.

  Args:
    rows: The texts of each row; a row may be empty.
    length: Tokens of a row, T.

  Returns:
    'tokens' int32 [B, T], 0 where padded; 'segments' int32 [B, T], the number of the
    text in its row, from 1, and 0 on padding; 'positions' int32 [B, T], from 0 in each
    text; 'loss_mask' bool [B, T], True on supervised tokens.
  """
  shape = (len(rows), length)
  batch = {
    'tokens': np.zeros(shape, np.int32),
    'segments': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
    'loss_mask': np.zeros(shape, bool),
  }
  for row, texts in enumerate(rows):
    start = 0
    for number, text in enumerate(texts, start=1):
      here = row, slice(start, start + len(text.ids))
      start += len(text.ids)
      if start > length:
        raise ValueError(f'{start} tokens do not fit into a row of {length}')
      batch['tokens'][here] = text.ids
      batch['segments'][here] = number
      batch['positions'][here] = np.arange(len(text.ids))
      batch['loss_mask'][here] = text.loss_mask
  return batch


def pad_batch(
  examples: Sequence[Example], *, max_length: int, multiple: int = _BUCKET
) -> dict[str, np.ndarray]:
  """Returns the examples as rows of one text each; see `make_rows`.

  Args:
    examples: At least one; none longer than `max_length`.
    max_length: Longest row there may be, in tokens.
    multiple: Row lengths are multiples of it, or `max_length`.
  """
  if not examples:
    raise ValueError('a batch needs at least one example')
  longest = max(len(example.ids) for example in examples)
  return make_rows(
    [[example] for example in examples],
    length=bucket_length(longest, multiple=multiple, max_length=max_length),
  )


class TextBatches:
  """The batches of a run: a function of the step alone.

  A unit is what must stay in one row: one text, or the texts of a pair. With packing,
  rows of `row_length` tokens hold as many units as fit, and `batch_size` counts these
  rows, as in TRL; without it a row holds one unit and `batch_size` counts units. Every
  unit comes once an epoch, and a step finds its rows in O(1).
  """

  def __init__(
    self,
    units: Sequence[Sequence[Example]],
    *,
    row_length: int,
    batch_size: int,
    grad_accumulation: int = 1,
    packing: bool = True,
    seed: int = 0,
    labels: Mapping[str, np.ndarray] | None = None,
  ):
    """Packs the units.

    Args:
      units: At least one; all of them with the same number of texts, none of them
        longer than a row.
      row_length: Tokens of a row, T; without packing, of the longest row there may be.
      batch_size: Rows a step, over all micro-batches.
      grad_accumulation: Micro-batches a step, A; divides `batch_size`.
      packing: Whether a row may hold more than one unit.
      seed: Of the order.
      labels: Numbers of each text, [units, texts a unit], by name; batches get them as
        [A, B, S], where entry s - 1 belongs to segment s, and 0 to no text.

    Raises:
      ValueError: No units, or one longer than a row.
    """
    lengths = [sum(len(text.ids) for text in unit) for unit in units]
    pack = packing_lib.pack_units if packing else packing_lib.one_unit_a_row
    self._packing = pack(lengths, capacity=row_length)
    self._units = units
    self._labels = dict(labels or {})
    self._packed = packing
    self._grad_accumulation = grad_accumulation
    self._seed = seed
    self.batch_size = batch_size
    self.row_length = row_length

  @property
  def num_units(self) -> int:
    return self._packing.num_units

  @property
  def num_rows(self) -> int:
    """Rows of an epoch."""
    return self._packing.num_rows

  @property
  def max_texts(self) -> int:
    """Most texts that a row holds, S."""
    return self._packing.max_units * len(self._units[0])

  def num_steps(self, num_epochs: float) -> int:
    """Steps of so many passes over the data, at least one."""
    return max(1, round(num_epochs * self.num_rows / self.batch_size))

  def epoch(self, step: int) -> float:
    """Epochs done before a step."""
    return step * self.batch_size / self.num_rows

  def names(self, step: int) -> list[str]:
    """What the records of a step are called, row by row."""
    units = (unit for row in self._rows(step) for unit in row)
    return [self._units[unit][0].where or str(unit) for unit in units]

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    """Arrays of a step: those of `make_rows`, [A, B, T], and the labels, [A, B, S]."""
    return self._arrays(self._rows(step))

  def one_epoch(self) -> Iterator[dict[str, np.ndarray]]:
    """Every unit once; rows without a text fill up the last batch."""
    places = range(self.num_rows)
    rows = [list(self._packing.units(self._seed, 0, place)) for place in places]
    rows += [[]] * (-len(rows) % self.batch_size)
    starts = range(0, len(rows), self.batch_size)
    for start in starts:
      yield self._arrays(rows[start : start + self.batch_size])

  def largest(self) -> dict[str, np.ndarray]:
    """Arrays of the largest shapes that a step can have."""
    longest = int(self._packing.lengths.argmax())
    return self._arrays([[longest]] * self.batch_size)

  def fingerprint(self) -> str:
    """SHA-256 of all texts and labels: what a resumed run must find unchanged."""
    digest = hashlib.sha256()
    for unit in self._units:
      for text in unit:
        digest.update(len(text.ids).to_bytes(4, 'big'))
        digest.update(text.ids.tobytes())
        digest.update(text.loss_mask.tobytes())
    for name, values in sorted(self._labels.items()):
      digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()

  def describe(self) -> str:
    """One line: units, rows, and the share of places that hold no text."""
    tokens = int(self._packing.lengths.sum())
    line = f'{self.num_units:,} units, {tokens:,} tokens'
    if not self._packed:
      return f'{line}; one unit a row, padded to the longest of the batch'
    padding = 1 - tokens / (self.num_rows * self.row_length)
    return (
      f'{line}, packed into {self.num_rows:,} rows of {self.row_length:,} '
      f'({padding:.1%} padding); a batch of {self.batch_size:,} rows holds about '
      f'{self.batch_size * self.num_units / self.num_rows:,.0f} units'
    )

  def _rows(self, step: int) -> list[list[int]]:
    where = batch_places(step, batch_size=self.batch_size, num_rows=self.num_rows)
    return [
      self._packing.units(self._seed, int(epoch), int(place)).tolist()
      for epoch, place in zip(*where)
    ]

  def _arrays(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
    length = self.row_length
    if not self._packed:
      longest = max((int(self._packing.lengths[row].sum()) for row in rows), default=1)
      length = bucket_length(longest, multiple=_BUCKET, max_length=length)
    texts = [[text for unit in row for text in self._units[unit]] for row in rows]
    batch = make_rows(texts, length=length)
    for name, values in self._labels.items():
      batch[name] = np.zeros((len(rows), self.max_texts), values.dtype)
      for i, row in enumerate(rows):
        found = values[row].reshape(-1)
        batch[name][i, : len(found)] = found
    return {
      name: x.reshape(self._grad_accumulation, -1, *x.shape[1:])
      for name, x in batch.items()
    }
