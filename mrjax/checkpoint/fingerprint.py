"""Checksums of trees of arrays, computed where the arrays live."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mrjax import trees

PyTree = Any


def checksums(tree: PyTree) -> dict[str, int]:
  """A 32-bit checksum of the bits of every leaf, by path.

  A sum over all numbers, modulo 2**32, of a hash of their bits and their place, so it
  depends neither on the mesh nor on the number of processes. It finds damage, not
  malice.
  """
  leaves = trees.flatten(tree)
  return dict(zip(leaves, np.asarray(_checksums(list(leaves.values()))).tolist()))


def fingerprint(tree: PyTree) -> str:
  """A hexadecimal SHA-256 of the names, shapes, dtypes and checksums of a tree."""
  sums = checksums(tree)
  facts = [
    f'{name} {leaf.shape} {leaf.dtype} {sums[name]}'
    for name, leaf in sorted(trees.flatten(tree).items())
  ]
  return hashlib.sha256('\n'.join(facts).encode()).hexdigest()


def not_finite(tree: PyTree) -> list[str]:
  """Paths of the floating-point leaves that hold a NaN or an infinity."""
  leaves = {
    name: leaf
    for name, leaf in trees.flatten(tree).items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  finite = np.asarray(_all_finite(list(leaves.values())))
  return [name for name, good in zip(leaves, finite) if not good]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
  return jnp.array([_checksum(x) for x in leaves], jnp.uint32)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.array([jnp.isfinite(x).all() for x in leaves], bool)


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  place = jnp.zeros(x.shape, jnp.uint32)
  for dim, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, dim
    )
  mixed = _mix(bits.astype(jnp.uint32) + place * jnp.uint32(0x9E3779B9))
  return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """The finaliser of MurmurHash3: every bit of the input moves every bit of the sum."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
