"""The training loop: it owns time, logs and checkpoints; the step stays pure."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.sharding.mesh import BATCH_AXES
from mrjax.training.step import TrainState


class NonFiniteLossError(FloatingPointError):
  """A metric of a training step is NaN or infinite; `step` counts from 1."""

  def __init__(self, step: int, name: str, value: float):
    super().__init__(f'The {name} of step {step} is {value}.')
    self.step = step


class NonFiniteEvaluationError(FloatingPointError):
  """A metric of the evaluation after a step is NaN or infinite."""

  def __init__(self, step: int, name: str, value: float):
    super().__init__(
      f'The {name} of the evaluation after step {step} is {value}. Lower '
      '--learning_rate, or look at the records of the evaluation.'
    )
    self.step = step


def check_evaluation(step: int, metrics: Mapping[str, float]) -> None:
  """Raises NonFiniteEvaluationError where a metric of an evaluation is not finite."""
  for name, value in metrics.items():
    if not math.isfinite(value):
      raise NonFiniteEvaluationError(step, name, value)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts [A, B, T] host arrays on the mesh, rows split over the batch axes.

  Every process holds the whole batch and hands over the rows its devices own, so the
  batch of a step is the same for any number of hosts.
  """
  sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
  return {
    name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    for name, x in batch.items()
  }


def fit(
  state: TrainState,
  train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
  get_batch: Callable[[int], dict[str, np.ndarray]],
  *,
  mesh: Mesh,
  start_step: int,
  num_steps: int,
  on_step: Callable[[int, dict[str, float]], None],
  save: Callable[[int, TrainState], None],
  save_every: int = 0,
  evaluate: Callable[[int, TrainState], None] | None = None,
  eval_every: int = 0,
  should_stop: Callable[[int], bool] = lambda done: False,
  profile: tuple[int, int, str] | None = None,
) -> tuple[int, TrainState]:
  """Trains from `start_step` to `num_steps`, or a stop, and saves the last state.

  Metrics of a step are read after the next one is launched, so the devices never
  wait for the host; a state is saved only once its loss, its gradient and its metrics
  are known to be finite.

  Args:
    state: The state after `start_step` steps.
    train_step: Compiled step; it may donate the state.
    get_batch: Host arrays [A, B, T] of a step, a function of the step number alone.
    mesh: Set while the step runs.
    start_step: Steps already done.
    num_steps: Steps to have done in the end.
    on_step: Called with the number of steps done and that step's metrics, to which
      `seconds`, `tokens` (not padding), `pairs` (of a token and one it sees) and
      `padding` (its share of all places) are added.
    save: Called with the number of steps done and the state.
    save_every: Steps between saves; 0 saves at the end alone.
    evaluate: Called likewise every `eval_every` steps, and before each save.
    eval_every: Steps between evaluations; 0 evaluates before saves alone.
    should_stop: Asked after each step, with the number of steps done; True ends the
      training there. The state is saved then, without an evaluation.
    profile: First step, last step (excluded) and directory of a profiler trace.

  Returns:
    The number of steps done, and the state.

  Raises:
    NonFiniteLossError: Names the step; nothing is saved from there on.
  """
  pending: tuple[int, dict, dict] | None = None
  clock = time.perf_counter()

  def finish_pending() -> None:
    nonlocal pending, clock
    if pending is None:
      return
    step, metrics, facts = pending
    pending = None
    values = {name: float(value) for name, value in metrics.items()}
    for key in ('loss', 'grad_norm', *values):
      if not math.isfinite(values[key]):
        name = 'gradient norm' if key == 'grad_norm' else key
        raise NonFiniteLossError(step, name, values[key])
    now = time.perf_counter()
    on_step(step, values | facts | {'seconds': now - clock})
    clock = now

  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    for step in range(start_step, num_steps):
      if profile and step == profile[0]:
        stack.enter_context(jax.profiler.trace(profile[2]))
      host_batch = get_batch(step)
      state, metrics = train_step(state, shard_batch(host_batch, mesh))
      finish_pending()
      pending = step + 1, metrics, count(host_batch)
      done = step + 1
      if profile and done == profile[1]:
        finish_pending()
        stack.close()
      stop = done < num_steps and should_stop(done)
      saves = stop or done == num_steps or _every(save_every, done)
      evaluates = not stop and (saves or _every(eval_every, done))
      if evaluate and evaluates:
        finish_pending()
        evaluate(done, state)
        clock = time.perf_counter()
      if saves:
        finish_pending()
        save(done, state)
      if stop:
        return done, state
  return num_steps, state


def _every(period: int, done: int) -> bool:
  return period > 0 and done % period == 0


def count(batch: dict[str, np.ndarray]) -> dict[str, Any]:
  """What `fit` says of a batch: `tokens`, `pairs` and `padding`."""
  real = batch['segments'] != 0
  num_tokens = int(real.sum())
  return {
    'tokens': num_tokens,
    'pairs': num_tokens + int(batch['positions'][real].sum()),
    'padding': 1 - num_tokens / real.size,
  }
