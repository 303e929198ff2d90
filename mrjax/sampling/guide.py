"""A value model that runs beside the decoder in its device program; see `guidance`.

It has a cache of its own. That of a 'V' head holds the whole prompt and the tokens
drawn, so that candidates come next; that of a 'Q' head lags one token behind, like that
of the decoder, as the hidden state before a token is what its value is read from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.losses.value import ValueHead, expected_rewards
from mrjax.models.cache import KVCache, Lanes
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling.guidance import (
  GuidanceConfig,
  find,
  guide,
  offsets,
  top_candidates,
)
from mrjax.sampling.logits import Array
from mrjax.sampling.weights import keeps_sums_whole


@dataclasses.dataclass(frozen=True)
class Guide:
  """A value model as the engine takes it.

  Attributes:
    config: Its decoder's; of any size, with the vocabulary of the model it guides.
    params: Its parameters, layers stacked, with a `value_head`.
    head: What its outputs mean.
    guidance: How these become offsets of logits.
  """

  config: DecoderConfig
  params: Any
  head: ValueHead
  guidance: GuidanceConfig


class GuideModel(NamedTuple):
  """What the device program knows of a guide beside its weights and cache.

  Attributes:
    decoder: With a value head, and `scan_layers=False`.
    head: What its outputs mean.
    guidance: How these become offsets.
  """

  decoder: Decoder
  head: ValueHead
  guidance: GuidanceConfig

  @property
  def is_active(self) -> bool:
    return self.guidance.mode != 'disabled'

  def num_read(self, lengths: Array) -> Array:
    """How many tokens of prompts its slots hold, where the decoder's hold `lengths`."""
    return lengths + 1 if self.head.classifier_type == 'V' else lengths

  def places(self, lanes: Lanes) -> Lanes:
    """Where rows stand in its cache, by where they stand in the decoder's."""
    lengths_B = jnp.asarray(self.num_read(lanes.prefix_lengths_B))
    return lanes._replace(prefix_lengths_B=lengths_B)


def by_token(params: Any, head: ValueHead, mesh: Mesh) -> Any:
  """The weights of a guide with the rows of a 'Q' head one after the other, [O, D].

  It is the largest matrix of the model, and a step reads a few of its rows: as
  training has it, [D, O], a TPU would turn it round at every dispatch.
  """
  if head.classifier_type != 'Q':
    return params
  kernel_DO = params['value_head']['kernel']
  # Whole rows would need an exchange of rows; parts of them one of sums.
  fits = kernel_DO.shape[0] % mesh.shape['tensor'] == 0
  split = 'tensor' if fits and not keeps_sums_whole(mesh) else None
  turn = jax.jit(
    jnp.transpose, out_shardings=NamedSharding(mesh, PartitionSpec(None, split))
  )
  return params | {'value_head': params['value_head'] | {'kernel': turn(kernel_DO)}}


class Proposal(NamedTuple):
  """What a guide says of the candidates of each row, and what it needs to go on.

  Attributes:
    candidates_Bk: int32 token ids.
    outputs_BkA: Its outputs for them.
    cache: Its cache; of a 'Q' head, with the newest token.
    kvs: Of a 'V' head, keys and values of the candidates in each layer.
    hidden_BD: Of a 'Q' head, the hidden states at the newest token.
  """

  candidates_Bk: jax.Array
  outputs_BkA: jax.Array
  cache: KVCache
  kvs: Any
  hidden_BD: Any


def propose(
  model: GuideModel,
  params: Any,
  cache: KVCache,
  lanes: Lanes,
  tokens_B: jax.Array,
  logits_BV: jax.Array,
  guided_B: jax.Array,
) -> Proposal:
  """Scores the likeliest next tokens.

  Args:
    model: Is active.
    params: Its weights.
    cache: Its cache.
    lanes: Where the rows stand in it.
    tokens_B: int32 newest token of each row.
    logits_BV: Raw logits of the next.
    guided_B: bool; where no row is guided, nothing is scored by a 'V' head.
  """
  candidates_Bk = top_candidates(
    logits_BV, model.guidance.num_candidates(logits_BV.shape[1])
  )
  if model.head.classifier_type == 'Q':
    apply: Callable[..., Any] = model.decoder.apply
    hidden_BD, cache = apply(
      {'params': params}, tokens_B, lanes, cache, method='decode_hidden'
    )
    outputs_BkA = outputs_of_tokens(hidden_BD, params, candidates_Bk, model.head)
    return Proposal(candidates_Bk, outputs_BkA, cache, None, hidden_BD)
  outputs_BkA, kvs = _peek(model, params, cache, lanes, candidates_Bk, guided_B.any())
  return Proposal(candidates_Bk, outputs_BkA, cache, kvs, None)


def raise_logits(
  model: GuideModel, proposal: Proposal, logits_BV: jax.Array, etas_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Guided logits, float32 [B, V]; and whether the guide's outputs were finite, [B].

  Rows of eta 0 keep their logits whatever the guide says.
  """
  offsets_Bk = offsets(proposal.outputs_BkA, etas_B, model.head, model.guidance)
  guided_BV = guide(logits_BV, proposal.candidates_Bk, offsets_Bk)
  return guided_BV, jnp.isfinite(offsets_Bk).all(axis=1)


def settle(
  model: GuideModel,
  params: Any,
  lanes: Lanes,
  proposal: Proposal,
  tokens_B: jax.Array,
  guided_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
  """The guide's cache with the tokens drawn, and what it expects after them, [B].

  The keys and values of a candidate are those it was scored with. Only for tokens that
  were none is the model run again.

  Returns:
    The cache, and expected rewards, float32; NaN for rows that are not guided.
  """
  if model.head.classifier_type == 'Q':
    outputs_BA = outputs_of_tokens(
      proposal.hidden_BD, params, tokens_B[:, None], model.head
    )[:, 0]
    cache = proposal.cache
  else:
    place_B = find(proposal.candidates_Bk, tokens_B)
    taken = _take((proposal.outputs_BkA, proposal.kvs), jnp.maximum(place_B, 0))
    if proposal.candidates_Bk.shape[1] < model.decoder.config.vocab_size:
      outside_B = guided_B & (place_B < 0)
      late = _peek(
        model, params, proposal.cache, lanes, tokens_B[:, None], outside_B.any()
      )
      taken = jax.tree.map(
        lambda x, y: jnp.where(outside_B.reshape(-1, *(1,) * (x.ndim - 1)), y[:, 0], x),
        taken,
        late,
      )
    outputs_BA, kvs = taken
    cache = proposal.cache.write(kvs, lanes)
  values_B = expected_rewards(outputs_BA, model.head)
  return cache, jnp.where(guided_B, values_B, jnp.nan)


def outputs_of_tokens(
  hidden_BD: jax.Array, params: Any, tokens_Bk: jax.Array, head: ValueHead
) -> jax.Array:
  """What a 'Q' head says of tokens that may come next, float32 [B, k, width].

  Only their rows of the head are read.

  Args:
    hidden_BD: Hidden states at the newest tokens.
    params: Of the guide, as `by_token` gives them.
    tokens_Bk: int32 token ids.
    head: Of type 'Q'.
  """
  kernel_OD, bias_O = params['value_head']['kernel'], params['value_head']['bias']
  rows_BkA = tokens_Bk[..., None] * head.width + jnp.arange(head.width)
  outputs_BkA = jnp.einsum(
    'BD,BkAD->BkA',
    hidden_BD.astype(jnp.float32),
    kernel_OD[rows_BkA].astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return outputs_BkA + bias_O[rows_BkA].astype(jnp.float32)


def _peek(model: GuideModel, params, cache, lanes, tokens_BT, needed):
  """`Decoder.peek`, or zeros where it is not needed."""
  apply: Callable[..., Any] = model.decoder.apply
  run = lambda: apply({'params': params}, tokens_BT, lanes, cache, method='peek')
  like = jax.eval_shape(run)
  empty = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return jax.lax.cond(needed, run, empty)


def _take(tree: Any, place_B: jax.Array) -> Any:
  """Entry `place_B` of axis 1 of each array."""
  return jax.tree.map(
    lambda x: jnp.take_along_axis(x, place_B.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[
      :, 0
    ],
    tree,
  )
