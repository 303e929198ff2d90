"""The one train step: pure, the same for every loss, accumulation and mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from mrjax.sharding.rules import param_shardings, param_specs
from mrjax.training.optimizer import state_specs

PyTree = Any
Batch = dict[str, jax.Array]
# (trainable, frozen, batch, key) -> (summed loss, (weight, metrics)). A step's loss is
# the sum over all its micro-batches divided by the summed weight (tokens, or pairs), so
# that accumulation, padding and mesh never change it. Metrics are sums, divided
# likewise. Only `trainable` is differentiated. `key` is for dropout: a function of the
# seed, the step and the micro-batch; None in an evaluation, where nothing is dropped.
LossFn = Callable[
  [PyTree, PyTree, Batch, jax.Array | None], tuple[jax.Array, tuple[jax.Array, dict]]
]


class TrainState(flax.struct.PyTreeNode):
  step: Any  # int32 scalar, optimizer steps done
  params: PyTree  # what trains; frozen weights are no part of the state
  opt_state: PyTree


def init_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def state_shardings(
  params: PyTree, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Where each leaf of the state lives; optimizer moments lie with their weights."""
  specs = state_specs(tx, params, param_specs(params))
  return TrainState(
    step=NamedSharding(mesh, jax.sharding.PartitionSpec()),
    params=param_shardings(params, mesh),
    opt_state=jax.tree.map(
      lambda spec: NamedSharding(mesh, spec),
      specs,
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    ),
  )


def train_step(
  state: TrainState,
  frozen: PyTree,
  batch: Batch,
  *,
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step over all micro-batches.

  Args:
    state: Updated state is returned; donate the old one.
    frozen: What the loss reads beside the trainable parameters; `{}` where all train.
    batch: Arrays with leading axes [A, B]: A micro-batches of B rows.
    loss_fn: See `LossFn`.
    tx: The optimizer.
    seed: Of the random stream that `loss_fn` gets.

  Returns:
    The new state, and float32 scalars: `loss`, `weight`, `grad_norm` (before
    clipping) and what `loss_fn` reports.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  step_key = jax.random.fold_in(jax.random.key(seed), state.step)

  def one(index, micro):
    key = jax.random.fold_in(step_key, index)
    (loss, (weight, metrics)), grads = grad_fn(state.params, frozen, micro, key)
    return grads, {'loss': loss, 'weight': weight} | metrics

  first = jax.tree.map(lambda x: x[0], batch)
  num_micro = jax.tree.leaves(batch)[0].shape[0]
  if num_micro == 1:
    grads, totals = one(0, first)
  else:
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, first)
    )
    add = lambda sums, xs: (jax.tree.map(jnp.add, sums, one(*xs)), None)
    (grads, totals), _ = jax.lax.scan(add, zeros, (jnp.arange(num_micro), batch))
  weight = totals.pop('weight')
  grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
  metrics = {name: total / weight for name, total in totals.items()}
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = TrainState(state.step + 1, params, opt_state)
  return state, metrics | {'weight': weight, 'grad_norm': optax.tree.norm(grads)}


def evaluate_step(
  trainable: PyTree, frozen: PyTree, batch: Batch, *, loss_fn: LossFn
) -> dict[str, jax.Array]:
  """Sums of `loss`, `weight` and what `loss_fn` reports over all micro-batches [A, B].

  A micro-batch after the other, so that an evaluation needs no more memory than a step.
  """

  def one(micro):
    loss, (weight, metrics) = loss_fn(trainable, frozen, micro, None)
    return {'loss': loss, 'weight': weight} | metrics

  return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(one, batch))
