"""Rematerialisation by name: what a layer keeps for its backward pass.

What is not kept is computed again. Numbers are those of a layer and a token, for width
D, feed-forward width F, and N query and K key heads of width H.

| name | kept on the device | numbers |
|---|---|---|
| none | all that the backward pass reads | |
| minimal | its input, products with weights, attention | 2 D + 2 (N + K) H + 2 F |
| attention | its input, attention | D + N H |
| full | its input | D |
| offload | nothing: its input waits in pinned memory of the host | 0 |

Attention is the output of a kernel, and its softmax sums. That of the `reference`
backend, which needs all its scores again, is always computed twice.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

POLICIES = ('none', 'minimal', 'attention', 'full', 'offload')
# Tensors named for these policies: a layer's input, its products with weights (an
# adapter's share included), and its attention.
LAYER_INPUT, PRODUCT, ATTENTION = 'layer_input', 'product', 'attention'
# cuDNN's output and softmax sums; JAX gives them no name.
_CUDNN_ATTENTION = 'dot_product_attention_fwd_wrapper'


def _keep(*names: str) -> Callable[..., bool]:
  is_named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive, *args, **params):
    is_cudnn = primitive.name == _CUDNN_ATTENTION
    return is_cudnn or is_named(primitive, *args, **params)

  return policy


def remat_layer(layer: Any, name: str, *, prevent_cse: bool) -> Any:
  """The layer class with the policy `name`.

  Args:
    layer: A linen module class.
    name: One of `POLICIES`.
    prevent_cse: Keep XLA from merging the second computation with the first; not
      needed under `scan`, where it costs speed.

  Raises:
    ValueError: An unknown name.
  """
  if name not in POLICIES:
    raise ValueError(f'remat {name!r} is unknown; want one of {", ".join(POLICIES)}.')
  if name == 'none':
    return layer
  policy = {
    'minimal': _keep(PRODUCT, ATTENTION),
    'attention': _keep(ATTENTION),
    'full': None,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  }[name]
  return nn.remat(layer, prevent_cse=prevent_cse, policy=policy)
