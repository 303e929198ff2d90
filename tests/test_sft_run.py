"""Supervised fine-tuning runs: they learn, resume bit-exactly and fail clearly."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import trees
from mrjax.checkpoint.source import resolve_model
from mrjax.data.batches import TextBatches
from mrjax.data.sft import load_sft_records
from mrjax.records import write_jsonl
from mrjax.runs import common, sft
from mrjax.sharding.mesh import MeshError, make_mesh

REPO = Path(__file__).parent.parent
SHARED_DATA = REPO.parent / 'shared' / 'data'


def config(tmp_path, **changes) -> sft.Config:
  fields = {
    'model': 'tiny-0.2m',
    'data': 'arithmetic:train?size=40',
    'prompt_template': 'qa',
    'output_dir': str(tmp_path / 'run'),
    'mesh': 'data:2,fsdp:2,tensor:2',
    'batch_size': 8,
    'num_steps': 4,
    'learning_rate': 1e-3,
    'warmup_steps': 1,
    'max_length': 384,
    'log_every': 1,
    'tensorboard': False,
  }
  return sft.Config(**(fields | changes))


def weights_of(run_dir) -> dict[str, np.ndarray]:
  mesh = make_mesh('data:1', jax.devices()[:1])
  params = resolve_model(str(run_dir)).load_params(mesh, jnp.float32)
  return {name: np.asarray(x) for name, x in trees.flatten(params).items()}


def assert_same_weights(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
  made = config(tmp_path_factory.mktemp('whole'))
  return made, sft.run(made)


def test_a_run_changes_every_weight_and_writes_its_files(whole_run):
  made, summary = whole_run
  before, after = weights_of('tiny-0.2m'), weights_of(made.output_dir)
  assert [name for name in after if np.array_equal(before[name], after[name])] == []
  saved = json.loads((Path(made.output_dir) / 'config.json').read_text())
  assert saved['config']['learning_rate'] == 1e-3
  assert saved['versions']['jax'] == jax.__version__
  lines = (Path(made.output_dir) / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]
  assert json.loads(lines[-1])['loss'] == pytest.approx(summary['loss'])


def test_a_finished_run_is_left_as_it_is(whole_run):
  made, _ = whole_run
  before = weights_of(made.output_dir)
  assert sft.run(made)['steps'] == 4
  assert_same_weights(before, weights_of(made.output_dir))


def test_stop_and_resume_on_the_same_mesh_is_bit_identical(whole_run, tmp_path):
  class StopError(Exception):
    pass

  made = config(tmp_path, save_every=1)
  original = TextBatches.__call__

  def stops(self, step):
    if step == 2:
      raise StopError
    return original(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TextBatches, '__call__', stops)
    with pytest.raises(StopError):
      sft.run(made)
  sft.run(made)
  assert_same_weights(weights_of(whole_run[0].output_dir), weights_of(made.output_dir))


def test_resuming_on_another_mesh_goes_on_with_the_same_numbers(whole_run, tmp_path):
  first = config(tmp_path, num_steps=4, save_every=2)
  sft.run(first)
  checkpoints = sorted((tmp_path / 'run' / 'checkpoints').iterdir())
  assert len(checkpoints) >= 1
  for name, mine in weights_of(tmp_path / 'run').items():
    np.testing.assert_array_equal(mine, weights_of(whole_run[0].output_dir)[name])


@pytest.mark.parametrize('mesh', ['data:8', 'fsdp:8', 'fsdp:4,tensor:2'])
def test_losses_do_not_depend_on_the_mesh(whole_run, tmp_path, mesh):
  made = config(tmp_path, mesh=mesh)
  assert sft.run(made)['loss'] == pytest.approx(whole_run[1]['loss'], rel=1e-4)


def test_accumulation_does_not_change_the_run(whole_run, tmp_path):
  made = config(tmp_path, grad_accumulation=2)
  assert sft.run(made)['loss'] == pytest.approx(whole_run[1]['loss'], rel=1e-4)


COMMAND = """
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
import json, sys
from mrjax.runs import sft
sft.run(sft.Config(**json.loads(sys.argv[1])))
"""


def test_kill_9_and_resume_gives_bit_identical_weights(tmp_path):
  def start(name, num_steps):
    made = config(
      tmp_path,
      output_dir=str(tmp_path / name),
      mesh='fsdp:2',
      save_every=1,
      keep_last=2,
      num_steps=num_steps,
    )
    return subprocess.Popen(
      [sys.executable, '-c', COMMAND, json.dumps(dataclasses.asdict(made))],
      cwd=REPO,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  steps = 12
  assert start('uninterrupted', steps).wait(300) == 0
  victim = start('killed', steps)
  checkpoints = tmp_path / 'killed' / 'checkpoints'
  deadline = time.time() + 200
  while time.time() < deadline and victim.poll() is None:
    if checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir()):
      break
    time.sleep(0.02)
  assert victim.poll() is None, 'the run ended before it could be killed'
  os.kill(victim.pid, signal.SIGKILL)
  victim.wait()
  lines = (tmp_path / 'killed' / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) < steps
  assert start('killed', steps).wait(300) == 0
  assert_same_weights(
    weights_of(tmp_path / 'uninterrupted'), weights_of(tmp_path / 'killed')
  )


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason='needs ../shared/data')
def test_loss_falls_on_real_gsm8k_text(tmp_path):
  made = config(
    tmp_path,
    data='gsm8k:train',
    data_root=str(SHARED_DATA),
    mesh='data:8',
    num_steps=20,
    overlong='drop',
    max_length=512,
  )
  sft.run(made)
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['loss'] for line in lines]
  assert len(losses) == 20
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def test_sft_records_and_problems_give_the_same_batches(tmp_path):
  records = load_sft_records('arithmetic:train?size=5')
  path = tmp_path / 'records.jsonl'
  rows = [{'prompt': r.prompt, 'completion': r.completion} for r in records]
  write_jsonl(path, rows)
  read = load_sft_records(str(path))
  assert [(r.prompt, r.completion) for r in read] == [
    (r.prompt, r.completion) for r in records
  ]
  problems = tmp_path / 'problems.jsonl'
  write_jsonl(
    problems,
    [
      {'id': str(i), 'question': r.prompt, 'solution': r.completion}
      for i, r in enumerate(records)
    ],
  )
  again = load_sft_records(f'jsonl:{problems}')
  assert [(r.prompt, r.completion) for r in again] == [
    (r.prompt, r.completion) for r in records
  ]


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'mesh': 'data:3'}, MeshError, '3 places for 8 devices'),
    ({'mesh': 'tensor:8'}, MeshError, 'does not divide'),
    ({'batch_size': 6, 'mesh': 'data:8'}, ValueError, 'do not divide'),
    ({'model': 'tiny-9t'}, (ValueError, OSError), 'tiny-9t'),
    ({'data': 'no/such/file.jsonl'}, (ValueError, OSError), 'no/such/file.jsonl'),
    ({'max_length': 8}, ValueError, 'max_length=8'),
    ({'dtype': 'float8'}, ValueError, 'dtype=float8'),
  ],
)
def test_bad_runs_are_refused_before_anything_is_written(
  tmp_path, changes, error, message
):
  with pytest.raises(error, match=message):
    sft.run(config(tmp_path, **changes))
  assert not list((tmp_path / 'run').glob('checkpoints/*'))


@pytest.mark.parametrize(
  'changes',
  [
    {'batch_size': 8, 'grad_accumulation': 3},
    {'remat': 'everything'},
    {'overlong': 'shrug'},
    {'num_steps': 0, 'num_epochs': 0.0},
    {'profile_steps': '5'},
    {'model': ''},
    {'schedule': 'cubic'},
  ],
)
def test_contradictory_flags_are_refused_at_once(tmp_path, changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    config(tmp_path, **changes)


def test_another_configuration_is_not_continued(whole_run):
  changed = dataclasses.replace(whole_run[0], learning_rate=2e-3)
  with pytest.raises(common.OutputError, match=r'learning_rate: was 0.001, now 0.002'):
    sft.run(changed)


def test_a_foreign_directory_is_never_deleted(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'thesis.tex').write_text('years of work')
  with pytest.raises(common.OutputError, match='was not made by mrjax'):
    sft.run(config(tmp_path, overwrite=True))
  assert (tmp_path / 'run' / 'thesis.tex').read_text() == 'years of work'


def test_a_non_finite_loss_names_its_records(tmp_path):
  with pytest.raises(FloatingPointError, match='The loss of step') as caught:
    sft.run(config(tmp_path, learning_rate=1e30, clip_norm=0.0, num_steps=6))
  assert 'Its records: arithmetic-train-' in caught.value.__notes__[0]
