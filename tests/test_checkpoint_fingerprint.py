"""Checksums: the same on every mesh, another for every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mrjax.checkpoint.fingerprint import checksums, fingerprint, not_finite
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import param_shardings


def make_params() -> dict:
  rng = np.random.default_rng(0)
  return {
    'embed': {'embedding': rng.standard_normal((56, 16)).astype(np.float32)},
    'layers': {
      'mlp': {
        'up': {'kernel': rng.standard_normal((3, 16, 24)).astype(ml_dtypes.bfloat16)}
      }
    },
    'final_norm': {'scale': rng.standard_normal(16).astype(np.float16)},
  }


@pytest.fixture(scope='module')
def reference():
  return checksums(make_params())


@pytest.mark.parametrize('spec', ['fsdp:8', 'fsdp:4,tensor:2'])
def test_every_mesh_gives_the_same(reference, spec):
  params = make_params()
  sharded = jax.tree.map(
    jax.device_put, params, param_shardings(params, make_mesh(spec))
  )
  assert checksums(sharded) == reference


def test_checksums_are_pinned():
  """Another version must find what this one has saved undamaged."""
  x = np.array([[3, 0], [7, 2**31]], np.uint32)
  total = 0
  for place, bits in enumerate(x.reshape(-1).tolist()):
    h = (bits + place * 0x9E3779B9) % 2**32
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    total += h ^ (h >> 16)
  assert checksums({'x': x}) == {'x': total % 2**32}


def test_any_bit_and_any_exchange_counts():
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  seen = {checksums({'x': x})['x']}
  for place in range(12):
    for bit in (0, 13, 31):
      changed = x.copy()
      changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
      seen.add(checksums({'x': changed})['x'])
  for i in range(3):
    changed = x.copy()
    changed[i, :2] = x[i, 1::-1]
    seen.add(checksums({'x': changed})['x'])
  assert len(seen) == 1 + 36 + 3


def test_the_fingerprint_also_sees_names_shapes_and_dtypes():
  x = np.zeros(6, np.int32)
  trees = [
    {'x': x},
    {'y': x},
    {'x': x.reshape(2, 3)},
    {'x': x.view(np.float32)},
    {'x': x, 'y': x},
    {'x': x.astype(bool)},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_not_finite_names_the_leaves(value):
  params = make_params() | {'codes': np.arange(4, dtype=np.uint8)}
  assert not_finite(params) == []
  params['layers']['mlp']['up']['kernel'][2, 7, 5] = value
  params['final_norm']['scale'][0] = jnp.nan
  assert not_finite(params) == ['final_norm/scale', 'layers/mlp/up/kernel']
