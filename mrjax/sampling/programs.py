"""The device programs of sampling, as pure functions: start a batch, go on, score.

A batch is P prompts with n rows each; row p * n + j is sample j of prompt p. Rows that
have finished stay in the batch and emit padding.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.models.cache import KVCache, grow_cache, make_cache
from mrjax.models.decoder import Decoder
from mrjax.sampling.logits import Array, Controls, row_keys, sample
from mrjax.sharding.mesh import BATCH_AXES, constrain

PAD_ID = 0  # emitted by finished rows, cut off by the host


class Rows(flax.struct.PyTreeNode):
  """What is fixed about the B rows of a batch while it runs.

  Attributes:
    controls: Temperature and filters.
    seeds_B: uint32 seed of the request.
    problem_hashes_B2: uint32 halves of a 64-bit hash of the problem's id.
    sample_indices_B: uint32 index of the row among the samples of its problem.
    prompt_lengths_B: int32 tokens of the prompt, at least 1.
    max_new_tokens_B: int32; 0 for a row that only fills the batch.
    stop_ids_BE: int32 ids that end a row, -1 where there are fewer.
  """

  controls: Controls
  seeds_B: Array
  problem_hashes_B2: Array
  sample_indices_B: Array
  prompt_lengths_B: Array
  max_new_tokens_B: Array
  stop_ids_BE: Array

  def keys(self) -> jax.Array:
    """A typed random key for each row."""
    return row_keys(self.seeds_B, self.problem_hashes_B2, self.sample_indices_B)


class State(flax.struct.PyTreeNode):
  """What changes from token to token, T places long.

  Attributes:
    cache: Keys and values of the prompts and of all tokens but the newest.
    tokens_TB: int32 tokens drawn.
    logps_TB: float32, under the model.
    sampling_logps_TB: float32, under the distribution drawn from.
    num_tokens_B: int32 tokens of each row, the ending one included.
    running_B: True until a row has ended.
    step: int32 scalar, tokens drawn so far by each row.
  """

  cache: KVCache
  tokens_TB: jax.Array
  logps_TB: jax.Array
  sampling_logps_TB: jax.Array
  num_tokens_B: jax.Array
  running_B: jax.Array
  step: jax.Array


def start(
  decoder: Decoder,
  params: Any,
  prompts_PS: jax.Array,
  rows: Rows,
  *,
  num_places: int,
  num_blocks: int = 1,
) -> State:
  """Reads the prompts, once each, and draws the first token of every row.

  Args:
    decoder: With `scan_layers=False`.
    params: Its parameters.
    prompts_PS: int32 right-padded prompts.
    rows: The rows, a multiple of P.
    num_places: Tokens the state has room for at first.
    num_blocks: Read this many equal blocks of prompts one after the other, which
      bounds the memory of attention among their tokens.
  """
  num_prompts, num_rows = prompts_PS.shape[0], rows.seeds_B.shape[0]
  repeats = num_rows // num_prompts
  lengths_P = jnp.asarray(rows.prompt_lengths_B)[::repeats]
  max_lengths_P = lengths_P + rows.max_new_tokens_B[::repeats]

  def prefill(block):
    prompts, lengths, max_lengths = block
    return decoder.apply(
      {'params': params},
      prompts,
      lengths_P=lengths,
      max_lengths_P=max_lengths,
      method='prefill',
    )

  def split(x_P):
    # A block takes its prompts from all over P, so that each device keeps its own.
    return x_P.reshape(-1, num_blocks, *x_P.shape[1:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(num_prompts, *x.shape[2:])

  blocks = jax.tree.map(split, (prompts_PS, lengths_P, max_lengths_P))
  logits_PV, prefix = jax.tree.map(join, jax.lax.map(prefill, blocks))
  cache = make_cache(
    decoder.config,
    prefix,
    prompt_lengths_P=lengths_P,
    num_rows=num_rows,
    num_places=num_places,
  )
  empty_TB = jnp.zeros((num_places, num_rows), jnp.float32)
  state = State(
    cache=cache,
    tokens_TB=jnp.full((num_places, num_rows), PAD_ID, jnp.int32),
    logps_TB=empty_TB,
    sampling_logps_TB=empty_TB,
    num_tokens_B=jnp.zeros(num_rows, jnp.int32),
    running_B=jnp.asarray(rows.max_new_tokens_B) > 0,
    step=jnp.zeros((), jnp.int32),
  )
  return _emit(state, jnp.repeat(logits_PV, repeats, axis=0), rows, rows.keys())


def go_on(
  decoder: Decoder, params: Any, state: State, rows: Rows, until_step: jax.Array
) -> State:
  """Draws tokens until `until_step` of them are there or every row has ended."""
  keys_B = rows.keys()

  def draw_next(state: State) -> State:
    last_B = jax.lax.dynamic_index_in_dim(
      state.tokens_TB, state.step - 1, axis=0, keepdims=False
    )
    logits_B1V, cache = decoder.apply(
      {'params': params},
      last_B[:, None],
      positions_BT=(rows.prompt_lengths_B + state.step - 1)[:, None],
      max_lengths_B=rows.prompt_lengths_B + rows.max_new_tokens_B,
      cache=state.cache,
      method='decode',
    )
    return _emit(state.replace(cache=cache), logits_B1V[:, 0], rows, keys_B)

  return jax.lax.while_loop(
    lambda state: (state.step < until_step) & jnp.any(state.running_B), draw_next, state
  )


def grow(state: State, *, num_places: int) -> State:
  """The same state with room for `num_places` tokens."""
  more = num_places - state.tokens_TB.shape[0]
  pad = lambda x_TB: jnp.pad(x_TB, ((0, more), (0, 0)))
  return state.replace(
    cache=grow_cache(state.cache, num_places=num_places),
    tokens_TB=pad(state.tokens_TB),
    logps_TB=pad(state.logps_TB),
    sampling_logps_TB=pad(state.sampling_logps_TB),
  )


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
    chosen = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_BtV, axis=-1)

  split = lambda x: x.reshape(B, T // 32, 32, *x.shape[2:]).swapaxes(0, 1)
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  logps_BT = jax.lax.map(score_block, (split(hidden_BTD), split(targets_BT)))
  logps_BT = logps_BT.swapaxes(0, 1).reshape(B, T)
  return jnp.pad(logps_BT[:, :-1], ((0, 0), (1, 0)))


def state_shardings(state: State, mesh: Mesh) -> Any:
  """A tree like `state` that says where it lives on `mesh`.

  Rows are split over the batch axes, and heads over the tensor axis.
  """
  at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  by_row, by_step, everywhere = at(BATCH_AXES), at(None, BATCH_AXES), at()
  layers = (at(BATCH_AXES, 'tensor'),) * len(state.cache.own_k)
  cache = state.cache.replace(
    prefix_k=layers,
    prefix_v=layers,
    own_k=layers,
    own_v=layers,
    prefix_positions_PS=by_row,
    own_positions_BC=by_row,
    index=everywhere,
  )
  return state.replace(
    cache=cache,
    tokens_TB=by_step,
    logps_TB=by_step,
    sampling_logps_TB=by_step,
    num_tokens_B=by_row,
    running_B=by_row,
    step=everywhere,
  )


def _emit(
  state: State, logits_BV: jax.Array, rows: Rows, row_keys_B: jax.Array
) -> State:
  """Draws the next token of every running row and ends the rows that are through."""
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, state.step)
  # Whole rows of the vocabulary on each device: the filters read all of it.
  logits_BV = constrain(logits_BV, BATCH_AXES, None)
  tokens_B, logps_B, sampling_logps_B = sample(logits_BV, rows.controls, keys_B)
  running_B = state.running_B
  tokens_B = jnp.where(running_B, tokens_B, PAD_ID)
  stops_B = (tokens_B[:, None] == rows.stop_ids_BE).any(axis=1)

  def put(x_TB, x_B):
    return jax.lax.dynamic_update_index_in_dim(x_TB, x_B, state.step, axis=0)

  return state.replace(
    tokens_TB=put(state.tokens_TB, tokens_B),
    logps_TB=put(state.logps_TB, logps_B),
    sampling_logps_TB=put(state.sampling_logps_TB, sampling_logps_B),
    num_tokens_B=state.num_tokens_B + running_B,
    running_B=running_B & ~stops_B & (state.step + 1 < rows.max_new_tokens_B),
    step=state.step + 1,
  )
