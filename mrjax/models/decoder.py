"""The decoder: one flax.linen module for the whole Llama family.

Parameters are a plain nested dict. With `scan_layers` (training) every leaf under
`layers` has a leading axis of layers; without it (sampling) there is one subtree
`layers_0`, `layers_1`, ... a layer: see `unstack_layers`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mrjax.models import products, remat
from mrjax.models.attention import NO_WINDOW
from mrjax.models.cache import KVCache, Lanes
from mrjax.models.config import DecoderConfig
from mrjax.models.layers import (
  DecoderLayer,
  LayerInputs,
  Linear,
  LoraSettings,
  RMSNorm,
)
from mrjax.models.rope import rope_angles
from mrjax.sharding.mesh import BATCH_AXES, constrain

REMAT_POLICIES = remat.POLICIES


class Decoder(nn.Module):
  """A Llama-family decoder with a language-model head or a value head.

  Attributes:
    config: Shape and flavour.
    dtype: Compute dtype; norms, softmax and logits are float32 whatever it is.
    scan_layers: Stack the layers and scan over them. Compile time then does not grow
      with depth, which is right for training; decoding wants separate layers, since
      a scan would copy the whole cache at every token.
    remat: What a layer keeps for its backward pass: see `remat.POLICIES`.
    num_value_outputs: 0 for a language model; otherwise the width of a value head
      that replaces the language-model head (1, atoms, vocabulary, or their product).
    lora_scale: `LoraConfig.scale` of the adapter that the parameters hold.
    lora_dropout: Share of adapter inputs dropped, in training; above 0, `apply` needs
      `rngs={'dropout': key}`.
    attention_backend: Of whole rows; see `attention.choose_backend`.
    fixed_tiles: Make products in tiles of fixed size, those of attention to a cache
      too: the bits of a row then depend on nothing that runs beside it. For sampling
      on a CPU; see `products.matmul_in_tiles` and `attention.cached_attention`.
  """

  config: DecoderConfig
  dtype: Any = jnp.float32
  scan_layers: bool = True
  remat: str = 'none'
  num_value_outputs: int = 0
  lora_scale: float | None = None
  lora_dropout: float = 0.0
  attention_backend: str = 'auto'
  fixed_tiles: bool = False

  def setup(self):
    c = self.config
    lora = LoraSettings(self.lora_scale, self.lora_dropout)
    self.embed = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(c.initializer_range),
    )
    layer = remat.remat_layer(
      DecoderLayer, self.remat, prevent_cse=not self.scan_layers
    )
    if self.scan_layers:
      self.layers: Any = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast),
        length=c.num_layers,
      )(c, self.dtype, lora, self.attention_backend, self.fixed_tiles)
    else:
      self.layers = [
        layer(c, self.dtype, lora, self.attention_backend, self.fixed_tiles)
        for _ in range(c.num_layers)
      ]
    self.final_norm = RMSNorm(c, c.hidden_size, self.dtype)
    if self.num_value_outputs:
      self.value_head = Linear(
        (c.hidden_size,),
        (self.num_value_outputs,),
        True,
        stddev=c.initializer_range,
        dtype=jnp.float32,
        fixed_tiles=self.fixed_tiles,
      )
    elif not c.tie_embeddings:
      self.lm_head = Linear(
        (c.hidden_size,),
        (c.vocab_size,),
        False,
        stddev=c.initializer_range,
        dtype=self.dtype,
        fixed_tiles=self.fixed_tiles,
      )

  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Head outputs of every token, float32 [B, T, V] or [B, T, num_value_outputs].

    Args:
      tokens_BT: int32 token ids.
      positions_BT: int32 position of each token in its own text; by default 0, 1, ...
      segments_BT: int32 text number of each token, 0 for padding (on either side);
        by default one text a row.
    """
    return self.head(
      self.hidden(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
    )

  def hidden(self, tokens_BT, *, positions_BT=None, segments_BT=None) -> jax.Array:
    """Hidden states after the final norm, [B, T, D] in the compute dtype."""
    x_BTD, inputs = self._begin(tokens_BT, positions_BT, segments_BT)
    windows = [w or NO_WINDOW for w in self.config.layer_windows]
    if self.scan_layers:
      x_BTD, _ = self.layers(x_BTD, jnp.asarray(windows, jnp.int32), inputs)
    else:
      for layer, window in zip(self.layers, windows):
        x_BTD, _ = layer(x_BTD, window, inputs)
    return self.final_norm(x_BTD)

  def prefill(self, tokens_PS: jax.Array, *, lengths_P: jax.Array, max_lengths_P):
    """Reads right-padded prompts; needs `scan_layers=False`.

    Args:
      tokens_PS: int32 prompts.
      lengths_P: int32 number of real tokens of each.
      max_lengths_P: int32 tokens each row may reach with its completion (`longrope`
        chooses its factors by it).

    Returns:
      A pair (k, v) of [P, K, S, H] for each layer.
    """
    places_S = jnp.arange(tokens_PS.shape[1])
    segments_PS = (places_S[None] < lengths_P[:, None]).astype(jnp.int32)
    positions_PS = jnp.broadcast_to(places_S[None], tokens_PS.shape)
    x, inputs = self._begin(tokens_PS, positions_PS, segments_PS, max_lengths_P)
    windows = [w or NO_WINDOW for w in self.config.layer_windows]
    prefix = []
    for layer, window in zip(self.layers, windows, strict=True):
      x, kv = layer.prefill(x, window, inputs)
      prefix.append(kv)
    return tuple(prefix)

  def prefill_chunk(
    self, tokens_PT: jax.Array, prefix, *, start: jax.Array, max_lengths_P: jax.Array
  ):
    """Goes on reading right-padded prompts, with their places from `start` on.

    Memory beside `prefix` grows with T and not with the length of the prompts.

    Args:
      tokens_PT: int32 tokens of those places.
      prefix: As `prefill` gives it, with room for all places, of which those before
        `start` have been read.
      start: int32, a multiple of T.
      max_lengths_P: As for `prefill`.

    Returns:
      `prefix` with these places.
    """
    places_T = start + jnp.arange(tokens_PT.shape[1])
    positions_PT = jnp.broadcast_to(places_T, tokens_PT.shape)
    x, inputs = self._begin(tokens_PT, positions_PT, None, max_lengths_P)
    read = []
    for i, layer in enumerate(self.layers):
      window = self.config.layer_windows[i] or NO_WINDOW
      x, kv = layer.prefill_chunk(x, window, inputs, prefix[i], start)
      read.append(kv)
    return tuple(read)

  def decode(
    self, tokens_B: jax.Array, lanes: Lanes, cache: KVCache
  ) -> tuple[jax.Array, KVCache]:
    """Head outputs of one new token a row, float32 [B, V], and the cache with it.

    Args:
      tokens_B: int32 next token of each row.
      lanes: Where its predecessors are; it is written at `lanes.own_lengths_B`.
      cache: Keys and values of all earlier tokens.
    """
    hidden_BD, cache = self.decode_hidden(tokens_B, lanes, cache)
    return self.head(hidden_BD[:, None])[:, 0], cache

  def decode_hidden(
    self, tokens_B: jax.Array, lanes: Lanes, cache: KVCache
  ) -> tuple[jax.Array, KVCache]:
    """As `decode`, with hidden states after the final norm [B, D] for head outputs."""
    positions_B1 = (lanes.prefix_lengths_B + lanes.own_lengths_B)[:, None]
    x, inputs = self._begin(tokens_B[:, None], positions_B1, None, lanes.max_lengths_B)
    own = []
    for i, layer in enumerate(self.layers):
      window = self.config.layer_windows[i] or NO_WINDOW
      x, kv = layer.decode(x, window, inputs, cache.layer(i, lanes))
      own.append(kv)
    own_k, own_v = zip(*own)
    return self.final_norm(x)[:, 0], cache.replace(own_k=own_k, own_v=own_v)

  def peek(self, tokens_BT: jax.Array, lanes: Lanes, cache: KVCache):
    """Head outputs of T tokens a row that could each come next, [B, T, outputs].

    Each token sees the cache and itself, as if it came next alone. Nothing is written.

    Returns:
      The outputs, and for each layer the keys and values of the tokens, a pair of
      [B, T, K, H], with which `KVCache.write` goes on from one of them.
    """
    positions_B1 = (lanes.prefix_lengths_B + lanes.own_lengths_B)[:, None]
    positions_BT = jnp.broadcast_to(positions_B1, tokens_BT.shape)
    x, inputs = self._begin(tokens_BT, positions_BT, None, lanes.max_lengths_B)
    kvs = []
    for i, layer in enumerate(self.layers):
      window = self.config.layer_windows[i] or NO_WINDOW
      x, kv = layer.peek(x, window, inputs, cache.layer(i, lanes))
      kvs.append(kv)
    return self.head(self.final_norm(x)), tuple(kvs)

  def head(self, hidden_BTD: jax.Array) -> jax.Array:
    """Float32 outputs of the head for hidden states: logits, or raw values."""
    c = self.config
    if self.num_value_outputs:
      return self.value_head(hidden_BTD.astype(jnp.float32))
    if c.tie_embeddings and self.fixed_tiles:
      table_DV = self.embed.embedding.astype(self.dtype).T
      logits = products.matmul_in_tiles(
        hidden_BTD.reshape(-1, c.hidden_size), table_DV
      ).reshape(*hidden_BTD.shape[:-1], -1)
    elif c.tie_embeddings:
      logits = self.embed.attend(hidden_BTD)
    else:
      logits = self.lm_head(hidden_BTD)
    logits = logits.astype(jnp.float32)
    if c.logit_softcap is not None:
      logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    return logits

  def _begin(self, tokens_BT, positions_BT, segments_BT, max_lengths_B=None):
    c = self.config
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if segments_BT is None:
      segments_BT = jnp.ones_like(tokens_BT)
    if max_lengths_B is None:
      max_lengths_B = 1 + jnp.max(jnp.where(segments_BT > 0, positions_BT, -1), axis=1)
    x_BTD = self.embed(tokens_BT)
    if c.scale_embeddings:
      # Rounded to the compute dtype first, as the released Gemma weights expect.
      x_BTD = x_BTD * jnp.asarray(c.hidden_size**0.5, self.dtype)
    cos, sin = rope_angles(positions_BT, c.rope, lengths_B=max_lengths_B)
    x_BTD = constrain(x_BTD, BATCH_AXES, None, None)
    return x_BTD, LayerInputs(cos, sin, positions_BT, segments_BT)


def unstack_layers(params: dict, num_layers: int) -> dict:
  """Parameters of a scanned decoder in the form `scan_layers=False` reads."""
  rest = {name: tree for name, tree in params.items() if name != 'layers'}
  layers = {
    f'layers_{i}': jax.tree.map(lambda x, i=i: x[i], params['layers'])
    for i in range(num_layers)
  }
  return rest | layers
