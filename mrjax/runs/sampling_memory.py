"""How many rows a sampling run draws at once, by the memory of its devices."""

import logging
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mrjax.runs import machine
from mrjax.sampling.drawing import Models
from mrjax.sampling.memory import MemoryPlan, plan_memory
from mrjax.sampling.plan import plan
from mrjax.sampling.requests import Request
from mrjax.sharding.mesh import batch_shards

_MOST_LANES = {'cpu': 256}  # of a device; elsewhere:
_MOST_LANES_OF_ACCELERATORS = 1024
_SHARE = 0.9  # of the memory that `auto` fills


def rows_at_once(
  models: Models,
  mesh: Mesh,
  requests: Sequence[Request],
  *,
  cache_dtype: Any,
  max_batch: int,
  may_stop: bool,
  limit: int | None = None,
) -> int:
  """Most rows that run together: `max_batch`, or where it is 0 as many as are of use.

  Says in one line of the log what is planned.

  Args:
    models: What draws.
    mesh: To run on.
    requests: All of this process; where there are none, nothing is planned.
    cache_dtype: Of keys and values.
    max_batch: Rows on all data shards.
    may_stop: As for `plan`.
    limit: Bytes of a device; by default what `machine.device_memory` says.

  Raises:
    ValueError: A device has not the memory for it.
  """
  shards = batch_shards(mesh)
  if not requests:
    return max_batch or shards
  limit = limit or machine.device_memory(mesh)

  def planned(lanes: int) -> MemoryPlan:
    layout = plan(requests, max_lanes=lanes, shards=shards, may_stop=may_stop)
    return plan_memory(
      models,
      mesh,
      layout,
      cache_dtype=cache_dtype,
      penalises=any(request.penalises for request in requests),
    )

  rows = -(-sum(request.num_samples for request in requests) // shards)
  most = _MOST_LANES.get(mesh.devices.flat[0].platform, _MOST_LANES_OF_ACCELERATORS)
  asked = max_batch // shards
  choices = [1 << i for i in range(max(most, asked).bit_length())]
  choices = [c for c in choices if c < 2 * rows]
  if limit:
    # More lanes never take less.
    choices = [c for c in choices if planned(c).total <= _SHARE * limit]
  lanes = asked or max(choices, default=1)
  found = planned(lanes)
  of = f' of {limit / 1e9:.2f} GB' if limit else ''
  logging.info('Memory for %d rows: %s%s.', lanes * shards, found, of)
  if limit and found.total > (limit if max_batch else _SHARE * limit):
    remedy = (
      f'Pass --max_batch={max(choices) * shards} or less, or --max_batch=auto.'
      if choices
      else 'Split the weights with --mesh=tensor:N, or take --dtype=bfloat16 or '
      '--cache_dtype=int8.'
    )
    raise ValueError(
      f'{lanes * shards} rows at once need {found}, and a device has {limit / 1e9:.2f} '
      f'GB. {remedy}'
    )
  return max_batch or lanes * shards
