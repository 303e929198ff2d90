"""Compiling for TPU slices that are described and not there, for tests."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Memory(NamedTuple):
  """What the compiler says a program needs, bytes on one device."""

  arguments: int
  outputs: int
  reused: int  # outputs that are written over arguments
  temporary: int
  peak: int


def prepare_compiler() -> None:
  """Makes this process one that compiles for TPUs."""
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # there is no TPU VM to ask about itself
  # Another process on this machine may compile too; no chip is taken by it.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  jax.config.update('jax_platforms', 'cpu')


def describe_slice(topology: str) -> list:
  """The devices of a slice."""
  devices = topologies.get_topology_desc(topology, 'tpu').devices
  assert devices[0].platform == 'tpu'
  return list(devices)


def memory_of(compiled) -> Memory:
  memory = compiled.memory_analysis()
  return Memory(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    reused=memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
  )


def on(shardings, shapes):
  """The shapes, each with where it lives."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
