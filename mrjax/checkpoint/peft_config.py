"""PEFT's adapter_config.json: what of it is supported, and what is written."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrjax.lora.adapters import AdapterError, LoraConfig

CONFIG = 'adapter_config.json'
_READ = {
  *('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'target_modules'),
  *('exclude_modules', 'init_lora_weights'),
}
# Options that say nothing about what a finished adapter computes.
_HARMLESS = {
  *('auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode'),
  *('peft_version', 'task_type', 'eva_config', 'megatron_core', 'qalora_group_size'),
  *('runtime_config', 'ensure_weight_tying'),
}
# Initialisations that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) change
# it, and their adapters are differences to weights that are nowhere stored.
_INITS = (None, True, False, 'gaussian', 'eva', 'orthogonal')


def read_config(path: Path) -> dict[str, Any]:
  """The fields of an adapter_config.json that is plain LoRA.

  Raises:
    FileNotFoundError: It is not there.
    AdapterError: It is damaged; another method; an option that is not supported.
  """
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(
      f'{path} does not exist; want a directory that PEFT saved.'
    ) from None
  except ValueError as error:
    raise AdapterError(f'{path} is damaged: {error}.') from None
  kind = _required(path, fields, 'peft_type')
  if kind != 'LORA':
    raise AdapterError(f'{path}: peft_type {kind!r} is not supported; want LORA.')
  if fields.get('init_lora_weights') not in _INITS:
    raise AdapterError(
      f'{path}: init_lora_weights={fields["init_lora_weights"]!r} changes the base '
      'model, which is not supported. Convert it to plain LoRA when saving: '
      'save_pretrained(..., path_initial_model_for_weight_conversion=...).'
    )
  for name, value in fields.items():
    if value and name not in _READ | _HARMLESS and (name, value) != ('bias', 'none'):
      raise AdapterError(
        f'{path}: {name}={value!r} is not supported. Merge the adapter with PEFT '
        '(merge_and_unload) and use the merged model.'
      )
  for name in ('r', 'lora_alpha'):
    _required(path, fields, name)
  for name in ('target_modules', 'exclude_modules'):
    _check_modules(path, name, fields.get(name))
  if not fields.get('target_modules'):
    raise AdapterError(f'{path}: target_modules is empty.')
  return fields


def lora_config(
  path: Path, fields: Mapping[str, Any], targets: tuple[str, ...]
) -> LoraConfig:
  """What the fields say of rank and scale, with the given targets.

  Raises:
    AdapterError: A value out of range.
  """
  try:
    return LoraConfig(
      rank=int(fields['r']),
      alpha=float(fields['lora_alpha']),
      dropout=float(fields.get('lora_dropout') or 0),
      rslora=bool(fields.get('use_rslora')),
      targets=targets,
    )
  except (TypeError, ValueError) as error:
    raise AdapterError(f'{path}: {str(error).rstrip(".")}.') from None


def is_target(fields: Mapping[str, Any], module: str) -> bool:
  """Whether PEFT gives a linear map of the layers, by its path, an adapter."""
  excluded = fields.get('exclude_modules')
  return _is_named(fields['target_modules'], module) and not (
    excluded and _is_named(excluded, module)
  )


def config_fields(
  lora: LoraConfig, base: str, stacked: Mapping[str, int]
) -> dict[str, Any]:
  """The fields of an adapter_config.json.

  Args:
    lora: The adapter.
    base: The model it goes on.
    stacked: For each target, such as `q_proj`, how many adapters are stacked in it.
  """
  number = lambda x: int(x) if float(x).is_integer() else x
  wide = {name: n for name, n in stacked.items() if n > 1}
  # So that the scale stays alpha / rank, or alpha / sqrt(rank).
  alpha = lambda n: lora.alpha * (math.sqrt(n) if lora.rslora else n)
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base or None,
    'inference_mode': True,
    'r': lora.rank,
    'lora_alpha': number(lora.alpha),
    'lora_dropout': lora.dropout,
    'use_rslora': lora.rslora,
    'target_modules': sorted(stacked),
    'rank_pattern': {name: lora.rank * n for name, n in wide.items()},
    'alpha_pattern': {name: number(alpha(n)) for name, n in wide.items()},
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'modules_to_save': None,
  }


def _is_named(names: str | list[str], module: str) -> bool:
  """PEFT's rule: a regular expression for the whole path, or names that end it."""
  if names == 'all-linear':
    return True
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == name or module.endswith(f'.{name}') for name in names)


def _required(path: Path, fields: Any, name: str) -> Any:
  if not isinstance(fields, dict) or fields.get(name) is None:
    raise AdapterError(
      f'{path} has no field {name!r}: give the directory as PEFT saved it.'
    )
  return fields[name]


def _check_modules(path: Path, name: str, value: Any) -> None:
  regexes = [value] if isinstance(value, str) else []
  if not (value is None or regexes or isinstance(value, list)):
    raise AdapterError(f'{path}: {name}={value!r}: want a list of names or a regex.')
  for regex in regexes:
    try:
      re.compile(regex)
    except re.error as error:
      raise AdapterError(f'{path}: {name}={value!r} is no regex: {error}.') from None
