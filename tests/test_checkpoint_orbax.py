"""Orbax checkpoints: exact onto any mesh, whole or absent, clear when damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from mrjax.checkpoint import orbax
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.store import CheckpointStore
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import param_shardings

MESHES = ('data:8', 'fsdp:8', 'fsdp:4,tensor:2', 'data:2,fsdp:2,tensor:2')


def make_params(mesh) -> dict:
  rng = np.random.default_rng(0)
  params = {
    'embed': {'embedding': rng.standard_normal((56, 16)).astype(np.float32)},
    'layers': {
      'mlp': {
        'up': {'kernel': rng.standard_normal((3, 16, 24)).astype(ml_dtypes.bfloat16)}
      }
    },
    'final_norm': {'scale': rng.standard_normal(16).astype(np.float16)},
  }
  return jax.tree.map(jax.device_put, params, param_shardings(params, mesh))


def abstract(params, mesh, dtype=None):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
    params,
    param_shardings(params, mesh),
  )


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def hf_dir(tmp_path):
  path = tmp_path / 'source'
  path.mkdir()
  (path / 'config.json').write_bytes(b'{"odd":   1}\r\n')
  (path / 'tokenizer.model').write_bytes(bytes(range(256)))
  (path / 'model.safetensors').write_bytes(b'weights')
  (path / 'code.py').write_text('raise SystemExit')
  return path


@pytest.fixture
def run_dir(tmp_path):
  return tmp_path / 'run'


def test_a_tree_saved_on_one_mesh_is_restored_onto_every_other(tmp_path):
  params = make_params(make_mesh('fsdp:4,tensor:2'))
  orbax.save_tree(tmp_path / 'tree', params)
  for spec in MESHES:
    mesh = make_mesh(spec)
    like = abstract(params, mesh)
    got = orbax.load_tree(tmp_path / 'tree', like)
    assert_same(got, params)
    jax.tree.map(lambda x, s: x.sharding == s.sharding or pytest.fail(), got, like)
    kernel = got['layers']['mlp']['up']['kernel']
    parts = mesh.shape['fsdp'] * mesh.shape['tensor']
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


def test_restoring_casts_when_asked(tmp_path):
  mesh = make_mesh('fsdp:8')
  params = make_params(mesh)
  orbax.save_tree(tmp_path / 'tree', params)
  got = orbax.load_tree(tmp_path / 'tree', abstract(params, mesh, jnp.bfloat16))
  assert_same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_a_step_holds_the_whole_state_and_its_metadata(run_dir, hf_dir):
  mesh = make_mesh('fsdp:8')
  params = make_params(mesh)
  opt_state = optax.adamw(1e-3).init(params)
  with CheckpointStore(run_dir, hf_dir=hf_dir) as store:
    assert store.latest_step() is None
    store.save(5, {'params': params, 'opt_state': opt_state}, {'seed': 3})
  with CheckpointStore(run_dir, hf_dir=hf_dir) as store:
    assert store.latest_step() == 5
    assert store.metadata(5) == {'seed': 3}
    place = jax.tree.leaves(param_shardings(params, mesh))[0].mesh
    everywhere = jax.sharding.NamedSharding(place, jax.sharding.PartitionSpec())
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), opt_state
    )
    got = store.restore(5, {'params': abstract(params, mesh), 'opt_state': like})
    assert_same(got, {'params': params, 'opt_state': opt_state})
    assert store.path(5) == run_dir / 'checkpoints' / '5'
  assert sorted(p.name for p in (run_dir / 'hf').iterdir()) == [
    'config.json',
    'tokenizer.model',
  ]
  for name in ('config.json', 'tokenizer.model'):
    assert (run_dir / 'hf' / name).read_bytes() == (hf_dir / name).read_bytes()


def test_arrays_may_be_donated_while_they_are_being_saved(run_dir, hf_dir):
  mesh = make_mesh('data:1', jax.devices()[:1])
  params = {'final_norm': {'scale': jnp.arange(1 << 20, dtype=jnp.float32)}}
  double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
  with CheckpointStore(run_dir, hf_dir=hf_dir) as store:
    for step in (1, 2, 3):
      store.save(step, {'params': params}, {})
      params = double(params)
    for step in (1, 2, 3):
      like = {'params': abstract(params, mesh)}
      scale = store.restore(step, like)['params']['final_norm']['scale']
      np.testing.assert_array_equal(
        np.asarray(scale), np.arange(1 << 20, dtype=np.float32) * 2 ** (step - 1)
      )


def test_only_the_last_steps_are_kept(run_dir, hf_dir):
  params = make_params(make_mesh('data:8'))
  with CheckpointStore(run_dir, hf_dir=hf_dir, keep_last=2) as store:
    for step in (2, 9, 10):
      store.save(step, {'params': params}, {})
    store.wait()
    assert store.steps() == [9, 10]
    with pytest.raises(CheckpointError, match='no checkpoint of step 2'):
      store.restore(2, {'params': params})
    with pytest.raises(CheckpointError, match='want a later one than 10'):
      store.save(10, {'params': params}, {})


KILLED = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
import jax.numpy as jnp
from mrjax.checkpoint.store import CheckpointStore
store = CheckpointStore(sys.argv[1], hf_dir=sys.argv[2])
store.save(1, {'params': {'x': jnp.arange(5.0)}}, {})
store.wait()
print('saved', flush=True)
for step in range(2, 1000):
  store.save(step, {'params': {'x': jnp.full(1 << 22, float(step))}}, {})
"""


def test_a_killed_save_leaves_no_step_that_looks_whole(run_dir, hf_dir):
  child = subprocess.Popen(
    [sys.executable, '-c', KILLED, str(run_dir), str(hf_dir)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout is not None and child.stdout.readline() == 'saved\n'
  time.sleep(0.3)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  with CheckpointStore(run_dir, hf_dir=hf_dir) as store:
    steps = store.steps()
    assert steps == list(range(1, len(steps) + 1))
    for step in steps[1:]:
      shapes = orbax.tree_shapes(store.path(step) / 'params')
      place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      like = {'x': jax.ShapeDtypeStruct((1 << 22,), jnp.float32, sharding=place)}
      assert shapes['x'].shape == (1 << 22,)
      got = store.restore(step, {'params': like})['params']['x']
      np.testing.assert_array_equal(np.asarray(got), np.float32(step))


def test_other_names_and_shapes_are_named(tmp_path):
  mesh = make_mesh('fsdp:8')
  params = make_params(mesh)
  orbax.save_tree(tmp_path / 'tree', params)
  like = abstract(params, mesh)
  place = like['final_norm']['scale'].sharding
  other = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)
  for change, match in (
    (
      {'final_norm': {'scale': other}},
      r'final_norm/scale has shape \(16,\), want \(8,',
    ),
    ({'final_norm': {}}, r'final_norm/scale has shape \(16,\), want \(not there'),
    ({'extra': other}, r'extra has shape \(not there\), want \(8,'),
  ):
    with pytest.raises(CheckpointError, match=match):
      orbax.load_tree(tmp_path / 'tree', like | change)


def test_damaged_checkpoints_are_refused(tmp_path):
  mesh = make_mesh('fsdp:8')
  params = make_params(mesh)
  with pytest.raises(CheckpointError, match='no whole Orbax checkpoint'):
    orbax.load_tree(tmp_path / 'nowhere', abstract(params, mesh))
  orbax.save_tree(tmp_path / 'tree', params)
  for path in (tmp_path / 'tree').glob('**/d/*'):
    path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(CheckpointError, match=r'no whole Orbax|cannot be read'):
    orbax.load_tree(tmp_path / 'tree', abstract(params, mesh))
  (tmp_path / 'tree' / 'manifest.ocdbt').unlink()
  with pytest.raises(CheckpointError, match=r'no whole Orbax[^\[]*$'):
    orbax.load_tree(tmp_path / 'tree', abstract(params, mesh))


def test_model_checkpoint_layout(tmp_path, hf_dir):
  params = make_params(make_mesh('fsdp:8'))
  out = tmp_path / 'out'
  orbax.save_model(out, params, hf_dir=hf_dir, source='org/name', dtypes={'a': 'F32'})
  assert sorted(p.name for p in out.iterdir()) == ['hf', 'mrjax.json', 'params']
  assert sorted(p.name for p in (out / 'hf').iterdir()) == [
    'config.json',
    'tokenizer.model',
  ]
  assert orbax.read_marker(out) == {
    'format_version': 1,
    'kind': 'model',
    'source': 'org/name',
    'dtypes': {'a': 'F32'},
  }
  with pytest.raises(FileExistsError, match='--overwrite'):
    orbax.save_model(out, params, hf_dir=hf_dir, source='')
  orbax.save_model(out, params, hf_dir=hf_dir, source='second', overwrite=True)
  assert orbax.read_marker(out)['source'] == 'second'
  with pytest.raises(FileExistsError, match=r'no mrjax\.json'):
    orbax.save_model(hf_dir, params, hf_dir=hf_dir, source='', overwrite=True)


def test_a_failing_save_leaves_nothing_at_the_output(tmp_path, hf_dir, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(orbax, 'save_tree', fail)
  with pytest.raises(OSError, match='No space left'):
    orbax.save_model(tmp_path / 'out', {}, hf_dir=hf_dir, source='')
  assert [p.name for p in tmp_path.iterdir()] == ['source']


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('{"kind"', 'is damaged'),
    ('{}', 'is damaged'),
    (json.dumps({'format_version': 2, 'kind': 'model'}), "'model' in format 2"),
    (json.dumps({'format_version': 1, 'kind': 'adapter'}), 'an mrjax adapter'),
  ],
)
def test_marker_of_another_kind_is_refused(tmp_path, text, match):
  (tmp_path / 'mrjax.json').write_text(text)
  with pytest.raises(CheckpointError, match=match):
    orbax.read_marker(tmp_path)
