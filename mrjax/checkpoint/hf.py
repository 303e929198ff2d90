"""Hugging Face models in and out: streamed to the devices, written shard by shard."""

import functools
import json
import logging
import math
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mrjax import trees
from mrjax.checkpoint import layout, weights
from mrjax.checkpoint.directories import CheckpointError, copy_side_files, new_directory
from mrjax.checkpoint.placing import fill_devices, put_layers, to_host
from mrjax.checkpoint.quantizing import load_quantized
from mrjax.checkpoint.safetensors_files import (
  DTYPE_NAMES,
  DTYPES,
  INDEX,
  SINGLE,
  SafetensorsReader,
  TensorSpec,
  write_safetensors,
)
from mrjax.lora.quantization import quantized_shapes
from mrjax.models.config import DecoderConfig
from mrjax.sharding.rules import param_shardings

PyTree = Any
# Layers of one leaf are assembled on the devices in pieces of at most this, or one by
# one where a layer is larger.
_PIECE_BYTES = 32 << 20


def load_hf(
  directory: str | Path,
  config: DecoderConfig,
  mesh: Mesh,
  *,
  dtype: Any = None,
  quantize: str | None = None,
) -> PyTree:
  """Parameters (scanned form) of a Hugging Face model, sharded over `mesh`.

  Each process reads what its own devices hold and nothing else. Beside the shards
  themselves, host memory holds at most one tensor and some tens of megabytes; the peak
  is logged.

  Args:
    directory: Holds `model.safetensors`, or an index and its shards.
    config: The decoder of the directory's config.json.
    mesh: Where to.
    dtype: Dtype of all parameters; None keeps what is stored (layers stored
      differently are widened to a type that holds them all exactly).
    quantize: One of `quantized.KINDS`: the kernels of the layers are quantised from
      what is stored as they are read; the rest has `dtype`.

  Raises:
    FileNotFoundError, CheckpointError: See `SafetensorsReader` and
      `weights.check_tensors`; found before any weight is read, but for a
      `lm_head.weight` that differs from its tied embedding.
    MeshError: A dimension that does not divide over the mesh.
  """
  reader, spare = _open(directory, config)
  shapes = weights.param_shapes(config)
  if quantize:
    shapes = quantized_shapes(shapes, config, quantize)
  shardings = trees.flatten(param_shardings(shapes, mesh))
  if weights.TIED_HEAD in spare:
    _check_tied_head(reader)
  leaves = {}
  # The embedding and the head need a whole tensor on the host, so they come first,
  # while there is little else.
  for rule in sorted(weights.rules_for(config), key=lambda rule: rule.stacked):
    if rule.ours in shardings:
      leaves[rule.ours] = _load_leaf(reader, rule, config, shardings[rule.ours], dtype)
    else:
      assert quantize
      read = functools.partial(_read_block, reader, rule, config)
      leaves |= load_quantized(read, rule, config, quantize, shardings)
  params = trees.unflatten(leaves)
  logging.info(
    'Loaded %s: %s of parameters, peak host memory %s.',
    directory,
    _size(trees.num_bytes(params)),
    _size(peak_host_bytes()),
  )
  return params


def stored_dtypes(directory: str | Path, config: DecoderConfig) -> dict[str, str]:
  """Tensors of a directory and their dtypes (`BF16`), known buffers left out.

  It is what `save_hf` needs to write the same tensors again, bit for bit. Raises what
  `load_hf` does, from the headers of the files alone.
  """
  reader, _ = _open(directory, config)
  names = (*weights.hf_tensors(config), weights.TIED_HEAD)
  return {name: reader.specs[name].dtype for name in names if name in reader.specs}


def _size(num_bytes: int) -> str:
  large = num_bytes >= 1e8
  return f'{num_bytes / 1e9:.3f} GB' if large else f'{num_bytes / 1e6:.2f} MB'


def peak_host_bytes() -> int:
  """The most memory this process has had resident so far, in bytes."""
  status = Path('/proc/self/status')
  if status.exists():  # unlike rusage, it does not count the parent before exec
    match = re.search(r'VmHWM:\s*(\d+) kB', status.read_text())
    if match:
      return int(match[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def save_hf(
  params: PyTree,
  config: DecoderConfig,
  hf_dir: str | Path,
  output_dir: str | Path,
  *,
  dtypes: Mapping[str, str] | None = None,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
  overwrite: bool = False,
) -> None:
  """Writes a Hugging Face model; nothing is at `output_dir` before everything is.

  Tensors come to the host one at a time and go straight into their file.

  Args:
    params: Parameter tree in the scanned form, on any mesh.
    config: Its decoder.
    hf_dir: Its config.json, tokenizer and their kin are copied byte for byte.
    output_dir: The new directory.
    dtypes: What `stored_dtypes` says of the model that `params` came from unchanged;
      by default every tensor has the dtype of its leaf.
    dtype: Dtype of every tensor, whatever `dtypes` says.
    max_shard_bytes: A file is closed before it grows beyond this.
    overwrite: Replace an `output_dir` that holds a config.json.

  Raises:
    CheckpointError: `params` are not the weights of `config`.
    FileExistsError: See `new_directory`.
  """
  leaves = trees.flatten(params)
  found = {name: leaf.shape for name, leaf in leaves.items()}
  weights.check_leaves(config, found, where='The parameter tree')
  tensors = weights.hf_tensors(config)
  if config.tie_embeddings and weights.TIED_HEAD in (dtypes or {}):
    tensors[weights.TIED_HEAD] = tensors[weights.EMBEDDING]
  specs = {}
  for name, entry in tensors.items():
    kind = DTYPE_NAMES[np.dtype(dtype or leaves[entry.rules[0].ours].dtype)]
    if dtype is None and dtypes:
      kind = dtypes.get(name, kind)
    specs[name] = TensorSpec(kind, entry.shape)

  def tensor(name: str) -> np.ndarray:
    entry = tensors[name]
    blocks = [
      layout.to_hf(rule, config, to_host(leaves[rule.ours], entry.layer))
      for rule in entry.rules
    ]
    whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return whole.astype(DTYPES[specs[name].dtype], copy=False)

  with new_directory(output_dir, marker='config.json', overwrite=overwrite) as partial:
    if jax.process_index() == 0:
      copy_side_files(hf_dir, partial)
    _write_shards(partial, specs, tensor, max_shard_bytes)


def _open(
  directory: str | Path, config: DecoderConfig
) -> tuple[SafetensorsReader, list[str]]:
  reader = SafetensorsReader(directory)
  found = {name: spec.shape for name, spec in reader.specs.items()}
  return reader, weights.check_tensors(config, found, where=str(directory))


def _read_block(
  reader: SafetensorsReader, rule: weights.WeightRule, config: DecoderConfig, layer: int
) -> np.ndarray:
  """The rule's block of a layer's tensor, as it is stored."""
  start = weights.block_start(rule, config)
  rows = slice(start, start + rule.block_shape(config)[0])
  return reader.read(rule.hf.format(i=layer), (rows,))


def _write_shards(
  directory: Path,
  specs: Mapping[str, TensorSpec],
  tensor: Callable[[str], np.ndarray],
  max_shard_bytes: int,
) -> None:
  shards: list[dict[str, TensorSpec]] = [{}]
  for name, spec in specs.items():
    held = sum(other.num_bytes for other in shards[-1].values())
    if shards[-1] and held + spec.num_bytes > max_shard_bytes:
      shards.append({})
    shards[-1][name] = spec
  files = [SINGLE]
  if len(shards) > 1:
    count = len(shards)
    files = [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]
  first = jax.process_index() == 0
  for file, shard in zip(files, shards):
    write_safetensors(directory / file if first else None, shard, tensor)
  if first and len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(spec.num_bytes for spec in specs.values())},
      'weight_map': {n: file for file, shard in zip(files, shards) for n in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')


def _load_leaf(
  reader: SafetensorsReader,
  rule: weights.WeightRule,
  config: DecoderConfig,
  sharding: NamedSharding,
  dtype: Any,
) -> jax.Array:
  """One leaf; the layers of a large one are put together on the devices.

  A whole stacked leaf in host memory could be more than an accelerator's host has, and
  on a CPU would be a second copy.
  """
  names = [rule.hf.format(i=i) for i in range(config.num_layers if rule.stacked else 1)]
  if dtype is None:
    stored = {DTYPES[reader.specs[name].dtype] for name in names}
    dtype = functools.reduce(jnp.promote_types, stored)
  dtype = np.dtype(dtype)
  one = rule.our_shape(config)

  def piece(names: list[str]) -> jax.Array:
    lead = (len(names),) if rule.stacked else ()

    def fill(index: tuple[slice, ...], out: np.ndarray) -> None:
      chosen = names[index[0]] if rule.stacked else names
      for name, part in zip(chosen, out if rule.stacked else (out,)):
        read = functools.partial(reader.read, name)
        layout.read_ours(rule, config, index[len(lead) :], read, part)

    return fill_devices((*lead, *one), dtype, sharding, fill)

  fits = max(1, _PIECE_BYTES // (math.prod(one) * dtype.itemsize))
  # A divisor of the number of layers: all pieces then share one compiled update.
  size = max(n for n in range(1, len(names) + 1) if len(names) % n == 0 and n <= fits)
  if size == len(names):
    return piece(names)
  leaf = jnp.zeros((len(names), *one), dtype, device=sharding)
  for i in range(0, len(names), size):
    leaf = put_layers(leaf, piece(names[i : i + size]), i, sharding=sharding)
    leaf.block_until_ready()  # one piece in flight, not all of them
  return leaf


def _check_tied_head(reader: SafetensorsReader) -> None:
  head, embedding = weights.TIED_HEAD, weights.EMBEDDING
  same = reader.specs[head] == reader.specs[embedding]
  num_rows, width = reader.specs[embedding].shape
  step = max(1, _PIECE_BYTES // (4 * width))
  for row in range(0, num_rows, step):
    rows = (slice(row, min(row + step, num_rows)),)
    if same:
      same = reader.read(head, rows).tobytes() == reader.read(embedding, rows).tobytes()
  if not same:
    raise CheckpointError(
      f'{reader.directory}: config.json ties the head to the embedding, but {head} '
      f'differs from {embedding}. Set tie_word_embeddings to false, or remove {head}.'
    )
