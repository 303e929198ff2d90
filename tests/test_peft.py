"""PEFT directories: read and written bit for bit, and what is refused by name."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_checkpoint_hf import (
  VARIANTS,
  assert_same_tensors,
  fields_of,
  one_device,
  read_directory,
  write_model,
)

from mrjax import trees
from mrjax.checkpoint import orbax, peft, weights
from mrjax.checkpoint.adapters import resolve_adapter, save_adapter
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint
from mrjax.checkpoint.source import resolve_model
from mrjax.checkpoint.store import CheckpointStore
from mrjax.lora import adapters, masks
from mrjax.lora.adapters import AdapterError, LoraConfig
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import convert_adapters
from mrjax.sharding.mesh import make_mesh

LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.125, targets=adapters.PRESETS['qv'])
CONFIG = DecoderConfig.from_hf(fields_of('llama'))
# What PEFT 0.21 writes beside what we read.
PEFT_FIELDS = {
  'alora_invocation_tokens': None,
  'alpha_pattern': {},
  'auto_mapping': None,
  'base_model_name_or_path': 'org/base',
  'bias': 'none',
  'corda_config': None,
  'ensure_weight_tying': False,
  'exclude_modules': None,
  'fan_in_fan_out': False,
  'inference_mode': True,
  'init_lora_weights': True,
  'layers_pattern': None,
  'layers_to_transform': None,
  'loftq_config': {},
  'lora_alpha': 12,
  'lora_bias': False,
  'lora_dropout': 0.1,
  'megatron_core': 'megatron.core',
  'modules_to_save': None,
  'peft_type': 'LORA',
  'peft_version': '0.21.2',
  'qalora_group_size': 16,
  'r': 4,
  'rank_pattern': {},
  'target_modules': ['v_proj', 'down_proj'],
  'task_type': 'CAUSAL_LM',
  'use_dora': False,
  'use_rslora': False,
}
MODULES = {'v_proj': 'self_attn.v_proj', 'down_proj': 'mlp.down_proj'}
SHAPES = {'v_proj': (16, 48), 'down_proj': (24, 16)}  # inputs, outputs


def write_peft(directory, dtype=np.float32, changes=None, tensors=None):
  """A PEFT directory for CONFIG, as PEFT itself would write it."""
  fields = PEFT_FIELDS | (changes or {})
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'adapter_config.json').write_text(json.dumps(fields))
  if tensors is None:
    rng, tensors = np.random.default_rng(0), {}
    for i in range(CONFIG.num_layers):
      for module, (num_in, num_out) in SHAPES.items():
        name = f'base_model.model.model.layers.{i}.{MODULES[module]}'
        a, b = rng.standard_normal((4, num_in)), rng.standard_normal((num_out, 4))
        tensors[f'{name}.lora_A.weight'] = a.astype(dtype)
        tensors[f'{name}.lora_B.weight'] = b.astype(dtype)
  save_file(tensors, directory / 'adapter_model.safetensors', {'format': 'pt'})
  return tensors


def random_adapter(config, lora, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
    adapters.adapter_shapes(config, lora),
  )


def test_tensors_land_beside_their_kernels(tmp_path):
  tensors = write_peft(tmp_path / 'in')
  found = resolve_adapter(str(tmp_path / 'in'))
  assert found.lora == LoraConfig(4, 12.0, 0.1, False, ('/attn/v/', '/mlp/down/'))
  assert found.base == {'model': 'org/base'}
  leaves = trees.flatten(found.load(CONFIG, one_device()))
  assert len(leaves) == 4
  for i in range(3):
    name = f'base_model.model.model.layers.{i}.self_attn.v_proj.lora_'
    a, b = tensors[f'{name}A.weight'], tensors[f'{name}B.weight']
    np.testing.assert_array_equal(leaves['layers/attn/v/lora_a'][i], a.T)
    got = leaves['layers/attn/v/lora_b'][i]
    assert got.shape == (4, 8, 6)
    np.testing.assert_array_equal(got, b.T.reshape(4, 8, 6))


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('mesh', ['data:8', 'fsdp:4,tensor:2'])
def test_there_and_back_is_bit_identical(tmp_path, dtype, mesh):
  tensors = write_peft(tmp_path / 'in', dtype)
  write_model(tmp_path / 'base')
  convert_adapters.import_peft(
    convert_adapters.ImportConfig(
      str(tmp_path / 'in'), str(tmp_path / 'base'), str(tmp_path / 'ckpt'), mesh
    )
  )
  shutil.rmtree(tmp_path / 'in')  # the checkpoint stands by itself
  shutil.rmtree(tmp_path / 'base')
  summary = convert_adapters.export_peft(
    convert_adapters.ExportConfig(
      str(tmp_path / 'ckpt'), output_dir=str(tmp_path / 'out'), mesh='fsdp:2,data:4'
    )
  )
  assert summary['num_params'] == sum(x.size for x in tensors.values())
  assert_same_tensors(load_file(tmp_path / 'out' / peft.WEIGHTS), tensors)
  fields = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert fields['base_model_name_or_path'] == str(tmp_path / 'base')
  for name in ('r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'peft_type', 'bias'):
    assert fields[name] == PEFT_FIELDS[name]
  assert set(fields['target_modules']) == {'v_proj', 'down_proj'}


def test_layers_of_different_dtypes_survive(tmp_path):
  tensors = write_peft(tmp_path / 'in', ml_dtypes.bfloat16)
  for name in list(tensors)[::3]:
    tensors[name] = tensors[name].astype(np.float32) + np.float32(2**-14)
  write_peft(tmp_path / 'in', tensors=tensors)
  found = resolve_adapter(str(tmp_path / 'in'))
  adapter = found.load(CONFIG, one_device(), None)
  peft.save_peft(
    adapter, found.lora, CONFIG, tmp_path / 'out', base='', dtypes=found.dtypes
  )
  assert_same_tensors(load_file(tmp_path / 'out' / peft.WEIGHTS), tensors)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_family_and_every_linear_map(tmp_path, variant):
  config = DecoderConfig.from_hf(fields_of(variant))
  lora = LoraConfig(rank=3, alpha=6.5, rslora=True)
  adapter = random_adapter(config, lora)
  if variant == 'phi3':  # as PEFT has it: one A for what is fused
    for block, names in (('attn', 'qkv'), ('mlp', ('gate', 'up'))):
      for name in names[1:]:
        modules = adapter['layers'][block]
        modules[name]['lora_a'] = modules[names[0]]['lora_a']
  peft.save_peft(adapter, lora, config, tmp_path / 'out', base='org/base')
  found = resolve_adapter(str(tmp_path / 'out'))
  assert (found.lora.rank, found.lora.scale) == (3, lora.scale)
  jax.tree.map(
    np.testing.assert_array_equal, found.load(config, make_mesh('fsdp:8')), adapter
  )
  names = {rule.hf for rule in weights.rules_for(config) if rule.hf.count('_proj.w')}
  saved = load_file(tmp_path / 'out' / peft.WEIGHTS)
  assert len(saved) == 2 * 3 * len(names)


@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('preset', ['all_linear', 'qv'])
def test_fused_projections_trained_apart_are_stacked(tmp_path, rslora, preset):
  """What PEFT computes, scale * B A, is our product in every block, and zero else."""
  config = DecoderConfig.from_hf(fields_of('phi3'))
  lora = LoraConfig(3, 6.5, rslora=rslora, targets=adapters.PRESETS[preset])
  adapter = random_adapter(config, lora)
  peft.save_peft(adapter, lora, config, tmp_path / 'out', base='')
  fields = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  saved, leaves = load_file(tmp_path / 'out' / peft.WEIGHTS), trees.flatten(adapter)
  num_blocks = 3 if preset == 'all_linear' else 2
  assert fields['rank_pattern']['qkv_proj'] == 3 * num_blocks
  assert ('gate_up_proj' in fields['rank_pattern']) == (preset == 'all_linear')
  assert 'o_proj' not in fields['rank_pattern']
  for rules in peft._modules(config):
    module = rules[0].hf.split('.')[-2]
    if module not in fields['target_modules']:
      continue
    rank = fields['rank_pattern'].get(module, fields['r'])
    alpha = fields['alpha_pattern'].get(module, fields['lora_alpha'])
    scale = alpha / (rank**0.5 if rslora else rank)
    for i in range(config.num_layers):
      name = f'base_model.model.{rules[0].hf.format(i=i).removesuffix("weight")}lora_'
      a, b = saved[f'{name}A.weight'], saved[f'{name}B.weight']
      assert a.shape[0] == rank == b.shape[1]
      want = []
      for rule in rules:
        rows, columns = rule.block_shape(config)
        key = rule.ours.removesuffix('kernel')
        if f'{key}lora_a' not in leaves:
          want.append(np.zeros((rows, columns)))
          continue
        ours_a = np.asarray(leaves[f'{key}lora_a'][i], np.float64).reshape(columns, 3)
        ours_b = np.asarray(leaves[f'{key}lora_b'][i], np.float64).reshape(3, rows)
        want.append(lora.scale * (ours_a @ ours_b).T)
      got = scale * (b.astype(np.float64) @ a.astype(np.float64))
      np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-9, atol=1e-9)
  with pytest.raises(AdapterError, match=r'_pattern=.* is not supported'):
    resolve_adapter(str(tmp_path / 'out'))


@pytest.mark.parametrize(
  'changes',
  [
    {'target_modules': r'.*\.(self_attn\.v_proj|mlp\.down_proj)'},
    {'target_modules': ['self_attn.v_proj', 'down_proj', 'not_of_this_family']},
    {'target_modules': 'all-linear', 'exclude_modules': r'.*\.(q|k|o|gate|up)_proj'},
    {'bias': 'none', 'init_lora_weights': 'gaussian', 'task_type': None},
  ],
)
def test_names_and_regexes_name_targets_as_in_peft(tmp_path, changes):
  write_peft(tmp_path / 'in', changes=changes)
  found = resolve_adapter(str(tmp_path / 'in'))
  assert len(trees.flatten(found.load(CONFIG, one_device()))) == 4


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'peft_type': 'IA3'}, "peft_type 'IA3' is not supported"),
    ({'use_dora': True}, 'use_dora=True is not supported'),
    ({'bias': 'lora_only'}, "bias='lora_only' is not supported"),
    ({'modules_to_save': ['lm_head']}, r"modules_to_save=\['lm_head'\]"),
    ({'layers_to_transform': [0, 1]}, r'layers_to_transform=\[0, 1\]'),
    ({'rank_pattern': {'v_proj': 8}}, 'rank_pattern='),
    ({'alpha_pattern': {'v_proj': 8}}, 'alpha_pattern='),
    ({'fan_in_fan_out': True}, 'fan_in_fan_out=True'),
    ({'trainable_token_indices': [5]}, 'trainable_token_indices='),
    ({'an_option_of_tomorrow': 1}, 'an_option_of_tomorrow=1 is not supported'),
    ({'init_lora_weights': 'pissa_niter_4'}, 'pissa_niter_4.* changes the base'),
    ({'target_modules': None}, 'target_modules is empty'),
    ({'target_modules': '('}, 'is no regex'),
    ({'target_modules': 5}, 'want a list of names or a regex'),
    ({'r': 0}, r'adapter_config.json: LoRA rank 0: want at least 1\.$'),
    ({'r': None}, "adapter_config.json has no field 'r': give the directory as PEFT"),
    ({'lora_alpha': None}, "adapter_config.json has no field 'lora_alpha'"),
    ({'peft_type': None}, "adapter_config.json has no field 'peft_type'"),
  ],
)
def test_options_that_are_not_supported_are_refused_by_name(tmp_path, changes, message):
  write_peft(tmp_path / 'in', changes=changes)
  with pytest.raises(AdapterError, match=message):
    resolve_adapter(str(tmp_path / 'in'))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'r': 5}, r'layers.0.mlp.down_proj.lora_A.weight has shape \(4, 24\), want \(5,'),
    (
      {'target_modules': ['v_proj']},
      r'down_proj.lora_A.weight is in adapter_model.* but not in adapter_config',
    ),
    (
      {'target_modules': ['c_attn']},
      r"\['c_attn'\] names no linear map of this llama .* are q_proj, k_proj, v_proj",
    ),
    (
      {'target_modules': ['v_proj', 'down_proj', 'q_proj']},
      r'q_proj.lora_A.weight is in adapter_config.json but not in adapter_model',
    ),
    (
      {'target_modules': r'model\.layers\.[01]\.(self_attn\.v_proj|mlp\.down_proj)'},
      r'v_proj.weight in layers \[0, 1\] only; want all 3',
    ),
  ],
)
def test_tensors_that_do_not_match_are_refused_by_name(tmp_path, changes, message):
  write_peft(tmp_path / 'in', changes=changes)
  found = resolve_adapter(str(tmp_path / 'in'))
  with pytest.raises(AdapterError, match=message):
    found.load(CONFIG, one_device())


def test_another_model_is_refused(tmp_path):
  write_peft(tmp_path / 'in')
  found = resolve_adapter(str(tmp_path / 'in'))
  for change in ({'intermediate_size': 32}, {'num_hidden_layers': 2}):
    other = DecoderConfig.from_hf(fields_of('llama') | change)
    with pytest.raises(AdapterError, match=r'down_proj.lora_A.weight .* this llama'):
      found.load(other, one_device())


@pytest.mark.parametrize(
  'name, message',
  [
    ('base_model.model.lm_head.lora_A.weight', 'lm_head.lora_A.weight is not'),
    ('base_model.model.model.embed_tokens.lora_embedding_A', 'lora_embedding_A is not'),
    ('base_model.model.model.layers.0.mlp.experts.lora_A.weight', 'experts'),
  ],
)
def test_tensors_elsewhere_are_refused_by_name(tmp_path, name, message):
  tensors = write_peft(tmp_path / 'in') | {name: np.zeros((4, 16), np.float32)}
  write_peft(tmp_path / 'in', tensors=tensors)
  with pytest.raises(AdapterError, match=message):
    resolve_adapter(str(tmp_path / 'in'))


def test_pickles_and_empty_directories_are_refused(tmp_path):
  write_peft(tmp_path / 'in')
  (tmp_path / 'in' / peft.WEIGHTS).rename(tmp_path / 'in' / 'adapter_model.bin')
  with pytest.raises(
    FileNotFoundError, match=r'pickled .*adapter_model.bin.*PeftModel'
  ):
    resolve_adapter(str(tmp_path / 'in'))
  (tmp_path / 'in' / 'adapter_config.json').write_text('{')
  with pytest.raises(AdapterError, match='is damaged'):
    resolve_adapter(str(tmp_path / 'in'))
  for name in (tmp_path / 'nowhere', tmp_path):
    with pytest.raises(FileNotFoundError, match='want a directory with adapter_config'):
      resolve_adapter(str(name))


@pytest.fixture
def trained(tmp_path):
  """A base, and a run that trained an adapter on it for 7 steps."""
  write_model(tmp_path / 'base')
  source = resolve_model(str(tmp_path / 'base'))
  adapter = random_adapter(CONFIG, LORA)
  base = {'model': source.name, 'fingerprint': fingerprint(load(source))}
  facts = {'lora': dataclasses.asdict(LORA), 'base': base}
  with CheckpointStore(tmp_path / 'run', hf_dir=source.hf_dir) as store:
    store.save(7, {'adapter': adapter}, facts)
  return tmp_path, source, adapter


def load(source, **kwargs):
  return source.load_params(one_device(), **kwargs)


def test_runs_steps_and_checkpoints_are_adapters(trained):
  tmp_path, source, adapter = trained
  save_adapter(
    tmp_path / 'ckpt', adapter, LORA, hf_dir=source.hf_dir, base={'model': source.name}
  )
  for name in ('run', 'run/checkpoints/7', 'ckpt'):
    found = resolve_adapter(str(tmp_path / name))
    assert found.lora == LORA
    assert found.base['model'] == source.name
    got = found.load(CONFIG, make_mesh('fsdp:8'))
    jax.tree.map(np.testing.assert_array_equal, got, adapter)
  low = found.load(CONFIG, one_device(), jnp.bfloat16)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(low))
  other = DecoderConfig.from_hf(fields_of('llama') | {'head_dim': 8})
  with pytest.raises(AdapterError, match=r'attn/q/lora_b has shape .* 32, 6\), want'):
    found.load(other, one_device())


def test_adapters_are_no_models_and_models_no_adapters(trained):
  tmp_path, source, adapter = trained
  save_adapter(tmp_path / 'a', adapter, LORA, hf_dir=source.hf_dir, base={})
  orbax.save_model(tmp_path / 'm', load(source), hf_dir=source.hf_dir, source='')
  with pytest.raises(CheckpointError, match='holds no model but an mrjax adapter'):
    resolve_model(str(tmp_path / 'a'))
  with pytest.raises(CheckpointError, match='holds no adapter but an mrjax model'):
    resolve_adapter(str(tmp_path / 'm'))
  with CheckpointStore(tmp_path / 'whole', hf_dir=source.hf_dir) as store:
    store.save(3, {'params': load(source)}, {})
  export = convert_adapters.ExportConfig(
    str(tmp_path / 'whole'), output_dir=str(tmp_path / 'out')
  )
  with pytest.raises(CheckpointError, match=r'no adapter: .*orbax_to_hf as --checkpoi'):
    convert_adapters.export_peft(export)


def fold(tmp_path, **changes):
  fields = {'adapter': str(tmp_path / 'run'), 'output_dir': str(tmp_path / 'out')}
  return convert_adapters.fold_adapter(convert_adapters.FoldConfig(**fields | changes))


def test_folding_gives_a_model_with_the_logits_of_base_and_adapter(trained):
  tmp_path, source, adapter = trained
  fold(tmp_path, mesh='fsdp:4,tensor:2')
  tokens = np.random.default_rng(0).integers(0, 56, (2, 5)).astype(np.int32)
  folded = load(resolve_model(str(tmp_path / 'out')))
  apply = lambda params, **kw: Decoder(CONFIG, **kw).apply({'params': params}, tokens)
  want = apply(masks.merge(adapter, load(source)), lora_scale=LORA.scale)
  np.testing.assert_allclose(apply(folded), want, rtol=1e-4, atol=1e-3)
  assert np.abs(want - apply(load(source))).max() > 1
  before, after = read_directory(tmp_path / 'base'), read_directory(tmp_path / 'out')
  changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
  assert len(changed) == 2 * 3
  assert all('q_proj' in name or 'v_proj' in name for name in changed)


def test_another_base_is_refused(trained):
  tmp_path, _, _ = trained
  _, tensors = write_model(tmp_path / 'other')
  tensors['model.norm.weight'][3] += 1
  write_model(tmp_path / 'other', tensors=tensors)
  with pytest.raises(CheckpointError, match=r"run was trained on '.*base' with other"):
    fold(tmp_path, model=str(tmp_path / 'other'))
  shutil.rmtree(tmp_path / 'base')
  with pytest.raises(FileNotFoundError) as error:
    fold(tmp_path)
  assert '--model names another' in error.value.__notes__[0]


def test_binaries_convert_and_fail_in_one_line(tmp_path):
  tensors = write_peft(tmp_path / 'in')
  write_model(tmp_path / 'base')
  steps = {
    'peft_to_orbax': ('--peft_dir=in', '--model=base', '--output_dir=ckpt'),
    'orbax_to_peft': ('--checkpoint=ckpt', '--output_dir=out', '--model=org/base'),
    'fold_adapter': ('--adapter=ckpt', '--output_dir=folded'),
  }
  for name, args in steps.items():
    result = run_binary(tmp_path, name, *args)
    assert result.returncode == 0, result.stderr
  assert_same_tensors(load_file(tmp_path / 'out' / peft.WEIGHTS), tensors)
  fields = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert fields['base_model_name_or_path'] == 'org/base'
  assert resolve_model(str(tmp_path / 'folded')).config == CONFIG
  result = run_binary(tmp_path, 'fold_adapter', '--adapter=base', '--output_dir=x')
  assert result.returncode == 1 and 'Traceback' not in result.stderr
  assert 'error: Adapter' in result.stderr


def run_binary(cwd, name, *args):
  return subprocess.run(
    [sys.executable, '-m', f'checkpoints_conversion.{name}', *args],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
