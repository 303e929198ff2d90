"""Orbax checkpoints: trees of arrays, saved from one mesh and restored onto another.

A model checkpoint is a directory of

    mrjax.json   what it is: `format_version`, `kind`, `source`, `dtypes`
    hf/          config.json, tokenizer and their kin, byte for byte as they came
    params/      the parameters (Orbax)

and a training run keeps `hf/` beside `checkpoints/STEP/`, whose `params/` has the same
form. A directory with its final name is whole: both are written aside and renamed.
Every step also holds checksums of its arrays, so that damage done later is found.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from mrjax import trees
from mrjax.checkpoint.directories import CheckpointError, copy_side_files, new_directory
from mrjax.checkpoint.fingerprint import checksums

PyTree = Any
MARKER = 'mrjax.json'
FORMAT_VERSION = 1
_METADATA = 'metadata'
_CHECKSUMS = 'checksums'


class _Preservation:
  """Keeps the last steps, every so many steps, and those that were named."""

  def __init__(self, keep_last: int | None, keep_every: int):
    self._keep_last, self._keep_every = keep_last, keep_every
    self.named: frozenset[int] = frozenset()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    recent = len(checkpoints) - (self._keep_last or len(checkpoints))
    return [
      i >= recent
      or info.step in self.named
      or bool(self._keep_every and info.step % self._keep_every == 0)
      for i, info in enumerate(checkpoints)
    ]


class CheckpointStore:
  """The checkpoints of one training run: RUN/checkpoints/STEP, and RUN/hf beside them.

  Saving is asynchronous: `save` returns once the arrays are copied, so they may be
  donated at once. A checkpoint that was cut short is never listed.
  """

  def __init__(
    self,
    run_dir: str | Path,
    *,
    hf_dir: str | Path,
    keep_last: int | None = None,
    keep_every: int = 0,
  ):
    """Opens a run, or begins one.

    Args:
      run_dir: The run.
      hf_dir: Whose config.json, tokenizer and their kin a new run takes over, so that
        its checkpoints are models by themselves.
      keep_last: Checkpoints that stay, older ones are deleted; None keeps all.
      keep_every: Steps that are a multiple of it stay too; 0 for none.
    """
    run_dir = Path(run_dir).absolute()
    self.directory = run_dir / 'checkpoints'
    if not (run_dir / 'hf').exists():
      with new_directory(run_dir / 'hf', marker='config.json') as partial:
        if jax.process_index() == 0:
          copy_side_files(hf_dir, partial)
    self._preservation = _Preservation(keep_last, keep_every)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._preservation, cleanup_tmp_directories=True
      ),
    )

  def __enter__(self) -> 'CheckpointStore':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def path(self, step: int) -> Path:
    """The directory of a step; `--model` accepts it."""
    return self.directory / str(step)

  def save(
    self,
    step: int,
    items: Mapping[str, PyTree],
    metadata: Mapping[str, Any],
    *,
    keep: Collection[int] = (),
  ) -> None:
    """Starts saving trees of arrays by name (one is `params`), and a JSON object.

    Args:
      step: Above all saved ones.
      items: What to save.
      metadata: To go with it.
      keep: Steps that stay, however old they are.

    Raises:
      CheckpointError: `step` is not above all saved steps.
    """
    latest = self.latest_step()
    if latest is not None and step <= latest:
      raise CheckpointError(
        f'{self.directory} holds step {latest} already; want a later one than {step}.'
      )
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    sums = {name: checksums(tree) for name, tree in items.items()}
    args[_METADATA] = ocp.args.JsonSave(dict(metadata) | {_CHECKSUMS: sums})
    self._preservation.named = frozenset(keep)
    self._manager.save(step, args=ocp.args.Composite(**args))

  def restore(self, step: int, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The named trees of a step.

    Args:
      step: One of `steps()`.
      items: For each name a tree of `jax.ShapeDtypeStruct` with a sharding each: where
        the arrays shall live, and in which dtype.

    Raises:
      CheckpointError: No such step, a tree of other names or shapes, damaged files, or
        numbers that are not those that were saved.
    """
    sums = self._metadata(step).get(_CHECKSUMS, {})
    trees_by_name = {}
    for name, like in items.items():
      path = self.path(step) / name
      tree = trees_by_name[name] = load_tree(path, like)
      stored = tree_shapes(path)
      for leaf, sum_ in checksums(tree).items():
        cast = trees.flatten(tree)[leaf].dtype != stored[leaf].dtype
        if not cast and sum_ != sums.get(name, {}).get(leaf, sum_):
          raise CheckpointError(
            f'{path} is damaged: {leaf} holds other numbers than were saved.'
          )
    return trees_by_name

  def metadata(self, step: int) -> dict[str, Any]:
    """The JSON object that was saved with a step.

    Raises:
      CheckpointError: No such step, or damaged files.
    """
    metadata = self._metadata(step)
    metadata.pop(_CHECKSUMS, None)
    return metadata

  def _metadata(self, step: int) -> dict[str, Any]:
    self._check(step)
    composite = ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()})
    try:
      return dict(self._manager.restore(step, args=composite)[_METADATA])
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CheckpointError(
        f'{self.path(step)} is damaged: {_first_line(error)}'
      ) from None

  def wait(self) -> None:
    """Returns when all saves are on disk; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _check(self, step: int) -> None:
    self.wait()
    if step not in self.steps():
      raise CheckpointError(
        f'{self.directory} has no checkpoint of step {step}; it has {self.steps()}.'
      )


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
    raise CheckpointError(
      f'{directory} is no whole Orbax checkpoint: {_first_line(error)}'
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
    except (OSError, ValueError) as error:
      raise CheckpointError(
        f'{directory} cannot be read: {_first_line(error)}'
      ) from None


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


def read_marker(directory: Path) -> dict[str, Any]:
  """The content of `mrjax.json`.

  Raises:
    CheckpointError: It is damaged, of another kind, or of a later version.
  """
  path = directory / MARKER
  try:
    facts = json.loads(path.read_text(encoding='utf-8'))
    version, kind = facts['format_version'], facts['kind']
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged: {error!r}.') from None
  if kind != 'model' or version != FORMAT_VERSION:
    raise CheckpointError(
      f'{path}: kind {kind!r} in format {version}, want kind "model" in format '
      f'{FORMAT_VERSION}. Read it with the version of mrjax that wrote it.'
    )
  return facts


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [repr(error)])[0].split(' [tensorstore_spec')[0]
