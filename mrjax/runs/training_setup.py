"""What a training run has before it has weights or data."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mrjax.checkpoint.adapters import AdapterSource, resolve_adapter
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.lora.adapters import LoraConfig
from mrjax.models.attention import choose_backend
from mrjax.models.decoder import Decoder
from mrjax.runs import common, weight_plan
from mrjax.runs.training_config import Config
from mrjax.runs.training_output import check_output
from mrjax.sharding.mesh import batch_shards, make_mesh
from mrjax.sharding.rules import param_shardings

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Setup:
  """The mesh, and the model that is found and not loaded.

  `lora` is what the adapter is, and `adapter` where it is, where one trains on.
  """

  mesh: Mesh
  source: ModelSource
  tokenizer: Tokenizer
  decoder: Decoder
  lora: LoraConfig | None = None
  adapter: AdapterSource | None = None


def start(
  config: Config,
  *,
  num_value_outputs: int = 0,
  devices: Sequence[jax.Device] | None = None,
) -> Setup:
  """Joins the processes of the run and finds its model; nothing is loaded or written.

  Args:
    config: Of the run.
    num_value_outputs: As for `Decoder`.
    devices: Of the mesh; by default all.

  Raises:
    MeshError, ValueError: A mesh that does not fit the devices or the batch.
    FileNotFoundError, CheckpointError, ConfigError: See `resolve_model` and
      `resolve_adapter`.
    AdapterError: An adapter that does not fit the model.
    OutputError: See `check_output`.
  """
  common.start_processes()
  check_output(config)
  mesh = make_mesh(config.mesh, devices)
  _check_rows(config, mesh)
  source = resolve_model(config.model)
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  adapter = resolve_adapter(config.adapter) if config.adapter else None
  lora = config.lora
  if adapter:  # with its own dropout, unless another one is asked for
    adapter.check_fits(source.config)
    lora = adapter.lora
    if config.lora_dropout is not None:
      lora = dataclasses.replace(lora, dropout=config.lora_dropout)
  decoder = Decoder(
    source.config,
    dtype=common.resolve_dtype(config.dtype),
    remat=config.remat,
    num_value_outputs=num_value_outputs,
    lora_scale=lora.scale if lora else None,
    lora_dropout=lora.dropout if lora else 0.0,
    attention_backend=config.attention_backend,
  )
  return Setup(mesh, source, tokenizer, decoder, lora, adapter)


def make_plan(
  config: Config,
  setup: Setup,
  *,
  row_length: int = 0,
  prepare: Callable[[PyTree], PyTree] | None = None,
  head_outputs: int = 0,
) -> weight_plan.WeightPlan:
  """What trains and how the rest is stored; nothing is loaded or written yet.

  Args:
    config: Of the run.
    setup: What `start` gave.
    row_length: Tokens of a row; 0 is `max_length`.
    prepare: Changes the loaded weights before anything trains, such as by adding a
      value head: a pure function of the parameter tree, used on shapes too.
    head_outputs: Outputs of a value head that are computed for a token; 0: all.

  Raises:
    ValueError: See `weight_plan.plan_weights`; an attention backend that cannot
      compute what is asked for.
    MeshError: A dimension that does not divide over the mesh.
  """
  found = weight_plan.plan_weights(
    setup.source,
    rules=config.rules,
    lora=setup.lora,
    adapter=setup.adapter,
    quantize=config.quantize,
    prepare=prepare,
    head_outputs=head_outputs,
  )
  for weights in (found.trainable, found.frozen):
    param_shardings(weights, setup.mesh)  # raises where they cannot be split
  row_length = row_length or config.max_length
  decoder = setup.decoder
  backend = choose_backend(
    decoder.attention_backend,
    platform=setup.mesh.devices.flat[0].platform,
    dtype=decoder.dtype,
    length=row_length,
    head_dim=decoder.config.head_dim,
    softcap=decoder.config.attention_softcap,
  )
  logging.info('Attention over rows of %d tokens: %s.', row_length, backend)
  return found


def _check_rows(config: Config, mesh: Mesh) -> None:
  rows, shards = config.batch_size // config.grad_accumulation, batch_shards(mesh)
  if rows % shards:
    raise ValueError(
      f'--batch_size={config.batch_size} over --grad_accumulation='
      f'{config.grad_accumulation} gives {rows} rows a micro-batch, which do not '
      f'divide over data*fsdp = {shards} of --mesh={config.mesh}. Choose a batch '
      f'size that is a multiple of {shards * config.grad_accumulation}.'
    )
