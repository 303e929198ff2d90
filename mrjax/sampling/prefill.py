"""Reading prompts for their keys and values, in bounded memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mrjax.models.decoder import Decoder
from mrjax.sharding.mesh import constrain

# Tokens that are read at once on a device, of several prompts or of a long one: enough
# for products that no memory bandwidth bounds, and little to fill up for few prompts.
CHUNK = 2048


def read_prompts(
  decoder: Decoder,
  params: Any,
  tokens_PS: jax.Array,
  *,
  lengths_P: jax.Array,
  max_lengths_P: jax.Array,
):
  """`Decoder.prefill`, in chunks where prompts are longer than `CHUNK`.

  Memory for activations then grows with the chunk and not with the prompts. S is a
  multiple of `CHUNK` where it is more. What is read stays in the compute dtype until it
  is stored, so that the numbers are those of reading all at once.
  """
  apply: Callable[..., Any] = functools.partial(decoder.apply, {'params': params})
  if tokens_PS.shape[1] <= CHUNK:
    kwargs = {'lengths_P': lengths_P, 'max_lengths_P': max_lengths_P}
    return apply(tokens_PS, **kwargs, method='prefill')
  (P, S), config = tokens_PS.shape, decoder.config
  shape = P, config.num_kv_heads, S, config.head_dim
  zeros = constrain(jnp.zeros(shape, decoder.dtype), None, 'tensor', None, None)

  def read(i, prefix):
    start = i * CHUNK
    return apply(
      jax.lax.dynamic_slice_in_dim(tokens_PS, start, CHUNK, axis=1),
      prefix,
      start=start,
      max_lengths_P=max_lengths_P,
      method='prefill_chunk',
    )

  num_chunks = -(-lengths_P.max() // CHUNK)
  prefix = ((zeros, zeros),) * config.num_layers
  return jax.lax.fori_loop(0, num_chunks, read, prefix)
