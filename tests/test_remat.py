"""Remat policies change what is kept, and no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import traced

from mrjax.lora import masks
from mrjax.lora.adapters import LoraConfig, init_adapter
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import REMAT_POLICIES, Decoder
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import param_shardings

B, T, L, D, F, N, K, H = 8, 16, 3, 20, 26, 4, 2, 6
CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 38,
    'hidden_size': D,
    'intermediate_size': F,
    'num_hidden_layers': L,
    'num_attention_heads': N,
    'num_key_value_heads': K,
    'head_dim': H,
    'initializer_range': 0.2,
    'tie_word_embeddings': True,
  }
)
TOKENS = np.random.default_rng(0).integers(0, 38, (B, T))


def decoder(remat: str) -> Decoder:
  return Decoder(CONFIG, remat=remat, attention_backend='blocks')


def loss(remat: str):
  return lambda params: jnp.square(
    decoder(remat).apply({'params': params}, TOKENS, method='hidden')
  ).mean()


@pytest.fixture(scope='module')
def params():
  return Decoder(CONFIG).init(jax.random.key(1), TOKENS[:1])['params']


@pytest.fixture(scope='module')
def plain(params):
  return jax.jit(jax.value_and_grad(loss('none')))(params)


@pytest.mark.parametrize('remat', REMAT_POLICIES[1:])
def test_gradients_are_those_of_the_plain_decoder(params, plain, remat):
  got, grads = jax.jit(jax.value_and_grad(loss(remat)))(params)
  np.testing.assert_allclose(got, plain[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, plain[1]
  )


@pytest.mark.parametrize('remat', ['attention', 'offload'])
def test_and_on_a_mesh(params, plain, remat):
  mesh = make_mesh('data:2,fsdp:2,tensor:2')
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, param_shardings(params, mesh))
    got, grads = jax.jit(jax.value_and_grad(loss(remat)))(sharded)
  np.testing.assert_allclose(got, plain[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, plain[1]
  )


def kept(remat: str, params) -> int:
  """Numbers of each layer and token that wait for the backward pass."""
  residuals = jax.eval_shape(lambda p: jax.vjp(loss(remat), p)[1], params)
  stacked = [
    x
    for x in jax.tree.leaves(residuals)
    if x.shape[:1] == (L,) and x.size % (L * B * T) == 0 and x.dtype == jnp.float32
  ]
  return sum(x.size for x in stacked) // (L * B * T)


def test_what_is_kept_is_what_the_table_says(params):
  sizes = {name: kept(name, params) for name in REMAT_POLICIES}
  softmax_sums = N
  assert sizes['minimal'] == 2 * D + 2 * (N + K) * H + 2 * F + softmax_sums
  assert sizes['attention'] == D + N * H + softmax_sums
  assert sizes['full'] == sizes['offload'] == D
  assert sizes['none'] > sizes['minimal']


def test_of_an_adapters_products_only_the_sum_with_the_kernels_is_kept(params):
  lora = LoraConfig(rank=3)
  adapter = init_adapter(CONFIG, lora, jax.random.key(2))
  decoder = Decoder(
    CONFIG, remat='minimal', lora_scale=lora.scale, attention_backend='blocks'
  )

  def loss(adapter, frozen):
    variables = {'params': masks.merge(adapter, frozen)}
    return jnp.square(decoder.apply(variables, TOKENS, method='hidden')).mean()

  def residuals(adapter, frozen):
    return jax.vjp(functools.partial(loss, frozen=frozen), adapter)[1]

  found = jax.tree.leaves(jax.eval_shape(residuals, adapter, params))
  as_wide_as_feed_forward = [x for x in found if x.size == L * B * T * F]
  assert len(as_wide_as_feed_forward) == 2  # gate and up


def test_offload_moves_the_input_of_each_layer_to_the_host_and_back(params):
  moves = [
    (eqn.outvars[0].aval.shape, eqn.params['devices'][0])
    for eqn in traced(jax.grad(loss('offload')), params)
    if eqn.primitive.name == 'device_put'
  ]
  there, back = jax.memory.Space.Host, jax.memory.Space.Device
  assert moves == [((B, T, D), there), ((B, T, D), back)]


def test_an_unknown_policy_is_refused(params):
  with pytest.raises(
    ValueError, match="remat 'some' is unknown; want one of none, min"
  ):
    decoder('some').apply({'params': params}, TOKENS)
