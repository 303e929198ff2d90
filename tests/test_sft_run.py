"""Supervised fine-tuning runs: they learn, resume bit-exactly and fail clearly."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import assert_same, make_config, metrics_of, weights_of, write_model

from mrjax.data.sft import load_sft_records
from mrjax.records import write_jsonl
from mrjax.runs import common, sft
from mrjax.sharding.mesh import MeshError

SHARED_DATA = Path(__file__).parents[2] / 'shared' / 'data'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp('model') / 'hf')


@pytest.fixture(scope='module')
def whole_run(model, tmp_path_factory):
  made = make_config(model, tmp_path_factory.mktemp('whole') / 'run')
  return made, sft.run(made)


def test_a_run_changes_every_weight_and_writes_its_files(whole_run):
  made, summary = whole_run
  before, after = weights_of(made.model), weights_of(made.output_dir)
  assert [name for name in after if np.array_equal(before[name], after[name])] == []
  saved = json.loads((Path(made.output_dir) / 'config.json').read_text())
  assert saved['config']['learning_rate'] == 1e-3
  assert saved['versions']['jax'] == jax.__version__
  lines = metrics_of(made.output_dir)
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  assert lines[-1]['loss'] == pytest.approx(summary['loss'])


def test_a_finished_run_is_left_as_it_is(whole_run):
  made, _ = whole_run
  before = weights_of(made.output_dir)
  assert sft.run(made)['steps'] == 4
  assert_same(before, weights_of(made.output_dir))


@pytest.mark.parametrize('mesh', ['data:8', 'fsdp:8', 'fsdp:4,tensor:2'])
def test_losses_do_not_depend_on_the_mesh(whole_run, tmp_path, mesh):
  made = dataclasses.replace(whole_run[0], output_dir=str(tmp_path / 'run'), mesh=mesh)
  assert sft.run(made)['loss'] == pytest.approx(whole_run[1]['loss'], rel=1e-4)


def test_accumulation_does_not_change_the_run(whole_run, tmp_path):
  made = dataclasses.replace(
    whole_run[0],
    output_dir=str(tmp_path / 'run'),
    mesh='data:4,tensor:2',
    grad_accumulation=2,
  )
  assert sft.run(made)['loss'] == pytest.approx(whole_run[1]['loss'], rel=1e-4)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason='needs ../shared/data')
def test_loss_falls_on_real_gsm8k_text(model, tmp_path):
  made = make_config(
    model,
    tmp_path / 'run',
    data='gsm8k:train',
    data_root=str(SHARED_DATA),
    mesh='data:8',
    num_steps=12,
    learning_rate=1e-2,
    overlong='drop',
    max_length=512,
  )
  sft.run(made)
  lines = metrics_of(made.output_dir)
  assert len(lines) == 12
  losses = [line['loss'] for line in lines]
  assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1


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
  model, tmp_path, changes, error, message
):
  with pytest.raises(error, match=message):
    sft.run(make_config(output_dir=tmp_path / 'run', **({'model': model} | changes)))
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
    make_config(output_dir=tmp_path / 'run', **({'model': 'tiny-0.2m'} | changes))


def test_another_configuration_is_not_continued(whole_run):
  changed = dataclasses.replace(whole_run[0], learning_rate=2e-3)
  with pytest.raises(common.OutputError, match=r'learning_rate: was 0.001, now 0.002'):
    sft.run(changed)


def test_a_foreign_directory_is_never_deleted(model, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'thesis.tex').write_text('years of work')
  with pytest.raises(common.OutputError, match='was not made by mrjax'):
    sft.run(make_config(model, tmp_path / 'run', overwrite=True))
  assert (tmp_path / 'run' / 'thesis.tex').read_text() == 'years of work'


def test_a_non_finite_loss_names_its_records(model, tmp_path):
  with pytest.raises(FloatingPointError, match='The loss of step') as caught:
    sft.run(
      make_config(
        model, tmp_path / 'run', learning_rate=1e30, clip_norm=0.0, num_steps=6
      )
    )
  assert 'Its records: arithmetic-train-' in caught.value.__notes__[0]
  assert 'or --overwrite to begin anew' in caught.value.__notes__[0]
  found = json.loads((tmp_path / 'run' / 'non_finite.json').read_text())
  assert f'step {found["step"]} is' in str(caught.value)
  assert len(found['records']) >= 8
