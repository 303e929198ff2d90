"""The key/value cache of decoding: a shared part a prompt, an own part a row."""

import flax.struct
import jax
import jax.numpy as jnp

from mrjax.models.config import DecoderConfig


class KVCache(flax.struct.PyTreeNode):
  """Keys and values of B rows in P groups of n = B / P rows with one prompt each.

  Layers are separate arrays, so that writing one token never copies the whole cache,
  and heads stand before places, so that attention is a plain batched product.

  Attributes:
    prefix_k: Prompt keys, a [P, K, S, H] for each layer, read once a group.
    prefix_v: Prompt values.
    own_k: Keys of the tokens decoded so far, a [B, K, C, H] for each layer.
    own_v: Their values.
    prefix_positions_PS: int32 position of each prompt place, -1 where empty.
    own_positions_BC: The same for the own part.
    index: int32 scalar, the own place that all rows write next.
  """

  prefix_k: tuple[jax.Array, ...]
  prefix_v: tuple[jax.Array, ...]
  own_k: tuple[jax.Array, ...]
  own_v: tuple[jax.Array, ...]
  prefix_positions_PS: jax.Array
  own_positions_BC: jax.Array
  index: jax.Array


def make_cache(
  config: DecoderConfig,
  prefix: tuple[tuple[jax.Array, jax.Array], ...],
  *,
  prompt_lengths_P: jax.Array,
  num_rows: int,
  num_places: int,
) -> KVCache:
  """A cache with the prompts of `prefix` and an empty own part.

  Args:
    config: The decoder's.
    prefix: Keys and values of each layer as `Decoder.prefill` returns them, prompts
      right-padded.
    prompt_lengths_P: int32 number of real tokens of each prompt.
    num_rows: B, a multiple of the number of prompts.
    num_places: C, tokens each row can decode.
  """
  k0 = prefix[0][0]
  places_S = jnp.arange(k0.shape[2])
  shape = (num_rows, config.num_kv_heads, num_places, config.head_dim)
  return KVCache(
    prefix_k=tuple(k for k, _ in prefix),
    prefix_v=tuple(v for _, v in prefix),
    own_k=tuple(jnp.zeros(shape, k.dtype) for k, _ in prefix),
    own_v=tuple(jnp.zeros(shape, v.dtype) for _, v in prefix),
    prefix_positions_PS=jnp.where(
      places_S[None] < prompt_lengths_P[:, None], places_S[None], -1
    ).astype(jnp.int32),
    own_positions_BC=jnp.full((num_rows, num_places), -1, jnp.int32),
    index=jnp.zeros((), jnp.int32),
  )


def grow_cache(cache: KVCache, *, num_places: int) -> KVCache:
  """The same cache with room for `num_places` own tokens a row."""
  more = num_places - cache.own_positions_BC.shape[1]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
  return cache.replace(
    own_k=tuple(map(pad, cache.own_k)),
    own_v=tuple(map(pad, cache.own_v)),
    own_positions_BC=jnp.pad(
      cache.own_positions_BC, ((0, 0), (0, more)), constant_values=-1
    ),
  )
