"""The host's side of the device loop: which prompt goes where, which row is whose."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from mrjax.sampling.drawing import Log
from mrjax.sampling.lanes import Slots, empty_slots
from mrjax.sampling.plan import Layout, slot_bucket, split
from mrjax.sampling.programs import Prompts
from mrjax.sampling.requests import Request, hash_problem_id

_COLUMNS = {  # lists of a row, and the arrays of a log that they come from
  'token_ids': 'tokens',
  'logprobs': 'logps',
  'sampling_logprobs': 'sampling_logps',
  'values': 'values',
  'kls': 'kls',
}


@dataclasses.dataclass
class Row:
  """A sample that a lane is drawing or has drawn; lists have one entry a token."""

  request: Request
  sample: int  # among those of the request
  slot: tuple[int, int]  # group and slot
  token_ids: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
  values: list[float] = dataclasses.field(default_factory=list)  # with a guide
  kls: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Job:
  """Samples first ... first + count - 1 of a request, for one slot."""

  request: Request
  first: int
  count: int
  rows: dict[int, Row] = dataclasses.field(default_factory=dict)
  num_ended: int = 0


class Schedule:
  """Puts requests in slots and gathers rows from the logs of dispatches.

  Groups and lanes are numbered through all shards: shard s has groups s * G ... and
  lanes s * B .... Only slots whose samples have all ended are filled again.
  """

  def __init__(self, requests: Sequence[Request], layout: Layout, *, shards: int):
    self.layout, self.shards = layout, shards
    self._queue = deque(
      _Job(request, part.start, len(part))
      for request in sorted(requests, key=lambda r: -len(r.prompt_ids))
      for part in split(request.num_samples, layout.slot_samples)
    )
    self._jobs: dict[tuple[int, int], _Job] = {}  # by group and slot
    self._num_filled = 0
    most = max((len(request.stop_ids) for request in requests), default=0)
    self.num_stops = 1 << max(3, (most - 1).bit_length())  # few shapes
    self._lane_rows: list[Row | None] = [None] * (shards * layout.lanes)

  @property
  def waiting(self) -> bool:
    """Whether some requests are in no slot yet."""
    return bool(self._queue)

  @property
  def done(self) -> bool:
    return not self._queue and not self._jobs

  def next_prompts(self) -> Iterator[Prompts]:
    """Prompts for the slots that are free, in one array for each length that occurs."""
    chosen: dict[int, list[list[tuple[int, int, _Job]]]] = {}
    # The group with the least left to do is served first; shards take turns.
    left: dict[int, int] = dict.fromkeys(range(self.shards * self.layout.groups), 0)
    for (group, _), job in self._jobs.items():
      left[group] += job.count - job.num_ended
    free = [
      (slot, left[group], group % self.layout.groups, group)
      for group in left
      for slot in range(self.layout.slots)
      if (group, slot) not in self._jobs
    ]
    for slot, _, _, group in sorted(free, key=lambda x: (x[1] > 0, x[1:3], x[0])):
      if not self._queue:
        break
      job = self._queue.popleft()
      self._jobs[group, slot] = job
      bucket = slot_bucket(len(job.request.prompt_ids))
      by_shard = chosen.setdefault(bucket, [[] for _ in range(self.shards)])
      by_shard[group // self.layout.groups].append((group, slot, job))
    for bucket, by_shard in chosen.items():
      yield self._prompts(bucket, by_shard)

  def gather(
    self, log: Log, running_B: np.ndarray
  ) -> tuple[list[Row], list[tuple[int, Row]]]:
    """Adds the tokens of a dispatch to their rows.

    Returns:
      Rows that have ended on the device; and lane and row of those that go on.
    """
    T = log.owners_TB.shape[0]
    owners = np.ascontiguousarray(log.owners_TB.T).ravel()  # lane after lane
    edges = np.flatnonzero(owners[1:] != owners[:-1]) + 1
    starts = np.union1d(edges, np.arange(0, owners.size, T))
    stops = np.append(starts[1:], owners.size)
    columns = {
      name: np.ascontiguousarray(getattr(log, f'{array}_TB').T).ravel()
      for name, array in _COLUMNS.items()
      if getattr(log, f'{array}_TB') is not None
    }
    touched: dict[int, tuple[int, Row]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist()):
      owner = int(owners[start])
      if owner < 0:
        continue
      lane = start // T
      row = self._row(lane, owner)
      for name, column in columns.items():
        getattr(row, name).extend(column[start:stop].tolist())
      touched[id(row)] = lane, row
      self._lane_rows[lane] = row
    going = [
      (lane, row)
      for lane, row in touched.values()
      if running_B[lane] and self._lane_rows[lane] is row
    ]
    still = {id(row) for _, row in going}
    ended = [row for key, (_, row) in touched.items() if key not in still]
    return ended, going

  def end(self, row: Row) -> None:
    """Says that a row has ended, here or on the device."""
    job = self._jobs[row.slot]
    job.num_ended += 1
    if job.num_ended == job.count:
      del self._jobs[row.slot]

  def _row(self, lane: int, owner: int) -> Row:
    slot, sample = divmod(owner, self.layout.slot_samples)
    place = lane // self.layout.group_size, slot
    job = self._jobs[place]
    if sample not in job.rows:
      job.rows[sample] = Row(job.request, job.first + sample, place)
    return job.rows[sample]

  def _prompts(
    self, bucket: int, by_shard: list[list[tuple[int, int, _Job]]]
  ) -> Prompts:
    """Arrays of one length, the prompts of each shard behind one another."""
    layout = self.layout
    size = layout.groups * layout.slots
    N = self.shards * size
    prompts = Prompts(
      tokens_NS=np.zeros((N, bucket), np.int32),
      groups_N=np.zeros(N, np.int32),
      slots_N=np.zeros(N, np.int32),
      entries=empty_slots((N,), layout.slot_samples, self.num_stops),
      number_1=np.asarray([len(jobs) for jobs in by_shard], np.int32),
    )
    for shard, jobs in enumerate(by_shard):
      for i, (group, slot, job) in enumerate(jobs, start=shard * size):
        ids = job.request.prompt_ids
        prompts.tokens_NS[i, : len(ids)] = ids
        prompts.groups_N[i] = group % layout.groups
        prompts.slots_N[i] = slot
        _describe(prompts.entries, i, job)
        prompts.entries.order[i] = self._num_filled
        self._num_filled += 1
    return prompts


def _describe(entries: Slots, i: int, job: _Job) -> None:
  """Writes a job into entry `i`."""
  request, samples = job.request, entries.samples
  all_params = request.params_by_sample()
  entries.lengths[i] = len(request.prompt_ids) - 1
  entries.last_tokens[i] = request.prompt_ids[-1]
  entries.max_lengths[i] = len(request.prompt_ids) + request.max_new_tokens
  entries.num_samples[i] = job.count
  samples.problem_hashes[i] = hash_problem_id(request.problem_id)
  first = request.first_sample_index + job.first
  samples.indices[i, : job.count] = np.arange(first, first + job.count)
  for j in range(job.count):
    params = all_params[job.first + j]
    samples.controls.temperature_B[i, j] = params.temperature
    samples.controls.top_k_B[i, j] = params.top_k
    samples.controls.top_p_B[i, j] = params.top_p
    samples.controls.min_p_B[i, j] = params.min_p
    samples.controls.repetition_penalty_B[i, j] = params.repetition_penalty
    samples.etas[i, j] = params.eta
    samples.seeds[i, j] = params.seed
    samples.max_new_tokens[i, j] = params.max_new_tokens
    samples.stop_ids[i, j, : len(params.stop_ids)] = params.stop_ids


@dataclasses.dataclass
class Utilisation:
  """How much of what the lanes did gave tokens.

  Attributes:
    row_steps: Lanes times steps.
    busy: Those that drew a token of a row.
  """

  row_steps: int = 0
  busy: int = 0

  def add(self, owners_TB: np.ndarray) -> None:
    busy_TB = owners_TB >= 0
    self.row_steps += int(busy_TB.any(axis=1).sum()) * owners_TB.shape[1]
    self.busy += int(busy_TB.sum())

  @property
  def share(self) -> float:
    return self.busy / max(self.row_steps, 1)
