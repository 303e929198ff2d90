"""What `--model` names: directories, runs, steps, embedded models, hub ids."""

import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint_hf import assert_same_trees, one_device, write_model

from mrjax.checkpoint import orbax, source
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.store import CheckpointStore
from mrjax.models.config import ConfigError
from mrjax.sharding.mesh import MeshError, make_mesh


@pytest.fixture
def hf_dir(tmp_path):
  write_model(tmp_path / 'hf_model', num_files=2)
  return tmp_path / 'hf_model'


@pytest.fixture
def run_dir(tmp_path, hf_dir):
  """A run with steps 3 and 12; the weights of step s are those of the model times s."""
  params = source.resolve_model(str(hf_dir)).load_params(one_device())
  with CheckpointStore(tmp_path / 'run', hf_dir=hf_dir) as store:
    for step in (3, 12):
      scaled = jax.tree.map(lambda x, step=step: x * step, params)
      store.save(step, {'params': scaled, 'opt_state': {'count': jnp.ones(())}}, {})
  (tmp_path / 'run' / 'config.json').write_text('{"config": {}}')
  return tmp_path / 'run'


def test_hf_directory(hf_dir):
  found = source.resolve_model(str(hf_dir))
  assert (found.name, found.hf_dir, found.params_dir) == (str(hf_dir), hf_dir, None)
  assert found.config.vocab_size == 56
  assert found.dtypes is not None and set(found.dtypes.values()) == {'F32'}
  params = found.load_params(make_mesh('fsdp:8'), jnp.bfloat16)
  shapes = found.param_shapes(jnp.bfloat16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )


def test_sizes_of_small_models_are_no_zeros(caplog):
  with caplog.at_level('INFO'):
    source.resolve_model('tiny-0.2m').load_params(one_device())
  assert ': 0.45 MB of parameters, peak host memory ' in caplog.text  # 225,728 bfloat16


def test_model_checkpoint(tmp_path, hf_dir):
  original = source.resolve_model(str(hf_dir))
  params = original.load_params(one_device())
  orbax.save_model(
    tmp_path / 'ckpt', params, hf_dir=hf_dir, source='x', dtypes=original.dtypes
  )
  shutil.rmtree(hf_dir)
  found = source.resolve_model(str(tmp_path / 'ckpt'))
  assert found.config == original.config
  assert found.hf_dir == tmp_path / 'ckpt' / 'hf'
  assert found.dtypes == original.dtypes
  got = found.load_params(make_mesh('fsdp:4,tensor:2'))
  assert_same_trees(got, params)
  kernel = got['layers']['attn']['q']['kernel']
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size
  cast = found.load_params(make_mesh('data:8'), jnp.bfloat16)
  assert_same_trees(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  with pytest.raises(MeshError, match='does not divide'):
    found.load_params(make_mesh('data:1,fsdp:1,tensor:5', jax.devices()[:5]))


def test_run_directory_means_its_last_step(hf_dir, run_dir, monkeypatch):
  params = source.resolve_model(str(hf_dir)).load_params(one_device())
  for name, step in (
    (run_dir, 12),
    (run_dir / 'checkpoints' / '3', 3),
    (run_dir / 'checkpoints' / '12', 12),
  ):
    found = source.resolve_model(str(name))
    assert found.hf_dir == run_dir / 'hf'
    assert found.dtypes is None  # the weights are no longer those of the source
    want = jax.tree.map(lambda x, step=step: x * step, params)
    assert_same_trees(found.load_params(one_device()), want)
  monkeypatch.chdir(run_dir / 'checkpoints')
  found = source.resolve_model('3')
  assert found.config.num_layers == 3


def test_step_that_was_cut_short_is_passed_over(run_dir):
  shutil.copytree(
    run_dir / 'checkpoints' / '12', run_dir / 'checkpoints' / '99.orbax-checkpoint-tmp'
  )
  found = source.resolve_model(str(run_dir))
  assert found.params_dir == run_dir / 'checkpoints' / '12' / 'params'


def test_a_damaged_step_names_the_one_before_it(run_dir):
  for step, notes in ((12, ['Give the checkpoint before it instead']), (3, [])):
    directory = run_dir / 'checkpoints' / str(step)
    path = directory / 'params' / '_METADATA'
    path.write_text(path.read_text()[:100])
    with pytest.raises(
      CheckpointError, match=rf'{step}/params is no whole .* cut short, or no JSON\.'
    ) as caught:
      source.resolve_model(str(directory)).load_params(one_device())
    found = getattr(caught.value, '__notes__', [])
    assert [note.partition(':')[0] for note in found] == notes
    assert all(note.endswith(f': {run_dir / "checkpoints" / "3"}.') for note in found)


def test_embedded_model(tmp_path, monkeypatch):
  write_model(tmp_path / 'assets' / 'tiny-9m', num_files=1)
  write_model(tmp_path / 'assets' / 'tiny-0.2m', 'llama_tied')
  monkeypatch.setattr(source, '_ASSETS', tmp_path / 'assets')
  assert source.embedded_models() == ['tiny-0.2m', 'tiny-9m']
  found = source.resolve_model('tiny-9m')
  assert found.hf_dir == tmp_path / 'assets' / 'tiny-9m'
  # A directory of that name comes first.
  monkeypatch.chdir(tmp_path)
  write_model(tmp_path / 'tiny-9m', 'llama_biases')
  assert source.resolve_model('tiny-9m').config.mlp_bias


def test_hub_id_is_fetched_without_code_or_pickles(hf_dir, monkeypatch):
  calls = []

  def snapshot_download(repo_id, *, allow_patterns):
    calls.append((repo_id, allow_patterns))
    return str(hf_dir)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  found = source.resolve_model('some-org/Model-1.5')
  assert (found.name, found.hf_dir) == ('some-org/Model-1.5', hf_dir)
  assert calls[0][0] == 'some-org/Model-1.5'
  kinds = {pattern.rpartition('.')[2] for pattern in calls[0][1] if '.' in pattern}
  assert kinds == {'safetensors', 'json', 'jinja', 'model', 'txt', 'tiktoken'}


def test_hub_that_cannot_be_reached(monkeypatch):
  def snapshot_download(repo_id, **_):
    raise ConnectionError('No route to host\nlong\ntrace')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  with pytest.raises(FileNotFoundError, match=r'hub did not give it.*No route.*hf dow'):
    source.resolve_model('some-org/model')


@pytest.mark.parametrize('name', ['', './nowhere', '/nowhere/model', 'a/b/c', '~/none'])
def test_path_that_is_not_there_is_no_hub_id(name, monkeypatch):
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', pytest.fail)
  with pytest.raises(FileNotFoundError, match='no such directory'):
    source.resolve_model(name)


def test_directories_that_hold_no_model(tmp_path, run_dir):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='holds neither'):
    source.resolve_model(str(tmp_path / 'empty'))
  (tmp_path / 'samples').mkdir()
  (tmp_path / 'samples' / 'config.json').write_text(json.dumps({'config': {}}))
  with pytest.raises(ConfigError, match='not supported'):
    source.resolve_model(str(tmp_path / 'samples'))
  for step in (3, 12):
    shutil.rmtree(run_dir / 'checkpoints' / str(step))
  with pytest.raises(CheckpointError, match='without a finished checkpoint'):
    source.resolve_model(str(run_dir))


def test_weights_and_config_that_do_not_belong_together(hf_dir, run_dir):
  fields = json.loads((hf_dir / 'config.json').read_text())
  other = json.dumps(fields | {'vocab_size': 60})
  (hf_dir / 'config.json').write_text(other)
  with pytest.raises(CheckpointError, match=r'\[56, 16\], want \[60, 16\]'):
    source.resolve_model(str(hf_dir))  # before anything is loaded
  (run_dir / 'hf' / 'config.json').write_text(other)
  with pytest.raises(CheckpointError, match=r'\[56, 16\], want \[60, 16\]'):
    source.resolve_model(str(run_dir)).load_params(one_device())


def test_loading_reports_the_peak(hf_dir, caplog):
  with caplog.at_level('INFO'):
    params = source.resolve_model(str(hf_dir)).load_params(one_device())
  assert 'peak host memory' in caplog.text
  assert np.isfinite(np.asarray(params['final_norm']['scale'])).all()
