"""The building blocks of the decoder, as flax.linen modules."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mrjax.models.attention import KVPart, attention, cached_attention
from mrjax.models.config import DecoderConfig
from mrjax.models.rope import apply_rope
from mrjax.sharding.mesh import BATCH_AXES, constrain

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


class LayerInputs(NamedTuple):
  """What every layer reads beside the residual stream."""

  cos: jax.Array
  sin: jax.Array
  positions_BT: jax.Array
  segments_BT: jax.Array


class Linear(nn.Module):
  """A product over the last `len(in_dims)` axes, computed in two dimensions.

  The kernel has shape [*in_dims, *out_dims]. Flattening rows before the product makes
  the backward pass two plain matrix products, which is faster on every backend.
  """

  in_dims: tuple[int, ...]
  out_dims: tuple[int, ...]
  use_bias: bool
  stddev: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      'kernel',
      nn.initializers.normal(self.stddev),
      (*self.in_dims, *self.out_dims),
      jnp.float32,
    )
    rows = x.shape[: x.ndim - len(self.in_dims)]
    num_in = int(np.prod(self.in_dims))
    kernel_2d = kernel.astype(self.dtype).reshape(num_in, -1)
    y = x.astype(self.dtype).reshape(-1, num_in) @ kernel_2d
    y = y.reshape(*rows, *self.out_dims)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, self.out_dims, jnp.float32)
      y = y + bias.astype(self.dtype)
    return y


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

  def setup(self):
    c = self.config
    d, h = (c.hidden_size,), c.head_dim
    kw = {'stddev': c.initializer_range, 'dtype': self.dtype}
    self.q = Linear(d, (c.num_heads, h), c.qkv_bias, **kw)
    self.k = Linear(d, (c.num_kv_heads, h), c.qkv_bias, **kw)
    self.v = Linear(d, (c.num_kv_heads, h), c.qkv_bias, **kw)
    self.o = Linear((c.num_heads, h), d, c.output_bias, **kw)
    if c.qk_norm:
      self.q_norm = RMSNorm(c, h, self.dtype)
      self.k_norm = RMSNorm(c, h, self.dtype)

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
    )
    return self.o(out_BTNH), (k_BTKH, v_BTKH)

  def decode(
    self, x_BTD, window, inputs: LayerInputs, prefix: KVPart, own: KVPart, index
  ):
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, inputs)
    start = (0, 0, index, 0)
    own = own._replace(
      k_PKSH=jax.lax.dynamic_update_slice(
        own.k_PKSH, k_BTKH.swapaxes(1, 2).astype(own.k_PKSH.dtype), start
      ),
      v_PKSH=jax.lax.dynamic_update_slice(
        own.v_PKSH, v_BTKH.swapaxes(1, 2).astype(own.v_PKSH.dtype), start
      ),
    )
    out_BTNH = cached_attention(
      q_BTNH,
      (prefix, own),
      positions_BT=inputs.positions_BT,
      window=window,
      scale=self.config.attention_scale,
      softcap=self.config.attention_softcap,
    )
    return self.o(out_BTNH), (own.k_PKSH, own.v_PKSH)


class MLP(nn.Module):
  """Gated feed-forward block."""

  config: DecoderConfig
  dtype: Any

  def setup(self):
    c = self.config
    d, f = (c.hidden_size,), (c.intermediate_size,)
    kw = {'stddev': c.initializer_range, 'dtype': self.dtype}
    self.gate = Linear(d, f, c.mlp_bias, **kw)
    self.up = Linear(d, f, c.mlp_bias, **kw)
    self.down = Linear(f, d, c.mlp_bias, **kw)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    hidden_BTF = _ACTIVATIONS[self.config.activation](self.gate(x_BTD)) * self.up(x_BTD)
    return self.down(constrain(hidden_BTF, BATCH_AXES, None, 'tensor'))


class DecoderLayer(nn.Module):
  """Pre-norm attention and feed-forward; Gemma 2 also norms what each gives back."""

  config: DecoderConfig
  dtype: Any

  def setup(self):
    c = self.config
    norm = lambda: RMSNorm(c, c.hidden_size, self.dtype)
    self.attn_norm, self.mlp_norm = norm(), norm()
    if c.post_norms:
      self.post_attn_norm, self.post_mlp_norm = norm(), norm()
    self.attn = Attention(c, self.dtype)
    self.mlp = MLP(c, self.dtype)

  def _finish(self, x_BTD, attended_BTD):
    c = self.config
    if c.post_norms:
      attended_BTD = self.post_attn_norm(attended_BTD)
    x_BTD = x_BTD + attended_BTD
    fed_BTD = self.mlp(self.mlp_norm(x_BTD))
    if c.post_norms:
      fed_BTD = self.post_mlp_norm(fed_BTD)
    return constrain(x_BTD + fed_BTD, BATCH_AXES, None, None)

  def __call__(self, x_BTD, window, inputs: LayerInputs):
    attended_BTD, _ = self.attn(self.attn_norm(x_BTD), window, inputs)
    return self._finish(x_BTD, attended_BTD), None

  def prefill(self, x_BTD, window, inputs: LayerInputs):
    attended_BTD, (k, v) = self.attn(self.attn_norm(x_BTD), window, inputs)
    kv = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return self._finish(x_BTD, attended_BTD), kv

  def decode(self, x_BTD, window, inputs: LayerInputs, prefix, own, index):
    attended_BTD, kv = self.attn.decode(
      self.attn_norm(x_BTD), window, inputs, prefix, own, index
    )
    return self._finish(x_BTD, attended_BTD), kv
