"""Progress of long work over rows: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """Shows rows done, tokens a second and the time left. Use it as a context manager."""

  def __init__(self, what: str, *, total: int, done: int = 0, shown: bool = True):
    """Starts the clock.

    Args:
      what: A verb, such as 'sample'.
      total: Rows in all.
      done: Rows of them that were done before.
      shown: False for all processes but one.
    """
    self._what, self._total, self._done, self._before = what, total, done, done
    self._tokens = 0
    self._compile_seconds = 0.0
    self._began = self._told = time.monotonic()
    self._shown = shown
    self._bar: Any = None
    if shown and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, initial=done, unit='row', desc=what)

  @property
  def tokens_per_second(self) -> float:
    """Since the start, of the rows that were done since, compilation left out."""
    seconds = time.monotonic() - self._began - self._compile_seconds
    return self._tokens / max(seconds, 1e-9)

  def add(self, *, rows: int, tokens: int, compile_seconds: float = 0.0) -> None:
    """Counts finished rows and the tokens in them.

    Args:
      rows: Finished since the last call.
      tokens: In these rows.
      compile_seconds: Spent on compilation since the start.
    """
    self._done += rows
    self._tokens += tokens
    self._compile_seconds = compile_seconds
    if self._bar:
      self._bar.set_postfix_str(
        f'{self.tokens_per_second:,.0f} tokens/s', refresh=False
      )
      self._bar.update(rows)
      return
    now = time.monotonic()
    ended = self._done >= self._total
    if self._shown and (ended or now - self._told >= _SECONDS_BETWEEN_LINES):
      self._told = now
      new = max(self._done - self._before, 1)
      left = (self._total - self._done) * (now - self._began) / new
      logging.info(
        '%s: %s of %s rows, %s tokens/s, %s left',
        self._what,
        f'{self._done:,}',
        f'{self._total:,}',
        f'{self.tokens_per_second:,.0f}',
        time.strftime('%H:%M:%S', time.gmtime(left)),
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: Any) -> None:
    if self._bar:
      self._bar.close()
