"""Whole models from Hugging Face form to an mrjax checkpoint and back."""

import dataclasses
from pathlib import Path
from typing import Any

from mrjax.checkpoint import orbax
from mrjax.checkpoint.directories import check_replaceable
from mrjax.checkpoint.hf import peak_host_bytes, save_hf
from mrjax.checkpoint.source import resolve_model
from mrjax.runs import common
from mrjax.sharding.mesh import make_mesh

DTYPES = ('stored', 'float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class ImportConfig:
  hf_dir: str = ''  # Hugging Face model directory, embedded name or hub id
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1'
  dtype: str = 'stored'  # of the checkpoint; stored keeps that of each tensor
  overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  checkpoint: str = ''  # mrjax model checkpoint, training run, or a step of one
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1'
  dtype: str = 'stored'  # of the tensors; stored keeps that of each
  max_shard_gb: float = 5.0  # 10^9 bytes
  overwrite: bool = False


def import_hf(config: ImportConfig) -> dict[str, Any]:
  """Writes an mrjax model checkpoint of a Hugging Face model.

  Returns:
    `output_dir`, `num_params`, `peak_host_bytes`.
  """
  common.start_processes()
  check_replaceable(config.output_dir, marker=orbax.MARKER, overwrite=config.overwrite)
  source = resolve_model(config.hf_dir)
  if source.params_dir is not None:
    raise ValueError(f'--hf_dir={config.hf_dir} is an mrjax checkpoint already.')
  dtype = resolve_dtype(config.dtype)
  common.make_folder(Path(config.output_dir).parent, output=config.output_dir)
  orbax.save_model(
    config.output_dir,
    source.load_params(make_mesh(config.mesh), dtype),
    hf_dir=source.hf_dir,
    source=config.hf_dir,
    dtypes=source.dtypes if dtype is None else None,
    overwrite=config.overwrite,
  )
  return _summary(config.output_dir, source)


def export_hf(config: ExportConfig) -> dict[str, Any]:
  """Writes a Hugging Face model directory of an mrjax checkpoint or training run.

  Returns:
    `output_dir`, `num_params`, `peak_host_bytes`.
  """
  common.start_processes()
  if config.max_shard_gb <= 0:
    raise ValueError(f'--max_shard_gb={config.max_shard_gb}: want a positive number.')
  check_replaceable(config.output_dir, marker='config.json', overwrite=config.overwrite)
  source = resolve_model(config.checkpoint)
  dtype = resolve_dtype(config.dtype)
  common.make_folder(Path(config.output_dir).parent, output=config.output_dir)
  save_hf(
    source.load_params(make_mesh(config.mesh)),
    source.config,
    source.hf_dir,
    config.output_dir,
    dtypes=source.dtypes,
    dtype=dtype,
    max_shard_bytes=int(config.max_shard_gb * 1e9),
    overwrite=config.overwrite,
  )
  return _summary(config.output_dir, source)


def resolve_dtype(name: str) -> str | None:
  """`--dtype` of a conversion: None for `stored`, which keeps that of each tensor.

  Raises:
    ValueError: No such dtype.
  """
  if name not in DTYPES:
    raise ValueError(f'--dtype={name}: want one of {", ".join(DTYPES)}.')
  return None if name == 'stored' else name


def _summary(output_dir: str, source) -> dict[str, Any]:
  return {
    'output_dir': output_dir,
    'num_params': source.config.num_params,
    'peak_host_bytes': peak_host_bytes(),
  }
