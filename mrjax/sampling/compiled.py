"""Programs compiled once for each shape, and a log of how many and how long."""

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

# Of the whole process: a second engine for the same model shape compiles nothing.
_PROGRAMS: dict[Any, Any] = {}


class CompiledPrograms:
  """Compiles ahead of time, so that no compilation goes by unseen.

  Attributes:
    names: Names of the programs compiled here so far, one for each shape.
    seconds: Time spent on that.
  """

  def __init__(self, mesh: Mesh, *, owner: Hashable):
    """Takes the mesh to compile for.

    Args:
      mesh: Is set while a program is traced and run.
      owner: What decides the functions beside their names; programs of equal owners
        are shared.
    """
    self._mesh, self._owner = mesh, owner
    self.names: list[str] = []
    self.seconds = 0.0

  @property
  def count(self) -> int:
    return len(self.names)

  def call(
    self,
    name: str,
    fn: Callable[..., Any],
    *args: Any,
    out_shardings: Callable[[Any], Any],
    donate_argnums: tuple[int, ...] = (),
  ) -> Any:
    """Returns `fn(*args)`.

    Args:
      name: Stands for `fn` and all it has bound; it is compiled once for each name
        and each shape of its arguments.
      fn: A pure function of arrays.
      *args: Trees of arrays.
      out_shardings: From the shapes `fn` returns to where they shall live.
      donate_argnums: Arguments whose memory may be used again.
    """
    shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(args))
    key = (self._owner, self._mesh, name, shapes)
    with jax.set_mesh(self._mesh):
      if key not in _PROGRAMS:
        began = time.perf_counter()
        program = jax.jit(
          fn,
          out_shardings=out_shardings(jax.eval_shape(fn, *args)),
          donate_argnums=donate_argnums,
        )
        _PROGRAMS[key] = _compile(program.lower(*args), self._mesh)
        seconds = time.perf_counter() - began
        self.names.append(name)
        self.seconds += seconds
        logging.info('Program %d (%s) compiled in %.1f s.', self.count, name, seconds)
      return _PROGRAMS[key](*args)


def _compile(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles a program so that a row has the same bits whatever runs beside it.

  On a CPU, XLA hands products and reductions to another library from some size on, all
  rows counted, and that library sums in another order.
  """
  if mesh.devices.flat[0].platform != 'cpu':
    return lowered.compile()
  try:
    return lowered.compile({'xla_cpu_experimental_ynn_fusion_type': ''})
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      raise
    logging.warning(
      'This version of XLA chooses its CPU library by size: where tokens tie but for '
      'rounding, rows can depend on how many run together.'
    )
    return lowered.compile()
