r"""Host memory and time of loading a Hugging Face checkpoint of several gigabytes.

Writes a random bfloat16 checkpoint with the shapes of a real model (2.2 to 2.5 GB, in
files of 1 GB), then loads it in a fresh process for each number of emulated CPU
devices. On a CPU the shards themselves lie in host memory, so this is the hardest case.
The bar is the bytes of the shards plus twice the largest tensor; `over_bar` holds what
loading adds to the process against it, `whole_process_over_bar` counts the interpreter,
jax and the compiler too (some 230 MB).

  python -m experiments.benchmarks.load --output=load.jsonl
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.figures import emit
from mrjax.runs import cli

# The largest tensor, the embedding, is 525 MB and 131 MB.
SHAPES: dict[str, dict[str, Any]] = {
  'llama-3.2-1b': {
    'vocab_size': 128256,
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'tie_word_embeddings': True,
  },
  'tinyllama-1.1b': {
    'vocab_size': 32000,
    'hidden_size': 2048,
    'intermediate_size': 5632,
    'num_hidden_layers': 22,
    'num_attention_heads': 32,
    'num_key_value_heads': 4,
    'tie_word_embeddings': False,
  },
}
_SHAPES = flags.DEFINE_multi_enum(
  'shape', ['llama-3.2-1b', 'tinyllama-1.1b'], list(SHAPES), 'Models to write.'
)
_DEVICES = flags.DEFINE_list('devices', ['1', '8'], 'Numbers of emulated devices.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'stored', ['stored', 'float32', 'bfloat16'], 'To load in.'
)
_SCRATCH = flags.DEFINE_string('scratch', '', 'Where to write; empty: the temp folder.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
_LOAD = flags.DEFINE_string('load', '', 'Used by itself: directory to load.')

_FILE_BYTES = 1_000_000_000


def write_checkpoint(directory: Path, shape: str) -> None:
  """Writes random weights, one tensor in memory at a time."""
  from mrjax.checkpoint.safetensors_files import (
    DTYPES,
    INDEX,
    TensorSpec,
    write_safetensors,
  )
  from mrjax.checkpoint.weights import hf_tensors
  from mrjax.models.config import DecoderConfig

  fields = SHAPES[shape] | {'architectures': ['LlamaForCausalLM']}
  (directory / 'config.json').write_text(json.dumps(fields))
  files: list[dict[str, TensorSpec]] = [{}]
  for name, tensor in hf_tensors(DecoderConfig.from_hf(fields)).items():
    spec = TensorSpec('BF16', tensor.shape)
    if sum(s.num_bytes for s in files[-1].values()) + spec.num_bytes > _FILE_BYTES:
      files.append({})
    files[-1][name] = spec
  rng = np.random.default_rng(0)
  weight_map: dict[str, str] = {}
  for i, specs in enumerate(files):
    file = f'model-{i + 1:05d}-of-{len(files):05d}.safetensors'

    def random_tensor(name: str, specs=specs) -> np.ndarray:
      values = rng.standard_normal(specs[name].shape, np.float32)
      return values.astype(DTYPES['BF16'])

    write_safetensors(directory / file, specs, random_tensor)
    weight_map |= dict.fromkeys(specs, file)
  (directory / INDEX).write_text(json.dumps({'weight_map': weight_map}))


def load(directory: str, num_devices: int, dtype: str) -> dict[str, float]:
  """Loads once; all sizes in 10^6 bytes."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', num_devices)
  from mrjax import trees
  from mrjax.checkpoint.hf import peak_host_bytes
  from mrjax.checkpoint.source import resolve_model
  from mrjax.sharding.mesh import make_mesh

  mesh = make_mesh('fsdp:-1')
  source = resolve_model(directory)
  before = peak_host_bytes() / 1e6
  start = time.perf_counter()
  params = source.load_params(mesh, None if dtype == 'stored' else dtype)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  peak = peak_host_bytes() / 1e6
  leaves = jax.tree.leaves(params)
  shards = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards) / 1e6
  vocab, width = source.config.vocab_size, source.config.hidden_size
  # In the dtype it is loaded in, or stored in, whichever is larger.
  largest = vocab * width * max(2, leaves[0].dtype.itemsize) / 1e6
  return {
    'parameters_mb': trees.num_bytes(params) / 1e6,
    'shards_mb': shards,
    'largest_tensor_mb': largest,
    'bar_mb': shards + 2 * largest,
    'process_before_mb': before,
    'peak_mb': peak,
    'over_bar': (peak - before) / (shards + 2 * largest),
    'whole_process_over_bar': peak / (shards + 2 * largest),
    'seconds': seconds,
  }


def main(argv: Sequence[str]) -> None:
  del argv
  if _LOAD.value:
    print(json.dumps(load(_LOAD.value, int(_DEVICES.value[0]), _DTYPE.value)))
    return
  for shape in _SHAPES.value:
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value or None) as directory:
      write_checkpoint(Path(directory), shape)
      for num_devices in _DEVICES.value:
        command = [sys.executable, '-m', 'experiments.benchmarks.load']
        command += [f'--load={directory}', f'--devices={num_devices}']
        command += [f'--dtype={_DTYPE.value}']
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(result.stdout.splitlines()[-1])
        emit(
          'load',
          _OUTPUT.value,
          shape=shape,
          devices=int(num_devices),
          dtype=_DTYPE.value,
          **{name: round(value, 3) for name, value in figures.items()},
        )


if __name__ == '__main__':
  cli.run(main)
