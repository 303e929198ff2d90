"""Arrays on meshes, put together from pieces in host memory, and back."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def fill_devices(
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding: NamedSharding,
  fill: Callable[[tuple[slice, ...], np.ndarray], None],
) -> jax.Array:
  """A sharded array; `fill(index, out)` runs once for each distinct local shard.

  XLA owns every buffer (none aliases NumPy's memory), so that training can donate them.
  """
  homes: dict[tuple, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape))
    homes.setdefault(bounds, []).append(device)
  shards = []
  for bounds, devices in homes.items():
    out = np.empty([stop - start for start, stop in bounds], dtype)
    fill(tuple(slice(*bound) for bound in bounds), out)
    shards += jax.block_until_ready(
      [jax.device_put(out, device, may_alias=False) for device in devices]
    )
    del out  # before the next shard is read
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """A host array, the same in every process, on the devices of `sharding`."""
  fill = lambda index, out: np.copyto(out, array[index])
  return fill_devices(array.shape, array.dtype, sharding, fill)


@functools.partial(jax.jit, donate_argnums=0, static_argnames='sharding')
def put_layers(leaf, layers, i, *, sharding):
  """`leaf` with `layers` from layer `i` on; the old one is donated."""
  leaf = jax.lax.dynamic_update_slice_in_dim(leaf, layers, i, 0)
  return jax.lax.with_sharding_constraint(leaf, sharding)


def to_host(leaf: jax.Array, layer: int | None) -> np.ndarray:
  """The array, or one layer of it, whole in every process."""
  part = leaf if layer is None else leaf[layer]
  if not part.is_fully_addressable:
    part = multihost_utils.process_allgather(part, tiled=True)
  return np.asarray(part)
