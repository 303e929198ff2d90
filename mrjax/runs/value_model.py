"""Value models on disk: a training run, and `value_head.json` that says what its head
means. The file lies beside `hf/`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint import orbax
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.checkpoint.weights import param_shapes
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.runs import common
from mrjax.sharding.rules import param_shardings

PyTree = Any
HEAD_FILE = 'value_head.json'


@dataclasses.dataclass(frozen=True)
class ValueSource(ModelSource):
  """A value model that was found and not yet loaded; `head` says what it predicts."""

  head: ValueHead = dataclasses.field(default_factory=ValueHead)

  def param_shapes(self, dtype: Any = None, *, quantize: str = '') -> PyTree:
    """As `ModelSource.param_shapes`; value models are not quantised."""
    _refuse(quantize)
    return value_shapes(self.config, self.head, dtype or jnp.float32)

  def load_params(self, mesh: Mesh, dtype: Any = None, *, quantize: str = '') -> PyTree:
    """As `ModelSource.load_params`, with a `value_head` in place of `lm_head`."""
    _refuse(quantize)
    assert self.params_dir is not None
    shapes = self.param_shapes(dtype)
    like = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      param_shardings(shapes, mesh),
    )
    return orbax.load_tree(self.params_dir, like)


def resolve_value_model(name: str) -> ValueSource:
  """Finds a value model: a run of `train_value`, or one step of it.

  Raises:
    CheckpointError: It is a language model, or its head is not described rightly.
    FileNotFoundError: As `resolve_model`.
  """
  source = as_value_source(resolve_model(name))
  if source is None:
    raise CheckpointError(
      f'{name!r} is no value model: there is no {HEAD_FILE} beside its hf/. Give the '
      'output directory of train_value.'
    )
  return source


def as_value_source(source: ModelSource) -> ValueSource | None:
  """The source with its value head, where it has one.

  Raises:
    CheckpointError: `value_head.json` is damaged.
  """
  path = source.hf_dir.parent / HEAD_FILE
  if source.params_dir is None or not path.is_file():
    return None
  try:
    head = ValueHead(**json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged: {error}.') from None
  fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(ModelSource)}
  return ValueSource(**fields, head=head)


def write_value_head(run_dir: str | Path, head: ValueHead) -> None:
  """Says in a run directory what the heads of its checkpoints mean."""
  common.write_json(Path(run_dir) / HEAD_FILE, dataclasses.asdict(head))


def value_shapes(config: DecoderConfig, head: ValueHead, dtype: Any) -> PyTree:
  """The parameter tree of a value model as `jax.ShapeDtypeStruct` leaves."""
  leaves = trees.flatten(param_shapes(config, dtype))
  leaves.pop('lm_head/kernel', None)
  outputs = head.num_outputs(config.vocab_size)
  for name, shape in (
    ('kernel', (config.hidden_size, outputs)),
    ('bias', (outputs,)),
  ):
    leaves[f'value_head/{name}'] = jax.ShapeDtypeStruct(shape, dtype)
  return trees.unflatten(leaves)


def _refuse(quantize: str) -> None:
  if quantize:
    raise ValueError(f'--quantize={quantize}: value models are not quantised.')
