"""The value model that `--guide` names, and how it guides."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.models.config import DecoderConfig
from mrjax.runs.value_model import ValueSource, resolve_value_model
from mrjax.sampling.engine import check_guide
from mrjax.sampling.guidance import MODES, GuidanceConfig
from mrjax.sampling.guide import Guide


@dataclasses.dataclass(frozen=True)
class GuideSource:
  """A guide that was found and not yet loaded."""

  source: ValueSource
  guidance: GuidanceConfig

  def without_weights(self) -> Guide:
    return Guide(self.source.config, None, self.source.head, self.guidance)

  def load(self, mesh: Mesh, dtype: Any) -> Guide:
    """With its weights on the mesh; see `ValueSource.load_params` for errors."""
    params = self.source.load_params(mesh, dtype)
    return dataclasses.replace(self.without_weights(), params=params)


def resolve_guide(
  name: str,
  *,
  guided: DecoderConfig,
  tokenizer: Tokenizer,
  mode: str = '',
  top_k: int = 20,
  cd_baseline: bool = False,
) -> GuideSource:
  """Finds a guide and checks that it can guide a model.

  Args:
    name: A run of train_value, or one step of it.
    guided: Config of the model that it shall guide.
    tokenizer: Of that model.
    mode: See `GuidanceConfig`; empty takes the first that the head was trained for.
    top_k: Number of candidates.
    cd_baseline: See `GuidanceConfig`.

  Raises:
    CheckpointError, FileNotFoundError: As `resolve_value_model`.
    ValueError: Another tokenizer, or a mode that the head was not trained for.
  """
  source = resolve_value_model(name)
  tokenizer.check_same(load_tokenizer(source.hf_dir), f'--guide={name}')
  fitting = [mode for mode, losses in MODES.items() if source.head.loss_type in losses]
  guidance = GuidanceConfig(mode or fitting[0], cd_baseline, top_k)
  check_guide(source.config, source.head, guidance, guided)
  return GuideSource(source, guidance)
