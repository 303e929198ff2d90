"""The shard of rows that one process of a sampling run writes and goes on with."""

import contextlib
import dataclasses
import fcntl
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from mrjax.records import DataError, Record, read_numbered
from mrjax.runs.common import OutputError
from mrjax.sampling.requests import Request


@dataclasses.dataclass
class Totals:
  """Counts over rows."""

  rows: int = 0
  tokens: int = 0
  truncated: int = 0
  errors: int = 0
  kl: float = 0.0

  def add(self, record: Record) -> None:
    self.rows += 1
    self.tokens += record['num_tokens']
    self.truncated += record['finish_reason'] == 'length'
    self.errors += record['finish_reason'] == 'error'
    self.kl += record.get('kl_sum', 0.0)


def missing_requests(
  requests: Sequence[Request], shard: Path, totals: Totals
) -> Iterator[Request]:
  """The parts of `requests` without a row in `shard`; counts the rows there."""
  wanted = {request.problem_id: request.num_samples for request in requests}
  done: dict[str, set[int]] = {request.problem_id: set() for request in requests}
  if shard.stat().st_size:
    for line, record in read_numbered(shard, required=('problem_id', 'sample_index')):
      name, index = record['problem_id'], record['sample_index']
      if not 0 <= index < wanted.get(name, 0) or index in done[name]:
        raise DataError(
          shard,
          line,
          f'sample {index} of {name!r} is there twice or was never asked for: the file '
          'was changed, or the data set was. Choose another --output_dir',
        )
      done[name].add(index)
      totals.add(record)
  for request in requests:
    there = sorted(done[request.problem_id])
    edges = [-1, *there, request.num_samples]
    for before, after in itertools.pairwise(edges):
      if after - before > 1:
        yield dataclasses.replace(
          request, first_sample_index=before + 1, num_samples=after - before - 1
        )


@contextlib.contextmanager
def only_writer(shard: Path) -> Iterator[None]:
  """Refuses to go on while another process of this machine writes `shard`."""
  with shard.with_name(f'.{shard.name}.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise OutputError(
        f'{shard} is being written by another process. Wait for it, or choose another '
        '--output_dir.'
      ) from None
    yield


def check_shards(shard: Path, count: int) -> None:
  """Raises `OutputError` beside shards that another number of processes made."""
  others = sorted(
    path.name
    for path in shard.parent.glob('samples-*-of-*.jsonl')
    if not path.name.endswith(f'-of-{count:05d}.jsonl')
  )
  if others:
    raise OutputError(
      f'{shard.parent} holds {others[0]}, made by another number of processes than '
      f'{count}. Resume with as many, or choose another --output_dir.'
    )
