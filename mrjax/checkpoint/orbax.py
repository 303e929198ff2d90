"""Orbax checkpoints: trees of arrays, saved from one mesh and restored onto another.

A model checkpoint is a directory of

    mrjax.json   what it is: `format_version`, `kind`, `source`, `dtypes`
    hf/          config.json, tokenizer and their kin, byte for byte as they came
    params/      the parameters (Orbax)

Those of training runs are in `store`. A directory with its final name is whole: it is
written aside and renamed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mrjax import trees
from mrjax.checkpoint.directories import (
  CheckpointError,
  copy_side_files,
  damaged,
  new_directory,
)

PyTree = Any
MARKER = 'mrjax.json'
FORMAT_VERSION = 1


def save_tree(directory: Path, tree: PyTree) -> None:
  """Writes a tree of arrays into a new directory."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory.absolute(), tree)
    checkpointer.wait_until_finished()


def tree_shapes(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every array in a directory, by path.

  Raises:
    CheckpointError: It is no tree of arrays, or its description is damaged.
  """
  try:
    metadata = ocp.StandardCheckpointHandler().metadata(directory.absolute())
  except (OSError, ValueError, KeyError) as error:
    raise damaged(
      directory, f'is no whole Orbax checkpoint: {first_line(error)}'
    ) from None
  leaves = jax.tree_util.tree_flatten_with_path(
    getattr(metadata, 'tree', metadata), is_leaf=lambda x: hasattr(x, 'shape')
  )[0]
  return {
    trees.path_name(path): jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    for path, leaf in leaves
  }


def load_tree(directory: Path, like: PyTree) -> PyTree:
  """The tree in a directory, laid out and cast as `like` says.

  Args:
    directory: What `save_tree` wrote, or one item of a `CheckpointStore` step.
    like: Tree of `jax.ShapeDtypeStruct`, each with its sharding.

  Raises:
    CheckpointError: Other names or shapes (named), or damaged files.
  """
  found = {name: leaf.shape for name, leaf in tree_shapes(directory).items()}
  want = {name: tuple(leaf.shape) for name, leaf in trees.flatten(like).items()}
  for name in sorted(found.keys() | want.keys()):
    if found.get(name) != want.get(name):
      raise CheckpointError(
        f'{directory}: {name} has shape {found.get(name, "(not there)")}, want '
        f'{want.get(name, "(not there)")}.'
      )
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(directory.absolute(), like)
    except Exception as error:
      # What Orbax cannot read of an array's chunks is a bare Exception.
      if type(error) is not Exception and not isinstance(error, OSError | ValueError):
        raise
      raise damaged(directory, f'cannot be read: {first_line(error)}') from None


def save_model(
  directory: str | Path,
  params: PyTree,
  *,
  hf_dir: str | Path,
  source: str,
  dtypes: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a model checkpoint; nothing is at `directory` before all of it is.

  Args:
    directory: The new checkpoint.
    params: Parameter tree in the scanned form.
    hf_dir: Whose config.json, tokenizer and their kin are taken over.
    source: Where the weights come from, for the record.
    dtypes: `stored_dtypes` of the Hugging Face model, where `params` are its weights
      unchanged; an export then writes the same tensors again.
    overwrite: Replace an earlier model checkpoint.

  Raises:
    FileExistsError: See `new_directory`.
  """
  with new_directory(directory, marker=MARKER, overwrite=overwrite) as partial:
    if jax.process_index() == 0:
      copy_side_files(hf_dir, partial / 'hf')
      facts = {
        'format_version': FORMAT_VERSION,
        'kind': 'model',
        'source': source,
        'dtypes': dict(dtypes) if dtypes else None,
      }
      (partial / MARKER).write_text(json.dumps(facts, indent=2) + '\n')
    save_tree(partial / 'params', params)


def read_marker(directory: Path, *, kind: str = 'model') -> dict[str, Any]:
  """The content of `mrjax.json`.

  Args:
    directory: Of the checkpoint.
    kind: What it shall hold, a `model` or an `adapter`.

  Raises:
    CheckpointError: It is damaged, of another kind, or of a later version.
  """
  path = directory / MARKER
  try:
    facts = json.loads(path.read_text(encoding='utf-8'))
    version, found = facts['format_version'], facts['kind']
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged: {error!r}.') from None
  if {found, kind} == {'model', 'adapter'}:
    raise CheckpointError(
      f'{directory} holds no {kind} but an mrjax {found}. Commands that want one take '
      f'it as --{found}.'
    )
  if found != kind or version != FORMAT_VERSION:
    raise CheckpointError(
      f'{path}: kind {found!r} in format {version}, want kind {kind!r} in format '
      f'{FORMAT_VERSION}. Read it with the version of mrjax that wrote it.'
    )
  return facts


def first_line(error: BaseException) -> str:
  """What an error of Orbax says, without the dump that follows it and a full stop."""
  if isinstance(error, json.JSONDecodeError):
    return 'the description in it is cut short, or no JSON'
  line = (str(error).splitlines() or [repr(error)])[0]
  return line.split(' [tensorstore_spec')[0].rstrip('.')
