"""Preference steps of a tiny decoder: the same numbers however texts are laid out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrjax import trees
from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example
from mrjax.lora import masks
from mrjax.lora.adapters import LoraConfig, init_adapter
from mrjax.losses.tokens import next_token_logps
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import preference
from mrjax.runs import preference_losses as losses
from mrjax.runs.preference_losses import LossConfig
from mrjax.sharding.mesh import make_mesh
from mrjax.training import loop, step

CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 40,
    'hidden_size': 16,
    'intermediate_size': 28,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 6,
  }
)
LORA = LoraConfig(rank=3, targets=('attn/q', 'mlp/down'))
DECODER = Decoder(CONFIG, lora_scale=LORA.scale)
NUM_PAIRS = 7


def random_text(rng) -> Example:
  prompt, completion = rng.integers(1, 4), rng.integers(1, 6)
  ids = rng.integers(1, 40, prompt + completion).astype(np.int32)
  return Example(ids, np.arange(prompt + completion) >= prompt)


RNG = np.random.default_rng(11)
PAIRS = [(random_text(RNG), random_text(RNG)) for _ in range(NUM_PAIRS)]


@pytest.fixture(scope='module')
def weights():
  """Weights that stay, and an adapter that has moved off zero."""
  frozen = DECODER.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  frozen = jax.tree.map(lambda x: 5 * x, frozen)  # predictions that are not all alike
  adapter = init_adapter(CONFIG, LORA, jax.random.key(1))
  moved = trees.map_named(
    lambda name, x: (
      x
      if name.endswith('a')
      else 0.2 * jnp.cos(jnp.arange(x.size) * 1.0).reshape(x.shape)
    ),
    adapter,
  )
  return frozen, adapter, moved


def batches_of(units, *, packing=True, accumulation=1, labels=None) -> TextBatches:
  return TextBatches(
    units,
    row_length=34,
    batch_size=8,
    grad_accumulation=accumulation,
    packing=packing,
    labels=labels,
  )


def run_step(
  config, batches, adapter, frozen, *, mesh='data:1', reference='', others=None
):
  """Metrics and gradients of one step over all records."""
  (batch,) = batches.one_epoch()
  policies = losses.Policies(DECODER, reference)
  loss_fn = losses.make_loss_fn(policies, config, num_texts=batches.max_texts)
  tx = optax.sgd(1.0)  # so that the change of a weight is its gradient
  take = functools.partial(step.train_step, loss_fn=loss_fn, tx=tx)
  if others:
    (found,) = others.one_epoch()
    batch |= {losses.MISMATCHED + name: x for name, x in found.items()}
    take = functools.partial(
      losses.kto_train_step,
      add_reference_point=losses.make_reference_point(
        policies, num_texts=others.max_texts
      ),
      loss_fn=loss_fn,
      tx=tx,
    )
  devices = jax.devices()[:1] if mesh == 'data:1' else jax.devices()
  mesh = make_mesh(mesh, devices)
  with jax.set_mesh(mesh):
    state, metrics = jax.jit(take)(
      step.init_state(adapter, tx), frozen, loop.shard_batch(batch, mesh)
    )
  grads = jax.tree.map(
    lambda a, b: np.asarray(a) - np.asarray(b), adapter, state.params
  )
  return {name: float(x) for name, x in metrics.items()}, grads


def assert_same(one, other):
  """To rounding: gradients are up to 3, sums of some hundred float32 terms."""
  assert one[0].keys() == other[0].keys()
  for name in one[0]:
    assert one[0][name] == pytest.approx(other[0][name], rel=2e-5, abs=1e-6), name
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=2e-5),
    one[1],
    other[1],
  )


@functools.cache
def plain_logps_fn():
  return jax.jit(
    lambda params, ids: next_token_logps(DECODER.apply({'params': params}, ids), ids)
  )


def plain_logps(params, text: Example) -> float:
  """Of one text alone, from all logits."""
  ids = np.zeros((1, 10), np.int32)
  ids[0, : len(text.ids)] = text.ids
  logps = np.asarray(plain_logps_fn()(params, ids), np.float64)[0]
  return sum(logps[t - 1] for t in np.flatnonzero(text.loss_mask))


@pytest.fixture(scope='module')
def texts_alone(weights):
  """Log-probabilities [pairs, 2] of policy and reference, computed text by text."""
  frozen, _, moved = weights
  table = lambda params: np.array(
    [[plain_logps(params, text) for text in pair] for pair in PAIRS], np.float32
  )
  return table(masks.merge(moved, frozen)), table(frozen)


DPO = LossConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2)


@pytest.fixture(scope='module')
def packed_step(weights):
  frozen, _, moved = weights
  return run_step(DPO, batches_of(PAIRS), moved, frozen, reference=losses.ADAPTER_OFF)


def test_packed_pairs_have_the_log_probabilities_of_single_texts(
  packed_step, texts_alone
):
  metrics, _ = packed_step
  policy, reference = texts_alone
  rewards = 0.3 * (policy - reference)
  margins = rewards[:, 0] - rewards[:, 1]
  assert metrics['weight'] == NUM_PAIRS
  means = {
    'logps/chosen': policy[:, 0],
    'logps/rejected': policy[:, 1],
    'rewards/chosen': rewards[:, 0],
    'rewards/rejected': rewards[:, 1],
    'rewards/margins': margins,
    'rewards/accuracies': margins > 0,
  }
  for name, values in means.items():
    assert metrics[name] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-5), name
  assert 0 < metrics['rewards/accuracies'] < 1
  nll = -policy[:, 0] / [chosen.loss_mask.sum() for chosen, _ in PAIRS]
  smoothed = 0.9 * np.log1p(np.exp(-margins)) + 0.1 * np.log1p(np.exp(margins))
  assert metrics['loss'] == pytest.approx(np.mean(smoothed + 0.2 * nll), rel=1e-4)


def test_a_row_for_every_pair_gives_the_same_step(packed_step, weights):
  frozen, _, moved = weights
  padded = run_step(
    DPO,
    batches_of(PAIRS, packing=False),
    moved,
    frozen,
    reference=losses.ADAPTER_OFF,
  )
  assert batches_of(PAIRS).num_rows < NUM_PAIRS
  assert_same(packed_step, padded)


def test_another_mesh_and_accumulation_give_the_same_step(packed_step, weights):
  frozen, _, moved = weights
  split = run_step(
    DPO,
    batches_of(PAIRS, accumulation=2),
    moved,
    frozen,
    mesh='data:2,fsdp:2,tensor:2',
    reference=losses.ADAPTER_OFF,
  )
  assert_same(packed_step, split)


def test_the_reference_may_be_resident_or_precomputed(
  packed_step, weights, texts_alone
):
  frozen, _, moved = weights
  resident = run_step(
    DPO,
    batches_of(PAIRS),
    moved,
    frozen | {losses.REFERENCE: frozen},
    reference=losses.RESIDENT,
  )
  assert_same(packed_step, resident)
  precomputed = run_step(
    DPO,
    batches_of(PAIRS, labels={losses.REFERENCE: texts_alone[1]}),
    moved,
    frozen,
    reference=losses.PRECOMPUTED,
  )
  assert_same(packed_step, precomputed)


def test_dpo_with_a_fresh_adapter_begins_at_log_2(weights):
  frozen, fresh, _ = weights
  metrics, grads = run_step(
    LossConfig(), batches_of(PAIRS), fresh, frozen, reference=losses.ADAPTER_OFF
  )
  assert metrics['loss'] == np.float32(math.log(2))
  assert metrics['rewards/accuracies'] == metrics['rewards/margins'] == 0
  for name, grad in trees.flatten(grads).items():
    assert grad.any() == name.endswith('lora_b'), name


def test_orpo_needs_no_reference(weights, texts_alone):
  frozen, _, moved = weights
  metrics, grads = run_step(LossConfig('orpo'), batches_of(PAIRS), moved, frozen)
  lengths = [[text.loss_mask.sum() for text in pair] for pair in PAIRS]
  means = texts_alone[0].astype(np.float64) / lengths
  odds = means - np.log1p(-np.exp(means))
  ratios = odds[:, 0] - odds[:, 1]
  expected = np.mean(-means[:, 0] + 0.1 * np.log1p(np.exp(-ratios)))
  assert metrics['loss'] == pytest.approx(expected, rel=1e-4)
  assert metrics['rewards/chosen'] == pytest.approx(0.1 * means[:, 0].mean(), rel=1e-4)
  assert any(grad.any() for grad in trees.flatten(grads).values())


def test_kto_has_one_reference_point_a_step(weights, texts_alone):
  """Whatever the accumulation, and whatever rows the other texts come in."""
  frozen, _, moved = weights
  texts = [(text,) for pair in PAIRS for text in pair]
  desirable = np.arange(len(texts))[:, None] % 2 == 0
  others = texts[::-1]
  config = LossConfig('kto', beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
  steps = [
    run_step(
      config,
      batches_of(texts, accumulation=number, labels={'desirable': desirable}),
      moved,
      frozen,
      mesh=mesh,
      reference=losses.ADAPTER_OFF,
      others=batches_of(others, accumulation=number),
    )
    for number, mesh in ((1, 'data:1'), (4, 'data:2,tensor:4'))
  ]
  assert_same(*steps)
  policy, reference = texts_alone
  ratios = (policy - reference).astype(np.float64)
  kl = max(ratios.mean(), 0)
  metrics, _ = steps[0]
  assert metrics['kl'] == pytest.approx(kl, rel=1e-4, abs=1e-6)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  good = 1.5 * (1 - sigmoid(0.3 * (ratios[:, 0] - kl)))
  bad = 0.5 * (1 - sigmoid(0.3 * (kl - ratios[:, 1])))
  assert metrics['loss'] == pytest.approx(np.mean([*good, *bad]), rel=1e-4)
  assert metrics['rewards/chosen'] == pytest.approx(0.3 * ratios[:, 0].mean(), rel=1e-3)
  margin = 0.3 * (ratios[:, 0] - ratios[:, 1]).mean()
  assert metrics['rewards/margins'] == pytest.approx(margin, rel=1e-3, abs=1e-5)


def test_the_chunk_that_was_asked_for_is_that_of_every_pass(weights, monkeypatch):
  frozen, _, moved = weights
  chunks = []
  original = losses.chunked_next_token_logps

  def recorded(*args, chunk_size=None):
    chunks.append(chunk_size)
    return original(*args, chunk_size=chunk_size)

  monkeypatch.setattr(losses, 'chunked_next_token_logps', recorded)
  config = preference.Config(model='m', data='d', output_dir='o', loss_chunk=5)
  policies = losses.Policies(DECODER, losses.ADAPTER_OFF)
  batches = batches_of(PAIRS)
  (batch,) = batches.one_epoch()
  loss_fn, *_ = preference._make_step(config, policies, batches)
  micro = {name: x[0] for name, x in batch.items()}
  jax.eval_shape(loss_fn, moved, frozen, micro, None)
  assert chunks == [5, 5]  # the policy's and the reference's
  add = losses.make_reference_point(policies, num_texts=batches.max_texts, chunk_size=3)
  others = {losses.MISMATCHED + name: x for name, x in batch.items()}
  jax.eval_shape(add, moved, frozen, others)
  assert chunks[2:] == [3, 3]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'loss': 'ppo'}, '--loss=ppo: want one of dpo, orpo, ipo, simpo, kto'),
    ({'beta': 0.0}, '--beta=0.0'),
    ({'label_smoothing': 0.5}, r'--label_smoothing=0.5: want a number in \[0, 0.5\)'),
    ({'sft_weight': -1.0}, '--sft_weight=-1.0: want at least 0'),
    ({'loss': 'simpo', 'gamma': math.inf}, '--gamma=inf'),
    ({'beta': math.nan}, '--beta=nan: want a positive number'),
    ({'loss': 'kto', 'desirable_weight': math.nan}, '--desirable_weight=nan'),
    (
      {'loss': 'kto', 'desirable_weight': 0.0, 'undesirable_weight': 0.0},
      'want one of them above 0',
    ),
    ({'loss': 'orpo', 'label_smoothing': 0.1}, 'is for --loss=dpo; it means nothing'),
    ({'loss': 'dpo', 'gamma': 0.1}, 'is for --loss=simpo'),
    ({'loss': 'ipo', 'desirable_weight': 2.0}, 'is for --loss=kto'),
  ],
)
def test_numbers_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    LossConfig(**changes)
