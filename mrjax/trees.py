"""Nested dicts of arrays addressed by paths such as `layers/attn/q/kernel`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

PyTree = Any


def path_name(path) -> str:
  """A key path of `jax.tree_util` as one string with slashes between."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, in tree order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict whose `flatten` is `leaves`."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
  """`jax.tree.map` whose function also gets the path, first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest
  )


def num_bytes(tree: PyTree) -> int:
  """Bytes of all leaves, which may be arrays or shapes with a dtype."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
