"""The order of the data: a pure function, and every record once an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrjax.data.order import batch_places, epoch_permutation

SIZES = {'batch_size': st.integers(1, 13), 'num_rows': st.integers(1, 29)}


@given(start=st.integers(0, 50), **SIZES)
def test_every_place_comes_once_an_epoch(start, batch_size, num_rows):
  steps = range(3 * num_rows // batch_size + 2)
  stream = [
    place
    for step in steps
    for place in zip(*batch_places(step, batch_size=batch_size, num_rows=num_rows))
  ]
  assert stream == [divmod(i, num_rows) for i in range(len(stream))]
  # A later step needs no earlier one.
  step = start % len(steps)
  again = batch_places(step, batch_size=batch_size, num_rows=num_rows)
  assert list(zip(*again)) == stream[step * batch_size : (step + 1) * batch_size]


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


def test_streams_are_other_orders():
  first, second = (epoch_permutation(3, 1, 30, stream=i) for i in (0, 1))
  assert sorted(first) == sorted(second) == list(range(30))
  assert (first != second).any()


def test_a_far_step_costs_no_more():
  epochs, places = batch_places(10**12, batch_size=5, num_rows=11)
  assert (epochs[0], places[0]) == divmod(5 * 10**12, 11)


def test_errors():
  with pytest.raises(ValueError, match='nothing to put in order'):
    epoch_permutation(0, 0, 0)
  with pytest.raises(ValueError, match='want numbers >= 0'):
    epoch_permutation(-1, 0, 3)
  for bad in ({'batch_size': 0}, {'num_rows': 0}, {'step': -1}):
    with pytest.raises(ValueError, match=f'{next(iter(bad))}='):
      batch_places(**({'step': 0, 'batch_size': 2, 'num_rows': 3} | bad))
