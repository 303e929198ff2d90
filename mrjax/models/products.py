"""Products whose backward pass is written out, for memory or for speed."""

import jax
import jax.numpy as jnp

_ROWS_AT_ONCE = 1024  # of `matmul_in_tiles`
LEAST_OUTPUTS = 16  # of it, on each device; fewer are summed in other orders


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


def matmul_in_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [rows, I] times a matrix [I, O]; on a CPU the bits of a row depend on it alone.

  XLA leaves products to Eigen there, which may share a long sum out to threads: whether
  and how depends on the number of rows (`shardByInnerDim` and `numThreadsInnerDim` in
  its TensorContractionThreadPool.h). A sum of 128 terms is never shared out, one of 256
  is not in a product as large as the second below: sums are cut to such tiles, and few
  rows filled up to as many as that takes. Many rows go in blocks, as the products of
  all tiles are in memory at once.
  """
  rows, num_inputs = x.shape
  if rows > _ROWS_AT_ONCE:
    blocks = jnp.pad(x, ((0, -rows % _ROWS_AT_ONCE), (0, 0)))
    blocks = blocks.reshape(-1, _ROWS_AT_ONCE, num_inputs)
    y = jax.lax.map(lambda block: matmul_in_tiles(block, kernel), blocks)
    return y.reshape(-1, kernel.shape[1])[:rows]
  num_outputs = kernel.shape[1]
  most, least_rows = (256, 16) if num_outputs >= 1280 else (128, 8)
  num_tiles = -(-num_inputs // most)
  # Equal tiles without filling up, where none becomes much smaller: no copy is made.
  while num_inputs % num_tiles and num_inputs // num_tiles > most // 2:
    num_tiles += 1
  size = -(-num_inputs // num_tiles)
  more_inputs = num_tiles * size - num_inputs
  # Sums of a row alone are never shared out.
  more_rows = max(0, least_rows - rows) if rows > 1 or num_tiles == 1 else 0
  x = jnp.pad(x, ((0, more_rows), (0, more_inputs)))
  more_outputs = max(0, LEAST_OUTPUTS - num_outputs)
  kernel = jnp.pad(kernel, ((0, more_inputs), (0, more_outputs)))
  y = jnp.einsum(
    'jri,jio->jro',
    x.reshape(-1, num_tiles, size).swapaxes(0, 1),
    kernel.reshape(num_tiles, size, -1),
    preferred_element_type=jnp.float32,
  )
  return y.sum(axis=0)[:rows, :num_outputs].astype(x.dtype)


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
