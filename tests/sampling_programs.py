"""The engine's programs for models that are shapes alone, to compile or lower them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_slices import on

from mrjax.checkpoint.weights import param_shapes
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.runs.value_model import value_shapes
from mrjax.sampling import programs
from mrjax.sampling.drawing import Models
from mrjax.sampling.guidance import GuidanceConfig
from mrjax.sampling.guide import GuideModel
from mrjax.sampling.plan import Layout, plan
from mrjax.sampling.requests import Request, SamplingParams
from mrjax.sampling.schedule import Schedule
from mrjax.sampling.weights import weight_shardings
from mrjax.sharding.mesh import BATCH, batch_shards

NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 256, 128


class Program(NamedTuple):
  """A jitted function, the mesh it runs on and the shapes it is compiled for."""

  jitted: Any
  args: tuple
  mesh: Mesh


class Sampling(NamedTuple):
  """What the engine's programs are made of; arrays are shapes."""

  mesh: Mesh
  models: Models
  weights: tuple[Any, Any]
  state: Any
  prompts: programs.Prompts
  layout: Layout


def sampling(
  config: DecoderConfig,
  mesh: Mesh,
  guide: tuple[DecoderConfig, ValueHead, GuidanceConfig] | None = None,
) -> Sampling:
  """As the engine lays out prompts with more samples each than run together."""
  controls = SamplingParams(
    temperature=0.8, top_p=0.95, max_new_tokens=NEW_TOKENS, stop_ids=(2,)
  )
  requests = [
    Request(str(i), (1,) * PROMPT_TOKENS, 2 * NUM_SAMPLES, controls)
    for i in range(NUM_PROMPTS)
  ]
  shards = batch_shards(mesh)
  layout = plan(
    requests,
    max_lanes=NUM_PROMPTS * NUM_SAMPLES // shards,
    shards=shards,
    may_stop=False,
  )
  assert (layout.slots, layout.slot_places) == (2, PROMPT_TOKENS)
  make_decoder = functools.partial(Decoder, dtype=jnp.bfloat16, scan_layers=False)
  models = Models(make_decoder(config))
  weights = (_weights(param_shapes(config, jnp.bfloat16), config, mesh), None)
  if guide:
    config, head, guidance = guide
    outputs = head.num_outputs(config.vocab_size)
    decoder = make_decoder(config, num_value_outputs=outputs)
    models = Models(models.decoder, GuideModel(decoder, head, guidance))
    shapes = value_shapes(config, head, jnp.bfloat16)
    guide_weights = _weights(shapes, config, mesh)
    if head.classifier_type == 'Q':
      kernel = guide_weights['value_head']['kernel']
      guide_weights['value_head']['kernel'] = jax.ShapeDtypeStruct(
        kernel.shape[::-1],
        kernel.dtype,
        sharding=NamedSharding(mesh, PartitionSpec(None, 'tensor')),
      )
    weights = (weights[0], guide_weights)
  state = jax.eval_shape(
    functools.partial(
      programs.empty_state,
      models,
      jnp.bfloat16,
      layout,
      num_places=NEW_TOKENS,
      shards=shards,
      num_stops=8,
    )
  )
  prompts = next(Schedule(requests, layout, shards=shards).next_prompts())
  by_row = jax.tree.map(lambda _: NamedSharding(mesh, BATCH), prompts)
  return Sampling(
    mesh,
    models,
    weights,
    on(programs.state_shardings(state, mesh), state),
    on(by_row, prompts),
    layout,
  )


def _weights(shapes, config: DecoderConfig, mesh: Mesh):
  split = jax.eval_shape(lambda x: unstack_layers(x, config.num_layers), shapes)
  return on(weight_shardings(split, mesh), split)


def fill(parts: Sampling) -> Program:
  """The engine's program that reads prompts into slots."""
  jitted = jax.jit(
    programs.fill_program(parts.models, parts.mesh),
    out_shardings=programs.state_shardings(parts.state, parts.mesh),
    donate_argnums=1,
  )
  return Program(jitted, (parts.weights, parts.state, parts.prompts), parts.mesh)


def decode(parts: Sampling) -> Program:
  """The engine's main program: draws tokens and hands lanes their next samples."""
  run = programs.decode_program(parts.models, parts.mesh, num_steps=32)
  shards = batch_shards(parts.mesh)
  by_row = NamedSharding(parts.mesh, BATCH)
  args = (
    parts.weights,
    parts.state,
    jax.ShapeDtypeStruct((shards * parts.layout.lanes,), jnp.bool_, sharding=by_row),
    jax.ShapeDtypeStruct((shards,), jnp.int32, sharding=by_row),
  )
  with jax.set_mesh(parts.mesh):
    _, log = jax.eval_shape(run, *args)
  jitted = jax.jit(
    run,
    out_shardings=(
      programs.state_shardings(parts.state, parts.mesh),
      programs.log_shardings(log, parts.mesh),
    ),
    donate_argnums=1,
  )
  return Program(jitted, args, parts.mesh)
