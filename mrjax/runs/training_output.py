"""The output directory of a training run: looked at first, made when all else fits."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mrjax.checkpoint.directories import steps_of
from mrjax.checkpoint.store import check_set_aside, set_aside_after
from mrjax.data.batches import TextBatches
from mrjax.runs import common
from mrjax.runs.training_config import Config


def check_output(config: Config) -> None:
  """Holds the output directory against a configuration; makes and deletes nothing.

  Raises:
    OutputError: See `common.prepare_output_dir`.
    CheckpointError: It has no checkpoint of step `resume_step`.
  """
  if config.dry_run or jax.process_index() != 0:
    return
  _prepare(config, check_only=True)
  if config.resume_step:
    check_set_aside(config.output_dir, after=config.resume_step)


def prepare_output(config: Config) -> Path:
  """Makes the output directory, or finds that of a run that goes on; `train` does so.

  Raises:
    OutputError: See `common.prepare_output_dir`.
  """
  if jax.process_index() == 0:
    _prepare(config, check_only=False)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('mrjax output directory')
  return Path(config.output_dir)


def _prepare(config: Config, *, check_only: bool) -> None:
  common.prepare_output_dir(
    config.output_dir,
    config.recorded(),
    overwrite=config.overwrite,
    resume=True,
    may_change=config.may_change,
    check_only=check_only,
  )


def is_finished(config: Config, make_batches: Callable[[], TextBatches]) -> bool:
  """Whether all steps of a run are done, so that it needs no weights.

  Args:
    config: Of the run.
    make_batches: Those of the training data, which say how many steps there are; only
      called where there is a checkpoint.
  """
  run_dir = Path(config.output_dir)
  steps = steps_of(run_dir)
  if not steps or config.overwrite or config.dry_run:
    return False
  if config.resume_step and set_aside_after(run_dir) != config.resume_step:
    return False  # it goes back
  return steps[-1] >= (config.num_steps or make_batches().num_steps(config.num_epochs))


def way_back(run_dir: Path, damaged: int) -> str:
  """How to go on where the checkpoint of step `damaged` cannot be used."""
  earlier = max((step for step in steps_of(run_dir) if step < damaged), default=0)
  if not earlier:
    return 'There is no earlier one: pass --overwrite to start again.'
  text = f'The checkpoint before it is that of step {earlier}: '
  if set_aside_after(run_dir) == earlier:  # it would not be followed a second time
    text += f'delete {run_dir / "set_aside"} and '
  return f'{text}pass --resume_step={earlier} to go on from there.'
