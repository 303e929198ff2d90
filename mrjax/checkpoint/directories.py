"""Output directories that appear whole or not at all, and the files they take over;
which steps a run holds, and what to do about a damaged one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

# What a Hugging Face directory holds beside its weights: config, tokenizer, template,
# generation defaults, licence. Never code.
_SIDE_FILES = (
  *('*.json', '*.jinja', '*.model', '*.txt', '*.tiktoken', 'LICENSE*', 'NOTICE*'),
  'additional_chat_templates/*.jinja',
)


class CheckpointError(ValueError):
  """A checkpoint that is damaged, incomplete, or not the one that was asked for."""


def steps_of(run_dir: str | Path) -> list[int]:
  """Steps of a training run that have a checkpoint, ascending; none without a run."""
  names = (path.name for path in (Path(run_dir) / 'checkpoints').glob('*'))
  return sorted(int(name) for name in names if name.isdigit())


def damaged(directory: Path, reason: str) -> CheckpointError:
  """The error for a checkpoint that cannot be read, for the caller to raise.

  Args:
    directory: Of the checkpoint, or of one of its items. For a step of a training run
      a note names the step before it, where there is one.
    reason: What is wrong with it.
  """
  error = CheckpointError(f'{directory} {reason}.')
  for path in (directory.absolute(), directory.absolute().parent):
    if path.name.isdigit() and path.parent.name == 'checkpoints':
      run_dir = path.parents[1]
      earlier = [step for step in steps_of(run_dir) if step < int(path.name)]
      if earlier:
        error.add_note(
          f'Give the checkpoint before it instead: {path.with_name(str(earlier[-1]))}.'
        )
  return error


def copy_side_files(source: str | Path, destination: str | Path) -> list[str]:
  """Copies all but the weights of a Hugging Face directory, byte for byte.

  Returns:
    The names of the copied files.
  """
  source, destination = Path(source), Path(destination)
  names = []
  for path in sorted({p for pattern in _SIDE_FILES for p in source.glob(pattern)}):
    if not path.is_file() or path.name.endswith('.index.json'):
      continue
    name = path.relative_to(source)
    (destination / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, destination / name)
    names.append(str(name))
  return names


def check_replaceable(path: str | Path, *, marker: str, overwrite: bool) -> None:
  """Raises FileExistsError where `new_directory` would, before any work is done."""
  path = Path(path)
  if path.exists() and not overwrite:
    raise FileExistsError(
      f'{path} exists already. Choose another output, or pass --overwrite.'
    )
  if path.exists() and not (path / marker).is_file():
    raise FileExistsError(
      f'{path} is not replaced: it holds no {marker}, so it is no output of this '
      'command. Choose another output.'
    )


@contextlib.contextmanager
def new_directory(
  path: str | Path, *, marker: str, overwrite: bool = False
) -> Iterator[Path]:
  """Gives a directory to fill, and renames it to `path` when the block succeeds.

  Until then everything stands in a hidden neighbour, which an exception removes and a
  later call replaces, so that `path` never holds half an output. All processes enter
  and leave together; process 0 makes and renames.

  Args:
    path: Where the directory shall be.
    marker: A file that every directory of this kind holds. An existing `path` is only
      replaced when it has it.
    overwrite: Replace what is there.

  Raises:
    FileExistsError: `path` is there and may not be replaced.
  """
  path = Path(os.path.abspath(path))
  check_replaceable(path, marker=marker, overwrite=overwrite)
  partial = path.with_name(f'.{path.name}.partial')
  first = jax.process_index() == 0
  if first:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  _sync('made')
  try:
    yield partial
  except BaseException:
    if first:
      shutil.rmtree(partial, ignore_errors=True)
    raise
  _sync('filled')
  if first:
    _flush(partial)
    old = path.with_name(f'.{path.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
      os.rename(path, old)
    os.rename(partial, path)
    _flush(path.parent, recursive=False)
    shutil.rmtree(old, ignore_errors=True)
  _sync('renamed')


def _flush(directory: Path, *, recursive: bool = True) -> None:
  """Asks the disk to hold what was written before the rename says that it is whole."""
  for path in (directory, *(directory.rglob('*') if recursive else ())):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'mrjax new_directory {name}')
