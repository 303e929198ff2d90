"""Adapters from PEFT to mrjax and back, or into the weights they go on."""

import dataclasses
from pathlib import Path
from typing import Any

from mrjax import trees
from mrjax.checkpoint import orbax
from mrjax.checkpoint.adapted import AdaptedModel
from mrjax.checkpoint.adapters import AdapterSource, resolve_adapter, save_adapter
from mrjax.checkpoint.directories import CheckpointError, check_replaceable
from mrjax.checkpoint.fingerprint import fingerprint
from mrjax.checkpoint.hf import peak_host_bytes, save_hf
from mrjax.checkpoint.peft import save_peft
from mrjax.checkpoint.peft_config import CONFIG
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.models.config import DecoderConfig, load_hf_config
from mrjax.runs import common
from mrjax.runs.convert import resolve_dtype
from mrjax.sharding.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class ImportConfig:
  peft_dir: str = ''  # directory that PEFT saved
  model: str = ''  # what it goes on; empty: what PEFT recorded
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1'
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  checkpoint: str = ''  # mrjax adapter, run that trained one, or a step of it
  model: str = ''  # name that PEFT shall know its base by; empty: the recorded one
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1'
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class FoldConfig:
  adapter: str = ''  # PEFT directory, mrjax adapter, run, or a step of it
  model: str = ''  # what it goes on; empty: the recorded one
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1'
  dtype: str = 'stored'  # of the tensors; stored keeps that of each
  max_shard_gb: float = 5.0  # 10^9 bytes
  overwrite: bool = False


def import_peft(config: ImportConfig) -> dict[str, Any]:
  """Writes an mrjax adapter checkpoint of a PEFT directory.

  The base is loaded once, for the fingerprint by which it is recognised later.

  Returns:
    `output_dir`, `num_params` (of the adapter), `peak_host_bytes`.
  """
  common.start_processes()
  check_replaceable(config.output_dir, marker=orbax.MARKER, overwrite=config.overwrite)
  found = resolve_adapter(config.peft_dir)
  if found.peft is None:
    raise ValueError(f'--peft_dir={config.peft_dir} is an mrjax adapter already.')
  source = _base(found, config.model)
  mesh = make_mesh(config.mesh)
  adapter = found.load(source.config, mesh, None)
  common.make_folder(Path(config.output_dir).parent, output=config.output_dir)
  save_adapter(
    config.output_dir,
    adapter,
    found.lora,
    hf_dir=source.hf_dir,
    base={'model': source.name, 'fingerprint': fingerprint(source.load_params(mesh))},
    dtypes=found.dtypes,
    overwrite=config.overwrite,
  )
  return _summary(config.output_dir, adapter)


def export_peft(config: ExportConfig) -> dict[str, Any]:
  """Writes a PEFT directory of an mrjax adapter or of a run that trained one.

  Returns:
    `output_dir`, `num_params` (of the adapter), `peak_host_bytes`.
  """
  common.start_processes()
  check_replaceable(config.output_dir, marker=CONFIG, overwrite=config.overwrite)
  found = resolve_adapter(config.checkpoint)
  if found.hf_dir is None:
    raise ValueError(f'--checkpoint={config.checkpoint} is a PEFT directory already.')
  decoder = DecoderConfig.from_hf(load_hf_config(found.hf_dir))
  adapter = found.load(decoder, make_mesh(config.mesh), None)
  common.make_folder(Path(config.output_dir).parent, output=config.output_dir)
  save_peft(
    adapter,
    found.lora,
    decoder,
    config.output_dir,
    base=config.model or found.base.get('model', ''),
    dtypes=found.dtypes,
    overwrite=config.overwrite,
  )
  return _summary(config.output_dir, adapter)


def fold_adapter(config: FoldConfig) -> dict[str, Any]:
  """Writes a Hugging Face model: full-precision weights with the adapter added in.

  Returns:
    `output_dir`, `num_params` (of the model), `peak_host_bytes`.
  """
  common.start_processes()
  if config.max_shard_gb <= 0:
    raise ValueError(f'--max_shard_gb={config.max_shard_gb}: want a positive number.')
  check_replaceable(config.output_dir, marker='config.json', overwrite=config.overwrite)
  dtype = resolve_dtype(config.dtype)
  found = resolve_adapter(config.adapter)
  source = _base(found, config.model)
  params = AdaptedModel(source, found).load_params(make_mesh(config.mesh))
  common.make_folder(Path(config.output_dir).parent, output=config.output_dir)
  save_hf(
    params,
    source.config,
    source.hf_dir,
    config.output_dir,
    dtypes=source.dtypes,
    dtype=dtype,
    max_shard_bytes=int(config.max_shard_gb * 1e9),
    overwrite=config.overwrite,
  )
  return _summary(config.output_dir, params)


def _base(found: AdapterSource, model: str) -> ModelSource:
  """The model that an adapter goes on, as given or as recorded."""
  name = model or found.base.get('model', '')
  if not name:
    raise ValueError(f'{found.name} does not say what model it goes on: pass --model.')
  try:
    return resolve_model(name)
  except (FileNotFoundError, CheckpointError) as error:
    if not model:
      error.add_note(f'{found.name} says that it goes on it; --model names another.')
    raise


def _summary(output_dir: str, tree: Any) -> dict[str, Any]:
  return {
    'output_dir': output_dir,
    'num_params': sum(leaf.size for leaf in trees.flatten(tree).values()),
    'peak_host_bytes': peak_host_bytes(),
  }
