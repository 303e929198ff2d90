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
import sampling_programs
from jax.sharding import NamedSharding, PartitionSpec
from sampling_programs import Program
from tpu_slices import Memory, describe_slice, memory_of, on

from mrjax import trees
from mrjax.checkpoint.weights import param_shapes
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import sft
from mrjax.sharding.mesh import BATCH_AXES, make_mesh
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


def parts_of(name: str, devices) -> sampling_programs.Sampling:
  case = CASES[name]
  mesh = make_mesh(case.sample_mesh, devices)
  return sampling_programs.sampling(DecoderConfig.from_hf(case.hf_config), mesh)


def fill(name: str, devices=None) -> Program:
  return sampling_programs.fill(parts_of(name, devices))


def decode(name: str, devices=None) -> Program:
  return sampling_programs.decode(parts_of(name, devices))


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
  names = list(trees.flatten(program.args[0][0])) if build is fill else []
  for i, (x, sharding) in enumerate(zip(given, shardings, strict=True)):
    if sharding is None and i < len(names):
      assert any(part in names[i] for part in unread)
    elif x.sharding is not None:
      assert sharding.is_equivalent_to(x.sharding, x.ndim)
