"""SIGTERM as a wish to stop, noticed by all processes between the same two steps."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Catches SIGTERM while it is entered; ask `reached` after every step.

  With several processes JAX's preemption service listens instead: it catches SIGTERM on
  any of them and names one step at which all of them stop.
  """

  def __init__(self) -> None:
    self._caught = threading.Event()
    self._previous: object = None
    # A signal handler can be set in the main thread alone.
    self._listens = (
      jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    )

  def __enter__(self) -> 'StopSignal':
    if self._listens:
      self._previous = signal.signal(signal.SIGTERM, self._catch)
    return self

  def __exit__(self, *_: object) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

  def reached(self, step: int) -> bool:
    """Whether to stop now that `step` steps are done."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._caught.is_set()

  def _catch(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._caught.set()
