"""Every way to train Llama-3-8B compiles for eight v5p chips, and stays split there.

Shapes are real and no weights are made: see `test_tpu_compile`. Row lengths, chunks and
widths all differ, so that an array of the compiled program is known by its shape.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu_slices import Memory, describe_slice, memory_of, on

from mrjax.checkpoint.source import ModelSource
from mrjax.checkpoint.weights import hf_tensors
from mrjax.lora import masks
from mrjax.lora.adapters import LoraConfig
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import preference_losses, sft, value_steps
from mrjax.runs.preference_losses import ADAPTER_OFF, LossConfig, Policies
from mrjax.runs.weight_plan import WeightPlan, plan_weights
from mrjax.sharding.mesh import BATCH_AXES, make_mesh
from mrjax.sharding.rules import param_shardings
from mrjax.training import optimizer, step

TOPOLOGY, MESH, NUM_CHIPS = 'v5p:2x2x2', 'fsdp:8', 8
CHIP_BYTES = 95e9  # of a v5p
CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 128256,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 8192,
    'rope_theta': 500000.0,
    'tie_word_embeddings': False,
  }
)
L, D, F, V = 32, 4096, 14336, 128256
ROWS, T = 8, 8192  # a row a chip
TEXTS = 40  # most texts in a row
CHUNK = 1024  # tokens that go through the head together, on accelerators


Array = tuple[str, tuple[int, ...]]
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16)\[([\d,]+)\]')
_MOVE = re.compile(
  r' = (.+?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)
_MOSAIC = re.compile(r'%([a-z_]+)\S* = .*custom_call_target="tpu_custom_call"')


class Recipe(NamedTuple):
  """A training command, as far as it decides the step.

  Attributes:
    make_loss_fn: Of the decoder.
    peak: GB a chip that it may need: a tenth above what it needed when written.
    lora: Its adapter; without one all weights train.
    quantize: How frozen kernels are stored.
    head: Its value head.
  """

  make_loss_fn: Callable[[Decoder], step.LossFn]
  peak: float
  lora: LoraConfig | None = None
  quantize: str = ''
  head: ValueHead | None = None


def preference_loss_fn(loss: str, reference: str, decoder: Decoder) -> step.LossFn:
  return preference_losses.make_loss_fn(
    Policies(decoder, reference), LossConfig(loss=loss), num_texts=TEXTS
  )


def value_loss_fn(head: ValueHead, decoder: Decoder) -> step.LossFn:
  return value_steps.make_loss_fn(decoder, head, use_bias=False)


LORA = LoraConfig(rank=16)
VALUE_HEAD = ValueHead(num_atoms=11)
dpo = functools.partial(preference_loss_fn, 'dpo', ADAPTER_OFF)
orpo = functools.partial(preference_loss_fn, 'orpo', '')
value = functools.partial(value_loss_fn, VALUE_HEAD)
RECIPES = {
  'full': Recipe(sft.make_loss_fn, 30),
  'lora': Recipe(sft.make_loss_fn, 10.5, LORA),
  'qlora': Recipe(sft.make_loss_fn, 9, LORA, 'nf4'),
  'dpo': Recipe(dpo, 10.5, LORA),
  'orpo': Recipe(orpo, 10.5, LORA),
  'value': Recipe(value, 25, head=VALUE_HEAD),
}


class Compiled(NamedTuple):
  """A compiled step.

  Attributes:
    memory: What a chip needs.
    arrays: (dtype, shape) of all arrays of a chip's program.
    moved: Those of them that come from other chips.
    kernels: Names in the program of what Mosaic compiled.
  """

  memory: Memory
  arrays: set[Array]
  moved: set[Array]
  kernels: set[str]


def plan_of(recipe: Recipe, mesh) -> WeightPlan:
  stored = dict.fromkeys(hf_tensors(CONFIG), 'BF16')
  prepare = None
  if recipe.head:
    prepare = value_steps.make_prepare(
      CONFIG, recipe.head, mesh, init_mode='random', seed=0
    )
  return plan_weights(
    ModelSource('llama-3-8b', Path(), CONFIG, dtypes=stored),
    rules=masks.rules_named('lora' if recipe.lora else 'all'),
    lora=recipe.lora,
    quantize=recipe.quantize,
    prepare=prepare,
  )


def make_tx():
  return optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 1e-5)


def compile_step(name: str) -> Compiled:
  """The step that `training.train` would run, for packed rows."""
  recipe = RECIPES[name]
  mesh = make_mesh(MESH, describe_slice(TOPOLOGY))
  assert mesh.size == NUM_CHIPS
  plan = plan_of(recipe, mesh)
  decoder = Decoder(
    CONFIG,
    dtype=jnp.bfloat16,
    remat='full',
    lora_scale=recipe.lora.scale if recipe.lora else None,
    num_value_outputs=recipe.head.num_outputs(V) if recipe.head else 0,
  )
  tx = make_tx()
  state = jax.eval_shape(lambda params: step.init_state(params, tx), plan.trainable)
  shardings = step.state_shardings(plan.trainable, tx, mesh)
  by_row = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
  batch: dict[str, Any] = {
    name: jax.ShapeDtypeStruct((1, ROWS, T), dtype, sharding=by_row)
    for name, dtype in (
      ('tokens', jnp.int32),
      ('segments', jnp.int32),
      ('positions', jnp.int32),
      ('loss_mask', jnp.bool_),
    )
  }
  if recipe.head:
    shape = 1, ROWS, TEXTS
    batch['reward'] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_row)
  jitted = jax.jit(
    functools.partial(step.train_step, loss_fn=recipe.make_loss_fn(decoder), tx=tx),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  frozen = on(param_shardings(plan.frozen, mesh), plan.frozen)
  with jax.set_mesh(mesh):
    lowered = jitted.lower(on(shardings, state), frozen, batch)
  # Without searching for speed: a third of the time, and the same memory within 10%.
  options = {'exec_time_optimization_effort': -1.0}
  compiled = lowered.compile(compiler_options=options)
  program = compiled.as_text()
  return Compiled(
    memory_of(compiled),
    arrays=set(arrays_in(program)),
    moved={x for line in _MOVE.findall(program) for x in arrays_in(line)},
    kernels=set(_MOSAIC.findall(program)),
  )


def arrays_in(program: str) -> Iterator[Array]:
  for dtype, shape in _ARRAY.findall(program):
    yield dtype, tuple(int(size) for size in shape.split(','))


@pytest.fixture(scope='module')
def steps(tpu_compiler) -> Callable[[str], Compiled]:
  """The compiled step of a recipe; each is compiled once."""
  return functools.cache(lambda name: tpu_compiler(compile_step, name))


def trainable_on_a_chip(recipe: Recipe) -> float:
  """Numbers that train, of which a chip has its part."""
  if recipe.lora:
    # Each map has a side of width D, where the kernel is split and its factor too. The
    # factor of the other side is whole on every chip.
    kv = CONFIG.num_kv_heads * CONFIG.head_dim
    other_sides = (D, kv, kv, D, F, F, F)
    return L * recipe.lora.rank * sum(D / NUM_CHIPS + side for side in other_sides)
  if recipe.head:
    return (CONFIG.num_params - V * D + (D + 1) * recipe.head.width) / NUM_CHIPS
  return CONFIG.num_params / NUM_CHIPS


def frozen_bytes(recipe: Recipe) -> float:
  """Of weights as they are stored: bfloat16, or 4 bits and what NF4 has a block."""
  if not recipe.lora:
    return 0
  vectors = (2 * L + 1) * D
  kernels = CONFIG.num_params - 2 * V * D - vectors
  a_number = 0.5 + (1 + 4 / 256) / 64 if recipe.quantize else 2
  return a_number * kernels + 2 * (2 * V * D + vectors)


@pytest.mark.parametrize('name', RECIPES)
def test_weights_and_optimizer_are_split_over_the_chips(steps, name):
  recipe, memory = RECIPES[name], steps(name).memory
  # Float32 weights and two moments, of what trains alone. Vectors, which are whole on
  # every chip, and the batch are less than a hundredth.
  state = 3 * 4 * trainable_on_a_chip(recipe)
  frozen = frozen_bytes(recipe) / NUM_CHIPS
  assert memory.outputs == pytest.approx(state, rel=0.01)
  assert memory.arguments == pytest.approx(state + frozen, rel=0.01)
  assert memory.reused > 0.99 * memory.outputs


@pytest.mark.parametrize('name', RECIPES)
def test_a_step_fits_its_chips(steps, name):
  memory = steps(name).memory
  needed = memory.arguments + memory.outputs - memory.reused + memory.temporary
  assert memory.peak <= needed < 1e9 * RECIPES[name].peak < CHIP_BYTES


@pytest.mark.parametrize('name', RECIPES)
def test_logits_are_only_there_a_chunk_at_a_time(steps, name):
  recipe = RECIPES[name]
  found = {(dtype, shape) for dtype, shape in steps(name).arrays if V in shape}
  if recipe.head:  # no head: shards of the embedding
    assert max(math.prod(shape) for _, shape in found) == V * D / NUM_CHIPS
    return
  wide = {(dtype, shape) for dtype, shape in found if math.prod(shape) >= CHUNK * V}
  weights = {('bf16', (D, V)), ('bf16', (V, D))}
  if not recipe.lora:  # and their gradient
    weights |= {('f32', (D, V)), ('f32', (V, D))}
  assert ('f32', (CHUNK, V)) in wide
  assert {math.prod(shape) for _, shape in wide - weights} == {CHUNK * V}


@pytest.mark.parametrize('name', RECIPES)
def test_attention_is_splash_and_holds_no_scores(steps, name):
  kernels = ' '.join(steps(name).kernels)
  assert all(f'splash_mha_{part}_' in kernels for part in ('fwd', 'dq', 'dkv'))
  assert not [shape for _, shape in steps(name).arrays if shape.count(T) > 1]


@pytest.mark.parametrize('name', [name for name in RECIPES if RECIPES[name].lora])
def test_frozen_weights_stay_as_they_are_stored(steps, name):
  # No copy of all layers in another dtype, whole or split, such as XLA makes where it
  # takes a cast out of the loop over layers. Feed-forward kernels speak for the rest.
  stacks = {
    dtype
    for dtype, shape in steps(name).arrays
    if shape[0] == L and F in shape and math.prod(shape) >= L * D * F / NUM_CHIPS
  }
  assert stacks == (set() if RECIPES[name].quantize else {'bf16'})
  # Chips exchange weights in bfloat16; in float32, parts of adapters or gradients.
  moved = [math.prod(shape) for dtype, shape in steps(name).moved if dtype == 'f32']
  assert max(moved, default=0) <= F * LORA.rank
