"""Device meshes from `--mesh`, and activation constraints on whatever mesh is set."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')  # rows of a batch are split over both
BATCH = PartitionSpec(BATCH_AXES)


class MeshError(ValueError):
  """A mesh that cannot be built, or an array that does not divide over it."""


def axis_sizes(spec: str) -> dict[str, int]:
  """The sizes that `spec` gives, every axis of `AXES` present.

  Args:
    spec: `axis:size` pairs with commas between, e.g. `data:1,fsdp:-1,tensor:1`; one
      size may be -1, for the devices that are left; an axis left out is 1.

  Raises:
    MeshError: An unknown or repeated axis, or a size that is no positive integer.
  """
  sizes: dict[str, int] = {}
  for item in filter(None, (item.strip() for item in spec.split(','))):
    name, _, value = item.partition(':')
    if name not in AXES or name in sizes:
      fault = 'given twice' if name in sizes else 'unknown'
      raise MeshError(
        f'Mesh {spec!r}: axis {name!r} is {fault}; want each of {", ".join(AXES)} at '
        'most once, as in "data:1,fsdp:-1".'
      )
    try:
      sizes[name] = int(value)
    except ValueError:
      sizes[name] = 0
    if sizes[name] < 1 and sizes[name] != -1:
      raise MeshError(
        f'Mesh {spec!r}: size {value!r} of {name} is no positive integer or -1.'
      )
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise MeshError(
      f'Mesh {spec!r}: only one axis may be -1, not {" and ".join(free)}.'
    )
  return {axis: sizes.get(axis, 1) for axis in AXES}


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
  """Axis sizes of `spec` with product `num_devices`; see `axis_sizes`.

  Raises:
    MeshError: As `axis_sizes`, or another product.
  """
  sizes = axis_sizes(spec)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free:
    if num_devices % fixed:
      raise MeshError(
        f'Mesh {spec!r}: {num_devices} devices are not a multiple of {fixed}, the '
        'product of the fixed sizes.'
      )
    sizes[free[0]] = num_devices // fixed
  elif fixed != num_devices:
    raise MeshError(
      f'Mesh {spec!r} has {fixed} places for {num_devices} devices; they must be '
      'equal. Set one axis to -1 to take what is left.'
    )
  return sizes


def make_mesh(spec: str, devices=None) -> Mesh:
  """The mesh `spec` describes over `devices` (all devices of all hosts by default)."""
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(spec, len(devices))
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform() -> str:
  """Where what is being traced will run: 'cpu', 'gpu' or 'tpu'.

  The devices of the mesh in force decide; they need not be of this machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def axis_size(axis: str) -> int:
  """Of the mesh in force (`jax.set_mesh`); 1 without one."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x: jax.Array, *axes) -> jax.Array:
  """Pins `x` to a layout on the mesh in force (`jax.set_mesh`); without one, `x`.

  Axes over which a `shard_map` has split the work already are left out.

  Args:
    x: An activation.
    *axes: A mesh axis, a tuple of them or None for each leading dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  done = set(mesh.manual_axes)
  if done:
    names = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    axes = tuple(tuple(n for n in group if n not in done) or None for group in names)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
