"""What a user sees of a training run: log lines, a progress bar, metrics files."""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mrjax.runs.common import MetricsLog


class TrainingWatch:
  """Gathers the metrics of each step and reports every `log_every` of them.

  A line of `metrics.jsonl` holds the means of `loss` and `padding` over the steps since
  the last one, `tokens_per_second` (padding not counted), `supervised_tokens`,
  `grad_norm` of the last step, and what `describe` says. Only process 0 writes.
  """

  def __init__(
    self,
    directory: Path,
    *,
    start_step: int,
    num_steps: int,
    log_every: int,
    describe: Callable[[int], dict[str, float]],
    tensorboard: bool,
    wandb: str,
  ):
    self._log_every, self._num_steps = log_every, num_steps
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
    seconds = sum(m['seconds'] for m in window)
    line = {
      'loss': float(np.mean([m['loss'] for m in window])),
      'grad_norm': window[-1]['grad_norm'],
      'tokens_per_second': sum(m['tokens'] for m in window) / seconds,
      'supervised_tokens': sum(m['weight'] for m in window),
      'padding': float(np.mean([m['padding'] for m in window])),
    } | self._describe(done)
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
