"""What a training run begins with: weights, cut by the mask, and checkpoints."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint.adapters import AdapterSource
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint, not_finite
from mrjax.checkpoint.source import ModelSource
from mrjax.checkpoint.store import (
  ADAPTER,
  PART,
  WHOLE,
  CheckpointStore,
  set_aside_after,
)
from mrjax.lora import masks
from mrjax.lora.adapters import LORA_LEAF, LoraConfig, adapter_shapes, init_adapter
from mrjax.models.quantized import LEAVES
from mrjax.runs import common
from mrjax.sharding.rules import born_sharded
from mrjax.training import step
from mrjax.training.flops import StepFlops, step_flops

PyTree = Any


class WeightPlan(NamedTuple):
  """The weights of a run, before any of them is loaded.

  Attributes:
    source: The model that is trained.
    prepare: Changes its weights before they are cut by the mask.
    lora: What the adapter on it is, where there is one.
    adapter: Where that adapter comes from; None for a new one.
    quantize: How the kernels of its layers are stored; empty: as they come.
    mask: Of all weights and the adapter's.
    trainable: Shapes of what trains, float32.
    frozen: Shapes of the rest, as it is stored.
    item: The name under which a checkpoint holds what trains.
    flops: Operations of a step.
  """

  source: ModelSource
  prepare: Callable[[PyTree], PyTree]
  lora: LoraConfig | None
  adapter: AdapterSource | None
  quantize: str
  mask: PyTree
  trainable: PyTree
  frozen: PyTree
  item: str
  flops: StepFlops


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


def plan_weights(
  source: ModelSource,
  *,
  rules: Sequence[masks.Rule],
  lora: LoraConfig | None = None,
  adapter: AdapterSource | None = None,
  quantize: str = '',
  prepare: Callable[[PyTree], PyTree] | None = None,
  head_outputs: int = 0,
) -> WeightPlan:
  """Decides what trains and how the rest is stored.

  Args:
    source: The model that is trained.
    rules: Of the mask.
    lora: What adapter to put on it.
    adapter: Where that comes from; None for a new one.
    quantize: One of `quantized.KINDS`, or empty.
    prepare: Changes the loaded weights; used on shapes here.
    head_outputs: As for `step_flops`.

  Raises:
    ValueError: A mask under which nothing trains, or which names quantised weights; an
      adapter or a quantisation that does not fit the model.
  """
  prepare = prepare or (lambda params: params)
  own = adapter_shapes(source.config, lora) if lora else {}

  def all_shapes(dtype: Any, quantize: str) -> PyTree:
    base = source.param_shapes(dtype, quantize=quantize)
    return masks.merge(own, jax.eval_shape(prepare, base))

  plain = all_shapes(jnp.float32, '')
  flops = step_flops(
    source.config, plain, masks.make_mask(plain, rules), head_outputs=head_outputs
  )
  stored = all_shapes(None, quantize)
  mask = masks.make_mask(stored, rules)
  chosen = {name for name, value in trees.flatten(mask).items() if value is not False}
  fixed = sorted(name for name in chosen if name.split('/')[-1] in LEAVES)
  if fixed:
    kernel = f'{fixed[0].rpartition("/")[0]}/kernel'
    raise ValueError(
      f'--quantize={quantize} stores {kernel} in few bits, which cannot be trained. '
      'Give --lora_rank, or a --trainable that leaves the kernels of the layers out.'
    )
  train_shapes, frozen_shapes = jax.eval_shape(lambda x: masks.split(x, mask), stored)
  if not frozen_shapes:
    item = WHOLE
  else:
    only_lora = all(LORA_LEAF.fullmatch(name) for name in chosen)
    item = ADAPTER if only_lora and chosen == trees.flatten(own).keys() else PART
  return WeightPlan(
    source,
    prepare,
    lora,
    adapter,
    quantize,
    mask,
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), train_shapes),
    frozen_shapes,
    item,
    flops,
  )


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
    try:
      metadata = store.metadata(start)
      _check_position(store, metadata, position)
      opt_shapes = jax.eval_shape(tx.init, plan.trainable)
      items = store.restore(
        start,
        {
          plan.item: _abstract(plan.trainable, shardings.params),
          'opt_state': _abstract(opt_shapes, shardings.opt_state),
        },
      )
    except CheckpointError as error:
      error.add_note(_way_back(store, start))
      raise
    state = _state(start, items[plan.item], items['opt_state'], shardings)
    return Begun(state, frozen, position, metadata)
  if plan.lora:
    base = masks.merge(params, frozen) if plan.adapter else {}
    trained, fixed = masks.split(_load_adapter(plan, mesh, base, seed), plan.mask)
    params, frozen = masks.merge(trained, params), masks.merge(fixed, frozen)
  params = jax.tree.map(_float32, params, shardings.params)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  return Begun(_state(start, params, opt_state, shardings), frozen, position, {})


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


def _way_back(store: CheckpointStore, damaged: int) -> str:
  """How to go on where the checkpoint of step `damaged` cannot be used."""
  earlier = max((step for step in store.steps() if step < damaged), default=0)
  if not earlier:
    return 'There is no earlier one: pass --overwrite to start again.'
  text = f'The checkpoint before it is that of step {earlier}: '
  run_dir = store.directory.parent
  if set_aside_after(run_dir) == earlier:  # it would not be followed a second time
    text += f'delete {run_dir / "set_aside"} and '
  return f'{text}pass --resume_step={earlier} to go on from there.'


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
