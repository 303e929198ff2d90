"""Data order as a function of (seed, epoch, step): resuming costs O(1) and is exact.

Step s of a run takes the places s*B ... s*B + B-1 of an endless list in which every
epoch is a permutation of all records. It knows nothing of hosts or devices: each
process takes its slice of the same global batch.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
  """Returns the order of the records in an epoch, int64 [num_records], read-only.

  The raw output of Philox is sorted, so the order is the same for every NumPy version:
  NumPy keeps the streams of its bit generators, not those of `permutation`.
  """
  if num_records < 1:
    raise ValueError(f'num_records={num_records}; there is nothing to put in order')
  if seed < 0 or epoch < 0:
    raise ValueError(f'seed={seed}, epoch={epoch}; want numbers >= 0')
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  order = np.argsort(bits.random_raw(num_records), kind='stable')
  order.flags.writeable = False
  return order


def batch_indices(
  seed: int, step: int, *, batch_size: int, num_records: int
) -> np.ndarray:
  """Returns the records of one global batch, int64 [batch_size].

  Every record comes once an epoch; a batch may hold the end of one epoch and the start
  of the next, so no record is dropped and all batches are full.

  Args:
    seed: Seed of the order.
    step: Optimizer step, from 0.
    batch_size: Records a step over all hosts and micro-batches.
    num_records: Records of the data set.
  """
  if batch_size < 1 or step < 0:
    raise ValueError(f'batch_size={batch_size}, step={step}; want >= 1 and >= 0')
  places = step * batch_size + np.arange(batch_size, dtype=np.int64)
  epochs = places // num_records if num_records > 0 else places
  indices = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    order = epoch_permutation(seed, int(epoch), num_records)
    indices[here] = order[places[here] % num_records]
  return indices


def epoch_of(step: int, *, batch_size: int, num_records: int) -> float:
  """Returns how many epochs are done before a step."""
  return step * batch_size / num_records


def process_slice(
  indices: np.ndarray, *, process_index: int, process_count: int
) -> np.ndarray:
  """Returns the part of a global batch that one process feeds.

  Raises:
    ValueError: The batch does not divide among the processes.
  """
  if len(indices) % process_count:
    raise ValueError(
      f'a batch of {len(indices)} does not divide among {process_count} processes; '
      'choose a batch size that is a multiple'
    )
  size = len(indices) // process_count
  return indices[process_index * size : (process_index + 1) * size]
