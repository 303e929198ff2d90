"""A run that is killed again and again ends with the weights of one that was not."""

import dataclasses
import random
import signal

import numpy as np
from process_runs import finish, kill, last_step, started, wait_for
from tiny_runs import (
  assert_same,
  make_config,
  metrics_of,
  read_tree,
  weights_of,
  write_model,
)

NUM_STEPS = 60
NUM_KILLS = 5


def random_moments() -> list[int]:
  """Steps to kill at, 8 to 12 apart: further than a run goes on until it notices."""
  rng = random.Random(0)
  return [4 + 10 * i + rng.randrange(-2, 3) for i in range(NUM_KILLS)]


def kill_at(config, moment: int, num_processes: int = 1) -> None:
  before = last_step(config.output_dir)
  with started(config, num_processes) as workers:
    wait_for(config.output_dir, workers, moment, before=before)
    kill(workers)
    assert all(worker.returncode == -signal.SIGKILL for worker in workers)


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
  killed = make_config(model, tmp_path / 'killed', **changes)
  legs = [(killed, 1), (killed, 1), (killed, 2), (killed, 1)]
  legs.append((dataclasses.replace(killed, mesh='fsdp:1,data:2'), 1))
  with started(whole) as first:
    for (config, num_processes), moment in zip(legs, random_moments(), strict=True):
      kill_at(config, moment, num_processes)
    # A wish to stop, sent to the second of two processes, ends both after a save.
    before = last_step(killed.output_dir)
    with started(killed, 2) as workers:
      wait_for(killed.output_dir, workers, before + 2, before=before)
      workers[1].send_signal(signal.SIGTERM)
      assert 'Run the same command to go on' in finish(workers)
    assert last_step(killed.output_dir) < NUM_STEPS
    with started(killed) as workers:
      finish(workers)
    steps = [line['step'] for line in metrics_of(killed.output_dir)]
    assert steps == list(range(1, NUM_STEPS + 1))
    finish(first)
  assert_same(weights_of(killed.output_dir), weights_of(whole.output_dir))


def test_dropout_goes_on_where_a_kill_left_it(tmp_path):
  model = write_model(tmp_path / 'model')
  changes = {
    'mesh': 'fsdp:2,data:1',
    'lora_rank': 3,
    'lora_dropout': 0.4,
    'learning_rate': 0.05,
    'save_every': 4,
    'keep_last': 9,
    'num_steps': 20,
  }
  whole = make_config(model, tmp_path / 'whole', **changes)
  killed = make_config(model, tmp_path / 'killed', **changes)
  with started(whole) as first:
    kill_at(killed, 9)  # a save waits for the one before, so that step 4 is whole
    assert (tmp_path / 'killed' / 'checkpoints' / '4').is_dir()
    assert not (tmp_path / 'killed' / 'checkpoints' / '20').exists()
    with started(killed) as workers:
      finish(workers)
    finish(first)
  ours, theirs = (
    read_tree(tmp_path / name / 'checkpoints' / '20' / 'adapter')
    for name in ('killed', 'whole')
  )
  assert_same(ours, theirs)
  assert all(np.any(x) for x in theirs.values())
