"""What a training run begins with: weights, cut by the mask, and checkpoints."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint, not_finite
from mrjax.checkpoint.orbax import CheckpointStore
from mrjax.checkpoint.source import ModelSource
from mrjax.lora import masks
from mrjax.runs import common
from mrjax.training import step

PyTree = Any
WHOLE, PART = 'params', 'trained'  # items of a checkpoint: all weights, or some


class Begun(NamedTuple):
  """A run that can go on.

  Attributes:
    state: After the steps that are done.
    frozen: Weights that do not train, in the dtype they are stored in.
    shardings: Where the leaves of `state` live.
    item: The name under which a checkpoint holds what trains.
    position: What a checkpoint says of data and base, and a resumed run must match.
    metadata: Of the checkpoint it goes on from; empty at the beginning.
  """

  state: step.TrainState
  frozen: dict[str, Any]
  shardings: step.TrainState
  item: str
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


def mask_rules(trainable: str) -> tuple[masks.Rule, ...]:
  """The mask rules that `--trainable` names.

  Raises:
    ValueError: No such preset, or a pattern that is no regular expression.
  """
  kind, _, patterns = trainable.partition(':')
  if kind != 'regex':
    return masks.rules_named(trainable or 'all')
  for pattern in patterns.split(';'):
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'--trainable: {pattern!r} is no pattern: {error}.') from None
  return tuple((pattern, True) for pattern in patterns.split(';'))


def begin(
  source: ModelSource,
  mesh: Mesh,
  tx: optax.GradientTransformation,
  store: CheckpointStore,
  *,
  start: int,
  rules: Sequence[masks.Rule],
  position: Mapping[str, Any],
  prepare: Callable[[PyTree], PyTree] | None = None,
) -> Begun:
  """Loads what a run needs: all weights at the beginning, later what is not saved.

  Args:
    source: The model that is trained.
    mesh: Where to.
    tx: The optimizer.
    store: The run's checkpoints.
    start: The checkpoint to go on from; 0 for none.
    rules: Of the mask.
    position: What a checkpoint must say of the data.
    prepare: Changes the loaded weights before they are cut by the mask.

  Raises:
    CheckpointError: Weights that are not finite, damaged files, another model.
    OutputError: A checkpoint of other data or of another base.
  """
  prepare = prepare or (lambda params: params)
  whole = jax.eval_shape(prepare, source.param_shapes(jnp.float32))
  mask = masks.make_mask(whole, rules)
  all_train = all(value is True for value in trees.flatten(mask).values())
  shapes = jax.eval_shape(lambda x: masks.split(x, mask)[0], whole)
  shardings = step.state_shardings(shapes, tx, mesh)
  position = dict(position)
  params: PyTree = {}
  frozen: dict[str, Any] = {}
  if not start or not all_train:
    dtype = jnp.float32 if all_train else None
    with jax.set_mesh(mesh):
      params = prepare(source.load_params(mesh, dtype=dtype))
    if bad := not_finite(params):
      raise CheckpointError(
        f'{source.name}: {", ".join(bad[:4])} hold NaN or infinite numbers. The files '
        'are damaged, or the training that made them diverged.'
      )
    params, frozen = masks.split(params, mask)
    params = jax.tree.map(_float32, params, shardings.params)
  if frozen:
    position['base'] = {'model': source.name, 'fingerprint': fingerprint(frozen)}
  item = WHOLE if all_train else PART
  if not start:
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    state = _state(start, params, opt_state, shardings)
    return Begun(state, frozen, shardings, item, position, {})
  metadata = store.metadata(start)
  _check_position(store, metadata, position)
  del params  # before the saved ones take their place
  items = store.restore(
    start,
    {
      item: _abstract(shapes, shardings.params),
      'opt_state': _abstract(jax.eval_shape(tx.init, shapes), shardings.opt_state),
    },
  )
  state = _state(start, items[item], items['opt_state'], shardings)
  return Begun(state, frozen, shardings, item, position, metadata)


def _float32(x: jax.Array, sharding) -> jax.Array:
  if x.dtype == jnp.float32 and x.sharding == sharding:
    return x
  return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=sharding)(x)


def _check_position(
  store: CheckpointStore, saved: Mapping[str, Any], position: Mapping[str, Any]
) -> None:
  changed = [
    f'{name}: was {saved.get(name)!r}, now {value!r}'
    for name, value in position.items()
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
