"""Training runs in processes of their own, for tests that kill and join them."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrjax.runs import training_config

REPO = Path(__file__).parents[1]
TIMEOUT = 900  # seconds, of machines that are busy with other tests
WORKER = """
import importlib, json, logging, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', int(sys.argv[3]))
logging.basicConfig(format='%(message)s')
method = importlib.import_module(sys.argv[1])
method.run(method.Config(**json.loads(sys.argv[2])))
"""


@contextlib.contextmanager
def started(
  config: training_config.Config, num_processes: int = 1
) -> Iterator[list[subprocess.Popen]]:
  """A run on two devices, in one process or one in each of two, and its end.

  None of its processes outlives the block. Runs whose directories are neighbours share
  what they compile, which takes most of their time.
  """
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  arguments = [type(config).__module__, json.dumps(dataclasses.asdict(config))]
  workers: list[subprocess.Popen] = []
  try:
    for i in range(num_processes):
      environment = dict(os.environ) | {
        'JAX_COMPILATION_CACHE_DIR': str(Path(config.output_dir).parent / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      }
      if num_processes > 1:
        environment |= {
          'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
          'JAX_NUM_PROCESSES': str(num_processes),
          'JAX_PROCESS_ID': str(i),
        }
      workers.append(
        subprocess.Popen(
          [sys.executable, '-c', WORKER, *arguments, str(2 // num_processes)],
          cwd=REPO,
          env=environment,
          stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    yield workers
  finally:
    kill(workers)


def kill(workers: list[subprocess.Popen]) -> None:
  """Ends all at once, as a machine that goes away does; waits until they are gone."""
  for worker in workers:
    worker.kill()
  for worker in workers:
    worker.wait()


def finish(workers: list[subprocess.Popen]) -> str:
  """Waits for all to succeed, and returns what the first of them said."""
  said = [worker.communicate(timeout=TIMEOUT)[1] for worker in workers]
  for worker, text in zip(workers, said):
    assert worker.returncode == 0, text[-3000:]
  return said[0]


def last_step(output_dir: str | Path) -> int:
  """The last step that a run has reported; 0 before the first."""
  path = Path(output_dir) / 'metrics.jsonl'
  # A process that was killed may have left half a line, and one that begins the file
  # anew may be read between two writes.
  lines = path.read_text().splitlines() if path.is_file() else []
  steps = [0]
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      steps.append(json.loads(line)['step'])
  return max(steps)


def wait_for(
  output_dir: str | Path, workers: list[subprocess.Popen], step: int, *, before: int
) -> None:
  """Returns once the workers have trained to a step, while they go on.

  Args:
    output_dir: Of the run.
    workers: What `started` gave.
    step: To wait for; where an earlier process has reported as many already, the
      second one after its last is waited for.
    before: The last step that had been reported when the workers were started.
  """
  step = max(step, before + 2)
  deadline = time.monotonic() + TIMEOUT
  while time.monotonic() < deadline:
    if last_step(output_dir) >= step:
      assert all(worker.poll() is None for worker in workers), 'it ended too soon'
      return
    for worker in workers:
      assert worker.poll() is None, worker.communicate()[1][-3000:]
    time.sleep(0.01)
  pytest.fail(f'step {step} was not reached')
