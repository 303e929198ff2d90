"""A training command that gets SIGTERM saves, says how to go on and ends well."""

import os
import signal
import subprocess
import sys

from process_runs import REPO, TIMEOUT, kill, last_step, wait_for
from tiny_runs import steps_of


def test_a_command_that_is_told_to_stop_saves_and_succeeds(tmp_path):
  run = tmp_path / 'run'
  flags = {
    'model': 'tiny-0.2m',
    'data': 'arithmetic:train?size=24&steps=1',
    'prompt_template': 'qa',
    'output_dir': str(run),
    'batch_size': '2',
    'max_length': '160',
    'num_steps': '100000',  # more than the test waits for
    'log_every': '1',
    'tensorboard': 'false',
  }
  command = [sys.executable, '-m', 'experiments.train_sft']
  worker = subprocess.Popen(
    command + [f'--{name}={value}' for name, value in flags.items()],
    cwd=REPO,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    wait_for(run, [worker], 2, before=0)
    worker.send_signal(signal.SIGTERM)
    stdout, stderr = worker.communicate(timeout=TIMEOUT)
  finally:
    kill([worker])
  assert worker.returncode == 0, stderr[-3000:]
  (step,) = steps_of(run)
  assert 2 <= step == last_step(run) < 100000
  assert f'Stopped by SIGTERM after step {step} of 100000, which is saved.' in stderr
  assert 'Run the same command to go on.' in stderr
  assert f'{run}/checkpoints/{step}' in stdout
