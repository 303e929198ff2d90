"""The CPU as sampling uses it: a device for each core."""

import logging
import math
import os

import jax
from jax.sharding import Mesh

from mrjax import trees
from mrjax.sharding.mesh import BATCH_AXES, axis_sizes

_MEMORY_SHARE = 4  # copies of the weights take at most one in so many of the bytes


def split_cpu(weights: trees.PyTree, *, mesh: str, max_batch: int) -> bool:
  """Makes the CPU as many devices as `mesh` can use; call before any device is used.

  XLA computes attention of a batch on one core, whatever else idles. With a data shard
  on each core, all of them are busy. Accelerators are left as they are.

  Nothing happens where somebody has said how many devices there are
  (`JAX_NUM_CPU_DEVICES`, `XLA_FLAGS`), where the devices are in use already, or where
  several processes make up the run: they may share the cores of one machine.

  Args:
    weights: Shapes of what every data shard holds.
    mesh: As for `make_mesh`; see `num_devices`.
    max_batch: Most rows that run together.

  Returns:
    Whether the CPU has more devices now than it would have had.

  Raises:
    MeshError: A mesh that cannot be read.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if (
    jax.config.values['jax_num_cpu_devices'] >= 0
    or '--xla_force_host_platform_device_count' in flags
    or os.environ.get('JAX_COORDINATOR_ADDRESS')
    or jax.distributed.is_initialized()
  ):
    return False
  most = most_devices(
    trees.num_bytes(weights),
    cores=num_cores(),
    memory=memory_bytes(),
    max_batch=max_batch,
  )
  number = num_devices(mesh, most)
  if number <= 1:
    return False
  try:
    jax.config.update('jax_num_cpu_devices', number)
  except RuntimeError:  # a backend runs already
    return False
  logging.info('On a CPU, rows are shared out to %d devices.', number)
  return True


def most_devices(weight_bytes: int, *, cores: int, memory: int, max_batch: int) -> int:
  """Devices of a CPU: as many as cores, rows, and copies of the weights allow."""
  copies = memory // (_MEMORY_SHARE * max(weight_bytes, 1))
  return max(1, min(cores, copies, max_batch))


def num_devices(mesh: str, most: int) -> int:
  """Devices for a mesh; an axis of rows that is -1 takes up to `most` with the others.

  Raises:
    MeshError: A mesh that cannot be read.
  """
  sizes = axis_sizes(mesh)
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = any(sizes[axis] == -1 for axis in BATCH_AXES)
  return fixed * max(1, most // fixed) if free else fixed


def num_cores() -> int:
  """Cores that this process may run on."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def device_memory(mesh: Mesh) -> int | None:
  """Bytes that a device of a mesh has; None where it does not say.

  The devices of a CPU share what there is.
  """
  device = mesh.local_devices[0]
  if device.platform == 'cpu':
    return memory_bytes() // len(mesh.local_devices)
  return (device.memory_stats() or {}).get('bytes_limit')


def memory_bytes() -> int:
  """Memory of the machine; what its control group may use where that is less."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    with open('/sys/fs/cgroup/memory.max', encoding='ascii') as file:
      return min(memory, int(file.read()))
  except (OSError, ValueError):  # no such file, or 'max'
    return memory
