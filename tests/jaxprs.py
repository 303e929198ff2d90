"""What a traced program computes, for tests that hold it to a shape."""

import math
from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
  """Every equation of a jaxpr, those of its inner jaxprs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for param in jax.tree.leaves(
      tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      if hasattr(param, 'eqns'):
        yield from equations(getattr(param, 'jaxpr', param))


def traced(fn, *args) -> list:
  """The equations of `fn(*args)`."""
  return list(equations(jax.make_jaxpr(fn)(*args).jaxpr))


def largest(fn, *args) -> int:
  """Elements of the largest array that `fn(*args)` computes."""
  eqns = traced(fn, *args)
  return max(math.prod(out.aval.shape) for eqn in eqns for out in eqn.outvars)
