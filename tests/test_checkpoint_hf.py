"""Hugging Face weights onto meshes and back, bit for bit, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mrjax import trees
from mrjax.checkpoint import hf, layout, weights
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.safetensors_files import TensorSpec, write_safetensors
from mrjax.models.config import ARCHITECTURES, DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sharding.mesh import MeshError, make_mesh

# Sizes all different, and all but H divide over up to 8 devices.
BASE = {
  'vocab_size': 56,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 3,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'head_dim': 6,
  'tie_word_embeddings': False,
}
VARIANTS = {
  'llama': ('LlamaForCausalLM', {}),
  'llama_biases': ('LlamaForCausalLM', {'attention_bias': True, 'mlp_bias': True}),
  'llama_tied': ('LlamaForCausalLM', {'tie_word_embeddings': True}),
  'mistral': ('MistralForCausalLM', {'sliding_window': 4}),
  'qwen2': ('Qwen2ForCausalLM', {}),
  'qwen3': ('Qwen3ForCausalLM', {}),
  'gemma': ('GemmaForCausalLM', {'tie_word_embeddings': True}),
  'gemma2': ('Gemma2ForCausalLM', {'tie_word_embeddings': True}),
  'phi3': ('Phi3ForCausalLM', {}),
}
MESHES = {
  '1x1x1': 'data:1',
  '8x1x1': 'data:8',
  '1x8x1': 'fsdp:8',
  '1x4x2': 'fsdp:4,tensor:2',
  '2x2x2': 'data:2,fsdp:2,tensor:2',
}
BF16 = ml_dtypes.bfloat16
Q0 = 'model.layers.0.self_attn.q_proj.weight'
NORM1 = 'model.layers.1.input_layernorm.weight'


def fields_of(variant: str) -> dict:
  architecture, changes = VARIANTS[variant]
  return BASE | {'architectures': [architecture]} | changes


def random_tensors(config: DecoderConfig, dtype=np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(tensor.shape, np.float32).astype(dtype)
    for name, tensor in weights.hf_tensors(config).items()
  }


def write_model(directory, variant='llama', *, num_files=1, tensors=None, **kwargs):
  """A model directory with side files; returns its config and tensors."""
  fields = fields_of(variant)
  config = DecoderConfig.from_hf(fields)
  tensors = random_tensors(config, **kwargs) if tensors is None else tensors
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(fields, indent=3))
  (directory / 'tokenizer.json').write_bytes(b'{"odd":   "spacing\\u00e9"}\r\n')
  (directory / 'tokenizer.model').write_bytes(bytes(range(256)))
  (directory / 'chat_template.jinja').write_text('{{ messages }}')
  (directory / 'modeling_evil.py').write_text('raise SystemExit')
  if num_files == 1:
    save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})
    return config, tensors
  weight_map = {}
  for i in range(num_files):
    file = f'model-{i + 1:05d}-of-{num_files:05d}.safetensors'
    part = {name: tensors[name] for name in list(tensors)[i::num_files]}
    save_file(part, directory / file, metadata={'format': 'pt'})
    weight_map |= {name: file for name in part}
  index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
  return config, tensors


def one_device():
  return make_mesh('', jax.devices()[:1])


def mesh_of(spec: str):
  return one_device() if spec == 'data:1' else make_mesh(spec)


def read_directory(directory) -> dict[str, np.ndarray]:
  tensors = {}
  for path in sorted(directory.glob('*.safetensors')):
    tensors |= load_file(path)
  return tensors


def assert_same_tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]):
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    assert got[name].shape == want[name].shape, name
    assert got[name].tobytes() == want[name].tobytes(), name


def assert_same_trees(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize('variant', VARIANTS)
def test_table_describes_the_tree_of_the_decoder(variant):
  config = DecoderConfig.from_hf(fields_of(variant))
  init = lambda key: Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32))['params']
  want = trees.flatten(jax.eval_shape(init, jax.random.key(0)))
  got = trees.flatten(weights.param_shapes(config))
  assert {n: (x.shape, x.dtype) for n, x in got.items()} == {
    n: (x.shape, x.dtype) for n, x in want.items()
  }


def test_every_rule_is_used_by_some_family():
  used = set()
  for variant in VARIANTS:
    used |= set(weights.rules_for(DecoderConfig.from_hf(fields_of(variant))))
  assert used == set(weights.RULES)
  assert {VARIANTS[v][0] for v in VARIANTS} == set(ARCHITECTURES)


def test_projection_layout_by_hand(tmp_path):
  """Row n * H + h of q_proj is column (n, h) of our kernel."""
  config, tensors = write_model(tmp_path / 'm')
  params = hf.load_hf(tmp_path / 'm', config, one_device())
  name = 'model.layers.{}.self_attn.{}_proj.weight'.format
  for i in range(3):
    q, o = (params['layers']['attn'][x]['kernel'][i] for x in 'qo')
    assert q[5, 7, 2] == tensors[name(i, 'q')][7 * 6 + 2, 5]
    assert o[7, 2, 5] == tensors[name(i, 'o')][5, 7 * 6 + 2]
  assert params['lm_head']['kernel'][5, 33] == tensors['lm_head.weight'][33, 5]
  assert params['embed']['embedding'][33, 5] == tensors[weights.EMBEDDING][33, 5]


def test_fused_projections_are_split_by_rows(tmp_path):
  config, tensors = write_model(tmp_path / 'm', 'phi3')
  layers = hf.load_hf(tmp_path / 'm', config, one_device())['layers']
  qkv = tensors['model.layers.2.self_attn.qkv_proj.weight']
  assert layers['attn']['k']['kernel'][2, 5, 3, 4] == qkv[32 * 6 + 3 * 6 + 4, 5]
  assert layers['attn']['v']['kernel'][2, 5, 3, 4] == qkv[(32 + 8) * 6 + 3 * 6 + 4, 5]
  gate_up = tensors['model.layers.1.mlp.gate_up_proj.weight']
  assert layers['mlp']['gate']['kernel'][1, 5, 9] == gate_up[9, 5]
  assert layers['mlp']['up']['kernel'][1, 5, 9] == gate_up[24 + 9, 5]


@pytest.mark.parametrize('spec', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('variant', ['llama_biases', 'phi3'])
def test_every_mesh_holds_the_same_values_in_smaller_shards(tmp_path, variant, spec):
  config, _ = write_model(tmp_path / 'm', variant, num_files=3, dtype=BF16)
  want = hf.load_hf(tmp_path / 'm', config, one_device())
  mesh = mesh_of(spec)
  got = hf.load_hf(tmp_path / 'm', config, mesh)
  assert_same_trees(got, want)
  split = mesh.shape['fsdp'] * mesh.shape['tensor']
  for name, leaf in trees.flatten(got).items():
    assert len(leaf.addressable_shards) == mesh.size
    if name.endswith(('kernel', 'embedding')):
      assert leaf.addressable_shards[-1].data.size * split == leaf.size, name


def test_layers_assembled_on_the_devices_equal_those_read_at_once(
  tmp_path, monkeypatch
):
  config, _ = write_model(tmp_path / 'm', 'llama_biases')
  mesh = make_mesh('fsdp:4,tensor:2')
  want = hf.load_hf(tmp_path / 'm', config, mesh)
  monkeypatch.setattr(hf, '_PIECE_BYTES', 1)  # one layer at a time
  monkeypatch.setattr(layout, '_READ_BYTES', 5 * 4 * 16)  # five rows at a time
  got = hf.load_hf(tmp_path / 'm', config, mesh)
  assert_same_trees(got, want)
  jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), got, want)


def test_each_distinct_shard_is_read_once_and_as_a_slice(tmp_path, monkeypatch):
  config, _ = write_model(tmp_path / 'm')
  seen = {}

  def read(self, name, slices):
    seen.setdefault(name, set()).add(tuple((s.start, s.stop) for s in slices))
    return original(self, name, slices)

  original = hf.SafetensorsReader.read
  monkeypatch.setattr(hf.SafetensorsReader, 'read', read)
  hf.load_hf(tmp_path / 'm', config, make_mesh('fsdp:4,tensor:2'))
  # q_proj [N * H, D]: N = 32 heads over tensor, D = 16 over fsdp.
  assert seen[Q0] == {((r, r + 96), (c, c + 4)) for r in (0, 96) for c in (0, 4, 8, 12)}
  assert seen[NORM1] == {((0, 16),)}  # replicated: read once, not eight times


def test_loaded_arrays_can_be_donated(tmp_path):
  config, _ = write_model(tmp_path / 'm')
  params = hf.load_hf(tmp_path / 'm', config, one_device())
  double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
  double(params)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('stored', [np.float32, np.float16, BF16])
def test_dtype_none_keeps_and_dtype_casts(tmp_path, stored):
  config, tensors = write_model(tmp_path / 'm', dtype=stored)
  kept = hf.load_hf(tmp_path / 'm', config, one_device())
  assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(stored)}
  cast = hf.load_hf(tmp_path / 'm', config, one_device(), dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(BF16)}
  want = tensors['lm_head.weight'].astype(BF16).T
  np.testing.assert_array_equal(np.asarray(cast['lm_head']['kernel']), want)


@pytest.mark.parametrize('variant', VARIANTS)
def test_round_trip_is_bit_identical(tmp_path, variant):
  config, tensors = write_model(tmp_path / 'in', variant, num_files=2, dtype=BF16)
  params = hf.load_hf(tmp_path / 'in', config, make_mesh('fsdp:4,tensor:2'))
  hf.save_hf(params, config, tmp_path / 'in', tmp_path / 'out', max_shard_bytes=20_000)
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)
  for name in (
    'config.json',
    'tokenizer.json',
    'tokenizer.model',
    'chat_template.jinja',
  ):
    assert (tmp_path / 'out' / name).read_bytes() == (
      tmp_path / 'in' / name
    ).read_bytes()
  assert not (tmp_path / 'out' / 'modeling_evil.py').exists()

  files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 1 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
  for file in files:
    with safe_open(tmp_path / 'out' / file, framework='numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}
      assert all(index['weight_map'][name] == file for name in opened.keys())  # noqa: SIM118
  again = hf.load_hf(tmp_path / 'out', config, one_device())
  assert_same_trees(again, params)


def test_mixed_dtypes_and_a_spare_tied_head_survive_the_round_trip(tmp_path):
  config = DecoderConfig.from_hf(fields_of('llama_tied'))
  tensors = random_tensors(config, BF16)
  tensors[NORM1] = tensors[NORM1].astype(np.float32) + np.float32(2**-12)
  tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.float16)
  tensors[weights.TIED_HEAD] = tensors[weights.EMBEDDING].copy()
  stored = dict(tensors)
  stored['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
  write_model(tmp_path / 'in', 'llama_tied', tensors=stored, num_files=2)
  params = hf.load_hf(tmp_path / 'in', config, one_device())
  assert params['layers']['attn_norm']['scale'].dtype == np.float32
  assert params['layers']['mlp_norm']['scale'].dtype == BF16
  dtypes = hf.stored_dtypes(tmp_path / 'in', config)
  hf.save_hf(params, config, tmp_path / 'in', tmp_path / 'out', dtypes=dtypes)
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)


def test_written_file_equals_that_of_the_library(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    'b.bias': rng.standard_normal(3).astype(np.float16),
    'a.weight': rng.standard_normal((5, 7)).astype(BF16),
    'z.weight': rng.standard_normal((2, 3)).astype(np.float32),
    'c': rng.standard_normal((1, 4)).astype(np.float32),
  }
  save_file(tensors, tmp_path / 'want', metadata={'format': 'pt'})
  kinds = {
    np.dtype(np.float32): 'F32',
    np.dtype(np.float16): 'F16',
    np.dtype(BF16): 'BF16',
  }
  specs = {name: TensorSpec(kinds[x.dtype], x.shape) for name, x in tensors.items()}
  write_safetensors(tmp_path / 'got', specs, tensors.__getitem__)
  assert (tmp_path / 'got').read_bytes() == (tmp_path / 'want').read_bytes()


def test_save_casts_when_asked(tmp_path):
  config, tensors = write_model(tmp_path / 'in')
  params = hf.load_hf(tmp_path / 'in', config, one_device())
  hf.save_hf(params, config, tmp_path / 'in', tmp_path / 'out', dtype=jnp.bfloat16)
  want = {name: x.astype(BF16) for name, x in tensors.items()}
  assert_same_tensors(read_directory(tmp_path / 'out'), want)
  assert [p.name for p in (tmp_path / 'out').glob('*.safetensors')] == [
    'model.safetensors'
  ]


def test_existing_output_is_refused_or_replaced_whole(tmp_path):
  config, _ = write_model(tmp_path / 'in')
  params = hf.load_hf(tmp_path / 'in', config, one_device())
  out = tmp_path / 'out'
  hf.save_hf(params, config, tmp_path / 'in', out, max_shard_bytes=9_000)
  with pytest.raises(FileExistsError, match='--overwrite'):
    hf.save_hf(params, config, tmp_path / 'in', out)
  hf.save_hf(params, config, tmp_path / 'in', out, overwrite=True)
  assert [p.name for p in out.glob('*.safetensors')] == ['model.safetensors']
  stranger = tmp_path / 'stranger'
  stranger.mkdir()
  (stranger / 'thesis.tex').write_text('years of work')
  with pytest.raises(FileExistsError, match=r'no config\.json'):
    hf.save_hf(params, config, tmp_path / 'in', stranger, overwrite=True)
  assert (stranger / 'thesis.tex').exists()


def test_disk_full_leaves_nothing_behind(tmp_path, monkeypatch):
  config, _ = write_model(tmp_path / 'in')
  params = hf.load_hf(tmp_path / 'in', config, one_device())
  to_hf, calls = layout.to_hf, []

  def fail_late(*args):
    calls.append(args)
    if len(calls) == 9:
      raise OSError(28, 'No space left on device')
    return to_hf(*args)

  monkeypatch.setattr(layout, 'to_hf', fail_late)
  with pytest.raises(OSError, match='No space left'):
    hf.save_hf(params, config, tmp_path / 'in', tmp_path / 'out')
  assert [p.name for p in tmp_path.iterdir()] == ['in']
  monkeypatch.undo()
  # What a killed process leaves is no output either, and is replaced.
  (tmp_path / '.out.partial').mkdir()
  (tmp_path / '.out.partial' / 'model.safetensors').write_bytes(b'half')
  hf.save_hf(params, config, tmp_path / 'in', tmp_path / 'out')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in', 'out']


class TestBadInput:
  @pytest.fixture
  def model(self, tmp_path):
    config, tensors = write_model(tmp_path / 'm', num_files=2)
    return tmp_path / 'm', config, tensors

  def fail(self, error, match, directory, config, mesh=None):
    with pytest.raises(error, match=match):
      hf.load_hf(directory, config, mesh or one_device())

  def rewrite(self, model, **changes):
    """The model in one file, with tensors changed; None removes one."""
    directory, _, tensors = model
    shutil.rmtree(directory)
    changes = {name.replace('__', '.'): value for name, value in changes.items()}
    tensors = {n: x for n, x in (tensors | changes).items() if x is not None}
    write_model(directory, tensors=tensors)

  def test_no_directory(self, model, tmp_path):
    self.fail(FileNotFoundError, 'is no directory', tmp_path / 'nowhere', model[1])

  def test_no_weights(self, model):
    for path in model[0].glob('*.safetensors*'):
      path.unlink()
    self.fail(FileNotFoundError, r'neither model\.safetensors nor', *model[:2])

  def test_pickles_are_never_read(self, model):
    for path in model[0].glob('*.safetensors*'):
      path.unlink()
    (model[0] / 'pytorch_model.bin').write_bytes(b'\x80\x02')
    self.fail(FileNotFoundError, r'pytorch_model\.bin.*save_pretrained', *model[:2])

  def test_shard_named_by_the_index_is_missing(self, model):
    (model[0] / 'model-00002-of-00002.safetensors').unlink()
    self.fail(FileNotFoundError, 'model-00002-of-00002.*does not exist', *model[:2])

  @pytest.mark.parametrize('text', ['{"weight_map"', '{}', '{"weight_map": [1]}'])
  def test_damaged_index(self, model, text):
    (model[0] / 'model.safetensors.index.json').write_text(text)
    self.fail(CheckpointError, r'index\.json is damaged', *model[:2])

  def test_index_that_points_elsewhere(self, model):
    index = {'weight_map': {'lm_head.weight': '../../secrets.safetensors'}}
    (model[0] / 'model.safetensors.index.json').write_text(json.dumps(index))
    self.fail(CheckpointError, 'want plain file names', *model[:2])

  @pytest.mark.parametrize('size', [0, 5, 900, -1])
  def test_truncated_file(self, model, size):
    path = model[0] / 'model-00002-of-00002.safetensors'
    path.write_bytes(path.read_bytes()[:size])
    self.fail(CheckpointError, '00002-of-00002.*is truncated', *model[:2])

  def test_not_a_safetensors_file(self, model):
    (model[0] / 'model-00001-of-00002.safetensors').write_bytes(b'version https' * 99)
    self.fail(CheckpointError, '00001-of-00002.*no safetensors file', *model[:2])

  def test_one_tensor_too_many(self, model):
    self.rewrite(model, model__layers__0__self_attn__q_proj__weight__lora=np.ones(2))
    self.fail(CheckpointError, 'F64', *model[:2])
    self.rewrite(model, adapter__weight=np.ones(2, np.float32))
    self.fail(CheckpointError, r'no weight rule names adapter\.weight', *model[:2])

  def test_a_tensor_the_config_has_no_place_for(self, model):
    extra = {
      'model.layers.3.mlp.up_proj.weight': np.ones((24, 16), np.float32),
      'model.layers.0.self_attn.q_proj.bias': np.ones(192, np.float32),
    }
    for name, value in extra.items():
      self.rewrite(model, **{name: value})
      self.fail(CheckpointError, f'no place for {name}', *model[:2])

  def test_one_tensor_too_few(self, model):
    self.rewrite(model, **{Q0: None})
    self.fail(CheckpointError, f'no file holds {Q0}', *model[:2])

  def test_wrong_shape_even_of_the_same_size(self, model):
    self.rewrite(model, **{Q0: model[2][Q0].T.copy()})
    self.fail(CheckpointError, r'has shape \[16, 192\], want \[192, 16\]', *model[:2])

  def test_tensor_written_twice(self, model):
    directory, config, tensors = model
    second = directory / 'model-00002-of-00002.safetensors'
    both = load_file(second) | {
      Q0: tensors[Q0],
      weights.EMBEDDING: tensors[weights.EMBEDDING],
    }
    save_file(both, second)
    self.fail(CheckpointError, 'stands in both', directory, config)

  def test_quantised_dtype(self, model):
    self.rewrite(model, **{Q0: np.ones((192, 16), np.int8)})
    self.fail(CheckpointError, 'has dtype I8.*Quantised', *model[:2])

  def test_tied_head_that_differs(self, tmp_path):
    config = DecoderConfig.from_hf(fields_of('llama_tied'))
    tensors = random_tensors(config)
    head = tensors[weights.EMBEDDING].copy()
    head[-1, -1] += 1
    tensors[weights.TIED_HEAD] = head
    write_model(tmp_path / 'm', 'llama_tied', tensors=tensors)
    self.fail(
      CheckpointError, 'differs from model.embed_tokens', tmp_path / 'm', config
    )

  def test_mesh_that_does_not_divide(self, tmp_path):
    write_model(tmp_path / 'm')
    narrow = DecoderConfig.from_hf(fields_of('llama') | {'vocab_size': 57})
    tensors = random_tensors(narrow)
    save_file(tensors, tmp_path / 'm' / 'model.safetensors')
    self.fail(
      MeshError, '57 does not divide', tmp_path / 'm', narrow, make_mesh('tensor:8')
    )

  def test_tree_of_another_model_is_not_saved(self, model, tmp_path):
    directory, config, _ = model
    params = hf.load_hf(directory, config, one_device())
    for change, match in (
      ({'extra': jnp.ones(2)}, 'no place for, extra'),
      ({'final_norm': {'scale': jnp.ones(15)}}, 'final_norm/scale has shape'),
    ):
      with pytest.raises(CheckpointError, match=match):
        hf.save_hf(params | change, config, directory, tmp_path / 'out')
    del params['final_norm']
    with pytest.raises(CheckpointError, match='lacks final_norm/scale'):
      hf.save_hf(params, config, directory, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
