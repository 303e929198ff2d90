"""The key/value cache of decoding: prompts stored once in slots, an own part a row.

B rows stand in G groups of n = B / G. A group has W slots, each with the beginning of
one prompt; every row of the group goes on from the prompt in one of them.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mrjax.models.attention import KVPart, Stored
from mrjax.models.config import DecoderConfig


class Lanes(NamedTuple):
  """Where B rows stand in a cache.

  Attributes:
    slots_B: int32 slot that each row goes on from.
    prefix_lengths_B: int32 tokens in that slot.
    own_lengths_B: int32 tokens in the own part.
    max_lengths_B: int32 tokens that the row may reach (`longrope` reads it).
  """

  slots_B: jax.Array
  prefix_lengths_B: jax.Array
  own_lengths_B: jax.Array
  max_lengths_B: jax.Array


class LayerCache(NamedTuple):
  """One layer of a cache, and what its rows see of it before the next token."""

  prefix_k: Stored
  prefix_v: Stored
  own_k: Stored
  own_v: Stored
  lanes: Lanes
  num_own: jax.Array  # int32 [B], places of the own part that are seen

  def prefix_part(self) -> KVPart:
    G, K, W, S, _ = self.prefix_k.values.shape
    places_S, lanes = jnp.arange(S), self.lanes
    held_BS = places_S < lanes.prefix_lengths_B[:, None]
    here_BW = jnp.arange(W) == lanes.slots_B[:, None]
    positions_BWS = jnp.where(here_BW[..., None] & held_BS[:, None], places_S, -1)
    join = lambda stored: jax.tree.map(
      lambda x: x.reshape(G, K, W * S, *x.shape[4:]), stored
    )
    return KVPart(
      join(self.prefix_k), join(self.prefix_v), positions_BWS.reshape(-1, W * S)
    )

  def own_part(self) -> KVPart:
    places_C = jnp.arange(self.own_k.values.shape[2])
    positions_BC = places_C + self.lanes.prefix_lengths_B[:, None]
    held_BC = places_C < self.num_own[:, None]
    return KVPart(self.own_k, self.own_v, jnp.where(held_BC, positions_BC, -1))

  def write(self, k_BKH: jax.Array, v_BKH: jax.Array) -> 'LayerCache':
    """With one more own token a row."""
    k_BKH, v_BKH = move_faults(k_BKH, v_BKH)
    return self._replace(
      own_k=_write(self.own_k, k_BKH, self.lanes.own_lengths_B),
      own_v=_write(self.own_v, v_BKH, self.lanes.own_lengths_B),
      num_own=self.lanes.own_lengths_B + 1,
    )


class KVCache(flax.struct.PyTreeNode):
  """Keys and values, a `Stored` for each layer.

  Layers are separate arrays, so that writing one token never copies the whole cache,
  and heads stand before places, so that attention is a plain batched product.

  Attributes:
    prefix_k: Prompt keys, [G, K, W, S, H], read once a group.
    prefix_v: Prompt values.
    own_k: Keys of the tokens of each row, [B, K, C, H].
    own_v: Their values.
  """

  prefix_k: tuple[Stored, ...]
  prefix_v: tuple[Stored, ...]
  own_k: tuple[Stored, ...]
  own_v: tuple[Stored, ...]

  def layer(self, i: int, lanes: Lanes) -> LayerCache:
    return LayerCache(
      self.prefix_k[i],
      self.prefix_v[i],
      self.own_k[i],
      self.own_v[i],
      lanes,
      lanes.own_lengths_B,
    )

  def write(self, kvs, lanes: Lanes) -> 'KVCache':
    """With one more own token a row: for each layer, its key and value [B, K, H]."""
    places_B = lanes.own_lengths_B
    kvs = [move_faults(*kv) for kv in kvs]
    return self.replace(
      own_k=tuple(_write(x, k, places_B) for x, (k, _) in zip(self.own_k, kvs)),
      own_v=tuple(_write(x, v, places_B) for x, (_, v) in zip(self.own_v, kvs)),
    )

  def fill_slots(self, prefix, groups_N: jax.Array, slots_N: jax.Array) -> 'KVCache':
    """With prompts in slots.

    Args:
      prefix: For each layer, keys and values [N, K, S', H] as `Decoder.prefill` gives
        them, S' at most the places of a slot.
      groups_N: int32 group of each prompt; one out of range drops it.
      slots_N: int32 slot.
    """
    places = prefix[0][0].shape[2]
    prefix = [move_faults(*kv) for kv in prefix]

    def put(stored: Stored, new: jax.Array) -> Stored:
      # [N, K, S', ...] replaces the slots' first places.
      return jax.tree.map(
        lambda x, y: x.at[groups_N, :, slots_N, :places].set(y, mode='drop'),
        stored,
        store(new, stored.values.dtype),
      )

    return self.replace(
      prefix_k=tuple(put(x, k) for x, (k, _) in zip(self.prefix_k, prefix)),
      prefix_v=tuple(put(x, v) for x, (_, v) in zip(self.prefix_v, prefix)),
    )

  def resize(self, num_places: int) -> 'KVCache':
    """With `num_places` own places a row; fewer drops the last, which must be empty."""

    def change(stored: Stored) -> Stored:
      more = num_places - stored.values.shape[2]
      if more <= 0:
        return jax.tree.map(lambda x: x[:, :, :num_places], stored)
      pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3))
      return jax.tree.map(pad, stored)

    return self.replace(
      own_k=tuple(map(change, self.own_k)), own_v=tuple(map(change, self.own_v))
    )


def empty_cache(
  config: DecoderConfig,
  dtype: Any,
  *,
  num_groups: int,
  num_slots: int,
  slot_places: int,
  num_rows: int,
  num_places: int,
) -> KVCache:
  """A cache without tokens.

  Args:
    config: The decoder's.
    dtype: What keys and values are stored in: a floating dtype, or int8.
    num_groups: G, a divisor of `num_rows`.
    num_slots: W.
    slot_places: S, places of a slot.
    num_rows: B.
    num_places: C, own places of a row.
  """
  K, H = config.num_kv_heads, config.head_dim

  def layers(*shape: int) -> tuple[Stored, ...]:
    return tuple(
      Stored(
        jnp.zeros((*shape, H), dtype),
        jnp.zeros(shape, jnp.float32) if dtype == jnp.int8 else None,
      )
      for _ in range(config.num_layers)
    )

  prefix = num_groups, K, num_slots, slot_places
  own = num_rows, K, num_places
  return KVCache(layers(*prefix), layers(*prefix), layers(*own), layers(*own))


def store(x: jax.Array, dtype: Any) -> Stored:
  """Vectors [..., H] in the dtype of a cache; in int8, each with a scale of its own."""
  if dtype != jnp.int8:
    return Stored(x.astype(dtype))
  x = x.astype(jnp.float32)
  scales = jnp.abs(x).max(axis=-1) / 127.0
  values = jnp.round(x / jnp.where(scales > 0, scales, 1.0)[..., None])
  return Stored(values.astype(jnp.int8), scales)


def move_faults(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Values that are not finite become keys that are not, for what is to be stored.

  A key that a row does not see is masked out. A value that it does not see is
  multiplied with 0, which would carry NaN from one row to others.
  """
  fine = jnp.isfinite(v).all(axis=-1, keepdims=True)
  return jnp.where(fine, k, jnp.nan), jnp.where(fine, v, 0)


def _write(stored: Stored, new_BKH: jax.Array, places_B: jax.Array) -> Stored:
  rows_B = jnp.arange(places_B.shape[0])
  return jax.tree.map(
    lambda x, y: x.at[rows_B, :, places_B].set(
      y, mode='promise_in_bounds', unique_indices=True, indices_are_sorted=True
    ),
    stored,
    store(new_BKH, stored.values.dtype),
  )
