"""Lanes: rows of the device loop, each handed the next sample when its own has ended.

B lanes stand in G groups of R. A group has W slots; each holds one prompt and what
is asked of its samples. Lanes of a group take samples from the slots in the order in
which these were filled, so that a slot is free again while the others still run.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mrjax.models.cache import KVCache, Lanes
from mrjax.sampling.logits import Array, Controls, row_keys


class Samples(flax.struct.PyTreeNode):
  """What is asked of samples, arrays with any leading axes (...).

  Attributes:
    controls: Temperature and filters, (...).
    seeds: uint32 seed of the request.
    problem_hashes: uint32 (..., 2), halves of a 64-bit hash of the problem's id.
    indices: uint32 index of the row among the samples of its problem.
    etas: float32 strength of guidance.
    max_new_tokens: int32.
    stop_ids: int32 (..., E) ids that end a row, -1 where there are fewer.
  """

  controls: Controls
  seeds: Array
  problem_hashes: Array
  indices: Array
  etas: Array
  max_new_tokens: Array
  stop_ids: Array


class Slots(flax.struct.PyTreeNode):
  """The prompts in slots, arrays with leading axes [G, W], or [N] of prompts to come.

  Attributes:
    samples: What is asked, with one more axis of the samples of a slot.
    lengths: int32 tokens of the prompt in the cache: all but its last.
    last_tokens: int32 last token of the prompt, which every sample starts from.
    max_lengths: int32 most tokens of the prompt with a completion.
    num_samples: int32 samples asked for; 0 in an empty slot.
    num_started: int32 samples that a lane has taken.
    order: int32; slots with a lower number are served first.
  """

  samples: Samples
  lengths: Array
  last_tokens: Array
  max_lengths: Array
  num_samples: Array
  num_started: Array
  order: Array


class LaneState(flax.struct.PyTreeNode):
  """What each lane is doing, arrays [B].

  Attributes:
    slots: int32 slot of the lane's group.
    samples: int32 number of the sample in that slot.
    tokens: int32 newest token, not yet in the cache.
    own_lengths: int32 tokens of the row in the cache: the prompt's last, and all drawn
      but the newest. It is the number of tokens drawn so far, too; 0 without a row.
    running: True while the lane has a row to go on with.
  """

  slots: jax.Array
  samples: jax.Array
  tokens: jax.Array
  own_lengths: jax.Array
  running: jax.Array


class Seen(flax.struct.PyTreeNode):
  """Which tokens a text holds, for repetition penalties.

  Attributes:
    prompts_GWV: bool, of the prompts in slots.
    rows_BV: bool, of the prompt and the row of each lane.
  """

  prompts_GWV: jax.Array
  rows_BV: jax.Array


class State(flax.struct.PyTreeNode):
  """All that lives on the device between dispatches.

  Attributes:
    cache: Of the decoder.
    slots: The prompts.
    lanes: The rows.
    seen: None where no row has a repetition penalty.
    guide_cache: None without a guide.
  """

  cache: KVCache
  slots: Slots
  lanes: LaneState
  seen: Seen | None = None
  guide_cache: KVCache | None = None


def empty_slots(shape: tuple[int, ...], num_samples: int, num_stops: int) -> Slots:
  """Slots without prompts, host arrays.

  Args:
    shape: Leading axes.
    num_samples: Most samples of a slot.
    num_stops: E, room for stop ids of a sample.
  """
  zeros = lambda dtype: np.zeros((*shape, num_samples), dtype)
  return Slots(
    samples=Samples(
      controls=Controls(
        temperature_B=zeros(np.float32),
        top_k_B=zeros(np.int32),
        top_p_B=zeros(np.float32) + 1,
        min_p_B=zeros(np.float32),
        repetition_penalty_B=zeros(np.float32) + 1,
      ),
      seeds=zeros(np.uint32),
      problem_hashes=np.zeros((*shape, num_samples, 2), np.uint32),
      indices=zeros(np.uint32),
      etas=zeros(np.float32),
      max_new_tokens=zeros(np.int32),
      stop_ids=np.full((*shape, num_samples, num_stops), -1, np.int32),
    ),
    lengths=np.zeros(shape, np.int32),
    last_tokens=np.zeros(shape, np.int32),
    max_lengths=np.ones(shape, np.int32),
    num_samples=np.zeros(shape, np.int32),
    num_started=np.zeros(shape, np.int32),
    order=np.zeros(shape, np.int32),
  )


def idle_lanes(num_lanes: int) -> LaneState:
  """Lanes without rows."""
  zeros = jnp.zeros(num_lanes, jnp.int32)
  return LaneState(zeros, zeros, zeros, zeros, jnp.zeros(num_lanes, bool))


def take_samples(slots: Slots, lanes: LaneState) -> tuple[Slots, LaneState]:
  """Hands each lane that is not running the next sample of its group."""
  G, W = slots.num_samples.shape
  idle_GR = ~lanes.running.reshape(G, -1)
  rank_GR = jnp.cumsum(idle_GR, axis=1) - 1
  turn_GW = jnp.argsort(slots.order, axis=1)
  left_GW = jnp.take_along_axis(slots.num_samples - slots.num_started, turn_GW, axis=1)
  ends_GW = jnp.cumsum(left_GW, axis=1)
  turns_GR = (rank_GR[..., None] >= ends_GW[:, None]).sum(axis=-1)
  starts_GR = idle_GR & (turns_GR < W)
  turns_GR = jnp.minimum(turns_GR, W - 1)
  slots_GR = jnp.take_along_axis(turn_GW, turns_GR, axis=1)
  at = lambda x_GW: jnp.take_along_axis(x_GW, slots_GR, axis=1)
  first_GR = jnp.take_along_axis(ends_GW - left_GW, turns_GR, axis=1)
  samples_GR = at(slots.num_started) + rank_GR - first_GR
  is_slot_GRW = slots_GR[..., None] == jnp.arange(W)
  taken_GW = (starts_GR[..., None] & is_slot_GRW).sum(axis=1)

  def change(new_GR, old_B):
    return jnp.where(starts_GR.reshape(-1), new_GR.reshape(-1), old_B)

  lanes = LaneState(
    slots=change(slots_GR, lanes.slots),
    samples=change(samples_GR, lanes.samples),
    tokens=change(at(slots.last_tokens), lanes.tokens),
    own_lengths=change(jnp.zeros_like(slots_GR), lanes.own_lengths),
    running=lanes.running | starts_GR.reshape(-1),
  )
  return slots.replace(num_started=slots.num_started + taken_GW), lanes


def num_refillable(slots: Slots, lanes: LaneState) -> jax.Array:
  """Idle lanes of groups with a slot that nobody needs any more, int32."""
  G, W = slots.num_samples.shape
  running_GR = lanes.running.reshape(G, -1)
  used_GW = (
    running_GR[..., None] & (lanes.slots.reshape(G, -1, 1) == jnp.arange(W))
  ).any(axis=1)
  free_GW = ~used_GW & (slots.num_started >= slots.num_samples)
  return jnp.where(free_GW.any(axis=1), (~running_GR).sum(axis=1), 0).sum()


def samples_of(slots: Slots, lanes: LaneState) -> Samples:
  """What is asked of the row of each lane, arrays [B, ...]."""
  groups_B = _groups(slots, lanes)
  return jax.tree.map(lambda x: x[groups_B, lanes.slots, lanes.samples], slots.samples)


def places_of(slots: Slots, lanes: LaneState) -> Lanes:
  """Where the rows stand in the cache."""
  at = lambda x_GW: jnp.asarray(x_GW)[_groups(slots, lanes), lanes.slots]
  return Lanes(lanes.slots, at(slots.lengths), lanes.own_lengths, at(slots.max_lengths))


def see_prompts(seen: Seen, slots: Slots, lanes: LaneState) -> Seen:
  """With the prompts of the rows that begin in place of what their lanes had seen."""
  begins_B = lanes.running & (lanes.own_lengths == 0)
  prompts_BV = seen.prompts_GWV[_groups(slots, lanes), lanes.slots]
  return seen.replace(rows_BV=jnp.where(begins_B[:, None], prompts_BV, seen.rows_BV))


def keys_of(samples: Samples, own_lengths_B: jax.Array) -> jax.Array:
  """A typed random key for the next token of each row."""
  keys_B = row_keys(samples.seeds, samples.problem_hashes, samples.indices)
  return jax.vmap(jax.random.fold_in)(keys_B, own_lengths_B)


def _groups(slots: Slots, lanes: LaneState) -> jax.Array:
  G = slots.lengths.shape[0]
  B = lanes.running.shape[0]
  return jnp.arange(B) // (B // G)
