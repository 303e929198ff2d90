"""The device programs of sampling, as pure functions: fill slots, go on, score."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.models.cache import empty_cache
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling import prefill
from mrjax.sampling.drawing import Log, Models, after_token, draw_tokens
from mrjax.sampling.lanes import (
  Seen,
  Slots,
  State,
  empty_slots,
  idle_lanes,
  num_refillable,
)
from mrjax.sampling.logits import Array, mark_seen
from mrjax.sampling.plan import Layout
from mrjax.sharding.mesh import BATCH, BATCH_AXES, batch_shards, constrain

_BY_STEP = PartitionSpec(None, BATCH_AXES)


class Prompts(NamedTuple):
  """Prompts to put in slots, N of them; those from `number` on are none.

  Attributes:
    tokens_NS: int32, right-padded.
    groups_N: int32 group of each.
    slots_N: int32 slot.
    entries: What the slots hold then, leading axis N.
    number_1: int32.
  """

  tokens_NS: Array
  groups_N: Array
  slots_N: Array
  entries: Slots
  number_1: Array


def empty_state(
  models: Models,
  cache_dtype: Any,
  layout: Layout,
  *,
  num_places: int,
  shards: int,
  num_stops: int,
  penalises: bool = False,
) -> State:
  """A state without rows, of all shards.

  Args:
    models: What draws.
    cache_dtype: See `empty_cache`.
    layout: Of a shard.
    num_places: Own places of a row at first.
    shards: Number of data shards.
    num_stops: Room for stop ids of a row.
    penalises: Whether some rows have a repetition penalty.
  """
  rows, vocab_size = shards * layout.lanes, models.decoder.config.vocab_size
  shape = shards * layout.groups, layout.slots

  def cache_of(config: DecoderConfig):
    return empty_cache(
      config,
      cache_dtype,
      num_groups=shape[0],
      num_slots=layout.slots,
      slot_places=layout.slot_places,
      num_rows=rows,
      num_places=num_places,
    )

  seen = None
  if penalises:
    seen = Seen(
      jnp.zeros((*shape, vocab_size), bool), jnp.zeros((rows, vocab_size), bool)
    )
  return State(
    cache_of(models.decoder.config),
    jax.tree.map(jnp.asarray, empty_slots(shape, layout.slot_samples, num_stops)),
    idle_lanes(rows),
    seen,
    cache_of(models.guide.decoder.config) if models.guide else None,
  )


def fill(models: Models, weights: Any, state: State, prompts: Prompts) -> State:
  """Reads prompts, once each, `prefill.CHUNK` tokens at a time."""
  N, S = prompts.tokens_NS.shape
  G = state.slots.lengths.shape[0]
  size = min(N, max(1, prefill.CHUNK // S))
  number = jnp.asarray(prompts.number_1)[0]
  # Those beyond the last are put out of range, and so dropped.
  groups_N = jnp.where(jnp.arange(N) < number, prompts.groups_N, G)

  def read_into(cache, decoder, params, lengths_N):
    def read(i, cache):
      start = jnp.minimum(i * size, N - size)
      take = lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size)
      prefix = prefill.read_prompts(
        decoder,
        params,
        take(prompts.tokens_NS),
        lengths_P=take(lengths_N),
        max_lengths_P=take(prompts.entries.max_lengths),
      )
      return cache.fill_slots(prefix, take(groups_N), take(prompts.slots_N))

    return jax.lax.fori_loop(0, -(-number // size), read, cache)

  lengths_N = prompts.entries.lengths
  state = state.replace(
    cache=read_into(state.cache, models.decoder, weights[0], lengths_N),
    slots=jax.tree.map(
      lambda x, new: x.at[groups_N, prompts.slots_N].set(new, mode='drop'),
      state.slots,
      prompts.entries,
    ),
  )
  if models.guide:
    cache = read_into(
      state.guide_cache,
      models.guide.decoder,
      weights[1],
      models.guide.num_read(lengths_N),
    )
    state = state.replace(guide_cache=cache)
  if state.seen is not None:
    is_prompt_NS = jnp.arange(S) <= jnp.asarray(lengths_N)[:, None]
    tokens_NS = jnp.where(is_prompt_NS, prompts.tokens_NS, -1)
    seen_NV = mark_seen(jnp.zeros((N, state.seen.rows_BV.shape[1]), bool), tokens_NS)
    prompts_GWV = state.seen.prompts_GWV.at[groups_N, prompts.slots_N].set(
      seen_NV, mode='drop'
    )
    state = state.replace(seen=state.seen.replace(prompts_GWV=prompts_GWV))
  return state


def go_on(
  models: Models,
  weights: Any,
  state: State,
  stopped_B: jax.Array,
  most_idle: jax.Array,
  *,
  num_steps: int,
) -> tuple[State, Log]:
  """Draws tokens, and hands lanes whose rows have ended the next samples.

  Args:
    models: What draws.
    weights: Of the models.
    state: Is used up.
    stopped_B: True for lanes whose rows the host has ended.
    most_idle: int32; the loop is left when more lanes than this are idle which new
      prompts would let go on.
    num_steps: T, most tokens a lane.
  """
  B = state.lanes.running.shape[0]
  guided = models.guide is not None
  empty_TB = jnp.zeros((num_steps, B), jnp.float32)
  log = Log(
    jnp.zeros((num_steps, B), jnp.int32),
    empty_TB,
    empty_TB,
    jnp.full((num_steps, B), -1, jnp.int32),
    empty_TB if guided else None,
    empty_TB if guided else None,
  )

  def draw_next(carry):
    step, state, log, _ = carry
    state, samples, entry = draw_tokens(models, weights, state)
    log = jax.tree.map(
      lambda x_TB, x_B: jax.lax.dynamic_update_index_in_dim(x_TB, x_B, step, axis=0),
      log,
      entry,
    )
    slots = state.slots
    lanes = after_token(state.lanes, samples, entry.tokens_TB, entry.logps_TB)
    can_go_on = lanes.running.any() | (slots.num_started < slots.num_samples).any()
    leave = ~can_go_on | (num_refillable(slots, lanes) > most_idle)
    return step + 1, state.replace(lanes=lanes), log, leave

  lanes = state.lanes.replace(
    own_lengths=jnp.where(stopped_B, 0, state.lanes.own_lengths),
    running=state.lanes.running & ~stopped_B,
  )
  carry = jnp.zeros((), jnp.int32), state.replace(lanes=lanes), log, jnp.array(False)
  _, state, log, _ = jax.lax.while_loop(
    lambda carry: (carry[0] < num_steps) & ~carry[3], draw_next, carry
  )
  return state, log


def fill_program(models: Models, mesh: Mesh) -> Callable[..., State]:
  """`fill` by each data shard for itself: from weights, state and prompts.

  The arrays of all shards stand behind one another, those of `Prompts` too. Tensor
  parallelism inside a shard is left to the compiler.
  """
  return _by_shard(functools.partial(fill, models), mesh, (BATCH, BATCH), BATCH)


def decode_program(
  models: Models, mesh: Mesh, *, num_steps: int
) -> Callable[..., tuple[State, Log]]:
  """`go_on` by each data shard for itself.

  Takes weights, state, `stopped_B` of all shards and `most_idle` of each [shards].
  """

  def run(weights, state, stopped_B, most_idle_1):
    return go_on(models, weights, state, stopped_B, most_idle_1[0], num_steps=num_steps)

  return _by_shard(run, mesh, (BATCH, BATCH, BATCH), (BATCH, _BY_STEP))


def _by_shard(fn, mesh: Mesh, in_specs, out_specs):
  if batch_shards(mesh) == 1:
    return fn
  return jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=(PartitionSpec(), *in_specs),
    out_specs=out_specs,
    axis_names=set(BATCH_AXES),
    check_vma=False,
  )


def state_shardings(state: State, mesh: Mesh) -> State:
  """Where a state lives: groups and rows over the batch axes, heads over tensor."""
  at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  shardings = jax.tree.map(lambda _: at(BATCH_AXES), state)
  by_head = lambda cache: jax.tree.map(lambda _: at(BATCH_AXES, 'tensor'), cache)
  return shardings.replace(
    cache=by_head(state.cache), guide_cache=by_head(state.guide_cache)
  )


def log_shardings(log: Log, mesh: Mesh) -> Log:
  """Where a log lives: its lanes over the batch axes."""
  return jax.tree.map(lambda _: NamedSharding(mesh, _BY_STEP), log)


def resize(state: State, *, num_places: int) -> State:
  """The same state with another number of own places; all rows must fit."""
  guide_cache = state.guide_cache and state.guide_cache.resize(num_places)
  return state.replace(cache=state.cache.resize(num_places), guide_cache=guide_cache)


def score(
  decoder: Decoder, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
  """Log-probability of each token given those before it, float32 [B, T].

  The first token of a row, which nothing predicts, has 0.

  Args:
    decoder: With `scan_layers=False`.
    params: Its parameters.
    tokens_BT: int32 right-padded texts, T a multiple of 32.
    lengths_B: int32 number of real tokens of each; later entries are meaningless.
  """
  B, T = tokens_BT.shape
  segments_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
  apply: Callable[..., Any] = functools.partial(decoder.apply, {'params': params})
  hidden_BTD = apply(tokens_BT, segments_BT=segments_BT, method='hidden')

  def score_block(block):
    # Logits of 32 tokens a row at a time: all of them together rarely fit.
    hidden_BtD, targets_Bt = block
    logits_BtV = apply(hidden_BtD, method='head')
    if decoder.fixed_tiles:  # no sum is split over devices
      logits_BtV = constrain(logits_BtV, BATCH_AXES, None, None)
    chosen = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_BtV, axis=-1)

  split = lambda x: x.reshape(B, T // 32, 32, *x.shape[2:]).swapaxes(0, 1)
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  logps_BT = jax.lax.map(score_block, (split(hidden_BTD), split(targets_BT)))
  logps_BT = logps_BT.swapaxes(0, 1).reshape(B, T)
  return jnp.pad(logps_BT[:, :-1], ((0, 0), (1, 0)))
