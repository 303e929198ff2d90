"""The order of the data: a pure function, and every record once an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrjax.data.order import batch_indices, epoch_of, epoch_permutation, process_slice

SIZES = {'batch_size': st.integers(1, 13), 'num_records': st.integers(1, 29)}


@given(seed=st.integers(0, 2**40), start=st.integers(0, 50), **SIZES)
def test_every_record_comes_once_an_epoch(seed, start, batch_size, num_records):
  steps = range(3 * num_records // batch_size + 2)
  stream = np.concatenate(
    [
      batch_indices(seed, step, batch_size=batch_size, num_records=num_records)
      for step in steps
    ]
  )
  for epoch in range(len(stream) // num_records):
    part = stream[epoch * num_records : (epoch + 1) * num_records]
    assert sorted(part) == list(range(num_records))
  # A later step needs no earlier one.
  step = start % len(steps)
  again = batch_indices(seed, step, batch_size=batch_size, num_records=num_records)
  assert (again == stream[step * batch_size : (step + 1) * batch_size]).all()


def test_the_order_is_pinned():
  """A resumed run of another machine or NumPy must find the same order."""
  np.testing.assert_array_equal(epoch_permutation(3, 1, 7), [3, 5, 6, 4, 0, 2, 1])


def test_epochs_and_seeds_differ():
  orders = {
    tuple(epoch_permutation(seed, epoch, 30)) for seed in range(4) for epoch in range(4)
  }
  assert len(orders) == 16


def test_the_order_is_random():
  """Positions of one record over many epochs are uniform: chi-square, 9 degrees."""
  places = [
    int(np.argwhere(epoch_permutation(0, e, 10) == 4)[0, 0]) for e in range(2000)
  ]
  counts = np.bincount(places, minlength=10)
  assert ((counts - 200) ** 2 / 200).sum() < 30  # p < 0.0005 by chance


def test_a_far_step_costs_no_more():
  far = batch_indices(1, 10**12, batch_size=5, num_records=11)
  place = 5 * 10**12
  order = epoch_permutation(1, place // 11, 11)
  assert far[0] == order[place % 11]


@pytest.mark.parametrize('process_count', [1, 2, 3, 6])
def test_processes_share_the_same_batch(process_count):
  batch = batch_indices(1, 4, batch_size=12, num_records=31)
  parts = [
    process_slice(batch, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  assert (np.concatenate(parts) == batch).all()


def test_epoch_of():
  assert epoch_of(3, batch_size=4, num_records=8) == 1.5


def test_errors():
  with pytest.raises(ValueError, match='does not divide among 5'):
    process_slice(np.arange(12), process_index=0, process_count=5)
  with pytest.raises(ValueError, match='nothing to put in order'):
    batch_indices(0, 0, batch_size=2, num_records=0)
  with pytest.raises(ValueError, match='want numbers >= 0'):
    epoch_permutation(-1, 0, 3)
  with pytest.raises(ValueError, match='batch_size=0'):
    batch_indices(0, 0, batch_size=0, num_records=3)
