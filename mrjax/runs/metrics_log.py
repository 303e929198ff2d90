"""The numbers of a run, a line for each step that is logged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrjax import records


class MetricsLog:
  """`metrics.jsonl` (always), TensorBoard and, where asked, Weights & Biases.

  Lines of steps after `start_step`, which a run that was killed has written and now
  does again, are dropped: every step stands in the file once.
  """

  def __init__(
    self,
    directory: Path,
    *,
    start_step: int = 0,
    tensorboard: bool = False,
    wandb: str = '',
  ):
    from tensorboardX import SummaryWriter

    path = directory / 'metrics.jsonl'
    with records.JsonlAppender(path):  # drops half a line
      pass
    if path.stat().st_size:
      kept = [r for r in records.read_jsonl(path) if r['step'] <= start_step]
      records.write_jsonl(path, kept)
    self._file = records.JsonlAppender(path)
    self._board = SummaryWriter(str(directory / 'tensorboard')) if tensorboard else None
    self._wandb: Any = None
    if wandb:
      try:
        import wandb as wandb_module
      except ImportError:
        raise ImportError(
          'wandb is not installed: pip install "mrjax[wandb]", or drop --wandb_project.'
        ) from None
      self._wandb = wandb_module.init(project=wandb, dir=str(directory))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._file.append([{'step': step} | dict(metrics)])
    if self._board:
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(dict(metrics), step=step)

  def close(self) -> None:
    self._file.close()
    if self._board:
      self._board.close()
    if self._wandb:
      self._wandb.finish()
