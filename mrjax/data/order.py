"""Data order as a function of (seed, epoch, step): resuming costs O(1) and is exact.

Step s of a run takes the places s*B ... s*B + B-1 of an endless list in which every
epoch is a permutation of all rows. It knows nothing of hosts or devices: each process
hands over its part of the same global batch.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_permutation(
  seed: int, epoch: int, num_records: int, *, stream: int = 0
) -> np.ndarray:
  """Returns the order of the records in an epoch, int64 [num_records], read-only.

  The raw output of Philox is sorted, so the order is the same for every NumPy version:
  NumPy keeps the streams of its bit generators, not those of `permutation`. Orders of
  different `stream` are independent of each other.
  """
  if num_records < 1:
    raise ValueError(f'num_records={num_records}; there is nothing to put in order')
  if seed < 0 or epoch < 0:
    raise ValueError(f'seed={seed}, epoch={epoch}; want numbers >= 0')
  bits = np.random.Philox(
    key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream])
  )
  order = np.argsort(bits.random_raw(num_records), kind='stable')
  order.flags.writeable = False
  return order


def batch_places(
  step: int, *, batch_size: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where one global batch lies: epochs and places in them, int64 [batch_size].

  Every row comes once an epoch; a batch may hold the end of one epoch and the start of
  the next, so no row is dropped and all batches are full.

  Args:
    step: Optimizer step, from 0.
    batch_size: Rows a step over all hosts and micro-batches.
    num_rows: Rows of an epoch.
  """
  if batch_size < 1 or step < 0 or num_rows < 1:
    raise ValueError(
      f'batch_size={batch_size}, step={step}, num_rows={num_rows}; want at least '
      '1, 0 and 1'
    )
  places = step * batch_size + np.arange(batch_size, dtype=np.int64)
  return places // num_rows, places % num_rows
