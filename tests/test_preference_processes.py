"""DPO in two processes is DPO in one: its reference is computed by both together."""

import numpy as np
from process_runs import finish, started
from tiny_runs import metrics_of, weights_of, write_model

from mrjax.records import write_jsonl
from mrjax.runs import preference


def test_two_processes_train_against_one_precomputed_reference(tmp_path):
  write_jsonl(
    tmp_path / 'pairs.jsonl',
    [
      {
        'prompt': f'{i} + {i % 3}',
        'chosen': f' = {i + i % 3}',
        'rejected': f' = {9 * i}',
      }
      for i in range(1, 11)
    ],
  )
  fields = {
    'model': write_model(tmp_path / 'model'),
    'data': str(tmp_path / 'pairs.jsonl'),
    'reference': 'precomputed',
    'mesh': 'fsdp:2,data:1',
    'batch_size': 4,
    'num_steps': 3,
    'learning_rate': 1e-3,
    'max_length': 24,
    'log_every': 1,
    'tensorboard': False,
  }
  one, two = (
    preference.Config(output_dir=str(tmp_path / name), **fields)
    for name in ('one', 'two')
  )
  with started(one) as alone, started(two, 2) as together:
    finish(alone)
    finish(together)
  tables = [
    np.load(tmp_path / name / 'reference' / 'train.npy') for name in ('one', 'two')
  ]
  assert tables[0].shape == (10, 2) and (tables[0] < 0).all()
  np.testing.assert_allclose(*tables, rtol=1e-5)
  for mine, his in zip(metrics_of(two.output_dir), metrics_of(one.output_dir)):
    np.testing.assert_allclose(mine['loss'], his['loss'], rtol=1e-5)
  assert len(metrics_of(two.output_dir)) == 3
  before = weights_of(one.model)
  ours, theirs = weights_of(two.output_dir), weights_of(one.output_dir)
  assert ours.keys() == theirs.keys()
  for name in theirs:
    # A step of Adam is about the learning rate, whatever the gradient.
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
    assert np.abs(theirs[name] - before[name]).max() > 1e-4, name
