"""Training and sampling compile for a TPU slice, and lower for GPUs, without either.

XLA's TPU compiler comes with `libtpu` and needs no TPU: it compiles for the devices of
a described topology. No weights are made; arguments are shapes with shardings.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_slices import Memory, describe_slice, memory_of, on

from mrjax import trees
from mrjax.checkpoint.weights import param_shapes
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.runs import sft
from mrjax.sampling import programs
from mrjax.sampling.plan import Layout, plan
from mrjax.sampling.requests import Request, SamplingParams
from mrjax.sampling.schedule import Schedule
from mrjax.sampling.weights import only_tensor
from mrjax.sharding.mesh import BATCH, BATCH_AXES, batch_shards, make_mesh
from mrjax.sharding.rules import param_shardings
from mrjax.training import optimizer, step

TOPOLOGY = 'v5e:2x4'
NUM_CHIPS = 8
CHIP_BYTES = 15.75 * 2**30  # what XLA may use of the 16 GB of a v5e
FAST_BYTES = 128 * 2**20  # its on-chip memory, where XLA keeps copies of small things


class Case(NamedTuple):
  hf_config: dict[str, Any]
  train_mesh: str
  train_shape: tuple[int, int]  # rows, tokens a row
  remat: str
  sample_mesh: str
  padding: float  # most by which tiles of 8 x 128 numbers may swell what is stored


CASES = {
  'tiny-1m': Case(
    {
      'architectures': ['LlamaForCausalLM'],
      'vocab_size': 512,
      'hidden_size': 128,
      'intermediate_size': 384,
      'num_hidden_layers': 4,
      'num_attention_heads': 4,
      'num_key_value_heads': 4,
      'tie_word_embeddings': False,
    },
    train_mesh='fsdp:4,tensor:2',
    train_shape=(16, 256),
    remat='none',
    sample_mesh='data:8',
    padding=2.1,  # heads of 32
  ),
  'llama-3.2-1b': Case(
    {
      'architectures': ['LlamaForCausalLM'],
      'vocab_size': 128256,
      'hidden_size': 2048,
      'intermediate_size': 8192,
      'num_hidden_layers': 16,
      'num_attention_heads': 32,
      'num_key_value_heads': 8,
      'head_dim': 64,
      'max_position_embeddings': 131072,
      'rope_theta': 500000.0,
      'rope_scaling': {
        'rope_type': 'llama3',
        'factor': 32.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
      },
      'tie_word_embeddings': True,
    },
    train_mesh='fsdp:8',
    train_shape=(8, 1024),
    remat='full',
    sample_mesh='data:4,tensor:2',
    padding=1.02,
  ),
}
NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 256, 128


class Program(NamedTuple):
  """A jitted function, the mesh it runs on and the shapes it is compiled for."""

  jitted: Any
  args: tuple
  mesh: Mesh


def sft_state(config: DecoderConfig, tx):
  return jax.eval_shape(
    lambda params: step.init_state(params, tx), param_shapes(config)
  )


def make_tx():
  return optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 1e-5)


def sft_step(name: str, devices=None) -> Program:
  """The step of `experiments.train_sft`: bfloat16 compute on float32 weights."""
  case = CASES[name]
  mesh = make_mesh(case.train_mesh, devices)
  config = DecoderConfig.from_hf(case.hf_config)
  decoder = Decoder(config, dtype=jnp.bfloat16, remat=case.remat)
  tx = make_tx()
  state = sft_state(config, tx)
  shardings = step.state_shardings(state.params, tx, mesh)
  by_row = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
  dtypes = dict.fromkeys(('tokens', 'segments', 'positions'), jnp.int32)
  dtypes['loss_mask'] = jnp.bool_
  batch = {
    key: jax.ShapeDtypeStruct((1, *case.train_shape), dtype, sharding=by_row)
    for key, dtype in dtypes.items()
  }
  jitted = jax.jit(
    functools.partial(step.train_step, loss_fn=sft.make_loss_fn(decoder), tx=tx),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  return Program(jitted, (on(shardings, state), {}, batch), mesh)


class Sampling(NamedTuple):
  """What the engine's programs for a case are made of; arrays are shapes."""

  mesh: Mesh
  decoder: Decoder
  weights: Any
  state: Any
  prompts: programs.Prompts
  layout: Layout


def sampling(name: str, devices) -> Sampling:
  """As the engine lays out prompts with more samples each than run together."""
  case = CASES[name]
  mesh = make_mesh(case.sample_mesh, devices)
  config = DecoderConfig.from_hf(case.hf_config)
  controls = SamplingParams(
    temperature=0.8, top_p=0.95, max_new_tokens=NEW_TOKENS, stop_ids=(2,)
  )
  prompt = (1,) * (PROMPT_TOKENS + 1)
  requests = [
    Request(str(i), prompt, 2 * NUM_SAMPLES, controls) for i in range(NUM_PROMPTS)
  ]
  shards = batch_shards(mesh)
  layout = plan(
    requests,
    max_lanes=NUM_PROMPTS * NUM_SAMPLES // shards,
    shards=shards,
    may_stop=False,
  )
  assert (layout.slots, layout.slot_places) == (2, PROMPT_TOKENS)
  weights = jax.eval_shape(
    lambda params: unstack_layers(params, config.num_layers),
    param_shapes(config, jnp.bfloat16),
  )
  shardings = jax.tree.map(
    lambda s: NamedSharding(mesh, only_tensor(s.spec)), param_shardings(weights, mesh)
  )
  make = functools.partial(
    programs.empty_state,
    config,
    jnp.bfloat16,
    layout,
    num_places=NEW_TOKENS,
    shards=shards,
    num_stops=8,
  )
  state = jax.eval_shape(make)
  prompts = next(Schedule(requests, layout, shards=shards).next_prompts())
  by_row = jax.tree.map(lambda _: NamedSharding(mesh, BATCH), prompts)
  return Sampling(
    mesh,
    Decoder(config, dtype=jnp.bfloat16, scan_layers=False),
    on(shardings, weights),
    on(programs.state_shardings(state, mesh), state),
    on(by_row, prompts),
    layout,
  )


def fill(name: str, devices=None) -> Program:
  """The engine's program that reads prompts into slots."""
  parts = sampling(name, devices)
  jitted = jax.jit(
    programs.fill_program(parts.decoder, parts.mesh),
    out_shardings=programs.state_shardings(parts.state, parts.mesh),
    donate_argnums=1,
  )
  return Program(jitted, (parts.weights, parts.state, parts.prompts), parts.mesh)


def decode(name: str, devices=None) -> Program:
  """The engine's main program: draws tokens and hands lanes their next samples."""
  parts = sampling(name, devices)
  run = programs.decode_program(parts.decoder, parts.mesh, num_steps=32)
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


def depth(name: str) -> int:
  return CASES[name].hf_config['num_hidden_layers']


def weight_bytes(name: str) -> int:
  """Bytes of all weights in bfloat16."""
  config = DecoderConfig.from_hf(CASES[name].hf_config)
  return trees.num_bytes(param_shapes(config, jnp.bfloat16))


def compile_for_tpu(build, name: str) -> Memory:
  devices = describe_slice(TOPOLOGY)
  assert len(devices) == NUM_CHIPS
  program = build(name, devices)
  with jax.set_mesh(program.mesh):
    return memory_of(program.jitted.lower(*program.args).compile())


@pytest.mark.parametrize('name', CASES)
def test_the_sft_step_compiles_for_a_slice(tpu_compiler, name):
  memory = tpu_compiler(compile_for_tpu, sft_step, name)
  config = DecoderConfig.from_hf(CASES[name].hf_config)
  # Weights and both moments are split over all chips: only vectors are whole on each.
  state_bytes = trees.num_bytes(sft_state(config, make_tx()))
  assert state_bytes == pytest.approx(6 * weight_bytes(name), rel=1e-5)
  batch_bytes = math.prod(CASES[name].train_shape) * (4 + 4 + 4 + 1) / NUM_CHIPS
  split = state_bytes / NUM_CHIPS + batch_bytes
  assert split < memory.arguments < CASES[name].padding * split
  # The new state is written over the old one.
  assert memory.reused > 0.99 * memory.outputs
  assert memory.peak < CHIP_BYTES


@pytest.mark.parametrize('name', CASES)
def test_filling_slots_compiles_for_a_slice(tpu_compiler, name):
  memory = tpu_compiler(compile_for_tpu, fill, name)
  # A copy of the weights on each data shard, split over tensor, beside the cache.
  split = weight_bytes(name) / make_mesh(CASES[name].sample_mesh).shape['tensor']
  assert split < memory.arguments
  assert memory.reused > 0.99 * memory.outputs
  assert memory.peak < CHIP_BYTES


@pytest.mark.parametrize('name', CASES)
def test_decode_compiles_for_a_slice(tpu_compiler, name):
  memory = tpu_compiler(compile_for_tpu, decode, name)
  # The cache is updated where it lies.
  assert memory.reused > 0.99 * memory.outputs
  # Nothing is gathered or copied for the loop that is as large as the weights: a token
  # reads them once and moves activations alone between chips. What there is are logits
  # and own places in the layout that they are written in.
  split = weight_bytes(name) / make_mesh(CASES[name].sample_mesh).shape['tensor']
  assert memory.temporary < max(FAST_BYTES, 0.3 * split)
  assert memory.peak < CHIP_BYTES


@pytest.mark.parametrize('build', [sft_step, fill, decode])
@pytest.mark.parametrize('name', CASES)
def test_the_same_programs_lower_for_gpus(build, name):
  program = build(name)
  with jax.set_mesh(program.mesh):
    exported = jax.export.export(program.jitted, platforms=['cuda'])(*program.args)
  assert exported.platforms == ('cuda',)
  assert exported.nr_devices == NUM_CHIPS
  # Every argument is split in the exported program as it is here.
  given = jax.tree.leaves(program.args)
  shardings = exported.in_shardings_jax(program.mesh)
  # Reading a prompt for its keys and values leaves out what only logits need.
  unread = 'head', 'final_norm', f'layers_{depth(name) - 1}/'
  names = list(trees.flatten(program.args[0])) if build is fill else []
  for i, (x, sharding) in enumerate(zip(given, shardings, strict=True)):
    if sharding is None and i < len(names):
      assert any(part in names[i] for part in unread)
    elif x.sharding is not None:
      assert sharding.is_equivalent_to(x.sharding, x.ndim)
