"""The train step: its numbers depend on the data alone."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrjax import trees
from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example
from mrjax.lora import masks
from mrjax.losses.tokens import cross_entropy, next_token_mask
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import sft
from mrjax.sharding.mesh import make_mesh
from mrjax.training import flops, loop, optimizer, step

CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 50,
    'hidden_size': 16,
    'intermediate_size': 26,
    'num_hidden_layers': 3,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 6,
  }
)
MESHES = (
  *('data:1', 'data:8', 'fsdp:8', 'data:2,fsdp:4'),
  *('fsdp:4,tensor:2', 'data:2,fsdp:2,tensor:2'),
)
DECODER = Decoder(CONFIG)


def make_params():
  return DECODER.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']


def make_batch(num_micro: int, rows: int = 16, length: int = 11):
  rng = np.random.default_rng(5)
  lengths = rng.integers(4, length + 1, (rows, 1))
  places = np.arange(length)[None]
  real = places < lengths
  batch = {
    'tokens': np.where(real, rng.integers(1, 50, (rows, length)), 0).astype(np.int32),
    'positions': np.broadcast_to(places, real.shape).astype(np.int32),
    'segments': real.astype(np.int32),
    'loss_mask': real & (places >= 2),
  }
  return {k: v.reshape(num_micro, rows // num_micro, length) for k, v in batch.items()}


def loss_fn(params, frozen, batch, key):
  del frozen, key
  logits = DECODER.apply(
    {'params': params},
    batch['tokens'],
    positions_BT=batch['positions'],
    segments_BT=batch['segments'],
  )
  loss, weight = cross_entropy(
    logits, batch['tokens'], batch['loss_mask'], batch['segments']
  )
  return loss, (weight, {})


def run_step(spec: str, batch, num_steps: int = 1):
  devices = jax.devices()[:1] if spec == 'data:1' else jax.devices()
  mesh = make_mesh(spec, devices)
  tx = optax.sgd(1.0)  # so that the change of a parameter is its gradient
  params = make_params()
  shardings = step.state_shardings(jax.eval_shape(lambda: params), tx, mesh)
  state = jax.device_put(step.init_state(params, tx), shardings)
  fn = jax.jit(lambda s, b: step.train_step(s, {}, b, loss_fn=loss_fn, tx=tx))
  with jax.set_mesh(mesh):
    for _ in range(num_steps):
      state, metrics = fn(state, loop.shard_batch(batch, mesh))
  return jax.device_get(state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope='module')
def reference():
  return run_step('data:1', make_batch(1))


@pytest.mark.parametrize('spec', MESHES[1:])
def test_any_mesh_gives_the_same_loss_and_gradients(reference, spec):
  state, metrics = run_step(spec, make_batch(1))
  assert metrics['loss'] == pytest.approx(reference[1]['loss'], rel=1e-6)
  assert metrics['weight'] == reference[1]['weight']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    state.params,
    reference[0].params,
  )


def test_accumulation_is_one_big_batch_though_token_counts_differ(reference):
  batch = make_batch(2)
  counts = batch['loss_mask'].sum((1, 2))
  assert counts[0] != counts[1]
  state, metrics = run_step('data:1', batch)
  assert metrics['loss'] == pytest.approx(reference[1]['loss'], rel=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    state.params,
    reference[0].params,
  )


def test_padding_does_not_change_the_step(reference):
  batch = {k: np.pad(v, ((0, 0), (0, 0), (0, 5))) for k, v in make_batch(1).items()}
  state, metrics = run_step('data:1', batch)
  assert metrics['loss'] == pytest.approx(reference[1]['loss'], rel=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
    state.params,
    reference[0].params,
  )


@pytest.fixture(scope='module')
def texts():
  rng = np.random.default_rng(7)
  make = lambda n: Example(rng.integers(1, 50, n).astype(np.int32), np.arange(n) >= 2)
  return [(make(n),) for n in rng.integers(4, 24, 13)]


def sft_update(texts, packing: bool):
  """What one step over all texts changes, and its metrics."""
  rows = TextBatches(texts, row_length=32, batch_size=1, packing=packing).num_rows
  batches = TextBatches(texts, row_length=32, batch_size=rows, packing=packing)
  tx = optax.sgd(1.0)
  fn = jax.jit(
    functools.partial(step.train_step, loss_fn=sft.make_loss_fn(DECODER), tx=tx)
  )
  state, metrics = fn(step.init_state(make_params(), tx), {}, batches(0))
  return state.params, metrics, batches(0)


def test_packed_rows_give_the_step_of_padded_rows(texts):
  packed, metrics, batch = sft_update(texts, packing=True)
  padded, padded_metrics, padded_batch = sft_update(texts, packing=False)
  assert batch['tokens'].size < 0.7 * padded_batch['tokens'].size
  assert metrics['weight'] == padded_metrics['weight']
  np.testing.assert_allclose(metrics['loss'], padded_metrics['loss'], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), packed, padded)


def test_an_evaluation_sums_what_a_step_averages():
  batch = make_batch(2)
  _, metrics = run_step('data:1', batch)
  found = jax.jit(functools.partial(step.evaluate_step, loss_fn=loss_fn))(
    make_params(), {}, batch
  )
  assert float(found['weight']) == metrics['weight']
  assert float(found['loss'] / found['weight']) == pytest.approx(metrics['loss'])


def test_cross_entropy_by_hand():
  # Three tokens; only the last is supervised; its logit leads by log 3 over one other.
  logits = jnp.array([[[0.0, 0.0], [np.log(3.0), 0.0], [9.0, 9.0]]])
  tokens = jnp.array([[0, 1, 0]])
  mask = jnp.array([[False, False, True]])
  loss, count = cross_entropy(logits, tokens, mask, jnp.ones((1, 3), jnp.int32))
  assert count == 1
  assert float(loss) == pytest.approx(-np.log(3 / 4))


def test_unsupervised_logits_get_exactly_zero_gradient():
  key = jax.random.key(1)
  logits = jax.random.normal(key, (2, 5, 7))
  tokens = jnp.arange(10).reshape(2, 5) % 7
  mask = jnp.zeros((2, 5), bool).at[0, 3].set(True)
  ones = jnp.ones((2, 5), jnp.int32)
  grads = jax.grad(lambda x: cross_entropy(x, tokens, mask, ones)[0])(logits)
  nonzero = np.argwhere(np.abs(grads).sum(-1))
  np.testing.assert_array_equal(nonzero, [[0, 2]])


def test_a_text_never_predicts_the_first_token_of_the_next():
  mask = np.ones((1, 6), bool)
  segments = np.array([[1, 1, 2, 2, 2, 0]])
  np.testing.assert_array_equal(
    next_token_mask(mask, segments), [[True, False, True, True, False, False]]
  )


def test_no_look_ahead():
  params = make_params()
  tokens = jnp.arange(7)[None]  # all different, so a row of the table is one input

  def logits_at(embedding, t):
    changed = params | {'embed': {'embedding': embedding}}
    return DECODER.apply({'params': changed}, tokens)[0, t].sum()

  for t in range(6):
    grads = jax.grad(logits_at)(params['embed']['embedding'], t)
    assert np.abs(grads[: t + 1]).max() > 0
    np.testing.assert_array_equal(grads[t + 1 :], 0)


def test_schedule_warms_up_and_ends_at_its_floor():
  config = optimizer.OptimizerConfig(
    learning_rate=2.0, schedule='cosine', warmup_ratio=0.03, final_lr_ratio=0.1
  )
  schedule = optimizer.make_schedule(config, 174)
  assert float(schedule(0)) == pytest.approx(2 / 6)  # 6 = ceil(0.03 * 174)
  assert float(schedule(5)) == pytest.approx(2.0)
  assert float(schedule(6)) == pytest.approx(2.0)
  assert float(schedule(174)) == pytest.approx(0.2)
  linear = optimizer.make_schedule(
    optimizer.OptimizerConfig(learning_rate=2.0, schedule='linear'), 10
  )
  assert float(linear(5)) == pytest.approx(1.0)


@pytest.mark.parametrize(
  ('name', 'value', 'wanted'),
  [
    ('clip_norm', -1.0, 'at least 0'),  # would turn every gradient round
    ('learning_rate', np.nan, 'at least 0'),
    ('learning_rate', np.inf, 'at least 0, and finite'),
    ('weight_decay', -0.1, 'at least 0'),
    ('warmup_steps', -3, 'at least 0'),
    ('warmup_ratio', 1.0, r'a number in \[0, 1\)'),
    ('final_lr_ratio', 1.5, r'a number in \[0, 1\]'),
    ('beta1', 1.0, r'a number in \[0, 1\)'),
    ('beta2', -0.5, r'a number in \[0, 1\)'),
    ('epsilon', 0.0, 'a positive number'),
    ('lora_plus_ratio', np.inf, 'a positive number, and finite'),
    ('lora_plus_ratio', 0.0, 'a positive number'),
  ],
)
def test_numbers_that_no_optimizer_has_are_refused_by_their_flag(name, value, wanted):
  with pytest.raises(ValueError, match=f'^--{name}={value}: want {wanted}'):
    optimizer.OptimizerConfig(**{name: value})


def test_the_ends_of_the_ranges_are_allowed():
  config = optimizer.OptimizerConfig(
    learning_rate=0.0, clip_norm=0.0, final_lr_ratio=1.0, beta1=0.0, weight_decay=0.0
  )
  assert dataclasses.replace(config, clip_norm=None).clip_norm is None
  with pytest.raises(ValueError, match='--schedule=step: want one of constant, lin'):
    dataclasses.replace(config, schedule='step')


def test_adamw_leaves_norms_and_biases_undecayed():
  tx = optimizer.make_optimizer(
    optimizer.OptimizerConfig(weight_decay=0.5, clip_norm=0.0), lambda _: 0.1
  )
  params = {'a': {'kernel': jnp.ones(3), 'bias': jnp.ones(3), 'scale': jnp.ones(3)}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  flat = trees.flatten(updates)
  np.testing.assert_allclose(flat['a/kernel'], -0.05)
  np.testing.assert_array_equal(flat['a/bias'], 0)
  np.testing.assert_array_equal(flat['a/scale'], 0)


def test_lora_plus_lengthens_the_steps_of_b_alone():
  config = optimizer.OptimizerConfig(clip_norm=0.0, lora_plus_ratio=4.0)
  plus = optimizer.make_optimizer(config, lambda _: 0.1)
  plain = optimizer.make_optimizer(
    dataclasses.replace(config, lora_plus_ratio=1.0), lambda _: 0.1
  )
  params = {'q': {'lora_a': jnp.ones(3), 'lora_b': jnp.ones(2)}}
  grads = {'q': {'lora_a': jnp.arange(3.0), 'lora_b': jnp.arange(2.0) - 3}}
  updates, want = (
    tx.update(grads, tx.init(params), params)[0]['q'] for tx in (plus, plain)
  )
  np.testing.assert_array_equal(updates['lora_a'], want['lora_a'])
  np.testing.assert_array_equal(updates['lora_b'], 4 * want['lora_b'])
  assert (want['lora_b'] != 0).all()


def flops_under(rules, extra=None):
  shapes = jax.eval_shape(make_params) | {}
  if extra:
    shapes = masks.merge(extra, shapes)
  return flops.step_flops(CONFIG, shapes, masks.make_mask(shapes, rules))


def test_operations_of_a_step_by_hand():
  # Matrices of a layer: q and o 16 x 48, k and v 16 x 24, gate, up and down 16 x 26.
  layer, head = 2 * 16 * 48 + 2 * 16 * 24 + 3 * 16 * 26, 16 * 50
  matrices = 3 * layer + head
  width = 8 * 6
  assert flops_under(masks.rules_named('all')) == (6 * matrices, 12 * 3 * width)
  # An adapter of rank 2 on q: its own weights cost 6, all others 4.
  lora = {'layers': {'attn': {'q': {}}}}
  for name, shape in (('lora_a', (3, 16, 2)), ('lora_b', (3, 2, 8, 6))):
    lora['layers']['attn']['q'][name] = jax.ShapeDtypeStruct(shape, jnp.float32)
  own = 3 * (16 * 2 + 2 * 48)
  assert flops_under(masks.rules_named('lora'), lora) == (
    4 * matrices + 6 * own,
    12 * 3 * width,
  )
  # The last layer alone: nothing flows back through the two below it.
  assert flops_under((('^layers/', 1),)) == (
    2 * matrices + 2 * (layer + head) + 2 * layer,
    4 * width * (3 + 2),
  )
  assert flops_under(masks.rules_named('head')) == (2 * matrices + 2 * head, 12 * width)


@pytest.mark.parametrize('tied', [False, True])
def test_operations_of_a_value_head_are_those_of_the_outputs_that_are_taken(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  shapes = {n: x for n, x in jax.eval_shape(make_params).items() if n != 'lm_head'}
  shapes['value_head'] = {'kernel': jax.ShapeDtypeStruct((16, 48 * 5), jnp.float32)}
  mask = masks.make_mask(shapes, masks.rules_named('all'))
  matrices = 3 * (2 * 16 * 48 + 2 * 16 * 24 + 3 * 16 * CONFIG.intermediate_size)
  found = flops.step_flops(config, shapes, mask, head_outputs=5)
  assert found.per_token == 6 * (matrices + 16 * 5)
  found = flops.step_flops(config, shapes, mask)
  assert found.per_token == 6 * (matrices + 16 * 48 * 5)


def test_flops_of_a_batch_follow_its_tokens_and_pairs():
  batch = {
    'segments': np.array([[1, 1, 1, 2, 2, 0]]),
    'positions': np.array([[0, 1, 2, 0, 1, 0]]),
  }
  counts = loop.count(batch)
  assert counts == {'tokens': 5, 'pairs': 6 + 3, 'padding': pytest.approx(1 / 6)}
  assert flops.StepFlops(10.0, 1.0).of(tokens=5, pairs=9) == 59


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA L40S', None),
    ('cpu', None),
  ],
)
def test_peaks_are_those_of_the_very_device(kind, peak):
  assert flops.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_moments_lie_with_their_weights():
  params = jax.eval_shape(make_params)
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 1.0)
  shardings = step.state_shardings(params, tx, make_mesh('fsdp:4,tensor:2'))
  flat = trees.flatten(shardings.opt_state)
  moments = [s for name, s in flat.items() if name.endswith('mlp/up/kernel')]
  want = trees.flatten(shardings.params)['layers/mlp/up/kernel']
  assert moments == [want, want]


def fit(num_steps, bad_step=None, bad_metric='loss', **options):
  seen = []

  def fake_step(state, batch):
    metrics = {n: jnp.float32(1) for n in ('loss', 'grad_norm', 'rewards/margins')}
    if int(state.step) == bad_step:
      metrics[bad_metric] *= jnp.nan
    return state.replace(step=state.step + 1), metrics

  saved = []
  state = step.TrainState(jnp.int32(0), {}, {})
  try:
    done, _ = loop.fit(
      state,
      fake_step,
      lambda i: make_batch(1),
      mesh=make_mesh('data:8'),
      start_step=0,
      num_steps=num_steps,
      on_step=lambda i, m: seen.append(i),
      save=lambda i, s: saved.append(i),
      save_every=2,
      **options,
    )
  except loop.NonFiniteLossError as error:
    return seen, saved, error
  assert done == seen[-1]
  return seen, saved, None


def test_a_wish_to_stop_ends_the_loop_after_a_save():
  asked = []

  def should_stop(done):
    asked.append(done)
    return done == 3

  assert fit(9, should_stop=should_stop) == ([1, 2, 3], [2, 3], None)
  assert asked == [1, 2, 3]


def test_evaluations_come_when_asked_and_before_saves():
  evaluated = []
  evaluate = lambda done, state: evaluated.append(done)
  assert fit(7, evaluate=evaluate, eval_every=3)[1] == [2, 4, 6, 7]
  assert evaluated == [2, 3, 4, 6, 7]
  evaluated.clear()
  fit(7, evaluate=evaluate, should_stop=lambda done: done == 5)
  assert evaluated == [2, 4]  # who is told to stop has no time for it


def test_loop_reports_each_step_once_and_saves_the_last():
  assert fit(5) == ([1, 2, 3, 4, 5], [2, 4, 5], None)


def test_a_profile_holds_the_steps_it_names(tmp_path):
  steps = fit(5, profile=(1, 3, str(tmp_path)))[0]
  assert steps == [1, 2, 3, 4, 5]
  (trace,) = tmp_path.glob('plugins/profile/*/*.xplane.pb')
  assert trace.stat().st_size > 0
  assert fit(1, profile=(1, 3, str(tmp_path / 'late')))[0] == [1]
  assert not (tmp_path / 'late').exists()


def test_a_non_finite_loss_stops_before_it_is_saved():
  seen, saved, error = fit(5, bad_step=3)
  assert (seen, saved) == ([1, 2, 3], [2])
  assert error.step == 4
  assert str(error) == 'The loss of step 4 is nan.'
  seen, saved, error = fit(5, bad_step=1, bad_metric='grad_norm')
  assert (seen, saved) == ([1], [])
  assert str(error) == 'The gradient norm of step 2 is nan.'
  seen, saved, error = fit(5, bad_step=2, bad_metric='rewards/margins')
  assert (seen, saved) == ([1, 2], [2])
  assert str(error) == 'The rewards/margins of step 3 is nan.'
