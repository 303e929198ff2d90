"""Best-fit packing: several texts a row, the same work in every epoch.

Where rows begin and end depends on the lengths of the texts alone, so every epoch has
the same number of rows and a step finds its rows in O(1). What changes with (seed,
epoch) is which of the texts of one length stands where, and the order of the rows.
Nothing here knows of hosts or devices.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mrjax.data.order import epoch_permutation

_ROW_ORDER = 1  # stream of random numbers beside that of the units


@dataclasses.dataclass(frozen=True)
class Packing:
  """Units of text shared out over rows.

  A unit is what must stay in one row: a text, or the two texts of a pair. Places count
  the units from the longest to the shortest; a row is a list of places, and an epoch
  says which unit stands at which place.

  Attributes:
    lengths: int64 [U], tokens of each unit.
    capacity: Tokens of a row.
    places: int64 [U], the places of all rows, one row after the other.
    row_starts: int64 [R + 1]; row r holds `places[row_starts[r]:row_starts[r + 1]]`.
  """

  lengths: np.ndarray
  capacity: int
  places: np.ndarray
  row_starts: np.ndarray

  @property
  def num_units(self) -> int:
    return len(self.lengths)

  @property
  def num_rows(self) -> int:
    return len(self.row_starts) - 1

  @property
  def max_units(self) -> int:
    """Units of the row that has most of them."""
    return int(np.diff(self.row_starts).max())

  def units(self, seed: int, epoch: int, index: int) -> np.ndarray:
    """The units of row `index` of an epoch, int64, longest first."""
    at_place, row_order = _epoch(self, seed, epoch)
    row = row_order[index]
    return at_place[self.places[self.row_starts[row] : self.row_starts[row + 1]]]

  # Identity, so that `_epoch` can be cached.
  __hash__ = object.__hash__
  __eq__ = object.__eq__


def pack_units(lengths: Sequence[int] | np.ndarray, *, capacity: int) -> Packing:
  """Returns the best-fit-decreasing packing of units into rows.

  From the longest on, each unit goes to the row with the least room that still holds
  it, else to a new row. At most 3/2 of the fewest rows possible are used, and 11/9 of
  them plus 4 (Simchi-Levi 1994; Johnson et al. 1974); on texts much shorter than the
  row the last row alone is not full. A unit costs a few operations on a bit set of
  `capacity` bits, one for every amount of room that some row has left.

  Args:
    lengths: Tokens of each unit, 1 to `capacity`.
    capacity: Tokens of a row.

  Raises:
    ValueError: No units, or one that is empty or longer than a row.
  """
  lengths, by_length = _checked(lengths, capacity)
  rows: list[list[int]] = []
  rows_with_room: dict[int, list[int]] = defaultdict(list)
  rooms = 0  # bit s is set where a row has room for s tokens
  for place, length in enumerate(lengths[by_length].tolist()):
    large_enough = rooms >> length
    if large_enough:
      room = length + (large_enough & -large_enough).bit_length() - 1
      row = rows_with_room[room].pop()
      if not rows_with_room[room]:
        rooms ^= 1 << room
    else:
      room, row = capacity, len(rows)
      rows.append([])
    rows[row].append(place)
    if room > length:
      rows_with_room[room - length].append(row)
      rooms |= 1 << (room - length)
  starts = np.cumsum([0, *map(len, rows)])
  places = np.array([place for row in rows for place in row], np.int64)
  return Packing(lengths, capacity, places, starts)


def one_unit_a_row(lengths: Sequence[int] | np.ndarray, *, capacity: int) -> Packing:
  """Returns the packing that packs nothing: every unit has a row of its own."""
  lengths, _ = _checked(lengths, capacity)
  count = len(lengths)
  return Packing(lengths, capacity, np.arange(count), np.arange(count + 1))


@functools.lru_cache(maxsize=4)
def _epoch(packing: Packing, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
  """The unit at each place, and the row that comes at each index."""
  order = epoch_permutation(seed, epoch, packing.num_units)
  longest_first = np.argsort(-packing.lengths[order], kind='stable')
  row_order = epoch_permutation(seed, epoch, packing.num_rows, stream=_ROW_ORDER)
  return order[longest_first], row_order


def _checked(lengths, capacity: int) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.asarray(lengths, np.int64)
  if not len(lengths):
    raise ValueError('there are no texts to pack')
  if lengths.min() < 1 or lengths.max() > capacity:
    bad = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
    raise ValueError(
      f'unit {bad} has {lengths[bad]} tokens; a row holds 1 to {capacity} tokens'
    )
  return lengths, np.argsort(-lengths, kind='stable')
