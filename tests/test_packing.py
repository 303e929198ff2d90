"""Packing: few rows, every text once an epoch, and the loss of separate rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrjax.data.batches import TextBatches, make_rows, pad_batch
from mrjax.data.packing import one_unit_a_row, pack_units
from mrjax.data.sft import Example

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


def rows_of(packing, seed=0, epoch=0):
  return [packing.units(seed, epoch, i).tolist() for i in range(packing.num_rows)]


def fewest_rows(lengths, capacity):
  """By exhaustive search: the next text goes to any row with room, or a new one."""
  best = len(lengths)

  def place(i, rooms):
    nonlocal best
    if len(rooms) >= best:
      return
    if i == len(lengths):
      best = len(rooms)
      return
    for room in {r for r in rooms if r >= lengths[i]}:
      j = rooms.index(room)
      place(i + 1, (*rooms[:j], room - lengths[i], *rooms[j + 1 :]))
    place(i + 1, (*rooms, capacity - lengths[i]))

  place(0, ())
  return best


@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 5))
def test_every_unit_comes_once_an_epoch_and_every_row_holds_its_units(
  lengths, seed, epoch
):
  packing = pack_units(lengths, capacity=20)
  rows = rows_of(packing, seed, epoch)
  assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
  assert all(sum(lengths[unit] for unit in row) <= 20 for row in rows)
  assert max(map(len, rows)) == packing.max_units
  assert min(map(len, rows)) >= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_at_most_three_halves_of_the_fewest_rows(lengths):
  best = fewest_rows(sorted(lengths, reverse=True), 20)
  rows = pack_units(lengths, capacity=20).num_rows
  assert best <= rows <= math.floor(1.5 * best)


@given(LENGTHS)
def test_each_unit_lies_where_it_fits_best(lengths):
  """The same rows as a plain search through all rows gives."""
  rooms: list[int] = []
  for length in sorted(lengths, reverse=True):
    fitting = [room for room in rooms if room >= length]
    if fitting:
      rooms.remove(min(fitting))
      rooms.append(min(fitting) - length)
    else:
      rooms.append(20 - length)
  packing = pack_units(lengths, capacity=20)
  found = [20 - sum(lengths[unit] for unit in row) for row in rows_of(packing)]
  assert sorted(found) == sorted(rooms)


def test_the_packing_is_pinned():
  """A resumed run of another machine or NumPy must find the same rows."""
  packing = pack_units([3, 5, 3, 7, 2, 3, 6], capacity=10)
  pinned = [[6, 2], [3, 0], [1, 5, 4]]
  assert rows_of(packing, 4, 0) == pinned
  assert rows_of(packing, 4, 1) != pinned
  assert rows_of(packing, 5, 0) != pinned


def test_little_is_padded_at_realistic_lengths():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(5.0, 0.45, 7473), 24, 900).astype(int)  # as GSM8K
  for capacity, most in ((1024, 0.01), (512, 0.02)):
    kept = lengths[lengths <= capacity]
    packing = pack_units(kept, capacity=capacity)
    assert 1 - kept.sum() / (packing.num_rows * capacity) < most


def test_ties_and_rows_change_with_the_epoch_but_their_number_does_not():
  lengths = [4, 4, 4, 4, 5, 5, 5, 6, 6, 2, 2, 2]
  packing = pack_units(lengths, capacity=10)
  epochs = [rows_of(packing, 1, epoch) for epoch in range(4)]
  assert len({str(rows) for rows in epochs}) == 4
  together = [{frozenset(row) for row in rows} for rows in epochs]
  assert together[0] != together[1]


def test_one_unit_a_row():
  packing = one_unit_a_row([3, 1, 2], capacity=3)
  assert packing.num_rows == 3
  assert sorted(rows_of(packing, 2, 7)) == [[0], [1], [2]]


@pytest.mark.parametrize(
  ('lengths', 'message'),
  [([], 'no texts'), ([3, 11, 4], 'unit 1 has 11 tokens'), ([0], 'unit 0 has 0')],
)
def test_units_that_fit_no_row_are_refused(lengths, message):
  with pytest.raises(ValueError, match=message):
    pack_units(lengths, capacity=10)


def text(*ids, supervised=1, where=''):
  mask = np.arange(len(ids)) >= len(ids) - supervised
  return Example(np.array(ids, np.int32), mask, where)


def test_rows_by_hand():
  rows = make_rows([[text(5, 6, 7), text(8, 9)], []], length=6)
  assert rows['tokens'].tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6]
  assert rows['segments'].tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]
  assert rows['positions'].tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
  assert np.argwhere(rows['loss_mask']).tolist() == [[0, 2], [0, 4]]
  with pytest.raises(ValueError, match='5 tokens do not fit into a row of 4'):
    make_rows([[text(5, 6, 7), text(8, 9)]], length=4)


def test_padded_rows_have_the_length_of_a_bucket():
  batch = pad_batch([text(1, 2, 3), text(4, 5, 6, 7, 8)], max_length=7, multiple=4)
  assert batch['tokens'].shape == (2, 7)
  assert batch['segments'].sum(1).tolist() == [3, 5]


def pairs(number):
  rng = np.random.default_rng(3)
  return [
    tuple(text(*rng.integers(1, 99, rng.integers(2, 9)), where=f'r{i}') for _ in 'ab')
    for i in range(number)
  ]


def test_the_texts_of_a_pair_stay_together_and_labels_follow_them():
  units = pairs(13)
  labels = np.array([[len(a.ids), -len(b.ids)] for a, b in units])
  batches = TextBatches(
    units, row_length=24, batch_size=4, grad_accumulation=2, labels={'signed': labels}
  )
  seen = 0
  for batch in batches.one_epoch():
    assert batch['tokens'].shape == (2, 2, 24)
    assert batch['signed'].shape == (2, 2, batches.max_texts)
    counts = [(batch['segments'] == s + 1).sum(-1) for s in range(batches.max_texts)]
    signs = [1 if s % 2 == 0 else -1 for s in range(batches.max_texts)]
    want = np.stack([count * sign for count, sign in zip(counts, signs)], axis=-1)
    np.testing.assert_array_equal(batch['signed'], want)
    seen += (batch['signed'] != 0).sum()
  assert seen == 26


@pytest.mark.parametrize('packing', [True, False])
def test_a_step_is_a_function_of_its_number(packing):
  units = pairs(9)
  make = lambda size, micro: TextBatches(
    units,
    row_length=24,
    batch_size=size,
    grad_accumulation=micro,
    packing=packing,
    seed=5,
  )
  batches = make(2, 1)
  names = [name for step in range(batches.num_rows) for name in batches.names(step)]
  # Twice the rows of an epoch in steps of two: every unit twice.
  assert sorted(names) == sorted([f'r{i}' for i in range(9)] * 2)
  assert batches.epoch(batches.num_rows) == 2
  again = make(2, 2)(3)
  for name, x in batches(3).items():
    np.testing.assert_array_equal(x[0], again[name][:, 0])


def test_the_fingerprint_sees_texts_masks_and_labels():
  units = pairs(3)
  make = lambda units, labels: TextBatches(
    units, row_length=24, batch_size=1, labels=labels
  ).fingerprint()
  label = {'x': np.arange(6).reshape(3, 2)}
  found = [make(units, None), make(units[::-1], None), make(units, label)]
  found.append(make(units, {'x': label['x'] + 1}))
  changed = Example(units[0][0].ids, ~units[0][0].loss_mask)
  found.append(make([(changed, units[0][1]), *units[1:]], None))
  assert len(set(found)) == 5
  assert make(units, None) == found[0]


def test_the_description_says_how_much_is_padded():
  batches = TextBatches([(text(1, 2, 3),)] * 6, row_length=7, batch_size=2)
  assert batches.describe() == (
    '6 units, 18 tokens, packed into 3 rows of 7 (14.3% padding); a batch of 2 rows '
    'holds about 4 units'
  )
