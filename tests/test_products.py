"""The product with a kernel: plain gradients, and no copy of the kernel kept."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import trees
from mrjax.checkpoint import weights
from mrjax.lora import adapters, masks, quantization
from mrjax.models import products
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder


def plain(x, kernel):
  return x @ kernel.astype(x.dtype).reshape(x.shape[1], -1)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_values_and_gradients_are_those_of_the_plain_product(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (7, 12), dtype)
  kernel = jax.random.normal(keys[1], (3, 4, 2, 5))
  dy = jax.random.normal(keys[2], (7, 10), dtype)
  want, pull_want = jax.vjp(plain, x, kernel)
  got, pull_got = jax.vjp(products.matmul, x, kernel)
  np.testing.assert_array_equal(got, want)
  for a, b in zip(pull_got(dy), pull_want(dy)):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_and_those_of_a_down_projection(dtype):
  keys = jax.random.split(jax.random.key(1), 3)
  x, a = (jax.random.normal(key, s, dtype) for key, s in zip(keys, [(7, 12), (12, 5)]))
  dh = jax.random.normal(keys[2], (7, 5))
  plain = lambda x, a: x.astype(jnp.float32) @ a.astype(jnp.float32)
  want, pull_want = jax.vjp(plain, x, a)
  got, pull_got = jax.vjp(products.down_projection, x, a)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  tolerance = 1e-6 if dtype == 'float32' else 2e-2  # dh is rounded before its products
  for a, b in zip(pull_got(dh), pull_want(dh), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=4 * tolerance
    )


def test_only_what_has_a_gradient_is_kept():
  x, kernel = jnp.ones((70, 12)), jnp.ones((3, 4, 2, 5))
  size = lambda pull: sum(x.nbytes for x in jax.tree.leaves(pull))
  _, frozen = jax.vjp(lambda x: products.matmul(x, kernel), x)
  assert size(frozen) == kernel.nbytes
  _, both = jax.vjp(products.matmul, x, kernel)
  assert size(both) == kernel.nbytes + x.nbytes


@pytest.mark.parametrize('kind', ['', 'nf4', 'int8'])
def test_a_step_on_an_adapter_needs_no_second_copy_of_the_layers(kind):
  """Few tokens, so that all the memory a step could take is that of kernels."""
  config = DecoderConfig.from_hf(
    {
      'architectures': ['LlamaForCausalLM'],
      'vocab_size': 24,
      'hidden_size': 128,
      'intermediate_size': 192,
      'num_hidden_layers': 12,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'head_dim': 32,
    }
  )
  lora = adapters.LoraConfig(rank=2)
  adapter = adapters.adapter_shapes(config, lora)
  base = weights.param_shapes(config)
  full = trees.num_bytes(base['layers'])
  if kind:
    base = quantization.quantized_shapes(base, config, kind)
  decoder = Decoder(config, lora_scale=lora.scale)
  tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)

  def loss(adapter, frozen, tokens):
    return decoder.apply({'params': masks.merge(adapter, frozen)}, tokens).sum()

  compiled = jax.jit(jax.grad(loss)).lower(adapter, base, tokens).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # One layer's kernels at a time, with their transposes, and small things.
  assert temporary < 3 * full / 12, (temporary, full)


@pytest.mark.parametrize('num_inputs', [48, 97, 384, 640])
@pytest.mark.parametrize(('rows', 'num_outputs'), [(1, 33), (5, 1), (17, 1290)])
def test_tiles_give_the_product(rows, num_inputs, num_outputs):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, num_inputs)).astype(np.float32)
  kernel = rng.normal(size=(num_inputs, num_outputs)).astype(np.float32)
  y = products.matmul_in_tiles(x, kernel)
  assert y.shape == (rows, num_outputs) and y.dtype == np.float32
  np.testing.assert_allclose(y, x.astype(np.float64) @ kernel, atol=1e-4)


# With as many threads as a bigger machine has (NPROC): in a process of its own.
ROWS_BESIDE = """
import jax, numpy as np
from mrjax.models.products import matmul_in_tiles

rng = np.random.default_rng(0)
options = {'xla_cpu_experimental_ynn_fusion_type': ''}
shapes = (384, 48), (1376, 512), (512, 1376), (130, 1), (384, 5)
for num_inputs, num_outputs in shapes:
  kernel = rng.normal(size=(num_inputs, num_outputs)).astype(np.float32)
  x = rng.normal(size=(1100, num_inputs)).astype(np.float32)
  def product(rows):
    lowered = jax.jit(matmul_in_tiles).lower(x[:rows], kernel)
    return np.asarray(lowered.compile(options)(x[:rows], kernel))
  whole = product(1100)  # in two blocks
  for rows in (1, 3, 16, 47, 160):
    assert np.array_equal(product(rows), whole[:rows]), (num_inputs, num_outputs, rows)
"""


@pytest.mark.parametrize('num_threads', [2, 16])
def test_rows_beside_a_row_change_no_bit_of_its_product_in_tiles(num_threads):
  environ = os.environ | {'NPROC': str(num_threads), 'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', ROWS_BESIDE], env=environ, check=True)
