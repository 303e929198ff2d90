"""Symbolic equality of LaTeX answers by math-verify, in worker processes.

Model text can make a computer algebra system run for hours or ask for all memory, so it
never runs in this process: a worker that exceeds its limits is ended and replaced, and
the comparison counts as unequal.
"""

import atexit
import collections
import contextlib
import functools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

MAX_WORKERS = 8
CPU_SECONDS = 5.0  # of one comparison; CPU time, so a busy machine changes no grade
MEMORY_BYTES = 2 << 30
_WALL_FACTOR = 12  # a worker that neither works nor answers is ended after this
_START_SECONDS = 120.0
_CACHE_SIZE = 1 << 16
_MAX_CHARACTERS = 10_000

_WORKER_FILE = Path(__file__).with_name('symbolic_worker.py')


class _WorkerGone(Exception):
  """A worker ended or did not answer; `timed_out` says whether it ran out of time."""

  def __init__(self, timed_out: bool):
    super().__init__('timed out' if timed_out else 'ended')
    self.timed_out = timed_out


class _Worker:
  def __init__(self, cpu_seconds: float, memory_bytes: int):
    self._cpu_seconds = cpu_seconds
    # -P: the folder of the script stays out of the import path.
    self._process = subprocess.Popen(
      [sys.executable, '-P', _WORKER_FILE, str(cpu_seconds), str(memory_bytes)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
    )
    try:
      ready = self._read(_START_SECONDS)
    except _WorkerGone as error:
      raise RuntimeError(
        f'the math-verify worker {error} before it was ready; try: '
        f'{sys.executable} -c "import math_verify"'
      ) from None
    if ready != b'r':
      self.kill()
      raise ModuleNotFoundError(
        "rule 'boxed_symbolic' needs math-verify: pip install math-verify"
      )

  def compare(self, gold: str, predicted: str) -> bool:
    line = json.dumps({'gold': gold, 'predicted': predicted}) + '\n'
    try:
      assert self._process.stdin is not None
      self._process.stdin.write(line.encode())
    except OSError:
      self.kill()
      raise _WorkerGone(timed_out=False) from None
    return self._read(self._cpu_seconds * _WALL_FACTOR) == b'1'

  def _read(self, seconds: float) -> bytes:
    """Returns the next byte of the worker, which is ended when none comes."""
    assert self._process.stdout is not None
    descriptor = self._process.stdout.fileno()
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
      selector.register(descriptor, selectors.EVENT_READ)
      answered = selector.select(max(0.0, deadline - time.monotonic()))
    reply = os.read(descriptor, 1) if answered else b''
    if reply:
      return reply
    code = self.kill()
    raise _WorkerGone(timed_out=not answered or code == -signal.SIGPROF)

  def kill(self) -> int:
    """Ends the process, if it still runs, and returns its exit code."""
    process = self._process
    for pipe in (process.stdin, process.stdout):
      if pipe is not None:
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
      return process.wait(timeout=0.5)  # it ends by itself: its input is closed
    process.kill()
    return process.wait()


class Verifier:
  """A pool of worker processes that compare answers; safe to call from threads.

  Workers start when they are needed. A comparison that ends its worker for another
  reason than time is tried once more in a fresh one.

  Attributes:
    counts: How many comparisons ended as 'timeout' or 'crash' (out of memory).
  """

  def __init__(
    self,
    *,
    num_workers: int | None = None,
    cpu_seconds: float = CPU_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
  ):
    num_workers = num_workers or min(MAX_WORKERS, os.cpu_count() or 1)
    self.counts: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._make_worker = functools.partial(_Worker, cpu_seconds, memory_bytes)
    self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
    self._num_workers = num_workers
    for _ in range(num_workers):
      self._idle.put(None)  # a place for a worker that is not started
    self._outcome = functools.lru_cache(maxsize=_CACHE_SIZE)(self._compare)

  def is_equal(self, predicted: str, gold: str) -> bool:
    """Says whether two LaTeX answers are equal as strings or as mathematics."""
    if predicted == gold:
      return True
    outcome = self._outcome(predicted, gold)
    if outcome in ('timeout', 'crash'):
      with self._lock:
        self.counts[outcome] += 1
    return outcome == 'equal'

  def _compare(self, predicted: str, gold: str) -> str:
    if max(len(predicted), len(gold)) > _MAX_CHARACTERS:
      return 'different'
    for _ in range(2):
      try:
        with self._borrow() as worker:
          return 'equal' if worker.compare(gold, predicted) else 'different'
      except _WorkerGone as error:
        if error.timed_out:
          return 'timeout'
    return 'crash'

  @contextlib.contextmanager
  def _borrow(self) -> Iterator[_Worker]:
    worker = self._idle.get()
    healthy = None
    try:
      worker = worker or self._make_worker()
      yield worker
      healthy = worker
    finally:
      if worker is not None and healthy is None:
        worker.kill()
      self._idle.put(healthy)

  def close(self) -> None:
    """Ends the workers; a later comparison starts new ones."""
    workers = [self._idle.get() for _ in range(self._num_workers)]
    for worker in workers:
      if worker is not None:
        worker.kill()
      self._idle.put(None)

  def __enter__(self) -> 'Verifier':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


@functools.cache
def _make_default_verifier() -> Verifier:
  verifier = Verifier()
  atexit.register(verifier.close)
  return verifier


_default_lock = threading.Lock()


def default_verifier() -> Verifier:
  """Returns the verifier of this process; its workers end with it."""
  with _default_lock:
    return _make_default_verifier()


def is_equal(predicted: str, gold: str) -> bool:
  """Says whether two LaTeX answers are equal, with the verifier of this process."""
  return default_verifier().is_equal(predicted, gold)
