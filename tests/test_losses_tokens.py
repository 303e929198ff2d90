"""Chunked losses equal the plain ones, and never hold all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import largest, traced

from mrjax.losses import tokens as losses
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.models.head import head_function
from mrjax.sharding.mesh import make_mesh

B, T, D, V = 3, 11, 5, 37
CHUNKS = (4, 40, None)  # of 33 tokens, of which the loss mask leaves fewer


def linear_head(params, hidden):
  return hidden @ params['kernel']


def capped_head(params, hidden):
  return 4 * jnp.tanh(hidden @ params['embedding'].T / 4)


HEADS = {'kernel': linear_head, 'embedding': capped_head}


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(3)
  segments = np.array(
    [[1] * 4 + [2] * 7, [1] * 6 + [0] * 5, [1] * 3 + [2] * 5 + [0] * 3]
  )
  return {
    'hidden': rng.normal(size=(B, T, D)).astype(np.float32),
    'tokens': rng.integers(0, V, (B, T)).astype(np.int32),
    'segments': segments.astype(np.int32),
    'loss_mask': (rng.random((B, T)) < 0.6) & (segments > 0),
    'weights': rng.normal(size=(B, T)).astype(np.float32),
  }


def head_params(name):
  kernel = jax.random.normal(jax.random.key(1), (D, V))
  return {name: kernel if name == 'kernel' else kernel.T}


def assert_close(got, want, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.mark.parametrize('chunk_size', CHUNKS)
@pytest.mark.parametrize('name', HEADS)
def test_chunked_cross_entropy_is_the_plain_one(batch, name, chunk_size):
  facts = batch['tokens'], batch['loss_mask'], batch['segments']

  def plain(params, hidden):
    return losses.cross_entropy(HEADS[name](params, hidden), *facts)

  def chunked(params, hidden):
    return losses.chunked_cross_entropy(
      HEADS[name], params, hidden, *facts, chunk_size=chunk_size
    )

  args = head_params(name), batch['hidden']
  (want, count), want_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*args)
  (got, num), grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(*args)
  assert num == count > 0
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  assert float(chunked(*args)[0]) == pytest.approx(float(want), rel=1e-6)
  assert_close(grads, want_grads)


def test_gradients_of_cross_entropy_are_softmax_minus_one_hot(batch):
  """By hand in float64, of the plain and the chunked form."""
  tokens, segments = batch['tokens'], batch['segments']
  kernel = np.asarray(head_params('kernel')['kernel'], np.float64)
  hidden = batch['hidden'].astype(np.float64)
  logits = hidden @ kernel
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want_logits, want_loss = np.zeros_like(logits), 0.0
  for b, t in np.ndindex(B, T - 1):
    if batch['loss_mask'][b, t + 1] and segments[b, t] == segments[b, t + 1]:
      want_logits[b, t] = probs[b, t] - np.eye(V)[tokens[b, t + 1]]
      want_loss -= np.log(probs[b, t, tokens[b, t + 1]])
  facts = tokens, batch['loss_mask'], segments
  loss, grads = jax.value_and_grad(lambda x: losses.cross_entropy(x, *facts)[0])(
    logits.astype(np.float32)
  )
  # Rounding of float32 logits of up to 8; the gradient is at most 1.
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  np.testing.assert_allclose(grads, want_logits, atol=2e-6)
  chunked = lambda kernel, hidden: losses.chunked_cross_entropy(
    linear_head, {'kernel': kernel}, hidden, *facts, chunk_size=8
  )[0]
  grads = jax.grad(chunked, (0, 1))(kernel.astype(np.float32), batch['hidden'])
  want = np.einsum('BTD,BTV->DV', hidden, want_logits), want_logits @ kernel.T
  assert_close(grads, want)


@pytest.mark.parametrize('name', HEADS)
def test_weighted_logps_are_the_plain_weighted_sum(batch, name):
  weights = np.where(batch['loss_mask'], batch['weights'], 0.0)

  def plain(params, hidden):
    logps = losses.next_token_logps(HEADS[name](params, hidden), batch['tokens'])
    return 3 * jnp.sum(weights * logps)

  def chunked(params, hidden):
    return 3 * losses.weighted_logps(
      HEADS[name], params, hidden, batch['tokens'], weights, chunk_size=8
    )

  args = head_params(name), batch['hidden']
  want, want_grads = jax.value_and_grad(plain, (0, 1))(*args)
  got, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(*args)
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  assert_close(grads, want_grads)


@pytest.mark.parametrize('name', HEADS)
def test_chunked_logps_are_the_plain_ones_where_they_are_wanted(batch, name):
  def loss(logps):
    return jnp.sum(batch['weights'] * jnp.square(logps)), logps

  def plain(params, hidden):
    logps = losses.next_token_logps(HEADS[name](params, hidden), batch['tokens'])
    return loss(jnp.where(batch['loss_mask'], logps, 0.0))

  def chunked(params, hidden):
    return loss(
      losses.chunked_next_token_logps(
        HEADS[name], params, hidden, batch['tokens'], batch['loss_mask'], chunk_size=8
      )
    )

  args = head_params(name), batch['hidden']
  (_, want), want_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*args)
  (_, got), grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(*args)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(got)[~batch['loss_mask']], 0)
  assert_close(grads, want_grads, atol=1e-4)
  every = losses.chunked_next_token_logps(
    HEADS[name], args[0], args[1], batch['tokens'], chunk_size=8
  )
  logits = HEADS[name](*args)
  assert_close(every, losses.next_token_logps(logits, batch['tokens']))


def test_without_supervised_tokens_loss_and_gradients_are_zero(batch):
  nothing = np.zeros((B, T), bool)

  def loss(params, hidden):
    return losses.chunked_cross_entropy(
      linear_head, params, hidden, batch['tokens'], nothing, batch['segments']
    )

  args = head_params('kernel'), batch['hidden']
  (loss, count), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
  assert (loss, count) == (0, 0)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def losses_of(batch, head):
  """Both forms of a loss of (head_params, hidden), and of the plain one."""
  tokens, mask = batch['tokens'], batch['loss_mask']

  def entropy(params, hidden):
    return losses.chunked_cross_entropy(
      head, params, hidden, tokens, mask, batch['segments']
    )[0]

  def logps(params, hidden):
    logps = losses.chunked_next_token_logps(head, params, hidden, tokens, mask)
    return jnp.square(logps).sum()

  def plain(params, hidden):
    return losses.next_token_logps(head(params, hidden), tokens).sum()

  return entropy, logps, plain


def test_no_array_of_all_logits_exists_forward_or_backward(batch):
  args = head_params('kernel'), batch['hidden']
  *chunked, plain = losses_of(batch, linear_head)
  assert largest(plain, *args) == B * T * V  # so the search below sees what is there
  for loss in chunked:
    for fn in (loss, jax.grad(loss, (0, 1))):
      assert D * V < largest(fn, *args) < B * T * V


def test_a_frozen_head_costs_no_gradient(batch):
  params, hidden = head_params('kernel'), batch['hidden']

  def head_gradients(fn):
    return sum(
      eqn.primitive.name == 'dot_general'
      and sorted(eqn.outvars[0].aval.shape) == [D, V]
      for eqn in traced(fn, params, hidden)
    )

  for loss in losses_of(batch, linear_head)[:2]:
    assert head_gradients(jax.grad(loss, 0)) == 1
    assert head_gradients(jax.grad(loss, 1)) == 0
    both = jax.grad(loss, (0, 1))(params, hidden)
    assert_close(jax.grad(loss, 0)(params, hidden), both[0])
    assert_close(jax.grad(loss, 1)(params, hidden), both[1])


@pytest.mark.parametrize('spec', ['data:2,fsdp:4', 'data:2,fsdp:2,tensor:2'])
def test_any_mesh_gives_the_same_loss_and_gradients(batch, spec):
  # Eight rows, so that no shard has as many supervised tokens as another.
  rng = np.random.default_rng(8)
  many = {key: np.concatenate([x, x, x[:2]]) for key, x in batch.items()}
  many['loss_mask'] &= rng.random((8, 1)) < 0.7
  params = jax.random.normal(jax.random.key(2), (8, 38))

  def loss(params, hidden):
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, 3)))
    entropy, logps, _ = losses_of(many, linear_head)
    return entropy(params, hidden) + logps(params, hidden)

  fn = jax.jit(jax.value_and_grad(loss, (0, 1)))
  args = {'kernel': params}, many['hidden']
  want = fn(*args)
  mesh = make_mesh(spec)
  spread = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
  with jax.set_mesh(mesh):
    got = fn(
      *jax.device_put(args, (spread('fsdp', 'tensor'), spread(('data', 'fsdp'))))
    )
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  assert_close(got[1], want[1], atol=1e-4)
  assert got[1][1].sharding.shard_shape(got[1][1].shape)[0] < 8


CONFIG = {
  'architectures': ['Gemma2ForCausalLM'],
  'vocab_size': V,
  'hidden_size': 16,
  'intermediate_size': 28,
  'num_hidden_layers': 1,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'initializer_range': 0.5,
  'final_logit_softcapping': 3.0,
}


@pytest.mark.parametrize('architecture', ['Gemma2', 'Llama'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_head_of_a_decoder_gives_the_numbers_of_its_logits(
  batch, architecture, dtype
):
  config = DecoderConfig.from_hf(
    CONFIG | {'architectures': [f'{architecture}ForCausalLM']}
  )
  assert config.tie_embeddings == (architecture == 'Gemma2')
  decoder = Decoder(config, dtype=dtype)
  tokens = batch['tokens']
  params = decoder.init(jax.random.key(0), tokens[:1])['params']

  def plain(params):
    logits = decoder.apply({'params': params}, tokens)
    return losses.next_token_logps(logits, tokens).sum()

  def chunked(params):
    hidden = decoder.apply({'params': params}, tokens, method='hidden')
    head, head_params = head_function(decoder, params)
    assert list(head_params) == ['embed' if config.tie_embeddings else 'lm_head']
    return losses.chunked_next_token_logps(head, head_params, hidden, tokens).sum()

  want, want_grads = jax.jit(jax.value_and_grad(plain))(params)
  got, grads = jax.jit(jax.value_and_grad(chunked))(params)
  # A product rounded to bfloat16 before or after it is capped and summed.
  rtol, atol = (1e-6, 1e-5) if dtype == jnp.float32 else (2e-3, 0.3)
  np.testing.assert_allclose(got, want, rtol=rtol)
  assert_close(grads, want_grads, atol=atol)


def test_a_value_head_gives_no_log_probabilities():
  decoder = Decoder(DecoderConfig.from_hf(CONFIG), num_value_outputs=5)
  with pytest.raises(ValueError, match='value head of 5 outputs'):
    head_function(decoder, {})
