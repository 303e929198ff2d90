"""Which rows run together: requests cut into groups, groups gathered into batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mrjax.sampling.logits import Controls
from mrjax.sampling.programs import Rows
from mrjax.sampling.requests import Request, hash_problem_id

_SHORTEST_BUCKET = 32  # prompt tokens
_BATCHES_A_BUCKET = 8  # at least, for a shorter bucket to be used


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows of one request that share a prefill: samples first ... first + count - 1."""

  request: Request
  first: int
  count: int


@dataclasses.dataclass(frozen=True)
class Batch:
  """Groups that run together; every batch of a plan has the same number of rows."""

  groups: tuple[Group, ...]
  num_groups: int  # P; those beyond `groups` are empty
  group_size: int  # n
  prompt_bucket: int  # S, places for the longest prompt

  @property
  def max_new_tokens(self) -> int:
    return max(group.request.params.max_new_tokens for group in self.groups)

  def rows(self) -> Iterator[tuple[int, Request, int]]:
    """Row number, request and sample index of every row that is not empty."""
    for p, group in enumerate(self.groups):
      for j in range(group.count):
        index = group.request.first_sample_index + group.first + j
        yield p * self.group_size + j, group.request, index

  def prompt_array(self) -> np.ndarray:
    """Right-padded prompts, int32 [P, S]."""
    prompts_PS = np.zeros((self.num_groups, self.prompt_bucket), np.int32)
    for p, group in enumerate(self.groups):
      prompts_PS[p, : len(group.request.prompt_ids)] = group.request.prompt_ids
    return prompts_PS

  def row_arrays(self) -> Rows:
    """What the device needs to know about each row, as host arrays."""
    B = self.num_groups * self.group_size
    num_stops = max(len(group.request.params.stop_ids) for group in self.groups)
    rows = Rows(
      controls=Controls(
        temperature_B=np.zeros(B, np.float32),
        top_k_B=np.zeros(B, np.int32),
        top_p_B=np.ones(B, np.float32),
        min_p_B=np.zeros(B, np.float32),
      ),
      seeds_B=np.zeros(B, np.uint32),
      problem_hashes_B2=np.zeros((B, 2), np.uint32),
      sample_indices_B=np.zeros(B, np.uint32),
      prompt_lengths_B=np.ones(B, np.int32),
      max_new_tokens_B=np.zeros(B, np.int32),
      stop_ids_BE=np.full((B, _power_of_two(max(num_stops, 8))), -1, np.int32),
    )
    for p, group in enumerate(self.groups):
      request, params = group.request, group.request.params
      # Also for the empty rows of a group: the first one speaks for its prompt.
      shared = slice(p * self.group_size, (p + 1) * self.group_size)
      rows.prompt_lengths_B[shared] = len(request.prompt_ids)
      own = slice(shared.start, shared.start + group.count)
      rows.controls.temperature_B[own] = params.temperature
      rows.controls.top_k_B[own] = params.top_k
      rows.controls.top_p_B[own] = params.top_p
      rows.controls.min_p_B[own] = params.min_p
      rows.seeds_B[own] = params.seed
      rows.problem_hashes_B2[own] = hash_problem_id(request.problem_id)
      first = request.first_sample_index + group.first
      rows.sample_indices_B[own] = np.arange(first, first + group.count)
      rows.max_new_tokens_B[own] = params.max_new_tokens
      rows.stop_ids_BE[own, : len(params.stop_ids)] = params.stop_ids
    return rows


def plan_batches(
  requests: Sequence[Request], *, max_rows: int, shards: int
) -> list[Batch]:
  """Batches that hold every sample of `requests` once, longest prompts first.

  Args:
    requests: In any order.
    max_rows: Most rows of a batch, at least `shards`.
    shards: Devices the rows are split over; groups are never split.
  """
  if not requests:
    return []
  size = _group_size(requests, limit=max_rows // shards)
  groups = [
    Group(request, first, min(size, request.num_samples - first))
    for request in sorted(requests, key=lambda r: -len(r.prompt_ids))
    for first in range(0, request.num_samples, size)
  ]
  # Few groups run in a small batch; powers of two bound the number of programs.
  needed = shards * _power_of_two(-(-len(groups) // shards))
  most = max_rows // size // shards * shards
  num_groups = min(needed, most)
  starts = range(0, len(groups), num_groups)
  batches: list[Batch] = []
  for number, start in enumerate(starts):
    bucket = prompt_bucket(len(groups[start].request.prompt_ids))
    # A new bucket costs compiling, which only several batches of shorter prompts repay.
    if batches and len(starts) - number < _BATCHES_A_BUCKET:
      bucket = batches[-1].prompt_bucket
    members = tuple(groups[start : start + num_groups])
    batches.append(Batch(members, num_groups, size, bucket))
  return batches


def prompt_bucket(length: int) -> int:
  """The power of two that has room for `length` tokens."""
  return max(_SHORTEST_BUCKET, _power_of_two(length))


def place_buckets(max_new_tokens: int) -> list[int]:
  """Rising numbers of places for new tokens; the last has room for all.

  Attention then reads 5/8 of what it would with all places from the start. Each number
  is one more program to compile, so short completions get fewer.
  """
  rounded = -(-max_new_tokens // 16) * 16
  parts = min(4, max(1, rounded // 48))
  return [-(-rounded * part // parts // 16) * 16 for part in range(1, parts + 1)]


def _group_size(requests: Sequence[Request], *, limit: int) -> int:
  """Rows a group, at most `limit`, for the fewest tokens read and drawn in all."""

  def cost(size: int) -> int:
    return sum(
      -(-request.num_samples // size)
      * (size * request.params.max_new_tokens + len(request.prompt_ids))
      for request in requests
    )

  counts = {request.num_samples for request in requests}
  # Even shares of every count that occurs: 100 samples at a limit of 64 go as 2 x 50.
  sizes = {-(-count // -(-count // limit)) for count in counts}
  return min(sorted(sizes, reverse=True), key=cost)


def _power_of_two(number: int) -> int:
  return 1 << max(0, number - 1).bit_length()
