"""Adapters: a fresh one changes nothing, a folded one is the same model, off is off."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import trees
from mrjax.lora import adapters, masks
from mrjax.lora.adapters import AdapterError, LoraConfig
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sharding import rules
from mrjax.sharding.mesh import make_mesh

CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 40,
    'hidden_size': 16,
    'intermediate_size': 28,
    'num_hidden_layers': 2,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 6,
    'initializer_range': 0.2,
  }
)
LORA = LoraConfig(rank=3, alpha=7.0)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 5)).astype(np.int32)
ALL = [f'layers/{m}' for m in adapters.linear_dims(CONFIG)]


def random_like(tree, seed=0, scale=0.3):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)
  return jax.tree.map(draw, tree)


@pytest.fixture(scope='module')
def base():
  shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), TOKENS)['params']
  return random_like(shapes, seed=1)


@pytest.fixture(scope='module')
def trained():
  """An adapter on every linear map, both factors far from zero."""
  return random_like(adapters.adapter_shapes(CONFIG, LORA))


@functools.cache
def compiled(method='__call__', **fields):
  decoder = Decoder(CONFIG, **fields)
  return jax.jit(lambda params, **kw: decoder.apply({'params': params}, TOKENS, **kw))


def logits(params, **fields):
  return np.asarray(compiled(**fields)(params))


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_fresh_adapter_leaves_logits_unchanged(base, remat):
  fresh = adapters.init_adapter(CONFIG, LORA, jax.random.key(5))
  assert all(np.any(x) for n, x in trees.flatten(fresh).items() if n[-1] == 'a')
  got = logits(masks.merge(fresh, base), remat=remat, lora_scale=LORA.scale)
  np.testing.assert_array_equal(got, logits(base, remat=remat))


def test_each_linear_map_adds_the_scaled_product(base, trained):
  """What one adapter does to the kernel it lies beside, in float64 by hand."""
  for module in ALL:
    one = {n: x for n, x in trees.flatten(trained).items() if n.startswith(module)}
    a, b = one[f'{module}/lora_a'], one[f'{module}/lora_b']
    product = np.stack(
      [np.tensordot(np.float64(a[i]), np.float64(b[i]), 1) for i in range(2)]
    )
    leaves = trees.flatten(base)
    leaves[f'{module}/kernel'] = leaves[f'{module}/kernel'] + 7.0 / 3 * product
    want = logits(jax.tree.map(jnp.float32, trees.unflatten(leaves)))
    got = logits(masks.merge(trees.unflatten(one), base), lora_scale=LORA.scale)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(got - logits(base)).max() > 1e-3, module


def test_folded_is_unfolded_scanned_and_unrolled(base, trained):
  merged = masks.merge(trained, base)
  folded = adapters.fold(merged, LORA)
  assert jax.tree.structure(folded) == jax.tree.structure(base)
  want = logits(merged, lora_scale=LORA.scale)
  np.testing.assert_allclose(logits(folded), want, atol=2e-5)
  unrolled = logits(unstack_layers(merged, 2), scan_layers=False, lora_scale=LORA.scale)
  np.testing.assert_allclose(unrolled, want, atol=2e-5)
  assert np.abs(want - logits(base)).max() > 0.1


def test_folding_is_float32_and_keeps_the_dtype(base, trained):
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
  folded = trees.flatten(adapters.fold(masks.merge(trained, low), LORA, donate=True))
  assert all(kernel_of(low, module).is_deleted() for module in ALL)
  leaves = trees.flatten(trained)
  for module in ALL:
    a, b = leaves[f'{module}/lora_a'], leaves[f'{module}/lora_b']
    product = np.stack([np.tensordot(a[i], b[i], 1) for i in range(2)])
    kernel = kernel_of(base, module).astype(jnp.bfloat16)
    want = np.float32(kernel) + np.float32(7.0 / 3) * product
    got = folded[f'{module}/kernel']
    assert got.dtype == jnp.bfloat16
    # Half a step of bfloat16: one rounding, at the end.
    np.testing.assert_allclose(np.float32(got), want, rtol=2**-8, atol=1e-6)


def kernel_of(params, module):
  return trees.flatten(params)[f'{module}/kernel']


def test_adapter_off_is_the_base(base, trained):
  merged = masks.merge(trained, base)
  jax.tree.map(np.testing.assert_array_equal, adapters.without_adapter(merged), base)
  jax.tree.map(np.testing.assert_array_equal, adapters.adapter_of(merged), trained)
  assert adapters.adapter_of(base) == {}


@pytest.mark.parametrize(
  'spec', ['fsdp:8', 'data:2,fsdp:2,tensor:2', 'tensor:4,data:2']
)
def test_every_mesh_gives_the_logits_of_one_device(base, trained, spec):
  mesh = make_mesh(spec)
  merged = masks.merge(trained, base)
  placed = jax.device_put(merged, rules.param_shardings(merged, mesh))
  with jax.set_mesh(mesh):
    got = logits(placed, lora_scale=LORA.scale)
  np.testing.assert_allclose(got, logits(merged, lora_scale=LORA.scale), atol=2e-5)


def test_adapters_are_born_where_their_kernels_lie():
  mesh = make_mesh('fsdp:4,tensor:2')
  init = functools.partial(adapters.init_adapter, CONFIG, LORA)
  made = trees.flatten(rules.born_sharded(init, mesh, jax.random.key(2)))
  alone = trees.flatten(init(jax.random.key(2)))
  parts = {
    'layers/attn/q/lora_a': 4,
    'layers/attn/k/lora_b': 2,
    'layers/attn/o/lora_a': 2,
    'layers/attn/o/lora_b': 4,
    'layers/mlp/up/lora_a': 4,
    'layers/mlp/gate/lora_b': 2,
    'layers/mlp/down/lora_a': 2,
    'layers/mlp/down/lora_b': 4,
  }
  for name, count in parts.items():
    shard = made[name].addressable_shards[0].data
    assert shard.size * count == made[name].size, name
    rank_axis = 1 if name.endswith('b') else -1
    assert shard.shape[rank_axis] == LORA.rank
  for name, leaf in made.items():
    np.testing.assert_allclose(leaf, alone[name], atol=1e-7)


def test_initial_values_are_pefts_and_depend_on_the_path_alone():
  key = jax.random.key(3)
  leaves = trees.flatten(adapters.init_adapter(CONFIG, LoraConfig(rank=64), key))
  for name, leaf in leaves.items():
    assert leaf.dtype == jnp.float32
    if name.endswith('lora_b'):
      assert not np.any(leaf)
      continue
    fan_in = math.prod(leaf.shape[1:-1])
    bound = fan_in**-0.5  # torch: kaiming_uniform_(a=sqrt(5))
    assert np.abs(leaf).max() <= bound
    # Uniform: the standard deviation is bound / sqrt(3), here of 2,048 draws or more.
    assert abs(np.std(leaf) / (bound / math.sqrt(3)) - 1) < 0.05
  few = adapters.init_adapter(CONFIG, LoraConfig(rank=64, targets=('attn/v',)), key)
  assert set(trees.flatten(few)) == {
    'layers/attn/v/lora_a',
    'layers/attn/v/lora_b',
  }
  np.testing.assert_array_equal(
    few['layers']['attn']['v']['lora_a'], leaves['layers/attn/v/lora_a']
  )
  draws = [x for n, x in leaves.items() if x.shape == (2, 16, 64)]
  assert len(draws) == 5
  assert all(np.any(x != y) for x, y in itertools.pairwise(draws))


def test_only_the_adapter_has_gradients_and_they_match_the_folded_kernel(base, trained):
  """d/dA = scale * d/dW B', d/dB = scale * A' d/dW, by the chain rule."""
  tangent = jax.random.normal(jax.random.key(0), (8, 5, 40))
  decoder = Decoder(CONFIG, lora_scale=LORA.scale)

  def loss(trainable, frozen):
    params = masks.merge(trainable, frozen)
    return jnp.sum(tangent * decoder.apply({'params': params}, TOKENS))

  mask = masks.make_mask(masks.merge(trained, base), masks.rules_named('lora'))
  trainable, frozen = masks.split(masks.merge(trained, base), mask)
  assert set(trees.flatten(trainable)) == set(trees.flatten(trained))
  grads = trees.flatten(jax.jit(jax.grad(loss))(trainable, frozen))
  folded = adapters.fold(masks.merge(trained, base), LORA)
  kernel_grads = trees.flatten(jax.jit(jax.grad(loss))(folded, {}))
  for module in ALL:
    a = np.asarray(trained_leaf(trained, module, 'a')).reshape(2, -1, 3)
    b = np.asarray(trained_leaf(trained, module, 'b')).reshape(2, 3, -1)
    w = np.asarray(kernel_grads[f'{module}/kernel'])
    w = w.reshape(2, a.shape[1], b.shape[2])
    want_a = LORA.scale * w @ b.swapaxes(1, 2)
    want_b = LORA.scale * a.swapaxes(1, 2) @ w
    for leaf, want in (('lora_a', want_a), ('lora_b', want_b)):
      got = np.asarray(grads[f'{module}/{leaf}']).reshape(want.shape)
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def trained_leaf(adapter, module, which):
  return trees.flatten(adapter)[f'{module}/lora_{which}']


def test_dropout_is_a_function_of_its_key_and_right_on_average(base, trained):
  merged = masks.merge(trained, base)
  fields = {'lora_scale': LORA.scale, 'lora_dropout': 0.25}
  run = compiled(**fields)
  key = jax.random.key
  one = run(merged, rngs={'dropout': key(1)})
  np.testing.assert_array_equal(one, run(merged, rngs={'dropout': key(1)}))
  assert np.any(one != run(merged, rngs={'dropout': key(2)}))
  # A fresh adapter has nothing to drop.
  fresh = adapters.init_adapter(CONFIG, LORA, key(5))
  np.testing.assert_array_equal(
    run(masks.merge(fresh, base), rngs={'dropout': key(1)}), logits(base)
  )
  with pytest.raises(Exception, match='dropout'):
    run(merged)


def test_dropout_scales_what_it_keeps():
  """On one linear map with A = B = identity: inputs are 0 or 1 / (1 - rate)."""
  from mrjax.models.layers import Linear, LoraSettings

  linear = Linear((6,), (6,), False, 1.0, jnp.float32, LoraSettings(2.0, 0.25))
  params = {'kernel': jnp.zeros((6, 6)), 'lora_a': jnp.eye(6), 'lora_b': jnp.eye(6)}
  y = linear.apply(
    {'params': params}, jnp.ones((500, 6)), rngs={'dropout': jax.random.key(0)}
  )
  values, counts = np.unique(np.asarray(y), return_counts=True)
  np.testing.assert_allclose(values, [0.0, 2.0 / 0.75], rtol=1e-6)
  # Six standard deviations of a binomial with 3,000 draws.
  assert abs(counts[0] / 3000 - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 3000)


@pytest.mark.parametrize(
  'preset, modules',
  [
    ('attention', {'attn/q', 'attn/k', 'attn/v', 'attn/o'}),
    ('qv', {'attn/q', 'attn/v'}),
    ('all_linear', {m.removeprefix('layers/') for m in ALL}),
    ('mlp/(gate|up)/, attn/o', {'mlp/gate', 'mlp/up', 'attn/o'}),
  ],
)
def test_presets_and_regexes_choose_modules(preset, modules):
  targets = adapters.targets_named(preset)
  got = adapters.target_modules(CONFIG, targets)
  assert got == [m for m in ALL if m.removeprefix('layers/') in modules]


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'rank': 0}, 'rank 0: want at least 1'),
    ({'alpha': -1.0}, 'alpha -1.0'),
    ({'alpha': float('nan')}, 'alpha nan'),
    ({'dropout': 1.0}, 'dropout 1.0'),
    ({'targets': ('(',)}, 'no regular expression'),
  ],
)
def test_bad_settings_are_refused(fields, message):
  with pytest.raises(AdapterError, match=message):
    LoraConfig(**fields)


@pytest.mark.parametrize(
  'targets, message',
  [
    (('q_proj',), "'q_proj' is found in none of layers/attn/q/kernel"),
    (('attn/q', 'lm_head'), "'lm_head' is found in none"),
    ((), 'No LoRA target is given'),
  ],
)
def test_targets_that_name_nothing_are_refused(targets, message):
  with pytest.raises(AdapterError, match=message):
    adapters.adapter_shapes(CONFIG, LoraConfig(targets=targets))


def test_scales():
  assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
  assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_an_adapter_of_another_rank_or_target_is_refused_by_name(trained):
  check = functools.partial(adapters.check_adapter, CONFIG, where='here')
  check(LORA, trained)
  with pytest.raises(AdapterError, match=r'here: layers/attn/k/lora_a has shape .*4\)'):
    check(LoraConfig(rank=4), trained)
  with pytest.raises(AdapterError, match=r'attn/k/lora_a .* want \(not there\)'):
    check(LoraConfig(rank=3, targets=adapters.PRESETS['qv']), trained)


def test_an_adapter_without_its_scale_is_an_error(base, trained):
  with pytest.raises(ValueError, match='made without lora_scale'):
    logits(masks.merge(trained, base))


def test_folding_nothing_or_into_nothing_is_refused(base, trained):
  with pytest.raises(AdapterError, match='no adapter to fold'):
    adapters.fold(base, LORA)
  with pytest.raises(AdapterError, match='is quantised'):
    adapters.fold(trained, LORA)
