"""What every run shares: its output directory, its log, its devices."""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mrjax import records

_PACKAGES = (
  'mrjax',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'transformers',
)

# What a training run leaves that is no result: its settings, logs and side files.
_NO_RESULTS = {
  *('config.json', 'metrics.jsonl', 'tensorboard', 'wandb', 'profile', 'hf'),
  *('checkpoints', 'non_finite.json', 'value_head.json'),
}


class OutputError(ValueError):
  """An output directory that is in use, or that another configuration made."""


def prepare_output_dir(
  path: str | Path,
  config: Any,
  *,
  overwrite: bool,
  resume: bool = False,
  facts: Mapping[str, Any] | None = None,
  may_change: Collection[str] = (),
  check_only: bool = False,
) -> Path:
  """Makes an output directory and writes `config.json` into it.

  Args:
    path: The directory; made with its parents.
    config: A dataclass; all its fields are recorded.
    overwrite: Delete what an earlier run left. Only a directory that a run of mrjax
      made (it holds `config.json`) is ever deleted.
    resume: Accept the directory of an earlier run with the same configuration.
    facts: Recorded, and held against an earlier run, as the fields of `config` are.
    may_change: Fields that may differ from those of an earlier run, beside those that
      say where it runs.
    check_only: Only look whether it could be made; make and delete nothing.

  Raises:
    OutputError: It cannot be made; it holds files and neither flag allows them; or it
      is to be resumed and is of another command, or a field differs (both values are
      named). A field that an earlier version did not know counts as its default there.
  """
  if not str(path):
    raise OutputError('--output_dir is empty: name a directory for the results.')
  path = Path(path)
  fields = _fields(config, facts)
  if path.is_dir() and not _is_empty(path):
    if not overwrite:
      if not resume:
        raise OutputError(
          f'{path} already holds files. Choose another --output_dir, or pass '
          '--overwrite to delete what is there.'
        )
      _check_same(path, config, fields, may_change)
      return path
    if not (path / 'config.json').is_file():
      raise OutputError(
        f'{path} was not made by mrjax (no config.json): not deleted. Choose another '
        '--output_dir.'
      )
    if not check_only:
      shutil.rmtree(path)
  elif obstacle := _obstacle(path):
    raise OutputError(f'cannot write {path}: {obstacle}. Choose another output.')
  if not check_only:
    make_folder(path, output=path)
    about = {'config': fields, 'run': type(config).__module__}
    write_json(path / 'config.json', about | environment())
  return path


def make_folder(folder: str | Path, *, output: str | Path) -> None:
  """Makes the folder that `output`, the value of a flag, is or will lie in.

  Raises:
    OutputError: It cannot be made.
  """
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = _obstacle(folder) or (
      f'the directory {folder} cannot be made ({error.strerror})'
    )
    raise OutputError(
      f'cannot write {output}: {reason}. Choose another output.'
    ) from None


def environment() -> dict[str, Any]:
  """Time (UTC), package versions, git commit, device and command of this process."""
  versions: dict[str, str | None] = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  facts: dict[str, Any] = {
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': sys.argv,
    'versions': versions,
    'git_commit': _git_commit(),
  }
  if 'jax' in sys.modules:  # text-only runs never load jax
    import jax

    facts['device'] = {
      'platform': jax.default_backend(),
      'kind': jax.devices()[0].device_kind,
      'count': jax.device_count(),
    }
  return facts


def write_json(path: str | Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, never a half."""
  text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
  with records.replace_atomically(Path(path)) as file:
    file.write(text.encode('utf-8'))


def start_processes() -> None:
  """Joins the other processes of a run over several hosts; call before any device.

  On a TPU VM the slice itself says who the others are. Elsewhere the run has several
  processes where `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
  are set. On one machine without these nothing happens.
  """
  import jax

  if jax.distributed.is_initialized():
    return
  if os.environ.get('JAX_COORDINATOR_ADDRESS'):
    try:
      num_processes = int(os.environ['JAX_NUM_PROCESSES'])
      process_id = int(os.environ['JAX_PROCESS_ID'])
    except (KeyError, ValueError):
      raise ValueError(
        'JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must '
        'be set to numbers too.'
      ) from None
    jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
  elif importlib.util.find_spec('libtpu') and any(
    Path(device).exists() for device in ('/dev/accel0', '/dev/vfio/0')
  ):
    jax.distributed.initialize()


def resolve_dtype(name: str):
  """`auto` is bfloat16 on TPU and GPU, float32 on a CPU (slow in bfloat16)."""
  import jax
  import jax.numpy as jnp

  if name == 'auto':
    return jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  dtypes = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
  if name not in dtypes:
    raise ValueError(f'--dtype={name}: want auto, {" or ".join(dtypes)}.')
  return dtypes[name]


def _is_empty(folder: Path) -> bool:
  """Whether a folder holds nothing but what a kill left of a new config.json."""
  return all(
    re.fullmatch(r'\.config\.json\.[0-9a-f]{32}\.tmp', path.name)
    for path in folder.iterdir()
  )


def _obstacle(folder: Path) -> str:
  """Why nothing can be written in a folder that is or will be; empty where it can."""
  places = (folder, *folder.parents)
  nearest = next((p for p in places if os.path.lexists(p)), Path())
  if not nearest.is_dir():
    return f'{nearest} is a file, and a directory is needed there'
  if not os.access(nearest, os.W_OK | os.X_OK):
    return f'the directory {nearest} is not writable'
  return ''


def _fields(config: Any, facts: Mapping[str, Any] | None) -> dict[str, Any]:
  """What is recorded of a configuration, as JSON has it."""
  everything = dataclasses.asdict(config) | dict(facts or {})
  return dict(json.loads(json.dumps(everything, default=str)))


def _defaults(config: Any) -> dict[str, Any]:
  """The default of every field that has one, as JSON has it."""
  found = {}
  for field in dataclasses.fields(config):
    if field.default is not dataclasses.MISSING:
      found[field.name] = field.default
    elif field.default_factory is not dataclasses.MISSING:
      found[field.name] = field.default_factory()
  return dict(json.loads(json.dumps(found, default=str)))


def _check_same(
  path: Path,
  config: Any,
  fields: dict[str, Any],
  may_change: Collection[str],
) -> None:
  config_path = path / 'config.json'
  if not config_path.is_file():
    raise OutputError(
      f'{path} holds files but no config.json, so no run of mrjax made it. Choose '
      'another --output_dir.'
    )
  try:
    saved = json.loads(config_path.read_text(encoding='utf-8'))
    old = _defaults(config) | saved['config']
  except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
    raise OutputError(
      f'{config_path} is damaged. Choose another --output_dir, or pass --overwrite to '
      'delete what is there.'
    ) from None
  run = type(config).__module__
  if saved.get('run', run) != run:  # earlier versions did not say
    command = str((saved.get('command') or [saved['run']])[0])
    raise OutputError(
      f'{path} holds a run of another command, {Path(command).stem}. Choose another '
      '--output_dir, or pass --overwrite to delete what is there.'
    )
  # Where it runs may change.
  ignored = {'overwrite', 'output_dir', 'mesh', 'max_batch', *may_change}
  changed = [
    f'{name}: was {old.get(name)!r}, now {fields.get(name)!r}'
    for name in sorted((old.keys() | fields.keys()) - ignored)
    if old.get(name) != fields.get(name)
  ]
  if changed:
    raise OutputError(
      f'{path} holds a run with another configuration ({"; ".join(changed)}). Choose '
      f'another --output_dir, or pass --overwrite to start again{_cost(path)}.'
    )


def _cost(path: Path) -> str:
  """What is added where starting again deletes nothing but settings and logs."""
  saved = any(p.name.isdigit() for p in path.glob('checkpoints/*'))
  if saved or any(p.name not in _NO_RESULTS for p in path.iterdir()):
    return ''
  return '; it has no result yet, so no more than its log is lost'


def _git_commit() -> str | None:
  try:
    result = subprocess.run(
      ['git', 'rev-parse', 'HEAD'],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      timeout=5,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return result.stdout.strip() or None
