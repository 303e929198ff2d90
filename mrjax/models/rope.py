"""Rotary position embeddings in the halves layout, with the scalings of the family."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, *, long: bool = False) -> np.ndarray:
  """Angular frequency of each rotated pair, float32 [rotary_dim / 2], radians a token.

  Args:
    rope: The scaling to apply.
    long: For `longrope`, take the factors for rows beyond the original length.
  """
  exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / rope.rotary_dim
  freqs = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
  if rope.kind == 'linear':
    return freqs / np.float32(rope.factor)
  if rope.kind == 'llama3':
    return _llama3(freqs, rope)
  if rope.kind == 'longrope':
    factors = rope.long_factors if long else rope.short_factors
    return freqs / np.asarray(factors, np.float32)
  return freqs


def rope_angles(
  positions_BT: jax.Array, rope: RopeConfig, *, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines, float32 [B, T, rotary_dim / 2].

  Args:
    positions_BT: int32 position of each token in its text; values below zero (empty
      places) are allowed and never attended to.
    rope: The scaling to apply.
    lengths_B: int32 number of tokens each row may reach. Only `longrope` reads it: a
      row longer than `original_max_positions` uses the long factors throughout, so a
      row's numbers never depend on its neighbours.
  """
  freqs = jnp.asarray(inverse_frequencies(rope))
  positions = positions_BT.astype(jnp.float32)[..., None]
  angles = positions * freqs
  if rope.kind == 'longrope':
    long_angles = positions * jnp.asarray(inverse_frequencies(rope, long=True))
    is_long_B = lengths_B > rope.original_max_positions
    angles = jnp.where(is_long_B[:, None, None], long_angles, angles)
  factor = rope.attention_factor
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the first `2 * cos.shape[-1]` head dimensions, the rest pass through."""
  half = cos.shape[-1]
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  x1 = x_BTNH[..., :half].astype(jnp.float32)
  x2 = x_BTNH[..., half : 2 * half].astype(jnp.float32)
  rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  rotated = rotated.astype(x_BTNH.dtype)
  if 2 * half == x_BTNH.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BTNH[..., 2 * half :]], axis=-1)


def _llama3(freqs: np.ndarray, rope: RopeConfig) -> np.ndarray:
  """Llama 3.1: long waves divided by `factor`, short ones kept, a blend between."""
  wavelengths = 2 * math.pi / freqs
  low_wavelength = rope.original_max_positions / rope.low_freq_factor
  high_wavelength = rope.original_max_positions / rope.high_freq_factor
  blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  blended = (1 - blend) * freqs / rope.factor + blend * freqs
  scaled = np.where(wavelengths > low_wavelength, freqs / rope.factor, blended)
  return np.where(wavelengths < high_wavelength, freqs, scaled).astype(np.float32)
