"""What a run reports of its steps: exact numbers for given seconds and operations."""

import logging

import numpy as np
import pytest
from tiny_runs import metrics_of

from mrjax.runs.watch import TrainingWatch
from mrjax.training.flops import StepFlops
from mrjax.training.optimizer import OptimizerConfig, make_schedule

STEPS = [
  {'seconds': 8.0, 'tokens': 30, 'pairs': 200, 'padding': 0.25, 'weight': 11.0},
  {'seconds': 0.5, 'tokens': 20, 'pairs': 150, 'padding': 0.5, 'weight': 7.0},
  {'seconds': 1.5, 'tokens': 40, 'pairs': 650, 'padding': 0.0, 'weight': 23.0},
]


def watch_steps(directory, *, peak=1e4, log_every=2, start_step=0):
  schedule = make_schedule(
    OptimizerConfig(learning_rate=0.6, schedule='cosine', warmup_steps=2), 3
  )
  watch = TrainingWatch(
    directory,
    start_step=start_step,
    num_steps=3,
    log_every=log_every,
    describe=lambda done: {'learning_rate': float(schedule(done - 1))},
    flops=StepFlops(per_token=60.0, per_pair=4.0),
    peak=peak,
    weight='supervised_tokens',
    tensorboard=False,
    wandb='',
  )
  for i, facts in enumerate(STEPS[start_step:], start_step):
    watch(i + 1, facts | {'loss': [3.0, 2.0, 1.0][i], 'grad_norm': float(i)})
  watch.close()
  return watch


def test_a_line_is_of_all_steps_since_the_last(tmp_path):
  summary = watch_steps(tmp_path).summary()
  first, last = metrics_of(tmp_path)
  assert (first['step'], last['step']) == (2, 3)
  assert first['loss'] == 2.5 and last['loss'] == 1.0
  assert first['grad_norm'] == 1.0
  assert first['supervised_tokens'] == 18.0
  assert first['padding'] == 0.375 and last['padding'] == 0.0
  assert first['tokens_per_second'] == pytest.approx(50 / 8.5)
  assert last['tokens_per_second'] == pytest.approx(40 / 1.5)
  # 60 operations a token and 4 a pair, over the seconds and the peak.
  assert first['mfu'] == pytest.approx((60 * 50 + 4 * 350) / 8.5 / 1e4)
  assert last['mfu'] == pytest.approx((60 * 40 + 4 * 650) / 1.5 / 1e4)
  assert not {'seconds', 'tokens', 'pairs', 'weight'} & first.keys()
  # The first step, which compiles, does not count.
  assert summary['tokens_per_second'] == pytest.approx(60 / 2.0)
  assert (summary['steps'], summary['loss']) == (3, 1.0)


def test_the_learning_rate_is_that_of_the_very_step(tmp_path):
  """Of two warm-up steps and a cosine over one: step 1 already takes half the peak."""
  watch_steps(tmp_path, log_every=1)
  rates = [line['learning_rate'] for line in metrics_of(tmp_path)]
  np.testing.assert_allclose(rates, [0.3, 0.6, 0.6], rtol=1e-6)


def test_no_share_of_a_peak_that_is_not_known(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    watch_steps(tmp_path, peak=None, start_step=1)
  (line,) = [line for line in metrics_of(tmp_path) if line['step'] == 3]
  assert 'mfu' not in line and 'tokens_per_second' in line
  assert 'step 2/3 padding 0.5 loss 2 ' in caplog.text
