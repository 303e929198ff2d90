"""NF4 and int8: bitsandbytes' numbers, our layout, and the models that run on them."""

import functools
import json
import math
import statistics

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mrjax import trees
from mrjax.checkpoint import weights
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.hf import load_hf
from mrjax.lora import adapters, masks, quantization
from mrjax.models import quantized
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sharding import rules
from mrjax.sharding.mesh import MeshError, make_mesh

# bitsandbytes: functional.get_4bit_type('nf4'), and the tree of csrc dQuantizeNF4.
NF4 = [
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
THRESHOLDS = [
  *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906),
  *(-0.33967943489551544, -0.23460740596055984, -0.13791173323988914),
  *(-0.045525018125772476, 0.03979014977812767, 0.1202552504837513),
  *(0.2035212516784668, 0.2920137718319893, 0.3893125355243683, 0.5016634166240692),
  *(0.6427869200706482, 0.8614784181118011),
]
OUTPUTS, INPUTS = 200, 192  # 600 blocks: the 256s of scales run across outputs


def random_weight(outputs=OUTPUTS, inputs=INPUTS, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  spread = np.exp(rng.standard_normal((outputs, 1)))
  return (spread * rng.standard_normal((outputs, inputs))).astype(dtype)


def brute_force(values, levels, size):
  """Codes and largest magnitudes of flat values: the nearest level, the first if two.

  It is bitsandbytes' own reference: distances to all levels, and argmin.
  """
  values = np.pad(values, (0, -len(values) % size)).reshape(-1, size)
  absmax = np.abs(values).max(axis=1)
  normed = values * (np.float32(1) / absmax)[:, None]
  codes = np.abs(normed.reshape(-1, 1) - np.asarray(levels, np.float32)).argmin(axis=1)
  return codes, absmax


def test_levels_are_the_published_ones():
  np.testing.assert_array_equal(quantized.NF4_LEVELS, np.array(NF4, np.float32))
  normal = statistics.NormalDist()
  positive = [normal.inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
  negative = [-normal.inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
  want = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
  np.testing.assert_allclose(quantized.NF4_LEVELS, want, atol=2e-7)


def test_dynamic_levels_are_those_of_create_dynamic_map():
  torch = pytest.importorskip('torch')
  values = [0.0, 1.0]
  for i in range(7):
    edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
    for sign in (1, -1):
      values += (sign * 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2.0).tolist()
  want = np.array(sorted(values), np.float32)
  assert len(want) == 256
  # The order of the products differs, hence one unit in the last place.
  np.testing.assert_allclose(quantized.DYNAMIC_LEVELS, want, rtol=1.2e-7)
  assert quantized.DYNAMIC_LEVELS[127] == 0 and quantized.DYNAMIC_LEVELS[255] == 1


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_nf4_codes_and_scales_are_an_independent_construction(dtype):
  weight = random_weight(dtype=dtype)
  leaves = quantization.quantize(weight, 'nf4')
  codes, absmax = brute_force(weight.astype(np.float32).reshape(-1), NF4, 64)
  packed = (codes[::2] << 4 | codes[1::2]).reshape(OUTPUTS, INPUTS // 2)
  np.testing.assert_array_equal(leaves['kernel_nf4'], packed.T)
  mean = leaves['kernel_absmax_mean']
  np.testing.assert_allclose(mean, absmax.mean(), rtol=1e-6)
  codes, scales = brute_force(absmax - mean, quantized.DYNAMIC_LEVELS, 256)
  np.testing.assert_array_equal(leaves['kernel_absmax_scale'], scales)
  codes = codes[: absmax.size].reshape(OUTPUTS, INPUTS // 64)
  np.testing.assert_array_equal(leaves['kernel_absmax_codes'], codes.T)


def test_midpoints_go_to_the_lower_level():
  """At bitsandbytes' thresholds (strictly greater goes up), and one step above."""
  thresholds = np.array(THRESHOLDS, np.float32)
  above = np.nextafter(thresholds, np.float32(2))
  weight = np.zeros((2, 64), np.float32)
  weight[:, 0] = 1
  weight[0, 1:16], weight[1, 1:16] = thresholds, above
  packed = quantization.quantize(weight, 'nf4')['kernel_nf4'].T
  codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(2, 64)
  np.testing.assert_array_equal(codes[:, 0], [15, 15])
  np.testing.assert_array_equal(codes[0, 1:16], np.arange(15))
  np.testing.assert_array_equal(codes[1, 1:16], np.arange(1, 16))


def test_a_block_of_zeros_stays_zero():
  weight = random_weight(3, 128)
  weight[1, 64:] = 0
  for kind in quantized.KINDS:
    leaves = quantization.quantize(weight, kind)
    back = np.asarray(quantized.dequantize(leaves, jnp.float32))
    assert np.all(back[64:, 1] == 0) and np.any(back[:64, 1])
  assert not np.any(
    quantized.dequantize(quantization.quantize(weight * 0, 'nf4'), 'f4')
  )


def numpy_nf4(leaves):
  """What the leaves stand for, [O, I], by bitsandbytes' order of operations."""
  packed = leaves['kernel_nf4'].T
  codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, 64)
  nested = leaves['kernel_absmax_codes'].T.reshape(-1)
  scales = np.repeat(leaves['kernel_absmax_scale'], 256)[: nested.size]
  absmax = quantized.DYNAMIC_LEVELS[nested] * scales + leaves['kernel_absmax_mean']
  values = np.array(NF4, np.float32)[codes] * absmax[:, None]
  return values.reshape(leaves['kernel_nf4'].shape[1], -1)


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_dequantised_in_jax_is_numpy(kind):
  leaves = quantization.quantize(random_weight(), kind)
  if kind == 'nf4':
    want = numpy_nf4(leaves)
  else:
    want = leaves['kernel_int8'].T * leaves['kernel_absmax'][:, None] / np.float32(127)
  got = jax.jit(quantized.dequantize, static_argnums=1)(leaves, 'float32')
  # A fused multiply-add rounds once where NumPy rounds twice.
  np.testing.assert_allclose(got.T, want, rtol=5e-7, atol=1e-7)
  low = quantized.dequantize(leaves, jnp.bfloat16)
  np.testing.assert_array_equal(low, got.astype(jnp.bfloat16))


def test_errors_are_bounded_by_half_a_step():
  weight = random_weight()
  absmax = np.abs(weight.reshape(-1, 64)).max(axis=1)
  leaves = quantization.quantize(weight, 'nf4')
  error = np.abs(numpy_nf4(leaves) - weight).reshape(-1, 64).max(axis=1)
  half_step = np.diff(NF4).max() / 2
  # Scales have steps of at most 0.9 / 64 of the largest of their 256.
  spread = np.repeat(leaves['kernel_absmax_scale'], 256)[: absmax.size]
  assert np.all(error <= half_step * absmax + spread * 0.9 / 64 / 2 * 1.001 + 1e-6)
  assert error.max() > 0.8 * half_step * absmax.min()
  leaves = quantization.quantize(weight, 'int8')
  back = np.asarray(quantized.dequantize(leaves, jnp.float32)).T
  row_max = np.abs(weight).max(axis=1, keepdims=True)
  assert np.all(np.abs(back - weight) <= row_max / 127 / 2 * 1.001)


def test_int8_is_the_absmax_of_each_output():
  weight = random_weight(5, 7, ml_dtypes.bfloat16)
  leaves = quantization.quantize(weight, 'int8')
  for o, row in enumerate(np.float32(weight)):
    absmax = max(abs(x) for x in row)
    want = [round(float(x) * 127 / float(absmax)) for x in row]
    np.testing.assert_array_equal(leaves['kernel_int8'][:, o], want)
    assert leaves['kernel_absmax'][o] == absmax
    assert 127 in np.abs(leaves['kernel_int8'][:, o])


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_the_product_has_a_gradient_in_x_and_keeps_no_kernel(kind):
  leaves = quantization.quantize(random_weight(), kind)
  x = np.random.default_rng(1).standard_normal((11, INPUTS)).astype(np.float32)
  dense = quantized.dequantize(leaves, jnp.float32)
  y, pullback = jax.vjp(lambda x: quantized.matmul(x, leaves), x)
  np.testing.assert_allclose(y, x @ dense, atol=1e-3)
  dy = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
  np.testing.assert_allclose(pullback(dy)[0], dy @ dense.T, atol=1e-3)
  kept = sum(x.nbytes for x in jax.tree.leaves(pullback) if hasattr(x, 'nbytes'))
  assert kept <= sum(x.nbytes for x in leaves.values()) < dense.nbytes / 3


CONFIG_FIELDS = {
  'vocab_size': 56,
  'hidden_size': 128,
  'intermediate_size': 384,
  'num_hidden_layers': 2,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 32,
  'tie_word_embeddings': False,
}
TOKENS = np.random.default_rng(0).integers(0, 56, (8, 5)).astype(np.int32)


def write_model(directory, architecture='Llama', dtype=ml_dtypes.bfloat16, **changes):
  fields = CONFIG_FIELDS | {'architectures': [f'{architecture}ForCausalLM']} | changes
  config = DecoderConfig.from_hf(fields)
  rng = np.random.default_rng(0)
  tensors = {
    name: (0.1 * rng.standard_normal(tensor.shape)).astype(dtype)
    for name, tensor in weights.hf_tensors(config).items()
  }
  directory.mkdir(exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(fields))
  save_file(tensors, directory / 'model.safetensors')
  return config, tensors


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('model')
  return directory, *write_model(directory)


def one_device():
  return make_mesh('', jax.devices()[:1])


@functools.cache
def forward(config, **fields):
  decoder = Decoder(config, **fields)
  return jax.jit(lambda params: decoder.apply({'params': params}, TOKENS))


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_loading_quantises_the_kernels_of_layers_and_nothing_else(model, kind):
  directory, config, tensors = model
  params = load_hf(directory, config, one_device(), quantize=kind)
  plain = trees.flatten(load_hf(directory, config, one_device()))
  leaves = trees.flatten(params)
  shapes = quantization.quantized_shapes(weights.param_shapes(config), config, kind)
  assert {n: x.shape for n, x in leaves.items()} == {
    n: x.shape for n, x in trees.flatten(shapes).items()
  }
  kept = leaves.keys() & plain.keys()
  assert len(kept) == 5
  assert 'embed/embedding' in kept and 'lm_head/kernel' in kept
  for name in kept:
    assert leaves[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaves[name], plain[name])
  for i in range(2):
    name = f'model.layers.{i}.self_attn.o_proj.weight'
    for leaf, want in quantization.quantize(tensors[name], kind).items():
      got = leaves[f'layers/attn/o/{leaf}'][i]
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_a_quantised_model_is_the_model_of_its_dequantised_kernels(model, kind):
  directory, config, _ = model
  params = load_hf(directory, config, one_device(), quantize=kind)
  plain = trees.flatten(load_hf(directory, config, one_device(), dtype=jnp.float32))
  for name, leaf in plain.items():
    if name.startswith('layers/') and name.endswith('/kernel'):
      module = trees.flatten(params['layers'])
      prefix = name.removeprefix('layers/').removesuffix('kernel')
      parts = {n.removeprefix(prefix): x for n, x in module.items() if prefix in n}
      rows = [
        quantized.dequantize({n: x[i] for n, x in parts.items()}, jnp.float32)
        for i in range(2)
      ]
      plain[name] = jnp.stack(rows).reshape(leaf.shape)
  want = forward(config)(trees.unflatten(plain))
  got = forward(config)(params)
  np.testing.assert_allclose(got, want, atol=1e-4)
  unrolled = forward(config, scan_layers=False)(unstack_layers(params, 2))
  np.testing.assert_allclose(unrolled, want, atol=1e-4)
  exact = forward(config)(load_hf(directory, config, one_device(), dtype=jnp.float32))
  assert np.abs(exact - want).max() > 1e-3


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_every_mesh_gives_the_logits_of_one_device(model, kind):
  directory, config, _ = model
  mesh = make_mesh('data:2,fsdp:2,tensor:2')
  params = load_hf(directory, config, mesh, quantize=kind)
  alone = load_hf(directory, config, one_device(), quantize=kind)
  jax.tree.map(np.testing.assert_array_equal, params, alone)
  name = 'kernel_nf4' if kind == 'nf4' else 'kernel_int8'
  for module in ('q', 'o'):
    leaf = params['layers']['attn'][module][name]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size
  with jax.set_mesh(mesh):
    got = forward(config)(params)
  np.testing.assert_allclose(got, forward(config)(alone), atol=1e-4)


def test_adapters_train_on_quantised_kernels_under_remat(model):
  """Gradients of the adapter equal those over the dequantised kernels."""
  directory, config, _ = model
  lora = adapters.LoraConfig(rank=3, alpha=6.0, targets=adapters.PRESETS['qv'])
  params = load_hf(directory, config, one_device(), quantize='nf4')
  rng = np.random.default_rng(3)
  adapter = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
    adapters.adapter_shapes(config, lora),
  )

  def grads(remat):
    decoder = Decoder(config, lora_scale=lora.scale, remat=remat)

    def loss(adapter, frozen):
      merged = masks.merge(adapter, frozen)
      return jnp.square(decoder.apply({'params': merged}, TOKENS)).sum()

    return jax.jit(jax.grad(loss))(adapter, params)

  plain, remat = grads('none'), grads('full')
  assert all(np.any(x) for x in jax.tree.leaves(plain))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, remat
  )
  step = 1e-2
  direction = jax.tree.map(lambda g: g / jnp.linalg.norm(g), plain)
  loss_at = lambda t: float(
    jnp.square(
      forward(config, lora_scale=lora.scale)(
        masks.merge(jax.tree.map(lambda x, d: x + t * d, adapter, direction), params)
      )
    ).sum()
  )
  slope = (loss_at(step) - loss_at(-step)) / (2 * step)
  want = sum(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(plain))
  assert math.isclose(slope, want, rel_tol=0.02)


def test_fused_tensors_are_quantised_by_projection(tmp_path):
  config, tensors = write_model(tmp_path / 'phi3', 'Phi3')
  params = load_hf(tmp_path / 'phi3', config, one_device(), quantize='nf4')
  fused = tensors['model.layers.1.self_attn.qkv_proj.weight']
  want = quantization.quantize(fused[256:384], 'nf4')
  for leaf, x in want.items():
    np.testing.assert_array_equal(params['layers']['attn']['k'][leaf][1], x)


def test_blocks_do_not_cross_devices(model):
  directory, config, _ = model
  with pytest.raises(
    MeshError, match=r'kernel_absmax_codes .*size 2 does not.*fsdp = 4.*64 weights'
  ):
    load_hf(directory, config, make_mesh('fsdp:4,data:2'), quantize='nf4')
  load_hf(directory, config, make_mesh('fsdp:4,data:2'), quantize='int8')


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path):
  config, tensors = write_model(tmp_path / 'a', intermediate_size=100)
  with pytest.raises(ValueError, match=r'mlp/down/kernel .*100 inputs .*=int8'):
    load_hf(tmp_path / 'a', config, one_device(), quantize='nf4')
  with pytest.raises(ValueError, match='--quantize=fp4: want one of nf4, int8'):
    load_hf(tmp_path / 'a', config, one_device(), quantize='fp4')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name][3, 5] = np.nan
  save_file(tensors, tmp_path / 'a' / 'model.safetensors')
  with pytest.raises(CheckpointError, match=f'{name} cannot be .*NaN'):
    load_hf(tmp_path / 'a', config, one_device(), quantize='int8')


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_every_leaf_has_one_sharding_rule(kind):
  config = DecoderConfig.from_hf(
    CONFIG_FIELDS | {'architectures': ['LlamaForCausalLM']}
  )
  shapes = quantization.quantized_shapes(weights.param_shapes(config), config, kind)
  specs = trees.flatten(rules.param_specs(shapes))
  for name, leaf in trees.flatten(shapes).items():
    assert len(specs[name]) == len(leaf.shape), name
  names = {name.rsplit('/', 1)[1] for name in specs}
  assert names <= {'embedding', 'scale', 'kernel', *quantized.LEAVES}
