"""What a training run begins with: loaded weights, or those of a checkpoint."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint, not_finite
from mrjax.checkpoint.store import CheckpointStore
from mrjax.lora import masks
from mrjax.lora.adapters import init_adapter
from mrjax.runs import common
from mrjax.runs.training_output import way_back
from mrjax.runs.weight_plan import WeightPlan
from mrjax.sharding.rules import born_sharded, param_shardings
from mrjax.training import step

PyTree = Any


class Begun(NamedTuple):
  """A run that can go on.

  Attributes:
    state: After the steps that are done.
    frozen: Weights that do not train, in the dtype they are stored in.
    position: What a checkpoint says of data and base, and a resumed run must match.
    metadata: Of the checkpoint it goes on from; empty at the beginning.
  """

  state: step.TrainState
  frozen: dict[str, Any]
  position: dict[str, Any]
  metadata: dict[str, Any]


class Scores:
  """Evaluation losses of the checkpoints: the last, and the best."""

  def __init__(self, metadata: Mapping[str, Any]):
    self.best: dict[str, Any] | None = metadata.get('best')
    self._last: tuple[int, float] | None = None

  def add(self, done: int, loss: float) -> None:
    self._last = done, loss

  def saved(self, done: int) -> dict[str, Any]:
    """What the checkpoint of step `done` says: `eval_loss` and `best`."""
    loss = self._last[1] if self._last and self._last[0] == done else None
    if loss is not None and (self.best is None or loss < self.best['loss']):
      self.best = {'step': done, 'loss': loss}
    return {'eval_loss': loss, 'best': self.best}


def begin(
  plan: WeightPlan,
  mesh: Mesh,
  tx: optax.GradientTransformation,
  store: CheckpointStore,
  *,
  start: int,
  position: Mapping[str, Any],
  seed: int = 0,
) -> Begun:
  """Loads what a run needs: all weights at the beginning, later what is not saved.

  Args:
    plan: Of the weights.
    mesh: Where to.
    tx: The optimizer.
    store: The run's checkpoints.
    start: The checkpoint to go on from; 0 for none.
    position: What a checkpoint must say of the data.
    seed: Of a fresh adapter.

  Raises:
    CheckpointError: Weights that are not finite, damaged files, another model.
    OutputError: A checkpoint of other data or of another base.
  """
  shardings = step.state_shardings(plan.trainable, tx, mesh)
  position = dict(position)
  params: PyTree = {}
  frozen: dict[str, Any] = {}
  if not start or plan.frozen:
    params, frozen = masks.split(_load_base(plan, mesh), plan.mask)
  if frozen:
    position['base'] = {
      'model': plan.source.name,
      'fingerprint': fingerprint(frozen),
      'quantize': plan.quantize,
    }
  if plan.lora:
    position['lora'] = dataclasses.asdict(plan.lora)
  if start:
    del params  # the saved ones take their place
    opt_shapes = jax.eval_shape(tx.init, plan.trainable)
    with _naming_way_back(store, start):
      metadata = store.metadata(start)
      _check_position(store, metadata, position)
      items = store.restore(
        start,
        {
          plan.item: _abstract(plan.trainable, shardings.params),
          'opt_state': _abstract(opt_shapes, shardings.opt_state),
        },
      )
    state = _state(start, items[plan.item], items['opt_state'], shardings)
    return Begun(state, frozen, position, metadata)
  if plan.lora:
    base = masks.merge(params, frozen) if plan.adapter else {}
    trained, fixed = masks.split(_load_adapter(plan, mesh, base, seed), plan.mask)
    params, frozen = masks.merge(trained, params), masks.merge(fixed, frozen)
  params = jax.tree.map(_float32, params, shardings.params)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  return Begun(_state(start, params, opt_state, shardings), frozen, position, {})


def check_finished(
  plan: WeightPlan, mesh: Mesh, store: CheckpointStore, done: int
) -> None:
  """Looks whether what a finished run has trained is whole, by reading it.

  The state of the optimizer, which nothing needs any more, is not looked at.

  Raises:
    CheckpointError: The checkpoint of step `done` is damaged; says how to go on from an
      earlier one.
  """
  like = _abstract(plan.trainable, param_shardings(plan.trainable, mesh))
  with _naming_way_back(store, done):
    store.restore(done, {plan.item: like})


def _load_base(plan: WeightPlan, mesh: Mesh) -> PyTree:
  dtype = None if plan.frozen else jnp.float32
  with jax.set_mesh(mesh):
    params = plan.prepare(
      plan.source.load_params(mesh, dtype=dtype, quantize=plan.quantize)
    )
  if bad := not_finite(params):
    raise CheckpointError(
      f'{plan.source.name}: {", ".join(bad[:4])} hold NaN or infinite numbers. The '
      'files are damaged, or the training that made them diverged.'
    )
  return params


def _load_adapter(plan: WeightPlan, mesh: Mesh, base: PyTree, seed: int) -> PyTree:
  assert plan.lora is not None
  if plan.adapter is None:
    init = functools.partial(init_adapter, plan.source.config, plan.lora)
    return born_sharded(init, mesh, jax.random.key(seed))
  made_on = plan.adapter.base
  same_form = plan.frozen and made_on.get('quantize', '') == plan.quantize
  if same_form and made_on.get('fingerprint'):
    plan.adapter.check_base(base)
  elif made_on.get('model') != plan.source.name:
    logging.warning(
      '%s was trained on %s; whether %s has the same weights cannot be told.',
      plan.adapter.name,
      repr(made_on['model']) if made_on.get('model') else 'a model it does not name',
      plan.source.name,
    )
  adapter = plan.adapter.load(plan.source.config, mesh)
  if bad := not_finite(adapter):
    raise CheckpointError(
      f'{plan.adapter.name}: {bad[0]} holds NaN or infinite numbers.'
    )
  return adapter


@contextlib.contextmanager
def _naming_way_back(store: CheckpointStore, done: int) -> Iterator[None]:
  """Has an error about the checkpoint of step `done` say how to train on without it."""
  try:
    yield
  except CheckpointError as error:
    # In place of what is said to who wants to read the model.
    error.__notes__ = [way_back(store.directory.parent, done)]
    raise


def _float32(x: jax.Array, sharding) -> jax.Array:
  if x.dtype == jnp.float32 and x.sharding == sharding:
    return x
  return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=sharding)(x)


def _check_position(
  store: CheckpointStore, saved: Mapping[str, Any], position: Mapping[str, Any]
) -> None:
  as_saved = json.loads(json.dumps(position))  # tuples become lists
  changed = [
    f'{name}: was {saved.get(name)!r}, now {value!r}'
    for name, value in as_saved.items()
    if saved.get(name) != value
  ]
  if changed:
    raise common.OutputError(
      f'{store.directory.parent} was trained on other data or another base '
      f'({"; ".join(changed)}). Choose another --output_dir, or pass --overwrite to '
      'start again.'
    )


def _state(done: int, params, opt_state, shardings) -> step.TrainState:
  number = jax.device_put(jnp.asarray(done, jnp.int32), shardings.step)
  return step.TrainState(number, params, opt_state)


def _abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )
