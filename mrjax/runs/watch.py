"""What a user sees of a training run: log lines, a progress bar, metrics files."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mrjax.checkpoint.hf import peak_host_bytes
from mrjax.runs.metrics_log import MetricsLog
from mrjax.training.flops import StepFlops

_SUMMED = ('seconds', 'tokens', 'pairs', 'weight')  # over the steps of a line
_LAST = ('grad_norm',)


def peak_memory_bytes() -> int:
  """The most memory that one of this process's devices has held so far.

  Where devices do not count it, as on a CPU, what the process itself has held.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return max(s.get('peak_bytes_in_use', 0) for s in stats) or peak_host_bytes()


class TrainingWatch:
  """Gathers the metrics of each step and reports every `log_every` of them.

  A line of `metrics.jsonl` holds the means of `loss`, `padding` and what else the loss
  reports over the steps since the last one, `tokens_per_second` (padding not counted),
  `mfu` (model FLOPs utilisation, where the peak is known), the weight of the loss (such
  as `supervised_tokens`), `grad_norm` of the last step, `memory_gb` (the most that a
  device of this process, or on a CPU the process itself, has held so far), and what
  `describe` says. Only process 0 writes.
  """

  def __init__(
    self,
    directory: Path,
    *,
    start_step: int,
    num_steps: int,
    log_every: int,
    describe: Callable[[int], dict[str, float]],
    flops: StepFlops,
    peak: float | None,
    weight: str,
    tensorboard: bool,
    wandb: str,
  ):
    """Opens the files.

    Args:
      directory: Of the run.
      start_step: Steps done before.
      num_steps: Steps to have done in the end.
      log_every: Steps between reports.
      describe: What else to report, for a number of steps done.
      flops: Operations of a step.
      peak: Operations a second of all devices together, where that is known.
      weight: What to call the summed weight of the steps.
      tensorboard: Whether to write TensorBoard files.
      wandb: Project to log to; empty for none.
    """
    self._log_every, self._num_steps = log_every, num_steps
    self._flops, self._peak, self._weight = flops, peak, weight
    self._describe = describe
    self._window: list[dict[str, float]] = []
    self._last: dict[str, float] = {}
    self._tokens, self._seconds = 0.0, 0.0
    self._done = start_step
    self._log: MetricsLog | None = None
    self._bar: Any = None
    if jax.process_index() == 0:
      self._log = MetricsLog(
        directory, start_step=start_step, tensorboard=tensorboard, wandb=wandb
      )
      if sys.stderr.isatty():
        from tqdm import tqdm

        self._bar = tqdm(total=num_steps, initial=start_step, unit='step', desc='train')

  def __call__(self, done: int, metrics: dict[str, float]) -> None:
    """Takes the metrics of step `done` (from 1), as `loop.fit` gives them."""
    if self._last:  # the first step is mostly compilation
      self._tokens += metrics['tokens']
      self._seconds += metrics['seconds']
    self._last = metrics
    self._done = done
    self._window.append(metrics)
    if self._bar:
      self._bar.update()
    if done % self._log_every == 0 or done == self._num_steps:
      self._report(done)

  def _report(self, done: int) -> None:
    window, self._window = self._window, []
    total = {name: sum(m[name] for m in window) for name in _SUMMED}
    means = {name: float(np.mean([m[name] for m in window])) for name in window[-1]}
    line = {name: x for name, x in means.items() if name not in (*_SUMMED, *_LAST)}
    line |= {
      'grad_norm': window[-1]['grad_norm'],
      'tokens_per_second': total['tokens'] / total['seconds'],
      self._weight: total['weight'],
      'memory_gb': peak_memory_bytes() / 1e9,
    } | self._describe(done)
    if self._peak:
      flops = self._flops.of(tokens=total['tokens'], pairs=total['pairs'])
      line['mfu'] = flops / total['seconds'] / self._peak
    if self._log:
      self._log.write(done, line)
    if self._bar:
      self._bar.set_postfix_str(f'loss {line["loss"]:.4f}')
    else:
      text = ' '.join(f'{name} {value:.4g}' for name, value in line.items())
      logging.info('step %d/%d %s', done, self._num_steps, text)

  def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
    """Takes what an evaluation after step `done` found; names get `eval_` in front."""
    line = {f'eval_{name}': value for name, value in metrics.items()}
    if self._log:
      self._log.write(done, line)
    text = ' '.join(f'{name} {value:.4g}' for name, value in line.items())
    logging.info('step %d/%d %s', done, self._num_steps, text)

  def summary(self) -> dict[str, Any]:
    """Steps done, the last loss, and tokens a second without the first step."""
    return {
      'steps': self._done,
      'loss': self._last['loss'],
      'tokens_per_second': self._tokens / self._seconds if self._seconds else None,
    }

  def close(self) -> None:
    if self._log:
      self._log.close()
    if self._bar:
      self._bar.close()
