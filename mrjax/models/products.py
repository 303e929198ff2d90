"""Products whose backward pass is written out, for memory or for speed."""

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


@jax.custom_vjp
def down_projection(x: jax.Array, a: jax.Array) -> jax.Array:
  """x [rows, I] times a narrow matrix [I, R], float32 [rows, R].

  The gradient of a narrow matrix is made as its transpose, [R, I]: the other way
  round, a CPU spends most of the time on reordering x (measured: a seventh of the
  speed at R = 16).
  """
  return jnp.dot(x, a, preferred_element_type=jnp.float32)


def _down_forward(x, a):
  return down_projection(x, a), (x, a)


def _down_backward(kept, dh):
  x, a = kept
  dh = dh.astype(x.dtype)
  # Without the barrier the compiler would turn the product round again.
  da_t = jax.lax.optimization_barrier(dh.T @ x)
  return dh @ a.T, da_t.T


down_projection.defvjp(_down_forward, _down_backward)
