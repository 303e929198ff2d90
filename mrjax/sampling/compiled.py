"""Programs compiled once for each shape, and a log of how many and how long."""

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh


class CompiledPrograms:
  """Compiles ahead of time, so that no compilation goes by unseen.

  Attributes:
    names: Names of the programs compiled so far, one for each shape.
    seconds: Time spent on that.
  """

  def __init__(self, mesh: Mesh):
    self.mesh = mesh
    self.names: list[str] = []
    self.seconds = 0.0
    self._programs: dict[Any, Any] = {}

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
    with jax.set_mesh(self.mesh):
      if (name, shapes) not in self._programs:
        began = time.perf_counter()
        program = jax.jit(
          fn,
          out_shardings=out_shardings(jax.eval_shape(fn, *args)),
          donate_argnums=donate_argnums,
        )
        self._programs[name, shapes] = program.lower(*args).compile()
        self.names.append(name)
        self.seconds += time.perf_counter() - began
        logging.info(
          'Program %d (%s) compiled in %.1f s.',
          self.count,
          name,
          time.perf_counter() - began,
        )
      return self._programs[name, shapes](*args)
