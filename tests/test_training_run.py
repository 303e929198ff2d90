"""What every training run does: masks, adapters, checkpoints, stops, evaluations."""

import dataclasses
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
  assert_same,
  make_config,
  metrics_of,
  read_tree,
  steps_of,
  weights_of,
  write_model,
)

from mrjax import trees
from mrjax.checkpoint import orbax, store
from mrjax.checkpoint.directories import CheckpointError
from mrjax.data.batches import TextBatches
from mrjax.lora.adapters import AdapterError
from mrjax.runs import common, sft, training, training_state


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp('model') / 'hf')


@pytest.fixture(scope='module')
def whole_run(model, tmp_path_factory):
  """Four steps, a checkpoint and an evaluation after each, all of them kept."""
  made = make_config(
    model,
    tmp_path_factory.mktemp('whole') / 'run',
    save_every=1,
    keep_last=9,
    eval_data='arithmetic:dev?size=11&steps=1',
  )
  return made, sft.run(made)


def copied(whole_run, tmp_path, **changes) -> sft.Config:
  """The finished run in another directory."""
  shutil.copytree(whole_run[0].output_dir, tmp_path / 'run')
  return dataclasses.replace(whole_run[0], output_dir=str(tmp_path / 'run'), **changes)


@pytest.fixture
def no_data(monkeypatch):
  """Reading data fails: what is refused is refused before."""
  monkeypatch.setattr(sft, 'load_sft_records', None)


def steps(made: sft.Config) -> Path:
  return Path(made.output_dir) / 'checkpoints'


def test_each_line_says_what_a_user_watches(whole_run):
  made, summary = whole_run
  lines = metrics_of(made.output_dir)
  train = [line for line in lines if 'loss' in line]
  assert [line['step'] for line in train] == [1, 2, 3, 4]
  for line in train:
    assert {'grad_norm', 'tokens_per_second', 'learning_rate', 'epoch'} <= line.keys()
    assert 0 <= line['padding'] < 0.5
    assert 0.01 < line['memory_gb'] < 100
    assert 'mfu' not in line  # nobody knows the peak of this CPU
  assert summary['loss'] == train[-1]['loss']


def test_each_checkpoint_knows_its_evaluation_and_the_best(whole_run):
  made, summary = whole_run
  scores = {
    x['step']: x['eval_loss'] for x in metrics_of(made.output_dir) if 'eval_loss' in x
  }
  assert sorted(scores) == [1, 2, 3, 4]
  best = min(scores, key=scores.__getitem__)
  assert summary['best'] == {'step': best, 'loss': scores[best]}
  for step, score in scores.items():
    path = Path(made.output_dir) / 'checkpoints' / str(step)
    assert store.read_metadata(path)['eval_loss'] == score


def test_the_best_checkpoint_outlives_newer_ones(model, tmp_path):
  # Training on with a rate that destroys the model: the first step stays the best.
  made = make_config(
    model,
    tmp_path / 'run',
    save_every=1,
    learning_rate=0.3,
    schedule='constant',
    warmup_steps=0,
    num_steps=5,
    keep_every=3,
    eval_data='arithmetic:dev?size=11&steps=1',
  )
  summary = sft.run(made)
  best = summary['best']['step']
  assert best != 5
  assert steps_of(made.output_dir) == sorted({best, 3, 4, 5})  # the last two as well


def test_an_evaluation_that_is_not_finite_names_step_and_metric(whole_run, tmp_path):
  made = copied(whole_run, tmp_path, resume_step=2)

  def fails(self, *args, **kwargs):
    return lambda trainable, frozen: {'loss': 1.0, 'entropy': float('nan')}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, 'make_evaluate', fails)
    with pytest.raises(
      FloatingPointError, match='The entropy of the evaluation after step 3 is nan'
    ):
      sft.run(made)
  assert steps_of(made.output_dir) == [1, 2]
  assert max(line['step'] for line in metrics_of(made.output_dir)) == 3
  assert not (tmp_path / 'run' / 'non_finite.json').exists()  # no record of a step


@pytest.mark.parametrize(
  'trainable', ['', 'last_layers:1', r'regex:norm/scale$;^embed']
)
def test_a_run_that_was_stopped_goes_on_bit_identically(
  whole_run, model, tmp_path, trainable
):
  class StopError(Exception):
    pass

  changes = (
    {'trainable': trainable} if trainable else {'lora_rank': 3, 'lora_dropout': 0.2}
  )
  original = TextBatches.__call__

  def stops(self, step):
    if step == 2:
      raise StopError
    return original(self, step)

  stopped = make_config(model, tmp_path / 'stopped', save_every=1, **changes)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TextBatches, '__call__', stops)
    with pytest.raises(StopError):
      sft.run(stopped)
  sft.run(stopped)
  straight = make_config(model, tmp_path / 'straight', **changes)
  sft.run(straight)
  if not trainable:
    adapters = [read_tree(steps(x) / '4' / 'adapter') for x in (stopped, straight)]
    assert_same(*adapters)
    return
  after = weights_of(straight.output_dir)
  assert_same(weights_of(stopped.output_dir), after)
  # What does not train is what the model had, bit for bit.
  before = weights_of(model)
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  if trainable.startswith('regex'):
    assert changed == {
      n for n in before if n.endswith('norm/scale') or n[:5] == 'embed'
    }
  else:
    assert {n for n in before if n.startswith(('layers/', 'final', 'lm'))} == changed
    for name in changed:
      if name.startswith('layers/'):
        np.testing.assert_array_equal(before[name][0], after[name][0])
        assert (before[name][1] != after[name][1]).any()


@pytest.mark.parametrize('quantize', ['', 'int8', 'nf4'])
def test_an_adapter_run_saves_the_adapter_alone_and_learns(model, tmp_path, quantize):
  made = make_config(
    model,
    tmp_path / 'run',
    mesh='data:8' if quantize == 'nf4' else 'data:2,fsdp:2,tensor:2',  # whole blocks
    lora_rank=4,
    quantize=quantize,
    num_steps=12,
    learning_rate=2e-2,
    lora_plus_ratio=2.0,
  )
  sft.run(made)
  losses = [line['loss'] for line in metrics_of(made.output_dir)]
  assert losses[-1] < losses[0] - 0.1
  step = Path(made.output_dir) / 'checkpoints' / '12'
  assert sorted(p.name for p in step.iterdir() if p.is_dir()) == [
    'adapter',
    'metadata',
    'opt_state',
  ]
  names = set(orbax.tree_shapes(step / 'adapter'))
  assert all(re.search('/lora_[ab]$', name) for name in names) and len(names) == 14
  moments = orbax.tree_shapes(step / 'opt_state')
  large = [name for name, x in moments.items() if len(x.shape) > 1]
  assert len(large) == 2 * 14
  facts = store.read_metadata(step)
  assert facts['lora']['rank'] == 4
  assert facts['base']['model'] == model


def test_an_adapter_trains_on_and_brings_its_rank_along(model, tmp_path, caplog):
  first = make_config(
    model,
    tmp_path / 'first',
    lora_rank=3,
    lora_targets='qv',
    lora_dropout=0.25,
    num_steps=2,
  )
  sft.run(first)
  second = make_config(
    model,
    tmp_path / 'second',
    adapter=first.output_dir,
    num_steps=1,
    learning_rate=0.0,  # so that what it begins with is what it ends with
  )
  sft.run(second)
  before = read_tree(steps(first) / '2' / 'adapter')
  assert_same(read_tree(steps(second) / '1' / 'adapter'), before)
  assert {x.shape[-1] for name, x in before.items() if name.endswith('lora_a')} == {3}
  assert store.read_metadata(steps(second) / '1')['lora']['rank'] == 3
  other = write_model(tmp_path / 'other', seed=1)
  with pytest.raises(CheckpointError, match='with other weights than these'):
    sft.run(dataclasses.replace(second, model=other, output_dir=str(tmp_path / 'x')))
  with pytest.raises(CheckpointError, match='with other weights than these'):
    more = dataclasses.replace(second, trainable='regex:lora_[ab]$;norm/scale$')
    sft.run(dataclasses.replace(more, model=other, output_dir=str(tmp_path / 'y')))
  with pytest.MonkeyPatch.context() as patch:  # by shapes, before there are data
    patch.setattr(sft, 'load_sft_records', None)
    with pytest.raises(AdapterError, match=r'attn/q/lora_a has shape \(2, .* want \(3'):
      small = dataclasses.replace(second, model='tiny-0.2m')
      sft.run(dataclasses.replace(small, output_dir=str(tmp_path / 'z')))
  # Its dropout comes along too, and may be turned off.
  second = dataclasses.replace(second, output_dir=str(tmp_path / 'none'))
  assert training.start(second).lora.dropout == 0.25
  without = dataclasses.replace(second, lora_dropout=0.0)
  assert training.start(without).decoder.lora_dropout == 0.0
  # Quantised, the fingerprint cannot be compared; then names are.
  for base, warned in ((model, False), (other, True)):
    caplog.clear()
    config = dataclasses.replace(second, model=base, quantize='int8')
    setup = training.start(config)
    plan = training.make_plan(config, setup)
    training_state._load_adapter(plan, setup.mesh, {}, 0)
    assert ('the same weights cannot be told' in caplog.text) == warned


def test_what_may_change_when_a_run_goes_on(tmp_path):
  may_change = lambda **changes: make_config('m', tmp_path, **changes).may_change
  assert 'batch_size' not in may_change()
  assert {'remat', 'attention_backend', 'loss_chunk', 'keep_last'} <= may_change()
  # Dropout takes other random numbers in each micro-batch.
  assert 'grad_accumulation' in may_change() & may_change(lora_rank=2)
  assert 'grad_accumulation' not in may_change(lora_rank=2, lora_dropout=0.1)
  assert 'grad_accumulation' not in may_change(adapter='a')  # it may have its own
  assert 'grad_accumulation' in may_change(adapter='a', lora_dropout=0.0)


@pytest.mark.parametrize('dry_run', [False, True])
def test_quantising_what_is_no_hugging_face_model_is_refused_at_once(
  whole_run, tmp_path, dry_run
):
  made = make_config(
    whole_run[0].output_dir,
    tmp_path / 'run',
    lora_rank=2,
    quantize='int8',
    dry_run=dry_run,
  )
  with pytest.raises(CheckpointError, match='--quantize=int8 reads Hugging Face files'):
    sft.run(made)
  assert not (tmp_path / 'run').exists()


def test_another_base_of_the_same_shape_is_refused(model, tmp_path):
  other = write_model(tmp_path / 'moved', seed=1)
  made = make_config(other, tmp_path / 'run', lora_rank=2, num_steps=2, save_every=1)
  made = dataclasses.replace(made, keep_last=2)
  sft.run(made)
  shutil.rmtree(other)
  shutil.copytree(model, other)
  with pytest.raises(common.OutputError, match=r'another base \(base: was'):
    sft.run(dataclasses.replace(made, num_steps=2, resume_step=1))


def test_sigterm_saves_and_says_how_to_go_on(whole_run, model, tmp_path, caplog):
  original = TextBatches.__call__

  def interrupts(self, step):
    if step == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, step)

  made = make_config(model, tmp_path / 'run')
  before = signal.getsignal(signal.SIGTERM)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TextBatches, '__call__', interrupts)
    summary = sft.run(made)
  assert signal.getsignal(signal.SIGTERM) is before
  assert (summary['steps'], summary['stopped']) == (2, True)
  assert steps_of(made.output_dir) == [2]
  assert 'Run the same command to go on' in caplog.text
  assert sft.run(made)['stopped'] is False
  assert_same(weights_of(made.output_dir), weights_of(whole_run[0].output_dir))


def test_the_same_command_goes_on_although_it_names_a_step_to_go_back_to(
  whole_run, tmp_path, caplog
):
  original = TextBatches.__call__

  def interrupts(self, step):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, step)

  made = copied(whole_run, tmp_path, resume_step=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TextBatches, '__call__', interrupts)
    assert sft.run(made)['stopped']
  aside = tmp_path / 'run' / 'set_aside'
  assert sorted(p.name for p in aside.iterdir()) == ['2', '3', '4', 'after.json']
  assert steps_of(made.output_dir) == [1, 2, 3]
  shutil.rmtree(steps(made) / '1')  # as --keep_last may do
  taken = []

  def counts(self, step):
    taken.append(step)
    return original(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TextBatches, '__call__', counts)
    with caplog.at_level('INFO'):
      assert sft.run(made)['steps'] == 4
  assert taken == [3]
  assert '--resume_step=1 was followed before' in caplog.text
  assert_same(weights_of(made.output_dir), weights_of(whole_run[0].output_dir))


def damage_numbers(step: Path) -> None:
  """Changes the last bits of one number: every file stays readable."""
  tree = read_tree(step / 'params')
  tree['final_norm/scale'] = tree['final_norm/scale'].at[3].multiply(1 + 2**-20)
  shutil.rmtree(step / 'params')
  orbax.save_tree(step / 'params', trees.unflatten(tree))


def damage_file(step: Path) -> None:
  largest = max(
    (p for p in step.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def remove_part(step: Path) -> None:
  shutil.rmtree(step / 'opt_state')


def remove_metadata(step: Path) -> None:
  shutil.rmtree(step / 'metadata')


@pytest.mark.parametrize(
  'damage', [damage_numbers, damage_file, remove_part, remove_metadata]
)
def test_a_damaged_newest_checkpoint_is_found_and_the_one_before_offered(
  whole_run, tmp_path, damage
):
  made = copied(whole_run, tmp_path, num_steps=4)
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  damage(tmp_path / 'run' / 'checkpoints' / '3')
  with pytest.raises(CheckpointError, match='checkpoints/3') as caught:
    sft.run(made)
  assert 'pass --resume_step=2 to go on' in caught.value.__notes__[0]
  sft.run(dataclasses.replace(made, resume_step=2))
  assert steps_of(made.output_dir) == [1, 2, 3, 4]
  assert (tmp_path / 'run' / 'set_aside' / '3').is_dir()
  assert_same(weights_of(made.output_dir), weights_of(whole_run[0].output_dir))


@pytest.mark.parametrize(
  ('damage', 'part'),
  [(damage_numbers, ''), (damage_file, 'params'), (remove_metadata, '')],
)
def test_damage_to_the_last_checkpoint_of_a_finished_run_is_found(
  whole_run, tmp_path, damage, part
):
  made = copied(whole_run, tmp_path)
  last = {'steps': 4, 'checkpoint': str(steps(made) / '4')}
  remove_part(steps(made) / '4')  # the optimizer's, which nothing needs any more
  assert sft.run(made) == last
  damage(steps(made) / '4' / part)
  with pytest.raises(CheckpointError, match='checkpoints/4') as caught:
    sft.run(made)
  assert caught.value.__notes__ == [
    'The checkpoint before it is that of step 3: pass --resume_step=3 to go on from '
    'there.'
  ]


def test_an_output_directory_is_looked_at_before_data(whole_run, tmp_path, no_data):
  made = copied(whole_run, tmp_path)
  (tmp_path / 'file').touch()
  new = str(tmp_path / 'new')
  for changes, message in (
    ({'learning_rate': 0.5}, r'\(learning_rate: was 0.001, now 0.5\)'),
    ({'resume_step': 7}, r'no checkpoint of step 7; it has \[1, 2, 3, 4\]'),
    ({'resume_step': 7, 'output_dir': new}, r'no checkpoint of step 7; it has \[\]'),
    ({'output_dir': str(tmp_path / 'file')}, 'is a file'),
  ):
    with pytest.raises(ValueError, match=message):
      sft.run(dataclasses.replace(made, **changes))
  (tmp_path / 'run' / 'config.json').write_text('{')
  with pytest.raises(common.OutputError, match=r'config\.json is damaged'):
    sft.run(made)
  assert {path.name for path in tmp_path.iterdir()} == {'run', 'file'}


def test_resuming_on_another_mesh_goes_on_with_the_same_numbers(whole_run, tmp_path):
  made = copied(
    whole_run,
    tmp_path,
    mesh='fsdp:4,data:1,tensor:2',
    grad_accumulation=2,  # and what else another mesh may need
    remat='full',
    attention_backend='blocks',
    loss_chunk=48,
    resume_step=2,
  )
  assert sft.run(made)['loss'] == pytest.approx(whole_run[1]['loss'], rel=1e-5)
  mine, others = weights_of(made.output_dir), weights_of(whole_run[0].output_dir)
  for name in mine:
    np.testing.assert_allclose(mine[name], others[name], atol=2e-5)


def test_a_dry_run_tells_the_memory_and_writes_nothing(model, tmp_path):
  made = make_config(
    model, tmp_path / 'run', dry_run=True, lora_rank=4, quantize='int8'
  )
  found = sft.run(made)
  assert not (tmp_path / 'run').exists()
  assert found['trainable'] < found['frozen'] < found['peak']
  held = sum(found[name] for name in ('trainable', 'optimizer', 'frozen', 'batch'))
  assert found['temporary'] > 0
  assert found['peak'] >= held + found['temporary']  # not so by the compiler for CPUs
  assert found['optimizer'] == pytest.approx(2 * found['trainable'], rel=1e-2)
  # Rows of 160 tokens: three int32 numbers and a boolean each, on four batch shards.
  assert found['batch'] == 8 * 160 * 13 / 4


def test_weights_that_are_not_finite_are_refused(tmp_path):
  import safetensors.numpy

  bad = Path(write_model(tmp_path / 'bad', dtype=np.float32))
  tensors = safetensors.numpy.load_file(bad / 'model.safetensors')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].copy()
  tensors[name][3, 5] = np.nan
  safetensors.numpy.save_file(tensors, bad / 'model.safetensors')
  with pytest.raises(CheckpointError, match='layers/mlp/up/kernel hold NaN'):
    sft.run(make_config(str(bad), tmp_path / 'run'))
  assert not list((tmp_path / 'run').glob('checkpoints/*'))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'trainable': 'regex:('}, r'is no pattern'),
    ({'trainable': 'everything'}, '--trainable=everything: want one of .*regex:'),
    ({'lora_plus_ratio': 4.0}, 'needs --lora_rank'),
    ({'adapter': 'runs/a', 'lora_rank': 4}, 'has its own rank'),
    ({'quantize': 'nf3'}, 'want one of nf4, int8'),
    ({'eval_every': 5}, 'needs --eval_data'),
    ({'lora_rank': -2}, '--lora_rank=-2: want at least 0'),
    ({'lora_rank': 2, 'lora_alpha': math.inf}, '--lora_alpha=inf: want a positive'),
    ({'lora_rank': 2, 'lora_dropout': 1.0}, r'--lora_dropout=1.0: want a number in'),
    ({'num_epochs': math.nan}, '--num_epochs=nan: want at least 0, and finite'),
    ({'num_epochs': 0.0, 'num_steps': 0}, 'One of --num_steps and --num_epochs must'),
    ({'num_steps': -4}, '--num_steps=-4: want at least 0'),
    ({'max_length': 1}, '--max_length=1: want at least 2'),
    ({'clip_norm': -1.0}, '--clip_norm=-1.0: want at least 0'),
    ({'lora_alpha': 8.0}, '--lora_alpha=8.0 is for adapters; it needs --lora_rank'),
    ({'lora_rslora': True}, '--lora_rslora=True is for adapters'),
    ({'lora_targets': 'qv'}, '--lora_targets=qv is for adapters'),
    ({'lora_dropout': 0.1}, '--lora_dropout=0.1 is for adapters'),
    ({'adapter': 'runs/a', 'lora_alpha': 8.0}, 'leave --lora_alpha=8.0 out'),
    ({'adapter': 'runs/a', 'lora_rslora': True}, 'leave --lora_rslora=True out'),
    ({'adapter': 'runs/a', 'lora_targets': 'qv'}, 'leave --lora_targets=qv out'),
    ({'overwrite': True, 'resume_step': 2}, '--overwrite deletes the run that'),
    ({'profile_steps': '4:6'}, '--profile_steps=4:6: want a FIRST below the 4 steps'),
  ],
)
def test_contradictory_flags_are_refused_at_once(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    make_config('tiny-0.2m', tmp_path / 'run', **changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'quantize': 'nf4'}, r'nf4 stores layers/\w+/\w+/kernel in few .* cannot be tra'),
    ({'trainable': 'regex:nothing_has_this_name'}, 'No parameter is trainable'),
    ({'trainable': 'lora'}, 'No parameter is trainable'),
    ({'lora_rank': 4, 'lora_targets': 'q_proj'}, 'q_proj'),
    ({'mesh': 'tensor:8'}, r'k/kernel \(2, 64, 2, 16\): dimension 2 .* divide over'),
  ],
)
def test_masks_that_do_not_fit_are_refused_before_data_are_read(
  model, tmp_path, no_data, changes, message
):
  with pytest.raises(ValueError, match=message):
    sft.run(make_config(model, tmp_path / 'run', **changes))
  assert not (tmp_path / 'run').exists()


def test_a_profile_after_the_last_step_is_refused_before_anything_is_written(
  model, tmp_path
):
  changes = {'num_steps': 0, 'num_epochs': 2.0, 'profile_steps': '40:42'}
  with pytest.raises(ValueError, match='FIRST below the '):
    sft.run(make_config(model, tmp_path / 'run', **changes))
  assert not (tmp_path / 'run').exists()
