"""How requests are laid out over lanes, groups and slots; numbers only."""

import dataclasses
import itertools
from collections.abc import Sequence

from mrjax.models.attention import TILE
from mrjax.sampling.requests import Request

MAX_GROUP = 32  # lanes that share slots


@dataclasses.dataclass(frozen=True)
class Layout:
  """The shapes of a run on one data shard; `lanes` is `groups * group_size`.

  Attributes:
    groups: G.
    group_size: R, lanes of a group.
    slots: W, prompts that a group holds.
    slot_places: S, tokens that a slot has room for.
    slot_samples: N, most samples of a slot.
    place_buckets: Rising numbers C of own places that are used; the last is enough for
      every row.
  """

  groups: int
  group_size: int
  slots: int
  slot_places: int
  slot_samples: int
  place_buckets: tuple[int, ...]

  @property
  def lanes(self) -> int:
    return self.groups * self.group_size


def plan(
  requests: Sequence[Request], *, max_lanes: int, shards: int, may_stop: bool
) -> Layout:
  """A layout for requests, at least one.

  Where all rows fit at once, or all will end together, each group has one slot and as
  many lanes as can share it. Otherwise a group has half as many lanes as a prompt has
  samples, and a second slot: its lanes then go on with the next prompt while the last
  rows of the one before end.

  Args:
    requests: What is asked for.
    max_lanes: Most lanes of a shard, at least 1.
    shards: Parts that the requests are shared out to.
    may_stop: Whether rows may end for a reason that the requests do not name.
  """
  counts = sorted(request.num_samples for request in requests)
  parts = lambda size: sum(-(-count // size) for count in counts)
  sizes = [1 << i for i in range(MAX_GROUP.bit_length())]
  sizes = [size for size in sizes if size <= min(counts[-1], max_lanes)]
  fitting = [s for s in sizes if -(-parts(s) // shards) * s <= max_lanes]
  if fitting or (_equal_lengths(requests) and not may_stop):
    # Up to a tenth of the lanes idle, for prompts that more of them share.
    rows = sum(counts)
    size = max(s for s in fitting or sizes if parts(s) * s <= 1.1 * rows or s == 1)
    slots, samples = 1, size
  else:
    size = max(s for s in sizes if 2 * s <= counts[len(counts) // 2] or s == 1)
    slots, samples = 2, max(len(part) for part in split(counts[-1], 4 * size))
  return Layout(
    # In powers of two: few shapes, however many requests a call has.
    groups=min(_power_of_two(-(-parts(size) // shards)), max_lanes // size),
    group_size=size,
    slots=slots,
    slot_places=slot_bucket(max(len(request.prompt_ids) for request in requests)),
    slot_samples=samples,
    place_buckets=place_buckets(max(request.max_new_tokens for request in requests)),
  )


def split(count: int, most: int) -> list[range]:
  """The numbers below `count` in parts of about equal size, at most `most`."""
  parts = -(-count // most)
  edges = [count * part // parts for part in range(parts + 1)]
  return [range(*pair) for pair in itertools.pairwise(edges)]


def slot_bucket(length: int) -> int:
  """The power of two, at least a tile of attention, with room for `length` tokens."""
  return max(TILE, _power_of_two(length))


def text_bucket(length: int) -> int:
  """The power of two, at least 32, with room for a text of `length` tokens."""
  return max(32, _power_of_two(length))


def place_buckets(max_new_tokens: int) -> tuple[int, ...]:
  """Rising numbers of own places, multiples of a tile; the last has room for all.

  Attention then reads less than with all places from the start. Each number is one
  more program to compile, so there are at most four.
  """
  tiles = -(-max_new_tokens // TILE)
  parts = min(4, tiles)
  return tuple(-(-tiles * part // parts) * TILE for part in range(1, parts + 1))


def _equal_lengths(requests: Sequence[Request]) -> bool:
  """Whether all rows are known to end after the same number of tokens."""
  if any(request.stop_ids for request in requests):
    return False
  lengths = {p.max_new_tokens for r in requests for p in set(r.params_by_sample())}
  return len(lengths) == 1


def _power_of_two(number: int) -> int:
  return 1 << max(0, number - 1).bit_length()
