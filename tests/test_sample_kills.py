"""A sampling run that is killed again and again has the rows of one that was not."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax

from mrjax.records import JsonlAppender, Record, dump_line
from mrjax.runs import sample

TIMEOUT = 900  # seconds, of machines that are busy with other tests
SHARD = 'samples-00000-of-00001.jsonl'
NUM_ROWS = 2000
# What takes a run seconds to import; its processes come from one that has.
PRELOAD = ('mrjax.runs.sample', 'transformers.models.llama.configuration_llama')


def wait_for_the_kill(*_) -> None:
  time.sleep(TIMEOUT)


class Appender(JsonlAppender):
  """Writes until so many rows, and bytes of the next one, are in the file.

  A kill may come when any part of what is to be appended has been.
  """

  def __init__(self, path: Path, *, rows: int, bytes: int):
    super().__init__(path)
    self._rows, self._bytes = rows, bytes

  def append(self, records: Iterable[Record]) -> int:
    records = list(records)
    lines = [dump_line(record) for record in records]
    whole = self._rows - self.path.read_bytes().count(b'\n')
    if len(lines) > whole:
      self._file.write(b''.join(lines[:whole]) + lines[whole][: self._bytes])
      self._file.flush()
      wait_for_the_kill()
    return super().append(records)


def work(config: sample.Config, num_devices: int, moment: Any) -> None:
  """Samples until a moment comes; None: to the end."""
  jax.config.update('jax_num_cpu_devices', num_devices)
  if moment == 'before the settings':
    os.replace = wait_for_the_kill  # config.json never gets its name
  elif moment:
    sample.JsonlAppender = functools.partial(Appender, **moment)
  sample.run(config)


@contextlib.contextmanager
def started(
  config: sample.Config, *, num_devices: int, moment: Any = None
) -> Iterator[BaseProcess]:
  """A run in a process of its own, which does not outlive the block."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(PRELOAD))
  worker = context.Process(target=work, args=(config, num_devices, moment), daemon=True)
  worker.start()
  try:
    yield worker
  finally:
    worker.kill()
    worker.join()


def kill(worker: BaseProcess, seen: Callable[[], Any], wanted: Any) -> None:
  """Kill -9, once what is seen is what is wanted."""
  deadline = time.monotonic() + TIMEOUT
  while seen() != wanted:
    assert worker.is_alive(), 'it ended before it could be killed'
    assert time.monotonic() < deadline
    time.sleep(0.01)
  worker.kill()
  worker.join()
  assert worker.exitcode == -signal.SIGKILL


def test_two_thousand_rows_and_five_kills(tmp_path):
  whole = sample.Config(
    model='tiny-0.2m',
    data='arithmetic:test?size=125',
    prompt_template='qa',
    output_dir=str(tmp_path / 'whole'),
    num_samples=16,
    temperature=0.9,
    top_p=0.95,
    max_new_tokens=7,
    max_batch=64,
    logprobs=True,
    seed=5,
  )
  killed = dataclasses.replace(
    whole, output_dir=str(tmp_path / 'killed'), max_batch=144
  )
  folder = tmp_path / 'killed'
  shard = folder / SHARD

  def whole_lines() -> bytes:
    data = shard.read_bytes()
    return data[: data.rfind(b'\n') + 1]

  def seen() -> dict[str, int] | None:
    if not shard.exists():
      return None
    lines = whole_lines()
    return {'rows': lines.count(b'\n'), 'bytes': shard.stat().st_size - len(lines)}

  with started(whole, num_devices=1) as first:
    moment: Any = 'before the settings'
    with started(killed, num_devices=2, moment=moment) as worker:
      kill(worker, lambda: folder.exists() and any(folder.iterdir()), True)
    assert not (folder / 'config.json').exists()
    before = b''
    for rows, num_bytes in ((0, 0), (1, 37), (811, 0), (1999, 80)):
      moment = {'rows': rows, 'bytes': num_bytes}
      with started(killed, num_devices=2, moment=moment) as worker:
        kill(worker, seen, moment)
      assert seen() == moment
      assert whole_lines().startswith(before)  # what was there stays
      before = whole_lines()
    with started(killed, num_devices=2) as last:
      for worker in (last, first):
        worker.join(TIMEOUT)
        assert worker.exitcode == 0
    assert whole_lines().startswith(before)
  ours, theirs = (
    [json.loads(line) for line in (tmp_path / name / SHARD).read_text().splitlines()]
    for name in ('killed', 'whole')
  )
  name = lambda row: (row['problem_id'], row['sample_index'])
  assert len(ours) == len(theirs) == len(set(map(name, ours))) == NUM_ROWS
  assert sorted(ours, key=name) == sorted(theirs, key=name)
