"""Products with a kernel whose backward pass keeps no copy of it."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [rows, I] times a kernel whose axes flatten to [I, O], in the dtype of x.

  Left to itself, JAX keeps the kernel as the product reads it, cast and flattened, for
  the backward pass: under `scan`, a second copy of all layers. This keeps the kernel
  itself, which costs nothing, and casts again; x is kept where the kernel trains.
  """
  return x @ _flat(kernel, x)


def _forward(x, kernel):
  kept_x = x.value if kernel.perturbed else None
  return x.value @ _flat(kernel.value, x.value), (kept_x, kernel.value)


def _backward(kept, dy):
  x, kernel = kept
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    dy = jnp.zeros(dy.shape, dy.dtype)
  dx = dy @ _flat(kernel, dy, num_outputs=dy.shape[1]).T
  if x is None:
    return dx, None
  return dx, (x.T @ dy).reshape(kernel.shape).astype(kernel.dtype)


matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _flat(kernel: jax.Array, like: jax.Array, num_outputs: int = 0) -> jax.Array:
  shape = (-1, num_outputs) if num_outputs else (like.shape[1], -1)
  return kernel.astype(like.dtype).reshape(shape)
