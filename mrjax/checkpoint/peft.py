"""PEFT's LoRA directories, in and out: adapter_config.json, adapter_model.safetensors.

Tensor names follow from the weight table: beside `layers/attn/q/kernel`, which is
`model.layers.{i}.self_attn.q_proj.weight`, an adapter has

    base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight   [R, inputs]
    base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight   [outputs, R]

Where Hugging Face fuses projections (Phi-3), PEFT has one A for all of them. Reading
gives each of ours a copy of it. Writing needs one A again: where training made them
different, they are stacked, the B's stand on a block diagonal, and rank_pattern and
alpha_pattern give the larger rank with the same scale. That loads in PEFT with equal
logits; it is not read back here.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint import weights
from mrjax.checkpoint.directories import new_directory
from mrjax.checkpoint.peft_config import (
  CONFIG,
  config_fields,
  is_target,
  lora_config,
  read_config,
)
from mrjax.checkpoint.placing import place, to_host
from mrjax.checkpoint.safetensors_files import (
  DTYPE_NAMES,
  DTYPES,
  SafetensorsReader,
  TensorSpec,
  write_safetensors,
)
from mrjax.lora.adapters import AdapterError, LoraConfig, adapter_shapes, check_adapter
from mrjax.models.config import DecoderConfig
from mrjax.sharding.rules import param_shardings

PyTree = Any
WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_TENSOR = re.compile(re.escape(_PREFIX) + r'(.+)\.lora_[AB]\.weight')


class PeftAdapter(NamedTuple):
  """A PEFT directory that was found and not yet loaded.

  Attributes:
    directory: Where it is.
    fields: Of its adapter_config.json.
    lora: What it is.
    dtypes: Name (`BF16`) of each tensor's dtype.
  """

  directory: Path
  fields: dict[str, Any]
  lora: LoraConfig
  dtypes: dict[str, str]

  @property
  def base(self) -> str:
    """The model it was trained on, as PEFT recorded it; empty where it did not."""
    return self.fields.get('base_model_name_or_path') or ''


def read_peft(directory: str | Path) -> PeftAdapter:
  """Reads the configuration of a PEFT directory, and the names of its tensors.

  Raises:
    FileNotFoundError: A file is not there, or weights are pickled.
    AdapterError: Another method than LoRA, an option that is not supported (named), or
      an adapter on something else than linear maps of the layers.
    CheckpointError: Damaged files.
  """
  directory = Path(directory)
  fields = read_config(directory / CONFIG)
  reader = SafetensorsReader(directory, file=WEIGHTS)
  known: dict[str, list[str]] = {}  # our modules by theirs, fused ones by all in them
  for rule in weights.RULES:
    if _has_adapter(rule):
      known.setdefault(rule.hf, []).append(rule.ours)
  targets = set()
  for name in reader.specs:
    match = _TENSOR.fullmatch(name)
    hf = (
      re.sub(r'(?<=\.layers\.)\d+(?=\.)', '{i}', f'{match[1]}.weight') if match else ''
    )
    if hf not in known:
      raise AdapterError(
        f'{directory / WEIGHTS}: {name} is not supported; adapters go to linear maps '
        'of the decoder layers alone, as lora_A and lora_B.'
      )
    targets |= {
      ours.removeprefix('layers').removesuffix('kernel') for ours in known[hf]
    }
  if not targets:
    raise AdapterError(f'{directory / WEIGHTS} holds no tensor.')
  return PeftAdapter(
    directory,
    fields,
    lora_config(directory / CONFIG, fields, tuple(sorted(targets))),
    {name: spec.dtype for name, spec in reader.specs.items()},
  )


def check_peft(found: PeftAdapter, config: DecoderConfig) -> None:
  """Holds an adapter's tensors against the decoder that it goes on; loads none.

  Raises:
    AdapterError: Tensors too many, too few or of a wrong shape for `config`, for the
      rank, or for target_modules (named).
  """
  _check_tensors(found, config, SafetensorsReader(found.directory, file=WEIGHTS))


def load_peft(
  found: PeftAdapter, config: DecoderConfig, mesh: Mesh, dtype: Any = None
) -> PyTree:
  """The adapter's leaves (scanned form), sharded over `mesh`.

  Args:
    found: What `read_peft` gave.
    config: The decoder that it goes on.
    mesh: Where to.
    dtype: Dtype of the leaves; None keeps what is stored.

  Raises:
    AdapterError: See `check_peft`.
  """
  reader = SafetensorsReader(found.directory, file=WEIGHTS)
  modules = _check_tensors(found, config, reader)
  shapes = {
    name: x.shape
    for name, x in trees.flatten(adapter_shapes(config, found.lora)).items()
  }
  shardings = trees.flatten(param_shardings(adapter_shapes(config, found.lora), mesh))
  leaves = {}
  for rule in (rule for rules in modules for rule in rules):
    start = weights.block_start(rule, config)
    rows = slice(start, start + rule.block_shape(config)[0])
    for which, part in (('A', slice(None)), ('B', rows)):
      names = [_tensor_name(rule, i, which) for i in range(config.num_layers)]
      kind = dtype or np.result_type(*(DTYPES[found.dtypes[n]] for n in names))
      layers = [reader.read(name, (part,)).astype(kind).T for name in names]
      leaf = _leaf_name(rule, which)
      leaves[leaf] = place(np.stack(layers).reshape(shapes[leaf]), shardings[leaf])
  return trees.unflatten(leaves)


def save_peft(
  adapter: PyTree,
  lora: LoraConfig,
  config: DecoderConfig,
  output_dir: str | Path,
  *,
  base: str,
  dtypes: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a PEFT directory; nothing is at `output_dir` before everything is.

  Args:
    adapter: The leaves (scanned form), on any mesh.
    lora: Its configuration.
    config: The decoder it goes on.
    output_dir: The new directory.
    base: Name or directory of the model it goes on, recorded for PEFT.
    dtypes: What `read_peft` said of the adapter that `adapter` is unchanged; by
      default every tensor has the dtype of its leaf.
    overwrite: Replace an earlier adapter.

  Raises:
    AdapterError: Leaves that are not those of `lora` and `config`.
    FileExistsError: See `new_directory`.
  """
  check_adapter(config, lora, adapter, where='The adapter')
  leaves = trees.flatten(adapter)
  specs, blocks = {}, {}
  stacked: dict[str, int] = {}
  for rules in _modules(config):
    present = [rule for rule in rules if _leaf_name(rule, 'A') in leaves]
    if not present:
      continue
    shared = _share_a(present, leaves, config)
    rank = lora.rank * (1 if shared else len(present))
    stacked[rules[0].hf.split('.')[-2]] = rank // lora.rank
    shapes = {'A': (rank, rules[0].block_shape(config)[1])}
    shapes['B'] = (sum(rule.block_shape(config)[0] for rule in rules), rank)
    for i in range(config.num_layers):
      for which, shape in shapes.items():
        name = _tensor_name(rules[0], i, which)
        kind = DTYPE_NAMES[np.dtype(leaves[_leaf_name(present[0], which)].dtype)]
        specs[name] = TensorSpec((dtypes or {}).get(name, kind), shape)
        blocks[name] = (rules, i, which, shared)

  def tensor(name: str) -> np.ndarray:
    rules, layer, which, shared = blocks[name]
    out = np.zeros(specs[name].shape, DTYPES[specs[name].dtype])
    row = column = 0
    for rule in rules:
      num_rows = rule.block_shape(config)[0]
      leaf = leaves.get(_leaf_name(rule, which))
      if leaf is not None:
        part, ranks = to_host(leaf, layer), slice(column, column + lora.rank)
        if which == 'A':
          out[ranks] = part.reshape(-1, lora.rank).T
        else:
          out[row : row + num_rows, ranks] = part.reshape(lora.rank, -1).T
        column += 0 if shared else lora.rank
      row += num_rows
    return out

  with new_directory(output_dir, marker=CONFIG, overwrite=overwrite) as partial:
    first = jax.process_index() == 0
    if first:
      fields = json.dumps(config_fields(lora, base, stacked), indent=2, sort_keys=True)
      (partial / CONFIG).write_text(fields + '\n', encoding='utf-8')
    write_safetensors(partial / WEIGHTS if first else None, specs, tensor)


def _share_a(
  rules: list[weights.WeightRule],
  leaves: Mapping[str, jax.Array],
  config: DecoderConfig,
) -> bool:
  """Whether the blocks of one module have the same A in every layer."""
  first, *rest = (leaves[_leaf_name(rule, 'A')] for rule in rules)
  return all(
    np.array_equal(to_host(first, i), to_host(other, i))
    for other in rest
    for i in range(config.num_layers)
  )


def _check_tensors(
  found: PeftAdapter, config: DecoderConfig, reader: SafetensorsReader
) -> list[list[weights.WeightRule]]:
  """The modules that have an adapter; raises unless the tensors are exactly theirs."""
  rank, want, chosen = found.lora.rank, {}, []
  for rules in _modules(config):
    num_rows = sum(rule.block_shape(config)[0] for rule in rules)
    layers = range(config.num_layers)
    hits = [is_target(found.fields, _module(rules[0], i)) for i in layers]
    if any(hits):
      chosen.append(rules)
      for i in layers:
        want[_tensor_name(rules[0], i, 'A')] = (rank, rules[0].block_shape(config)[1])
        want[_tensor_name(rules[0], i, 'B')] = (num_rows, rank)
    if any(hits) and not all(hits):
      raise AdapterError(
        f'{found.directory}: target_modules names {rules[0].hf} in layers '
        f'{[i for i in layers if hits[i]]} only; want all {config.num_layers}.'
      )
  targets = f'target_modules {found.fields["target_modules"]}'
  model = f'this {config.family} model of {config.num_layers} layers'
  if not chosen:
    maps = dict.fromkeys(rules[0].hf.split('.')[-2] for rules in _modules(config))
    raise AdapterError(
      f'{found.directory}: {targets} names no linear map of {model}; these are '
      f'{", ".join(maps)}. Give the model that the adapter was trained on.'
    )
  shapes = {name: spec.shape for name, spec in reader.specs.items()}
  for name in sorted(want.keys() | shapes.keys()):
    if name not in want or name not in shapes:
      there, missing = (CONFIG, WEIGHTS) if name in want else (WEIGHTS, CONFIG)
      raise AdapterError(
        f'{found.directory}: {name} is in {there} but not in {missing}, by {targets} '
        f'and {model}. Give both files of one adapter, and the model it was trained on.'
      )
    if shapes[name] != want[name]:
      raise AdapterError(
        f'{found.directory}: {name} has shape {shapes[name]}, want {want[name]} for '
        f'rank {rank} and {model}.'
      )
  return chosen


def _modules(config: DecoderConfig) -> list[list[weights.WeightRule]]:
  """Rules of the layers' linear maps, those of a fused one together."""
  rules = filter(_has_adapter, weights.rules_for(config))
  return [list(group) for _, group in itertools.groupby(rules, lambda rule: rule.hf)]


def _has_adapter(rule: weights.WeightRule) -> bool:
  return rule.stacked and rule.ours.endswith('/kernel')


def _module(rule: weights.WeightRule, layer: int) -> str:
  return rule.hf.format(i=layer).removesuffix('.weight')


def _tensor_name(rule: weights.WeightRule, layer: int, which: str) -> str:
  return f'{_PREFIX}{_module(rule, layer)}.lora_{which}.weight'


def _leaf_name(rule: weights.WeightRule, which: str) -> str:
  return f'{rule.ours.removesuffix("kernel")}lora_{which.lower()}'
