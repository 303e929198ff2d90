"""The building blocks of the decoder, as flax.linen modules."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mrjax.models import products, quantized
from mrjax.models.attention import NO_WINDOW, attention, cached_attention
from mrjax.models.attention_blocks import chunk_attention
from mrjax.models.cache import LayerCache, move_faults
from mrjax.models.config import DecoderConfig
from mrjax.models.remat import LAYER_INPUT, PRODUCT
from mrjax.models.rope import apply_rope
from mrjax.sharding.mesh import BATCH_AXES, axis_size, constrain

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


Dims = tuple[int, ...]


class LayerInputs(NamedTuple):
  """What every layer reads beside the residual stream."""

  cos: jax.Array
  sin: jax.Array
  positions_BT: jax.Array
  segments_BT: jax.Array


class LoraSettings(NamedTuple):
  """How adapters act where the parameters hold them.

  Attributes:
    scale: Factor of the adapter's product; None where adapters are not expected, and
      parameters that hold one are then an error.
    dropout: Share of the adapter's inputs that is dropped; above 0 the caller gives
      `rngs={'dropout': key}`.
  """

  scale: float | None = None
  dropout: float = 0.0


def linear_dims(config: DecoderConfig) -> dict[str, tuple[Dims, Dims]]:
  """Input and output dimensions of a layer's linear maps, by path in the layer."""
  d, f = (config.hidden_size,), (config.intermediate_size,)
  heads = (config.num_heads, config.head_dim)
  kv_heads = (config.num_kv_heads, config.head_dim)
  return {
    'attn/q': (d, heads),
    'attn/k': (d, kv_heads),
    'attn/v': (d, kv_heads),
    'attn/o': (heads, d),
    'mlp/gate': (d, f),
    'mlp/up': (d, f),
    'mlp/down': (f, d),
  }


class Linear(nn.Module):
  """A product over the last `len(in_dims)` axes, computed in two dimensions.

  The kernel has shape [*in_dims, *out_dims]. Flattening rows before the product makes
  the backward pass two plain matrix products, which is faster on every backend.
  Parameters that hold `lora_a` [*in_dims, R] and `lora_b` [R, *out_dims] beside the
  kernel add `scale * dropout(x) @ lora_a @ lora_b` (Hu et al. 2021,
  https://arxiv.org/abs/2106.09685). Parameters that hold the leaves of a quantised
  kernel in its place use that.
  """

  in_dims: Dims
  out_dims: Dims
  use_bias: bool
  stddev: float
  dtype: Any
  lora: LoraSettings = LoraSettings()
  fixed_tiles: bool = False  # `products.matmul_in_tiles`

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rows = x.shape[: x.ndim - len(self.in_dims)]
    x_2d = x.astype(self.dtype).reshape(-1, math.prod(self.in_dims))
    if self.fixed_tiles:
      x_2d = constrain(x_2d, BATCH_AXES, None)  # no sum is split over devices
    y = self._product(x_2d)
    if self.has_variable('params', 'lora_a'):
      y = y + self._adapter(x_2d)
    y = checkpoint_name(y, PRODUCT).reshape(*rows, *self.out_dims)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, self.out_dims, jnp.float32)
      y = y + bias.astype(self.dtype)
    return y

  def _product(self, x_2d: jax.Array) -> jax.Array:
    stored: Any = {
      name: self.get_variable('params', name)
      for name in quantized.LEAVES
      if self.has_variable('params', name)
    }
    if stored:
      return quantized.matmul(x_2d, stored)
    kernel = self.param(
      'kernel',
      nn.initializers.normal(self.stddev),
      (*self.in_dims, *self.out_dims),
      jnp.float32,
    )
    if self.fixed_tiles:
      kernel = kernel.astype(self.dtype).reshape(x_2d.shape[1], -1)
      if kernel.shape[1] >= products.LEAST_OUTPUTS * axis_size('tensor'):
        return products.matmul_in_tiles(x_2d, kernel)
      y = products.matmul_in_tiles(x_2d, constrain(kernel, None, None))
      return constrain(y, BATCH_AXES, None)  # each device makes all of it
    return products.matmul(x_2d, kernel)

  def _adapter(self, x_2d: jax.Array) -> jax.Array:
    if self.lora.scale is None:
      raise ValueError(
        f'{"/".join(self.path)} holds an adapter, but the decoder was made without '
        'lora_scale. Give it the scale of the LoraConfig, or drop the adapter.'
      )
    if self.lora.dropout:
      x_2d = nn.Dropout(self.lora.dropout, name='lora_dropout')(
        x_2d, deterministic=False
      )
    a_IR: Any = self.get_variable('params', 'lora_a')
    b_RO: Any = self.get_variable('params', 'lora_b')
    a_IR = a_IR.astype(self.dtype).reshape(x_2d.shape[1], -1)
    b_RO = b_RO.astype(self.dtype).reshape(a_IR.shape[1], -1)
    # The product with A is small: float32 here costs nothing and keeps what a low
    # precision would round away before B.
    h_2d = products.down_projection(x_2d, a_IR) * self.lora.scale
    return h_2d.astype(self.dtype) @ b_RO


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32, Zhang and Sennrich 2019."""

  config: DecoderConfig
  dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    adds_one = self.config.norm_adds_one
    init = nn.initializers.zeros if adds_one else nn.initializers.ones
    scale = self.param('scale', init, (self.dim,), jnp.float32).astype(jnp.float32)
    x = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.config.norm_eps)
    if adds_one:
      return (x * (1.0 + scale)).astype(self.dtype)
    # Rounding before the scale is what the reference Llama does in low precision.
    return x.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig
  dtype: Any
  lora: LoraSettings = LoraSettings()
  backend: str = 'auto'
  fixed_tiles: bool = False

  def setup(self):
    c = self.config
    dims = linear_dims(c)
    kw: Any = {
      'stddev': c.initializer_range,
      'dtype': self.dtype,
      'lora': self.lora,
      'fixed_tiles': self.fixed_tiles,
    }
    self.q = Linear(*dims['attn/q'], c.qkv_bias, **kw)
    self.k = Linear(*dims['attn/k'], c.qkv_bias, **kw)
    self.v = Linear(*dims['attn/v'], c.qkv_bias, **kw)
    self.o = Linear(*dims['attn/o'], c.output_bias, **kw)
    if c.qk_norm:
      self.q_norm = RMSNorm(c, c.head_dim, self.dtype)
      self.k_norm = RMSNorm(c, c.head_dim, self.dtype)

  def project(self, x_BTD: jax.Array, inputs: LayerInputs):
    q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
    if self.config.qk_norm:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    q_BTNH = apply_rope(q_BTNH, inputs.cos, inputs.sin)
    k_BTKH = apply_rope(k_BTKH, inputs.cos, inputs.sin)
    return tuple(
      constrain(x, BATCH_AXES, None, 'tensor', None) for x in (q_BTNH, k_BTKH, v_BTKH)
    )

  def __call__(self, x_BTD, window, inputs: LayerInputs):
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, inputs)
    out_BTNH = attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      positions_BT=inputs.positions_BT,
      segments_BT=inputs.segments_BT,
      window=window,
      scale=self.config.attention_scale,
      softcap=self.config.attention_softcap,
      windows=[w or NO_WINDOW for w in self.config.layer_windows],
      backend=self.backend,
    )
    return self.o(out_BTNH), (k_BTKH, v_BTKH)

  def prefill_chunk(self, x_PTD, window, inputs: LayerInputs, prefix, start):
    """Attends to the text before the chunk and to the chunk, which `prefix` then holds.

    `prefix` are keys and values [P, K, S, H] of the places so far.
    """
    q_PTNH, k_PTKH, v_PTKH = self.project(x_PTD, inputs)
    # As in the cache: what is not finite and not seen must not reach other tokens.
    kv = move_faults(k_PTKH, v_PTKH)
    k_PKSH, v_PKSH = prefix = tuple(
      jax.lax.dynamic_update_slice_in_dim(x, new.swapaxes(1, 2), start, axis=2)
      for x, new in zip(prefix, kv)
    )
    out_PTNH = chunk_attention(
      q_PTNH,
      k_PKSH,
      v_PKSH,
      start=start,
      window=window,
      scale=self.config.attention_scale,
      softcap=self.config.attention_softcap,
    )
    return self.o(out_PTNH), prefix

  def decode(self, x_B1D, window, inputs: LayerInputs, cache: LayerCache):
    """Attends to the cache and the new token, which the own part then holds."""
    q_B1NH, k_B1KH, v_B1KH = self.project(x_B1D, inputs)
    cache = cache.write(k_B1KH[:, 0], v_B1KH[:, 0])
    out_B1NH = self._attend(q_B1NH, window, inputs, cache)
    return self.o(out_B1NH), (cache.own_k, cache.own_v)

  def peek(self, x_BTD, window, inputs: LayerInputs, cache: LayerCache):
    """Attends with each token to the cache and to itself; the cache stays as it is."""
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, inputs)
    out_BTNH = self._attend(q_BTNH, window, inputs, cache, (k_BTKH, v_BTKH))
    return self.o(out_BTNH), (k_BTKH, v_BTKH)

  def _attend(self, q_BTNH, window, inputs, cache: LayerCache, itself=None):
    return cached_attention(
      q_BTNH,
      cache.prefix_part(),
      cache.own_part(),
      itself=itself,
      positions_BT=inputs.positions_BT,
      window=window,
      scale=self.config.attention_scale,
      softcap=self.config.attention_softcap,
      fixed_tiles=self.fixed_tiles,
    )


class MLP(nn.Module):
  """Gated feed-forward block."""

  config: DecoderConfig
  dtype: Any
  lora: LoraSettings = LoraSettings()
  fixed_tiles: bool = False

  def setup(self):
    c = self.config
    dims = linear_dims(c)
    kw: Any = {
      'stddev': c.initializer_range,
      'dtype': self.dtype,
      'lora': self.lora,
      'fixed_tiles': self.fixed_tiles,
    }
    self.gate = Linear(*dims['mlp/gate'], c.mlp_bias, **kw)
    self.up = Linear(*dims['mlp/up'], c.mlp_bias, **kw)
    self.down = Linear(*dims['mlp/down'], c.mlp_bias, **kw)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    hidden_BTF = _ACTIVATIONS[self.config.activation](self.gate(x_BTD)) * self.up(x_BTD)
    return self.down(constrain(hidden_BTF, BATCH_AXES, None, 'tensor'))


class DecoderLayer(nn.Module):
  """Pre-norm attention and feed-forward; Gemma 2 also norms what each gives back."""

  config: DecoderConfig
  dtype: Any
  lora: LoraSettings = LoraSettings()
  attention_backend: str = 'auto'
  fixed_tiles: bool = False

  def setup(self):
    c = self.config
    norm = lambda: RMSNorm(c, c.hidden_size, self.dtype)
    self.attn_norm, self.mlp_norm = norm(), norm()
    if c.post_norms:
      self.post_attn_norm, self.post_mlp_norm = norm(), norm()
    self.attn = Attention(
      c, self.dtype, self.lora, self.attention_backend, self.fixed_tiles
    )
    self.mlp = MLP(c, self.dtype, self.lora, self.fixed_tiles)

  def _finish(self, x_BTD, attended_BTD):
    c = self.config
    attended_BTD = constrain(attended_BTD, BATCH_AXES, None, None)
    if c.post_norms:
      attended_BTD = self.post_attn_norm(attended_BTD)
    x_BTD = x_BTD + attended_BTD
    fed_BTD = constrain(self.mlp(self.mlp_norm(x_BTD)), BATCH_AXES, None, None)
    if c.post_norms:
      fed_BTD = self.post_mlp_norm(fed_BTD)
    return constrain(x_BTD + fed_BTD, BATCH_AXES, None, None)

  def __call__(self, x_BTD, window, inputs: LayerInputs):
    x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
    attended_BTD, _ = self.attn(self.attn_norm(x_BTD), window, inputs)
    return self._finish(x_BTD, attended_BTD), None

  def prefill(self, x_BTD, window, inputs: LayerInputs):
    attended_BTD, (k, v) = self.attn(self.attn_norm(x_BTD), window, inputs)
    kv = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return self._finish(x_BTD, attended_BTD), kv

  def prefill_chunk(self, x_PTD, window, inputs: LayerInputs, prefix, start):
    normed_PTD = self.attn_norm(x_PTD)
    attended_PTD, prefix = self.attn.prefill_chunk(
      normed_PTD, window, inputs, prefix, start
    )
    return self._finish(x_PTD, attended_PTD), prefix

  def decode(self, x_B1D, window, inputs: LayerInputs, cache: LayerCache):
    attended_B1D, own = self.attn.decode(self.attn_norm(x_B1D), window, inputs, cache)
    return self._finish(x_B1D, attended_B1D), own

  def peek(self, x_BTD, window, inputs: LayerInputs, cache: LayerCache):
    attended_BTD, kv = self.attn.peek(self.attn_norm(x_BTD), window, inputs, cache)
    return self._finish(x_BTD, attended_BTD), kv
