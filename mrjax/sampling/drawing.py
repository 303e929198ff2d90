"""One step of the device loop: a token for each lane."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling import guide as guides
from mrjax.sampling.guidance import kl_per_token
from mrjax.sampling.guide import Guide, GuideModel
from mrjax.sampling.lanes import (
  LaneState,
  Samples,
  State,
  keys_of,
  places_of,
  samples_of,
  see_prompts,
  take_samples,
)
from mrjax.sampling.logits import (
  mark_seen,
  penalize,
  sample,
  scale_and_filter,
  without_filters_where_greedy,
)
from mrjax.sampling.weights import keeps_sums_whole
from mrjax.sharding.mesh import BATCH_AXES, constrain


class Log(NamedTuple):
  """What a dispatch did, T steps of B lanes.

  Attributes:
    tokens_TB: int32 tokens drawn.
    logps_TB: float32, under the model; not finite where its logits were not.
    sampling_logps_TB: float32, under the distribution drawn from.
    owners_TB: int32 slot * (samples of a slot) + sample whose token it is, or -1.
    values_TB: float32 rewards that the guide expects after the tokens, NaN for rows
      that are not guided; None without a guide, as what follows.
    kls_TB: float32; see `guidance.kl_per_token`.
  """

  tokens_TB: jax.Array
  logps_TB: jax.Array
  sampling_logps_TB: jax.Array
  owners_TB: jax.Array
  values_TB: jax.Array | None = None
  kls_TB: jax.Array | None = None


class Models(NamedTuple):
  """What draws: a decoder, and a guide where there is one.

  `decoder` is made with `scan_layers=False`. Weights of both stand in a pair of trees,
  `(params, guide_params)`.
  """

  decoder: Decoder
  guide: GuideModel | None = None

  @classmethod
  def make(
    cls, config: DecoderConfig, guide: Guide | None, mesh: Mesh, *, dtype: Any
  ) -> 'Models':
    """What an engine draws with on a mesh; of `guide` all but the weights."""
    make_decoder = functools.partial(
      Decoder,
      dtype=dtype,
      scan_layers=False,
      # Costs accelerators time, and their products are not reproducible to the bit.
      fixed_tiles=keeps_sums_whole(mesh),
    )
    models = cls(make_decoder(config))
    if guide is None:
      return models
    outputs = guide.head.num_outputs(guide.config.vocab_size)
    decoder = make_decoder(guide.config, num_value_outputs=outputs)
    return models._replace(guide=GuideModel(decoder, guide.head, guide.guidance))


def draw_tokens(
  models: Models, weights: Any, state: State
) -> tuple[State, Samples, Log]:
  """One token for each lane that has a row, or gets one now.

  The order is that of transformers: repetition penalty, guidance, temperature, filters.

  Returns:
    The state, its lanes as they were before the token; what is asked of their rows; and
    the entry of the log, arrays [B].
  """
  slots, lanes = take_samples(state.slots, state.lanes)
  samples = samples_of(slots, lanes)
  places = places_of(slots, lanes)
  controls = samples.controls
  logits_BV, cache = models.decoder.apply(
    {'params': weights[0]}, lanes.tokens, places, state.cache, method='decode'
  )
  # Whole rows of the vocabulary on each device: the filters read all of it.
  logits_BV = constrain(logits_BV, BATCH_AXES, None).astype(jnp.float32)
  shaped_BV, seen = logits_BV, state.seen
  if seen is not None:
    seen = see_prompts(seen, slots, lanes)
    shaped_BV = penalize(shaped_BV, seen.rows_BV, controls.repetition_penalty_B)
  keys_B = keys_of(samples, lanes.own_lengths)
  owners_B = jnp.where(
    lanes.running, lanes.slots * slots.samples.seeds.shape[2] + lanes.samples, -1
  )
  state = state.replace(cache=cache, slots=slots, lanes=lanes)
  if models.guide is None:
    drawn = sample(logits_BV, controls, keys_B, shaped_BV=shaped_BV)
    entry = Log(*drawn, owners_B)
  else:
    state, entry = _draw_guided(
      models.guide, weights[1], state, samples, keys_B, (logits_BV, shaped_BV)
    )
    entry = entry._replace(owners_TB=owners_B)
  if seen is not None:
    tokens_B = jnp.where(lanes.running, entry.tokens_TB, -1)
    seen = seen.replace(rows_BV=mark_seen(seen.rows_BV, tokens_B))
  return state.replace(seen=seen), samples, entry


def _draw_guided(model: GuideModel, params, state, samples, keys_B, logits):
  """The rest of `draw_tokens` with a guide; logits are those of the model, shaped."""
  logits_BV, shaped_BV = logits
  lanes = state.lanes
  values_B = jnp.full(lanes.tokens.shape, jnp.nan)
  is_fine_B = jnp.ones_like(lanes.running)
  if model.is_active:
    guided_B = lanes.running & (samples.etas != 0)
    places = model.places(places_of(state.slots, lanes))
    proposal = guides.propose(
      model, params, state.guide_cache, places, lanes.tokens, shaped_BV, guided_B
    )
    shaped_BV, is_fine_B = guides.raise_logits(model, proposal, shaped_BV, samples.etas)
  # Of a greedy row the divergence is that of what could be drawn at temperature 1.
  controls = without_filters_where_greedy(samples.controls)
  weights_BV = scale_and_filter(shaped_BV, controls)
  tokens_B, logps_B, sampling_logps_B = sample(
    logits_BV, controls, keys_B, shaped_BV=shaped_BV, weights_BV=weights_BV
  )
  if model.is_active:
    cache, values_B = guides.settle(model, params, places, proposal, tokens_B, guided_B)
    state = state.replace(guide_cache=cache)
  kls_B = kl_per_token(weights_BV, logits_BV, controls.temperature_B)
  logps_B = jnp.where(is_fine_B, logps_B, jnp.nan)  # which ends the row as an error
  return state, Log(tokens_B, logps_B, sampling_logps_B, lanes.slots, values_B, kls_B)


def after_token(lanes: LaneState, samples: Samples, tokens_B, logps_B) -> LaneState:
  """The lanes with their new tokens; rows that these end are no longer running."""
  num_drawn_B = lanes.own_lengths + 1
  stops_B = (tokens_B[:, None] == samples.stop_ids).any(axis=1)
  ends_B = stops_B | (num_drawn_B >= samples.max_new_tokens) | ~jnp.isfinite(logps_B)
  running_B = lanes.running & ~ends_B
  return lanes.replace(
    tokens=jnp.where(running_B, tokens_B, lanes.tokens),
    own_lengths=jnp.where(running_B, num_drawn_B, 0),
    running=running_B,
  )
