r"""What a train step needs: memory by policy, LoRA, vocabulary; compile time by depth.

The 30M Llama of `training`, float32, full rows of 512. Bytes are those of the compiled
program, so they do not depend on the machine's load; step and compile times are medians
of interleaved rounds.

  remat        memory beside weights and optimizer, and step time, of each policy
  lora         peak over (weights; adapter, its moments and gradient; activations). As
               activations count those of full fine-tuning (its temporaries less its
               gradient) or, stricter, what waits for the backward pass alone
  vocabulary   the same step at V = 8,192 and 128,256: memory beyond embedding and head
               (weights, moments and gradients)
  depth        compile time at 4 and 32 layers

  python -m experiments.benchmarks.training_memory --output=training_memory.jsonl
"""

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks.figures import emit
from experiments.benchmarks.llama_30m import LORA_ALPHA, LORA_RANK, MODEL, ROW_LENGTH
from mrjax.lora.adapters import LoraConfig, init_adapter
from mrjax.models import remat
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import cli
from mrjax.runs.common import environment
from mrjax.runs.sft import make_loss_fn
from mrjax.runs.training_config import Config
from mrjax.sharding.mesh import make_mesh
from mrjax.training import optimizer, step

PyTree = Any
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Timed turns of each.', lower_bound=1)
_ROWS = flags.DEFINE_integer('rows', 8, 'Rows of 512 tokens a step.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
LORA = LoraConfig(LORA_RANK, LORA_ALPHA)


class Program(NamedTuple):
  """A train step that is ready to be compiled; leaves are shapes and dtypes."""

  config: DecoderConfig
  jitted: Any
  state: step.TrainState
  frozen: PyTree
  batch: dict[str, jax.ShapeDtypeStruct]
  waiting_bytes: int  # what waits for the backward pass and is no weight

  def compile(self) -> Any:
    return self.jitted.lower(self.state, self.frozen, self.batch).compile()


def make_program(policy: str, *, lora: bool = False, **changes: int) -> Program:
  """A step of the benchmark's model, of which `changes` may differ."""
  config = DecoderConfig.from_hf(MODEL | changes)
  decoder = Decoder(config, remat=policy, lora_scale=LORA.scale if lora else None)
  init = lambda key: Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))['params']
  trainable, frozen = jax.eval_shape(init, jax.random.key(0)), {}
  if lora:
    own = functools.partial(init_adapter, config, LORA)
    trainable, frozen = jax.eval_shape(own, jax.random.key(0)), trainable
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 2e-5)
  loss_fn = make_loss_fn(decoder)
  shape = 1, _ROWS.value, ROW_LENGTH
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (
      ('tokens', jnp.int32),
      ('segments', jnp.int32),
      ('positions', jnp.int32),
      ('loss_mask', jnp.bool_),
    )
  }

  def waits(trainable, frozen, batch):
    micro = jax.tree.map(lambda x: x[0], batch)
    loss = lambda trainable: loss_fn(trainable, frozen, micro, None)[0]
    return jax.vjp(loss, trainable)[1]

  return Program(
    config,
    jax.jit(
      functools.partial(step.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0
    ),
    jax.eval_shape(lambda params: step.init_state(params, tx), trainable),
    frozen,
    batch,
    _bytes(_others(jax.eval_shape(waits, trainable, frozen, batch), trainable, frozen)),
  )


def main(argv: Sequence[str]) -> None:
  del argv
  with jax.set_mesh(make_mesh('data:1', jax.devices()[:1])):
    emit(
      'training_memory_30m_float32',
      _OUTPUT.value,
      rows=_ROWS.value,
      row_length=ROW_LENGTH,
      remat=_by_policy(),
      lora=_of_lora(),
      vocabulary=_by_vocabulary(),
      depth=_by_depth(),
      versions=environment()['versions'],
    )


def _by_policy() -> dict[str, dict[str, float]]:
  programs = {name: make_program(name) for name in remat.POLICIES}
  compiled = {name: program.compile() for name, program in programs.items()}
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(_ROUNDS.value):
    for name, program in programs.items():
      state, frozen, batch = _example(program)
      state, metrics = jax.block_until_ready(compiled[name](state, frozen, batch))
      began = time.perf_counter()
      float(compiled[name](state, frozen, batch)[1]['loss'])
      seconds[name].append(time.perf_counter() - began)
      del state, metrics
  return {
    name: {
      'temporary_mb': _temporary(compiled[name]) / 1e6,
      'waiting_mb': programs[name].waiting_bytes / 1e6,
      'step_seconds': float(np.median(seconds[name])),
    }
    for name in programs
  }


def _of_lora() -> dict[str, dict[str, float]]:
  found: dict[str, dict[str, float]] = {}
  for name, lora in (('full', False), ('lora', True)):
    program = make_program(Config.remat, lora=lora)
    gradient = _bytes(program.state.params)
    held = _bytes(program.state) + _bytes(program.frozen) + _bytes(program.batch)
    temporary = _temporary(program.compile())
    found[name] = {
      'peak_mb': (held + temporary) / 1e6,
      'held_and_gradient_mb': (held + gradient) / 1e6,
      'activations_mb': (temporary - gradient) / 1e6,
      'waiting_mb': program.waiting_bytes / 1e6,
    }
  ours = found['lora']
  for kind, needed in (
    ('activations_of_full', found['full']['activations_mb']),
    ('what_waits', ours['waiting_mb']),
  ):
    total = ours['held_and_gradient_mb'] + needed
    ours[f'peak_to_held_and_{kind}'] = ours['peak_mb'] / total
  return found


def _by_vocabulary() -> dict[str, float]:
  beyond = {}
  for size in (8192, 128256):
    program = make_program(Config.remat, vocab_size=size)
    peak = _bytes(program.state) + _bytes(program.batch) + _temporary(program.compile())
    # Embedding and head; each has two moments and a gradient.
    beyond[size] = peak - 2 * 4 * 4 * size * program.config.hidden_size
  return {
    'beyond_8192_mb': beyond[8192] / 1e6,
    'beyond_128256_mb': beyond[128256] / 1e6,
    'ratio': beyond[128256] / beyond[8192],
  }


def _by_depth() -> dict[str, float]:
  seconds: dict[int, list[float]] = {4: [], 32: []}
  for _ in range(_ROUNDS.value):
    for layers, times in seconds.items():
      program = make_program(Config.remat, num_hidden_layers=layers)
      began = time.perf_counter()
      program.compile()
      times.append(time.perf_counter() - began)
      jax.clear_caches()
  medians = {layers: float(np.median(times)) for layers, times in seconds.items()}
  return {
    'seconds_4_layers': medians[4],
    'seconds_32_layers': medians[32],
    'ratio': medians[32] / medians[4],
  }


def _example(program: Program) -> tuple[step.TrainState, PyTree, dict[str, jax.Array]]:
  """Weights of zero and full rows of one text: time does not depend on the values."""
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  batch = {name: jnp.ones(x.shape, x.dtype) for name, x in program.batch.items()}
  batch['positions'] *= jnp.arange(ROW_LENGTH)
  return zeros(program.state), zeros(program.frozen), batch


def _temporary(compiled: Any) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


def _others(found: PyTree, *weights: PyTree) -> Iterator[Any]:
  """The leaves of `found` that are none of the weights."""
  kind = lambda x: (x.shape, x.dtype)
  weights_left = Counter(kind(x) for x in jax.tree.leaves(weights))
  for leaf in jax.tree.leaves(found):
    if weights_left[kind(leaf)] > 0:
      weights_left[kind(leaf)] -= 1
    else:
      yield leaf


def _bytes(tree: PyTree) -> int:
  leaves = jax.tree.leaves(list(tree) if isinstance(tree, Iterator) else tree)
  return sum(x.size * x.dtype.itemsize for x in leaves)


if __name__ == '__main__':
  cli.run(main)
