"""Weights as the sampling programs read them: layers apart, one copy a data shard."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax import trees
from mrjax.sharding.rules import param_shardings


def keeps_sums_whole(mesh: Mesh) -> bool:
  """Whether no sum of a product is split over devices, so that rows keep their bits.

  On a CPU that costs little: an exchange of activations before a product in place of
  one of sums after it. Accelerators do not reproduce products to the bit anyway.
  """
  return mesh.devices.flat[0].platform == 'cpu'


def weight_shardings(params: Any, mesh: Mesh) -> Any:
  """Where parameters (arrays or shapes) live while a model samples, stacked or not.

  Every data shard has a copy, as gathering weights at every token would cost more; it
  is split over the tensor axis.

  Raises:
    MeshError: As `param_shardings`.
  """
  whole_sums = keeps_sums_whole(mesh)

  def sharding(name: str, leaf, trained: NamedSharding) -> NamedSharding:
    spec = _only_tensor(trained.spec)
    if whole_sums and re.search(r'(attn/o|mlp/down)/kernel$', name):
      fits = leaf.shape[-1] % mesh.shape['tensor'] == 0
      spec = PartitionSpec(*[None] * (leaf.ndim - 1), 'tensor' if fits else None)
    return NamedSharding(mesh, spec)

  return trees.map_named(sharding, params, param_shardings(params, mesh))


def split_layers(params: Any, mesh: Mesh, *, dtype: Any, donate: bool) -> Any:
  """Parameters of separate layers on the mesh, made leaf by leaf from stacked ones.

  Args:
    params: Of a decoder with stacked layers.
    mesh: See `weight_shardings`.
    dtype: Of the matrices.
    donate: Free each stacked leaf as soon as its layers are there.
  """
  shardings = trees.flatten(weight_shardings(params, mesh))
  split: dict[str, jax.Array] = {}
  for name, leaf in trees.flatten(params).items():
    # Norm scales are used in float32 by some families, and they are small.
    leaf_dtype = leaf.dtype if name.endswith('norm/scale') else dtype
    placed = jax.device_put(leaf, shardings[name])
    if not name.startswith('layers/'):
      split[name] = placed.astype(leaf_dtype)
    else:
      one_layer = NamedSharding(mesh, PartitionSpec(*shardings[name].spec[1:]))
      unstack = jax.jit(
        lambda x, leaf_dtype=leaf_dtype: [layer.astype(leaf_dtype) for layer in x],
        out_shardings=[one_layer] * leaf.shape[0],
      )
      for i, layer in enumerate(unstack(placed)):
        split[name.replace('layers/', f'layers_{i}/', 1)] = layer
      if donate and isinstance(leaf, jax.Array):
        leaf.delete()
  return trees.unflatten(split)


def _only_tensor(spec: PartitionSpec) -> PartitionSpec:
  """A layout of the rules without the axes that data shards are made of."""
  names = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
  return PartitionSpec(*('tensor' if 'tensor' in group else None for group in names))
