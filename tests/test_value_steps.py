"""Value steps of a tiny decoder: heads, their first weights, losses, evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrjax import trees
from mrjax.checkpoint.weights import param_shapes
from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example
from mrjax.losses.value import ValueHead, evaluate, token_losses
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import value_steps
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import param_shardings
from mrjax.training import loop, step

HF = {
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 32,
  'hidden_size': 16,
  'intermediate_size': 28,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
}
CONFIG = DecoderConfig.from_hf(HF)
NUM_TEXTS = 9
RNG = np.random.default_rng(2)


def random_text() -> Example:
  length = int(RNG.integers(5, 12))
  switch = int(RNG.integers(1, length - 1))
  return Example(
    RNG.integers(1, 32, length).astype(np.int32), np.arange(length) >= switch
  )


TEXTS = [(random_text(),) for _ in range(NUM_TEXTS)]
REWARDS = RNG.choice([0.0, 1.0], (NUM_TEXTS, 1)).astype(np.float32)
HEADS = {
  'V bce': ValueHead('V', 'bce'),
  'V mle': ValueHead('V', 'mle', num_atoms=5),
  'Q mse': ValueHead('Q', 'mse'),
  'Q mle': ValueHead('Q', 'mle', num_atoms=3),
}


@functools.cache
def language_model(config=CONFIG):
  """Weights large enough that outputs are not all alike."""
  rng = np.random.default_rng(0)
  return trees.map_named(
    lambda name, x: (
      jnp.ones(x.shape)
      if name.endswith('scale')
      else jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
    ),
    param_shapes(config),
  )


def value_params(head, *, config=CONFIG, init_mode='random', seed=3, given=None):
  prepare = value_steps.make_prepare(
    config, head, make_mesh('data:1', jax.devices()[:1]), init_mode=init_mode, seed=seed
  )
  return prepare(language_model(config) if given is None else given)


def batches_of(*, packing=True, accumulation=1) -> TextBatches:
  return TextBatches(
    TEXTS,
    row_length=24,
    batch_size=16,
    grad_accumulation=accumulation,
    packing=packing,
    labels={'reward': REWARDS},
  )


def decoder_of(head) -> Decoder:
  return Decoder(CONFIG, num_value_outputs=head.num_outputs(32))


def run_step(name, batches, *, mesh='data:1', use_bias=True):
  """Metrics, weights before, and gradients of one step over all texts."""
  head = HEADS[name]
  params = value_params(head)
  loss_fn = value_steps.make_loss_fn(decoder_of(head), head, use_bias=use_bias)
  tx = optax.sgd(1.0)  # so that the change of a weight is its gradient
  mesh = make_mesh(mesh, jax.devices()[:1] if mesh == 'data:1' else jax.devices())
  (batch,) = batches.one_epoch()
  with jax.set_mesh(mesh):
    shardings = step.state_shardings(jax.eval_shape(lambda: params), tx, mesh)
    state, metrics = jax.jit(
      functools.partial(step.train_step, loss_fn=loss_fn, tx=tx)
    )(
      jax.device_put(step.init_state(params, tx), shardings),
      {},
      loop.shard_batch(batch, mesh),
    )
  grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params)
  return {name: float(x) for name, x in metrics.items()}, grads


@functools.cache
def packed_step(name):
  return run_step(name, batches_of())


@functools.cache
def outputs_alone(name) -> list[np.ndarray]:
  """Outputs for the supervised tokens of each text, from the whole head's outputs."""
  head, params = HEADS[name], value_params(HEADS[name])
  outputs_of = jax.jit(lambda ids: decoder_of(head).apply({'params': params}, ids))
  found = []
  for (text,) in TEXTS:
    ids = np.zeros((1, 12), np.int32)
    ids[0, : len(text.ids)] = text.ids
    outputs = np.asarray(outputs_of(ids))[0]
    places = np.flatnonzero(text.loss_mask)
    if head.classifier_type == 'V':
      found.append(outputs[places])
    else:
      by_token = outputs.reshape(12, 32, head.width)
      found.append(by_token[places - 1, text.ids[places]])
  return found


def assert_same(one, other):
  assert one[0].keys() == other[0].keys()
  for name in one[0]:
    assert one[0][name] == pytest.approx(other[0][name], rel=2e-5, abs=1e-6), name
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), one[1], other[1]
  )


@pytest.mark.parametrize('name', HEADS)
def test_packed_texts_have_the_loss_of_single_texts(name):
  metrics, grads = packed_step(name)
  assert metrics['weight'] == NUM_TEXTS
  losses = [
    np.mean(token_losses(outputs, np.full(len(outputs), reward), HEADS[name]))
    for outputs, (reward,) in zip(outputs_alone(name), REWARDS)
  ]
  assert metrics['loss'] == pytest.approx(np.mean(losses), rel=1e-4)
  assert metrics['reward'] == pytest.approx(REWARDS.mean())
  assert all(grad.any() for grad in trees.flatten(grads).values())


def test_a_row_for_every_text_gives_the_same_step():
  assert batches_of().num_rows < NUM_TEXTS
  assert_same(packed_step('V mle'), run_step('V mle', batches_of(packing=False)))


@pytest.mark.parametrize('name', ['V bce', 'Q mle'])
def test_another_mesh_and_accumulation_give_the_same_step(name):
  batches = batches_of(accumulation=2)
  assert_same(packed_step(name), run_step(name, batches, mesh='data:2,fsdp:4'))


@pytest.mark.parametrize('name', ['V bce', 'Q mse'])
def test_without_a_bias_it_stays_zero(name):
  metrics, grads = run_step(name, batches_of(), use_bias=False)
  assert metrics['loss'] == pytest.approx(packed_step(name)[0]['loss'], rel=1e-6)
  assert not grads['value_head'].pop('bias').any()
  assert all(grad.any() for grad in trees.flatten(grads).values())


TIED = DecoderConfig.from_hf(HF | {'tie_word_embeddings': True})


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_a_q_head_may_begin_as_the_language_model_head(config):
  head = HEADS['Q mle']
  before = language_model(config)
  made = value_params(head, config=config, init_mode='reuse')
  if config is TIED:
    rows = np.asarray(before['embed']['embedding'])
  else:
    rows = np.asarray(before['lm_head']['kernel']).T
  kernel = np.asarray(made['value_head']['kernel']).reshape(16, 32, 3)
  for token, atom in ((0, 0), (7, 2), (31, 1)):
    np.testing.assert_array_equal(kernel[:, token, atom], rows[token])
  assert 'lm_head' not in made


def test_first_weights_of_a_head():
  head = HEADS['V mle']
  zero = value_params(head, init_mode='zero')['value_head']
  assert not zero['kernel'].any() and zero['kernel'].shape == (16, 5)
  assert not zero['bias'].any() and zero['bias'].shape == (5,)
  random = value_params(head)['value_head']['kernel']
  assert 0.01 < np.std(random) < 0.03  # the model's initializer_range is 0.02
  np.testing.assert_array_equal(random, value_params(head)['value_head']['kernel'])
  assert (random != value_params(head, seed=4)['value_head']['kernel']).all()
  # A V head has no rows to reuse.
  reused = value_params(head, init_mode='reuse')['value_head']['kernel']
  np.testing.assert_array_equal(random, reused)
  trained = {'value_head': {'kernel': np.ones((16, 5)), 'bias': np.ones(5)}}
  given = language_model() | trained
  warm = value_params(head, init_mode='warmstart', given=given)
  assert warm['value_head'] is trained['value_head']
  cold = value_params(head, init_mode='random', given=given)
  np.testing.assert_array_equal(cold['value_head']['kernel'], random)


def test_the_rest_of_the_model_is_kept():
  made = trees.flatten(value_params(HEADS['V bce']))
  names = trees.flatten(param_shapes(CONFIG)).keys() - {'lm_head/kernel'}
  assert made.keys() == names | {'value_head/kernel', 'value_head/bias'}
  before = trees.flatten(language_model())
  for name in names:
    np.testing.assert_array_equal(made[name], before[name])


@pytest.mark.parametrize('name', ['V bce', 'Q mle'])
def test_evaluation_is_over_supervised_tokens(name):
  head = HEADS[name]
  mesh = make_mesh('data:2,fsdp:2,tensor:2')

  class Setup:
    decoder = decoder_of(head)

  Setup.mesh = mesh
  small = TextBatches(
    TEXTS, row_length=12, batch_size=4, labels={'reward': REWARDS}
  )  # several batches, the last not full
  run = value_steps.make_evaluate(Setup, head, {'id': small, 'ood': batches_of()})
  params = value_params(head)
  params = jax.device_put(params, param_shardings(params, mesh))
  with jax.set_mesh(mesh):
    metrics = run(params, {})
  outputs = outputs_alone(name)
  rewards = np.concatenate([[r] * len(o) for o, (r,) in zip(outputs, REWARDS)])
  joined = np.concatenate(outputs).astype(np.float64)
  if head.loss_type == 'mle':
    probs = np.exp(joined) / np.exp(joined).sum(-1, keepdims=True)
    predictions = probs @ head.atoms()
    variance = probs @ head.atoms() ** 2 - predictions**2
    assert metrics['id_variance'] == pytest.approx(variance.mean(), rel=1e-4)
    entropy = -(probs * np.log(probs)).sum(-1)
    assert metrics['ood_entropy'] == pytest.approx(entropy.mean(), rel=1e-4)
  else:
    predictions = 1 / (1 + np.exp(-joined[:, 0]))
  for key, number in evaluate(predictions, rewards, head).items():
    for data in ('id', 'ood'):
      assert metrics[f'{data}_{key}'] == pytest.approx(number, rel=1e-3, abs=1e-4), key
  assert metrics['loss'] == metrics['id_loss']
  assert metrics['id_loss'] == pytest.approx(metrics['ood_loss'], rel=1e-5)
  assert metrics['id_loss'] == pytest.approx(packed_step(name)[0]['loss'], rel=1e-4)
