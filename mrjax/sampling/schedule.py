"""The host's side of the device loop: which prompt goes where, which row is whose."""

import dataclasses
import heapq
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
  rows: dict[int, Row] = dataclasses.field(default_factory=dict)  # those started
  num_ended: int = 0

  @property
  def num_unstarted(self) -> int:
    return self.count - len(self.rows)

  def split_off(self, count: int) -> '_Job':
    """Gives up its last samples, which no lane has taken."""
    self.count -= count
    return _Job(self.request, self.first + self.count, count)


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
    # Of the newest job of each slot, which may have ended.
    self._num_samples = np.zeros((shards * layout.groups, layout.slots), np.int32)
    self._num_filled = 0
    most = max((len(request.stop_ids) for request in requests), default=0)
    self.num_stops = 1 << max(3, (most - 1).bit_length())  # few shapes
    self._lane_rows: list[Row | None] = [None] * (shards * layout.lanes)

  @property
  def waiting(self) -> bool:
    """Whether there are samples that no lane has taken."""
    return bool(self._queue) or any(job.num_unstarted for job in self._jobs.values())

  @property
  def done(self) -> bool:
    return not self._queue and not self._jobs

  def next_prompts(self) -> Iterator[Prompts]:
    """Prompts for the slots that are free, in one array for each length that occurs."""
    chosen: dict[int, list[list[tuple[int, int, _Job]]]] = {}
    # The group with the least to do is served first; shards take turns.
    left = self._left()
    turns = [(left[g], g % self.layout.groups, g) for g in self._with_free_slot()]
    heapq.heapify(turns)
    while self._queue and turns:
      *_, group = heapq.heappop(turns)
      slots = range(self.layout.slots)
      slot, *more = (slot for slot in slots if (group, slot) not in self._jobs)
      job = self._queue.popleft()
      self._jobs[group, slot] = job
      self._num_samples[group, slot] = job.count
      left[group] += job.count
      if more:
        heapq.heappush(turns, (left[group], group % self.layout.groups, group))
      bucket = slot_bucket(len(job.request.prompt_ids))
      by_shard = chosen.setdefault(bucket, [[] for _ in range(self.shards)])
      by_shard[group // self.layout.groups].append((group, slot, job))
    for bucket, by_shard in chosen.items():
      yield self._prompts(bucket, by_shard)

  def share_out(self) -> np.ndarray | None:
    """Where no request waits, leaves samples of busy groups to groups with idle lanes.

    The group with the fewest rows to come gets half of what it has less than the one
    with the most; its prompt is then read once more. `next_prompts` has the new jobs.

    Returns:
      int32 [groups of all shards, slots], samples that each slot now has; None where
      they are what they were.
    """
    layout = self.layout
    if self._queue:
      return None
    left = self._left()
    givers = {place: job for place, job in self._jobs.items() if job.num_unstarted}
    for taker in sorted(self._with_free_slot(), key=lambda g: left[g]):
      if not givers:
        break
      place = max(givers, key=lambda p: (left[p[0]], givers[p].num_unstarted))
      job, more = givers[place], left[place[0]] - left[taker]
      count = min(job.num_unstarted, more // 2)
      if left[taker] >= layout.group_size or count < 1:
        break
      self._queue.append(job.split_off(count))
      self._num_samples[place] = job.count
      left[place[0]] -= count
      left[taker] += count
      if not job.num_unstarted:
        del givers[place]
      if job.count == job.num_ended:
        del self._jobs[place]
    return self._num_samples.copy() if self._queue else None

  def most_idle(self) -> np.ndarray:
    """For each shard, how many lanes may idle before the host should look, int32.

    It has prompts for lanes that will idle, and none for those that do now.
    """
    layout, left = self.layout, self._left()
    most = np.full(self.shards, layout.lanes, np.int32)
    if self.waiting:
      most[:] = layout.lanes // 16
      for group in self._with_free_slot():
        most[group // layout.groups] += max(0, layout.group_size - left[group])
    return most

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

  def _left(self) -> dict[int, int]:
    """Rows that each group has still to end."""
    left = dict.fromkeys(range(self.shards * self.layout.groups), 0)
    for (group, _), job in self._jobs.items():
      left[group] += job.count - job.num_ended
    return left

  def _with_free_slot(self) -> list[int]:
    layout = self.layout
    return [
      group
      for group in range(self.shards * layout.groups)
      if any((group, slot) not in self._jobs for slot in range(layout.slots))
    ]

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
