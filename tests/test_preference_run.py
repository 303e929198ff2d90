"""Preference runs: they begin where they must, learn, resume and fail clearly."""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mrjax import trees
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.source import resolve_model
from mrjax.data.batches import TextBatches
from mrjax.data.problems import load_problems
from mrjax.records import DataError, read_jsonl, write_jsonl
from mrjax.runs import common, preference, reference
from mrjax.sharding.mesh import make_mesh


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Right solutions before ones whose last number is wrong; new problems to test on."""
  folder = tmp_path_factory.mktemp('pairs')
  rng = random.Random(0)
  for name, spec in (
    ('train', 'arithmetic:train?size=40'),
    ('test', 'arithmetic:test?size=12'),
  ):
    pairs = []
    for problem in load_problems(spec):
      wrong = re.sub(r'\d+$', str(rng.randrange(1000, 9999)), problem.solution)
      pairs.append(
        {'prompt': problem.question, 'chosen': problem.solution, 'rejected': wrong}
      )
    write_jsonl(folder / f'{name}.jsonl', pairs)
  return folder


@pytest.fixture(scope='module')
def make_config(data, tmp_path_factory):
  def make(name='run', **changes) -> preference.Config:
    fields = {
      'model': 'tiny-0.2m',
      'data': str(data / 'train.jsonl'),
      'prompt_template': 'qa',
      'output_dir': str(tmp_path_factory.mktemp('runs') / name),
      'mesh': 'data:2,fsdp:2,tensor:2',
      'batch_size': 4,
      'num_steps': 3,
      'learning_rate': 1e-3,
      'schedule': 'constant',
      'max_length': 384,
      'log_every': 1,
      'tensorboard': False,
    }
    return preference.Config(**(fields | changes))

  return make


def lines_of(config, name='loss'):
  text = (Path(config.output_dir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [line for line in lines if name in line]


def weights_of(config):
  mesh = make_mesh('data:1', jax.devices()[:1])
  params = resolve_model(config.output_dir).load_params(mesh, jnp.float32)
  return {name: np.asarray(x) for name, x in trees.flatten(params).items()}


@pytest.fixture(scope='module')
def adapter_run(make_config, data):
  config = make_config(
    'adapter',
    lora_rank=4,
    num_steps=6,
    learning_rate=5e-3,
    eval_data=str(data / 'test.jsonl'),
    eval_every=3,
  )
  return config, preference.run(config)


def test_dpo_with_an_adapter_begins_at_log_2_and_learns(adapter_run):
  config, summary = adapter_run
  assert config.reference_kind == 'adapter_off'
  lines = lines_of(config)
  assert lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-7)
  assert lines[0]['rewards/margins'] == lines[0]['rewards/accuracies'] == 0
  assert lines[-1]['rewards/margins'] > 0.1
  assert sum(line['pairs'] for line in lines[:2]) <= 40
  middle, last = lines_of(config, 'eval_loss')
  assert 0 < middle['eval_rewards/margins'] < last['eval_rewards/margins']
  assert last['eval_rewards/accuracies'] > 0.8
  assert last['eval_loss'] < middle['eval_loss'] < math.log(2)
  assert summary['best']['step'] == 6
  assert not (Path(config.output_dir) / 'reference').exists()


def test_an_adapter_that_trains_on_is_its_own_reference(adapter_run, make_config):
  """Not the model without it, which was another policy."""
  config = make_config('on', adapter=adapter_run[0].output_dir, num_steps=1)
  assert config.reference_kind == 'precomputed'
  preference.run(config)
  (line,) = lines_of(config)
  assert line['loss'] == pytest.approx(math.log(2), abs=1e-5)


def test_orpo_turns_a_preference_round_without_a_reference(make_config, data, tmp_path):
  """Wrong solutions are chosen here: the model begins with the opposite preference."""
  for name in ('train', 'test'):
    turned = [
      {'prompt': pair['prompt'], 'chosen': pair['rejected'], 'rejected': pair['chosen']}
      for pair in read_jsonl(data / f'{name}.jsonl')
    ]
    write_jsonl(tmp_path / f'{name}.jsonl', turned)
  config = make_config(
    loss='orpo',
    beta=1.0,
    lora_rank=4,
    num_steps=10,
    learning_rate=5e-3,
    data=str(tmp_path / 'train.jsonl'),
    eval_data=str(tmp_path / 'test.jsonl'),
  )
  preference.run(config)
  first = lines_of(config)[0]
  assert first['rewards/accuracies'] < 0.2 and first['log_odds_ratio'] < 0
  (end,) = lines_of(config, 'eval_loss')
  assert end['eval_rewards/accuracies'] > 0.8 and end['eval_log_odds_ratio'] > 0
  with pytest.raises(common.OutputError, match="loss: was 'orpo', now 'simpo'"):
    preference.run(dataclasses.replace(config, loss='simpo'))


@pytest.fixture(scope='module')
def stop_at_step():
  class StopError(Exception):
    pass

  original = TextBatches.__call__

  def stops(self, step):
    if step == 2:
      raise StopError
    return original(self, step)

  def run(config):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(TextBatches, '__call__', stops)
      with pytest.raises(StopError):
        preference.run(config)

  return run


def test_all_weights_against_a_reference_that_was_computed_before(
  make_config, stop_at_step, monkeypatch
):
  """A run that goes on reads it, and ends in the same weights."""
  whole = make_config()
  assert whole.reference_kind == 'precomputed'
  preference.run(whole)
  first = lines_of(whole)[0]
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-5)
  assert abs(first['rewards/margins']) < 1e-4
  table = np.load(Path(whole.output_dir) / 'reference' / 'train.npy')
  assert table.shape == (40, 2) and table.dtype == np.float32
  key = json.loads((Path(whole.output_dir) / 'reference' / 'train.json').read_text())
  assert key['model'] == 'tiny-0.2m'

  stopped = make_config('stopped', save_every=1)
  stop_at_step(stopped)
  with monkeypatch.context() as patch:
    patch.setattr(reference, '_compute', None)  # would fail if it were called
    preference.run(stopped)
  assert [line['step'] for line in lines_of(stopped)] == [1, 2, 3]
  ours, theirs = weights_of(stopped), weights_of(whole)
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_cached_reference_of_other_weights_is_not_used(make_config):
  config = make_config(num_steps=1)
  path = Path(config.output_dir) / 'reference' / 'train.npy'
  preference.run(config)
  before = np.load(path)
  key = json.loads(path.with_suffix('.json').read_text())
  common.write_json(path.with_suffix('.json'), key | {'weights': '0' * 64})
  np.save(path, np.zeros_like(before))
  shutil.rmtree(Path(config.output_dir) / 'checkpoints')
  preference.run(config)
  np.testing.assert_array_equal(np.load(path), before)


@pytest.mark.parametrize('kind', ['precomputed', 'resident'])
def test_a_finished_run_loads_no_reference(make_config, monkeypatch, kind):
  config = make_config(reference=kind, num_steps=0, num_epochs=0.1)
  steps = preference.run(config)['steps']
  monkeypatch.setattr(reference.ReferencePolicy, 'load', None)
  assert preference.run(config)['steps'] == steps
  with pytest.raises(TypeError):  # there is something to do
    preference.run(dataclasses.replace(config, overwrite=True))


def test_a_second_model_is_the_same_in_memory_and_computed_before(make_config):
  """Of another shape, too: only the tokenizer must be the same."""
  losses = []
  for kind in ('resident', 'precomputed'):
    config = make_config(
      kind, loss='ipo', reference_model='tiny-1m', reference=kind, num_steps=2
    )
    preference.run(config)
    losses.append([line['loss'] for line in lines_of(config)])
  assert losses[0] == pytest.approx(losses[1], rel=1e-4)
  assert losses[0][0] != pytest.approx(25.0, rel=1e-3)  # (1 / (2 beta))**2: no margin


def test_kto_learns_from_judged_completions(make_config, data):
  config = make_config(
    loss='kto', num_steps=5, learning_rate=2e-3, eval_data=str(data / 'test.jsonl')
  )
  preference.run(config)
  first, *_, last = lines_of(config)
  assert first['loss'] == pytest.approx(0.5, abs=1e-4)  # two sigmoids of 0
  assert first['kl'] == pytest.approx(0, abs=1e-4)
  assert last['rewards/margins'] > first['rewards/margins'] + 0.05
  (end,) = lines_of(config, 'eval_loss')
  assert end['eval_desirable'] == 0.5
  margin = end['eval_rewards/chosen'] - end['eval_rewards/rejected']
  assert end['eval_rewards/margins'] == pytest.approx(margin, rel=1e-4)
  names = {'train', 'eval', 'train_mismatched', 'eval_mismatched'}
  found = (Path(config.output_dir) / 'reference').glob('*.npy')
  assert {path.stem for path in found} == names


def test_a_mask_that_fits_nothing_is_refused_before_the_reference(make_config):
  config = make_config(trainable='regex:nothing_has_this_name')
  assert config.reference_kind == 'precomputed'
  with pytest.raises(ValueError, match='No parameter is trainable'):
    preference.run(config)
  assert not Path(config.output_dir).exists()


@pytest.mark.parametrize('kind', ['resident', 'precomputed'])
def test_a_reference_that_is_not_finite_is_named(make_config, tmp_path, kind):
  bad = tmp_path / 'bad'
  shutil.copytree(resolve_model('tiny-0.2m').hf_dir, bad)
  tensors = safetensors.numpy.load_file(bad / 'model.safetensors')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].copy()
  tensors[name][3, 5] = np.nan
  safetensors.numpy.save_file(tensors, bad / 'model.safetensors')
  config = make_config(reference=kind, reference_model=str(bad))
  with pytest.raises(CheckpointError, match=r'The reference .*/mlp/up/kernel hold NaN'):
    preference.run(config)


def test_a_dry_run_writes_nothing(make_config):
  config = make_config(dry_run=True, reference='resident')
  found = preference.run(config)
  assert found['peak'] > found['frozen'] > 0  # the second model
  assert not Path(config.output_dir).exists()


def test_a_pair_without_a_difference_names_its_line(make_config, data, tmp_path):
  path = tmp_path / 'equal.jsonl'
  pair = {'prompt': 'a', 'chosen': 'same', 'rejected': 'same'}
  write_jsonl(path, [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, pair])
  config = make_config(data=str(path))
  with pytest.raises(ValueError, match=r'equal\.jsonl:2: chosen and rejected are the'):
    preference.run(config)
  write_jsonl(path, [{'prompt': 'a', 'chosen': 'b'}])
  with pytest.raises(DataError, match=r"equal\.jsonl:1: missing field\(s\) \['rejec"):
    preference.run(config)
  assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'loss': 'ppo'}, '--loss=ppo: want one of dpo'),
    ({'reference': 'moving'}, '--reference=moving: want one of auto, adapter_off'),
    ({'equal_pairs': 'keep'}, '--equal_pairs=keep'),
    ({'loss': 'orpo', 'reference_model': 'tiny-1m'}, '--loss=orpo has no reference'),
    ({'loss': 'simpo', 'reference': 'resident'}, '--loss=simpo has no reference'),
    ({'reference': 'adapter_off'}, 'more than an adapter trains'),
    (
      {'reference': 'adapter_off', 'lora_rank': 2, 'trainable': 'all'},
      'more than an adapter trains',
    ),
    (
      {'reference': 'adapter_off', 'lora_rank': 2, 'reference_model': 'tiny-1m'},
      'contradict each other',
    ),
    ({'beta': -1.0}, '--beta=-1.0'),
    ({'model': ''}, '--model is empty'),
  ],
)
def test_contradictory_flags_are_refused_at_once(make_config, changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


def test_where_the_reference_comes_from(make_config):
  kind = lambda **changes: make_config(**changes).reference_kind
  assert kind() == 'precomputed'
  assert kind(lora_rank=2) == 'adapter_off'
  assert kind(lora_rank=2, trainable='norms') == 'precomputed'
  assert kind(lora_rank=2, reference_model='tiny-1m') == 'precomputed'
  assert kind(reference='resident') == 'resident'
  assert kind(loss='orpo') == kind(loss='simpo') == ''
