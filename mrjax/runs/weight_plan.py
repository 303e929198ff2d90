"""What of a model trains, and how the rest is stored, before any of it is loaded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mrjax import trees
from mrjax.checkpoint.adapters import AdapterSource
from mrjax.checkpoint.source import ModelSource
from mrjax.checkpoint.store import ADAPTER, PART, WHOLE
from mrjax.lora import masks
from mrjax.lora.adapters import LORA_LEAF, LoraConfig, adapter_shapes
from mrjax.models.quantized import LEAVES
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
