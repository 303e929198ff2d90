"""Weights as the sampling programs read them: layers apart, one copy a data shard."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax import trees
from mrjax.sharding.rules import param_shardings


def split_layers(params: Any, mesh: Mesh, *, dtype: Any, donate: bool) -> Any:
  """Parameters of separate layers on the mesh, made leaf by leaf from stacked ones.

  Args:
    params: Of a decoder with stacked layers.
    mesh: Every data shard gets a copy, split over the tensor axis.
    dtype: Of the matrices.
    donate: Free each stacked leaf as soon as its layers are there.
  """
  shardings = trees.flatten(param_shardings(params, mesh))
  split: dict[str, jax.Array] = {}
  for name, leaf in trees.flatten(params).items():
    # Norm scales are used in float32 by some families, and they are small.
    leaf_dtype = leaf.dtype if name.endswith('norm/scale') else dtype
    # One copy a data shard: gathering weights at every token would cost more.
    sharding = NamedSharding(mesh, only_tensor(shardings[name].spec))
    placed = jax.device_put(leaf, sharding)
    if not name.startswith('layers/'):
      split[name] = placed.astype(leaf_dtype)
    else:
      one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
      unstack = jax.jit(
        lambda x, leaf_dtype=leaf_dtype: [layer.astype(leaf_dtype) for layer in x],
        out_shardings=[one_layer] * leaf.shape[0],
      )
      for i, layer in enumerate(unstack(placed)):
        split[name.replace('layers/', f'layers_{i}/', 1)] = layer
      if donate and isinstance(leaf, jax.Array):
        leaf.delete()
  return trees.unflatten(split)


def only_tensor(spec: PartitionSpec) -> PartitionSpec:
  """A layout of the rules without the axes that data shards are made of."""
  names = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
  return PartitionSpec(*('tensor' if 'tensor' in group else None for group in names))
