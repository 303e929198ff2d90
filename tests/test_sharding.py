"""Sharding rules: one for every parameter, nothing big replicated, loud when uneven."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import trees
from mrjax.lora import adapters, quantization
from mrjax.models import quantized
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sharding import mesh as mesh_lib
from mrjax.sharding import rules

ARCHITECTURES = ('Llama', 'Mistral', 'Qwen2', 'Qwen3', 'Gemma', 'Gemma2', 'Phi3')


def config_of(architecture: str, **changes) -> DecoderConfig:
  fields = {
    'architectures': [f'{architecture}ForCausalLM'],
    'vocab_size': 48,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 3,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 6,
    'attention_bias': True,
    'mlp_bias': True,
    'tie_word_embeddings': False,
  }
  return DecoderConfig.from_hf(fields | changes)


def shapes_of(config: DecoderConfig, **kwargs):
  decoder = Decoder(config, **kwargs)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(decoder.init, jax.random.key(0), tokens)['params']


def all_shapes():
  yield from (shapes_of(config_of(name)) for name in ARCHITECTURES)
  yield shapes_of(config_of('Llama'), num_value_outputs=5)
  yield adapters.adapter_shapes(config_of('Llama'), adapters.LoraConfig(rank=5))
  for kind in quantized.KINDS:
    config = config_of('Llama', hidden_size=64, intermediate_size=192, head_dim=8)
    yield quantization.quantized_shapes(shapes_of(config), config, kind)


def test_every_parameter_of_every_family_matches_one_rule_and_every_rule_is_used():
  used = set()
  for shapes in all_shapes():
    for name in trees.flatten(shapes):
      hits = rules.matching_rules(name)
      assert len(hits) == 1, (name, hits)
      used.add(hits[0])
  assert used == set(rules.RULES)


def test_specs_have_the_rank_of_their_parameters():
  for shapes in all_shapes():
    specs = rules.param_specs(shapes)
    jax.tree.map(
      lambda x, spec: (len(spec) == x.ndim) or pytest.fail(str(spec)), shapes, specs
    )


def test_a_parameter_without_a_rule_is_refused_by_name():
  with pytest.raises(
    KeyError, match=r'layers/attn/gate/kernel.*matches 0 sharding rules'
  ):
    rules.param_specs({'layers': {'attn': {'gate': {'kernel': jnp.zeros((3, 4))}}}})


def test_stacked_and_separate_layers_are_split_alike():
  config = config_of('Qwen2')
  stacked = shapes_of(config)
  separate = jax.eval_shape(lambda p: unstack_layers(p, config.num_layers), stacked)
  specs = rules.param_specs(stacked)['layers']['attn']['q']['kernel']
  one = rules.param_specs(separate)['layers_1']['attn']['q']['kernel']
  assert tuple(one) == tuple(specs)[1:]


@pytest.mark.parametrize(
  'spec', ['data:8', 'fsdp:8', 'data:2,fsdp:2,tensor:2', 'fsdp:2,tensor:-1']
)
def test_parameters_are_born_sharded_with_equal_values(spec):
  config = config_of('Llama')
  decoder = Decoder(config)
  init = lambda key: decoder.init(key, jnp.zeros((1, 2), jnp.int32))['params']
  mesh = mesh_lib.make_mesh(spec)
  params = rules.born_sharded(init, mesh, jax.random.key(3))
  whole = init(jax.random.key(3))
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)  # jit or not: 1 ulp
  jax.tree.map(close, params, whole)
  q = params['layers']['attn']['q']['kernel']
  parts = mesh.shape['fsdp'] * mesh.shape['tensor']
  assert q.addressable_shards[0].data.size * parts == q.size


def test_uneven_split_names_the_parameter_the_size_and_the_remedy():
  shapes = shapes_of(config_of('Llama', num_key_value_heads=2, attention_bias=False))
  mesh = mesh_lib.make_mesh('tensor:8')
  with pytest.raises(
    mesh_lib.MeshError, match=r'k/kernel.*size 2 does not divide.*8.*--mesh'
  ):
    rules.param_shardings(shapes, mesh)


def test_explain_sharding_adds_up():
  shapes = shapes_of(config_of('Llama'))
  mesh = mesh_lib.make_mesh('data:2,fsdp:4')
  text = rules.explain_sharding(shapes, mesh)
  assert 'layers/mlp/down/kernel' in text
  rows = [line.split()[-1].replace(',', '') for line in text.splitlines()[1:]]
  assert sum(map(int, rows[:-1])) == int(rows[-1])
  matrices = sum(x.size * 4 for x in jax.tree.leaves(shapes) if x.ndim > 2) // 4
  assert int(rows[-1]) > matrices


@pytest.mark.parametrize(
  ('spec', 'sizes'),
  [
    ('data:1,fsdp:-1,tensor:1', (1, 8, 1)),
    ('tensor:2,fsdp:-1', (1, 4, 2)),
    ('data:2,fsdp:2,tensor:2', (2, 2, 2)),
    ('data:8', (8, 1, 1)),
  ],
)
def test_parse_mesh(spec, sizes):
  assert tuple(mesh_lib.parse_mesh(spec, 8).values()) == sizes


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('data:3', '3 places for 8 devices'),
    ('fsdp:-1,data:3', '8 devices are not a multiple of 3'),
    ('fsdp:-1,data:-1', 'only one axis'),
    ('model:8', "axis 'model' is unknown"),
    ('data:2,data:4', "axis 'data' is given twice"),
    ('data:two', "size 'two' of data"),
    ('data:0', "size '0' of data"),
    ('data', "size '' of data"),
  ],
)
def test_bad_mesh_is_refused(spec, message):
  with pytest.raises(mesh_lib.MeshError, match=message):
    mesh_lib.parse_mesh(spec, 8)
