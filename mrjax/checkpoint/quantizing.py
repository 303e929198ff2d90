"""Kernels quantised while they stream from a checkpoint onto a mesh."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.placing import place, put_layers
from mrjax.checkpoint.weights import WeightRule
from mrjax.lora import quantization
from mrjax.models.config import DecoderConfig


def load_quantized(
  read: Callable[[int], np.ndarray],
  rule: WeightRule,
  config: DecoderConfig,
  kind: str,
  shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
  """The leaves that stand for a quantised kernel, by path, stacked.

  Every process quantises the whole of every layer, since the scales of NF4's blocks
  are blocks themselves, which run over all of it.

  Args:
    read: Gives a layer's weight as Hugging Face stores it.
    rule: The kernel's.
    config: The decoder's.
    kind: One of `quantized.KINDS`.
    shardings: Where the leaves live, by path.

  Raises:
    CheckpointError: A weight that is no finite number.
  """
  leaves: dict[str, jax.Array] = {}
  for i in range(config.num_layers):
    try:
      parts = quantization.quantize(read(i), kind)
    except ValueError as error:
      raise CheckpointError(
        f'{rule.hf.format(i=i)} cannot be quantised: {error}.'
      ) from None
    for leaf, part in parts.items():
      name = f'{rule.ours.removesuffix("/kernel")}/{leaf}'
      layer = place(part[None], shardings[name])
      if i == 0:
        shape = (config.num_layers, *part.shape)
        leaves[name] = jnp.zeros(shape, part.dtype, device=shardings[name])
      leaves[name] = put_layers(leaves[name], layer, i, sharding=shardings[name])
      leaves[name].block_until_ready()  # one layer in flight, not all of them
  return leaves
