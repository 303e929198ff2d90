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

from typing import Any

import flax.linen as nn
import jax

POLICIES = ('none', 'minimal', 'attention', 'full', 'offload')
LAYER_INPUT, ATTENTION = 'layer_input', 'attention'  # tensors named for these policies
# cuDNN's output and softmax sums; JAX gives them no name.
_CUDNN_ATTENTION = 'dot_product_attention_fwd_wrapper'

_is_named_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _keep_attention(primitive, *args, **params):
  is_cudnn = primitive.name == _CUDNN_ATTENTION
  return is_cudnn or _is_named_attention(primitive, *args, **params)


def _keep_products(primitive, *args, **params):
  return _is_product(primitive, *args, **params) or _keep_attention(
    primitive, *args, **params
  )


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
    'minimal': _keep_products,
    'attention': _keep_attention,
    'full': None,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    ),
  }[name]
  return nn.remat(layer, prevent_cse=prevent_cse, policy=policy)
