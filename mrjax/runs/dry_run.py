"""Compiles a training step without weights and says what memory it needs."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.data.batches import TextBatches
from mrjax.runs.weight_plan import WeightPlan
from mrjax.sharding.mesh import BATCH_AXES
from mrjax.sharding.rules import param_shardings
from mrjax.training import step

PyTree = Any
_PARTS = ('trainable', 'optimizer', 'frozen', 'batch')


def dry_run(
  plan: WeightPlan,
  mesh: Mesh,
  tx: optax.GradientTransformation,
  jit_step: Callable[[step.TrainState], Any],
  batches: TextBatches,
  constants: Mapping[str, PyTree],
) -> dict[str, Any]:
  """Compiles the step for the largest batch of a run. Nothing is loaded or written.

  Args:
    plan: Of the weights.
    mesh: Of the run.
    tx: The optimizer.
    jit_step: Gives the jitted step for the shardings of the state.
    batches: Of the run.
    constants: What the loss reads beside the weights.

  Returns:
    `compile_seconds`, `flops` of a full batch, and bytes on one device: `trainable`,
    `optimizer`, `frozen`, `batch` (what is held between steps), `temporary` and `peak`
    (by the compiler, and no less than all of these).
  """
  shardings = step.state_shardings(plan.trainable, tx, mesh)
  init = lambda params: step.init_state(params, tx)
  state = _on(jax.eval_shape(init, plan.trainable), shardings)
  frozen = _on(plan.frozen, param_shardings(plan.frozen, mesh))
  frozen |= jax.tree.map(lambda x: _on(x, x.sharding), dict(constants))
  rows = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
  largest = batches.largest()
  batch = _on(largest, dict.fromkeys(largest, rows))
  began = time.perf_counter()
  with jax.set_mesh(mesh):
    compiled = jit_step(shardings).lower(state, frozen, batch).compile()
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  parts = (state.params, state.opt_state, frozen, batch)
  held = {name: _bytes_on_one(tree) for name, tree in zip(_PARTS, parts)}
  together = sum(held.values()) + memory.temp_size_in_bytes
  tokens = int(np.prod(largest['tokens'].shape))
  pairs = tokens * (largest['tokens'].shape[-1] + 1) / 2
  return {
    'compile_seconds': seconds,
    'flops': plan.flops.of(tokens=tokens, pairs=pairs),
    **held,
    'temporary': memory.temp_size_in_bytes,
    # The compiler for CPUs leaves temporaries out of its own. Outputs take the place of
    # what is donated.
    'peak': max(getattr(memory, 'peak_memory_in_bytes', 0), together),
  }


def describe(found: Mapping[str, Any]) -> str:
  """The result of `dry_run` as a table, in GB on one device."""
  names = (*_PARTS, 'temporary', 'peak')
  lines = [f'{name:<12}{found[name] / 1e9:>10.3f} GB' for name in names]
  lines.append(
    f'compiled in {found["compile_seconds"]:.1f} s; a full batch takes '
    f'{found["flops"]:.3g} floating-point operations'
  )
  return '\n'.join(['memory on one device', *lines])


def _bytes_on_one(tree: PyTree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _on(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
