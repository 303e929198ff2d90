"""The checkpoints of a training run.

A run keeps

    hf/                 config.json, tokenizer and their kin, byte for byte
    checkpoints/STEP/   what trained: all weights in `params/`, an adapter in
                        `adapter/`, or some of the weights in `trained/`; `opt_state/`;
                        and `metadata`: how to go on, what the rest of the weights was,
                        and checksums of the arrays, so that later damage is found

A step with its final name is whole: it is written aside and renamed.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mrjax import trees
from mrjax.checkpoint.directories import (
  CheckpointError,
  copy_side_files,
  damaged,
  new_directory,
  steps_of,
)
from mrjax.checkpoint.fingerprint import checksums
from mrjax.checkpoint.orbax import first_line, load_tree, tree_shapes

PyTree = Any
WHOLE, ADAPTER, PART = 'params', 'adapter', 'trained'
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
          raise damaged(path, f'is damaged: {leaf} holds other numbers than were saved')
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
    return read_metadata(self.path(step))

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


def read_metadata(directory: Path) -> dict[str, Any]:
  """The JSON object that was saved with a step, with the checksums of its arrays.

  Args:
    directory: Of the step.

  Raises:
    CheckpointError: It is not there, or damaged.
  """
  path = directory / _METADATA / 'metadata'
  try:
    return dict(json.loads(path.read_text(encoding='utf-8')))
  except (OSError, ValueError, TypeError) as error:
    raise damaged(directory, f'is damaged: {first_line(error)}') from None


def check_set_aside(run_dir: str | Path, *, after: int) -> None:
  """Looks whether `set_aside` can do what it is asked for; changes nothing.

  Raises:
    CheckpointError: There is no checkpoint of step `after`, and it is not the step that
      `set_aside` went back to last.
  """
  steps = steps_of(run_dir)
  if after not in steps and set_aside_after(run_dir) != after:
    raise CheckpointError(
      f'{Path(run_dir) / "checkpoints"} has no checkpoint of step {after}; it has '
      f'{steps}.'
    )


def set_aside(run_dir: str | Path, *, after: int) -> None:
  """Moves the checkpoints of later steps to RUN/set_aside, so that none is the last.

  Once: RUN/set_aside/after.json remembers `after`, and a second call for the same step
  changes nothing, so that a command that is run again goes on where it was stopped.

  Raises:
    CheckpointError: See `check_set_aside`.
  """
  check_set_aside(run_dir, after=after)
  is_done = set_aside_after(run_dir) == after
  if jax.process_count() > 1:  # all have looked before anything moves
    multihost_utils.sync_global_devices('mrjax set_aside begins')
  if not is_done and jax.process_index() == 0:
    memory = _memory(run_dir)
    memory.parent.mkdir(exist_ok=True)
    for step in reversed([step for step in steps_of(run_dir) if step > after]):
      new = memory.parent / str(step)
      shutil.rmtree(new, ignore_errors=True)
      os.rename(Path(run_dir) / 'checkpoints' / str(step), new)
    scratch = memory.with_name('.after.json')
    scratch.write_text(json.dumps({'after': after}), encoding='utf-8')
    os.replace(scratch, memory)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('mrjax set_aside')


def set_aside_after(run_dir: str | Path) -> int | None:
  """The step that `set_aside` went back to last; None where it never did."""
  try:
    return int(json.loads(_memory(run_dir).read_text(encoding='utf-8'))['after'])
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise CheckpointError(
      f'{_memory(run_dir)} is damaged: {first_line(error)}. Delete it.'
    ) from None


def _memory(run_dir: str | Path) -> Path:
  return Path(run_dir) / 'set_aside' / 'after.json'
