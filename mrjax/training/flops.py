"""Floating-point operations of a training step, and how fast devices can be.

Counted as is usual for model FLOPs utilisation (MFU, Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311): a weight costs 2 operations a token in the forward
pass, 2 to send the gradient through it and 2 for its own gradient, so 6 where all
trains and 4 where it is frozen below an adapter. Recomputation (remat) does not count,
nor does padding; attention counts the pairs of tokens that see each other, in each text
for itself (sliding windows are not subtracted).
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from mrjax import trees
from mrjax.models.config import DecoderConfig

PyTree = Any
_VALUE_HEAD = 'value_head/kernel'

# Dense bfloat16 operations a second of one device, as the makers state them, by the
# beginning of `device_kind`; the longest that ends with a word counts.
_PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GH200': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA L4': 121e12,
  'NVIDIA GeForce RTX 4090': 165e12,
}


class StepFlops(NamedTuple):
  """What a training step costs, forward and backward.

  Attributes:
    per_token: Operations a token.
    per_pair: Operations of attention for each (token, token it sees).
  """

  per_token: float
  per_pair: float

  def of(self, *, tokens: float, pairs: float) -> float:
    return self.per_token * tokens + self.per_pair * pairs


def step_flops(
  config: DecoderConfig, params: PyTree, mask: PyTree, *, head_outputs: int = 0
) -> StepFlops:
  """Operations of a step.

  Args:
    config: The decoder's.
    params: Shapes of all parameters, adapters included, before any quantisation.
    mask: What trains, as `masks.make_mask` gives it.
    head_outputs: Outputs of a value head that are computed for a token; 0: all.
  """
  trains = trees.flatten(mask)
  layers_back = _layers_with_backward(trains, config.num_layers)
  forward = through = own = 0.0
  leaves = trees.flatten(params)
  for name, leaf in leaves.items():
    if not _is_matrix(name, config, leaves):
      continue
    size = leaf.size
    if head_outputs and name == _VALUE_HEAD:
      size = size // leaf.shape[-1] * head_outputs
    share = 1.0  # of the layers that the gradient goes through
    if name.startswith('layers/'):
      share = layers_back / config.num_layers
    elif layers_back == 0 and not trains['final_norm/scale']:
      share = 0.0
    forward += 2 * size
    through += 2 * size * share
    last = trains[name]
    own += 2 * size * (last if isinstance(last, bool) else last / leaf.shape[0])
  width = config.num_heads * config.head_dim
  per_pair = 4.0 * width * (config.num_layers + 2 * layers_back)
  return StepFlops(forward + through + own, per_pair)


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 operations a second of a device; None where it is not known."""
  kind = device.device_kind
  names = [name for name in _PEAKS if re.match(rf'{re.escape(name)}(?![\w])', kind)]
  return _PEAKS[max(names, key=len)] if names else None


def _layers_with_backward(trains: dict[str, Any], num_layers: int) -> int:
  if trains['embed/embedding']:
    return num_layers
  cuts = [value for name, value in trains.items() if name.startswith('layers/')]
  return max(num_layers if cut is True else int(cut) for cut in cuts)


def _is_matrix(name: str, config: DecoderConfig, names: Collection[str]) -> bool:
  # Looking an embedding up costs nothing; as a tied head it is a product, which a value
  # head takes the place of.
  tied = config.tie_embeddings and _VALUE_HEAD not in names
  return (tied and name == 'embed/embedding') or name.endswith(
    ('/kernel', '/lora_a', '/lora_b')
  )
