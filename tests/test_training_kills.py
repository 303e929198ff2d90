"""A run that is killed again and again ends with the weights of one that was not."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import assert_same, make_config, metrics_of, weights_of, write_model

from mrjax.runs import sft

REPO = Path(__file__).parents[1]
NUM_STEPS = 60
WORKER = """
import json, logging, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', int(sys.argv[2]))
logging.basicConfig(format='%(message)s')
from mrjax.runs import sft
sft.run(sft.Config(**json.loads(sys.argv[1])))
"""


def start(made: sft.Config, num_processes: int = 1) -> list[subprocess.Popen]:
  """Starts a run on two devices, in one process or one in each of two."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  workers = []
  for i in range(num_processes):
    environment = dict(os.environ)
    if num_processes > 1:
      environment |= {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(num_processes),
        'JAX_PROCESS_ID': str(i),
      }
    command = [sys.executable, '-c', WORKER, json.dumps(dataclasses.asdict(made))]
    workers.append(
      subprocess.Popen(
        [*command, str(2 // num_processes)],
        cwd=REPO,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return workers


def finish(workers: list[subprocess.Popen]) -> str:
  """Waits for all to succeed, and returns what the first of them said."""
  said = [worker.communicate(timeout=900)[1] for worker in workers]
  for worker, text in zip(workers, said):
    assert worker.returncode == 0, text[-3000:]
  return said[0]


def wait_for(made: sft.Config, workers: list[subprocess.Popen], step: int) -> None:
  """Returns once a step is reported, while the run goes on."""
  path = Path(made.output_dir) / 'metrics.jsonl'
  deadline = time.monotonic() + 900
  while time.monotonic() < deadline:
    if path.is_file() and f'"step": {step},' in path.read_text():
      assert all(worker.poll() is None for worker in workers), 'it ended too soon'
      return
    for worker in workers:
      assert worker.poll() is None, worker.communicate()[1][-3000:]
    time.sleep(0.01)
  pytest.fail(f'step {step} was not reached')


def test_five_kills_two_processes_and_another_mesh_leave_no_trace(tmp_path):
  model = write_model(tmp_path / 'model')
  changes = {
    'mesh': 'fsdp:2,data:1',
    'save_every': 3,
    'keep_last': 2,
    'num_steps': NUM_STEPS,
    # A norm over all weights is summed in another order on another mesh.
    'clip_norm': 0.0,
  }
  whole = make_config(model, tmp_path / 'whole', **changes)
  first = start(whole)
  killed = make_config(model, tmp_path / 'killed', **changes)
  moments = sorted(random.Random(0).sample(range(4, NUM_STEPS - 6), 5))
  legs = [(killed, 1), (killed, 1), (killed, 2), (killed, 1)]
  legs.append((dataclasses.replace(killed, mesh='fsdp:1,data:2'), 1))
  for (made, num_processes), moment in zip(legs, moments):
    workers = start(made, num_processes)
    wait_for(made, workers, moment)
    for worker in workers:
      os.kill(worker.pid, signal.SIGKILL)
    for worker in workers:
      worker.communicate()
    assert len([x for x in metrics_of(made.output_dir) if 'loss' in x]) < NUM_STEPS
  # A wish to stop, sent to the second of two processes, ends both after a save.
  workers = start(killed, 2)
  wait_for(killed, workers, moments[-1] + 2)
  os.kill(workers[1].pid, signal.SIGTERM)
  said = finish(workers)
  assert 'Run the same command to go on' in said
  finish(start(killed))
  steps = [line['step'] for line in metrics_of(killed.output_dir)]
  assert steps == list(range(1, NUM_STEPS + 1))
  finish(first)
  assert_same(weights_of(killed.output_dir), weights_of(whole.output_dir))
