"""What a training run has before it has weights or data."""

import dataclasses

from jax.sharding import Mesh

from mrjax.checkpoint.adapters import AdapterSource, resolve_adapter
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.lora.adapters import LoraConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import common
from mrjax.runs.training_config import Config
from mrjax.sharding.mesh import batch_shards, make_mesh


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


def start(config: Config, *, num_value_outputs: int = 0) -> Setup:
  """Joins the processes of the run and finds its model; nothing is loaded yet.

  Args:
    config: Of the run.
    num_value_outputs: As for `Decoder`.

  Raises:
    MeshError, ValueError: A mesh that does not fit the devices or the batch.
    FileNotFoundError, CheckpointError, ConfigError: See `resolve_model` and
      `resolve_adapter`.
  """
  common.start_processes()
  mesh = make_mesh(config.mesh)
  _check_rows(config, mesh)
  source = resolve_model(config.model)
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  adapter = resolve_adapter(config.adapter) if config.adapter else None
  lora = config.lora
  if adapter:  # with its own dropout, unless another one is asked for
    dropout = config.lora_dropout or adapter.lora.dropout
    lora = dataclasses.replace(adapter.lora, dropout=dropout)
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


def _check_rows(config: Config, mesh: Mesh) -> None:
  rows, shards = config.batch_size // config.grad_accumulation, batch_shards(mesh)
  if rows % shards:
    raise ValueError(
      f'--batch_size={config.batch_size} over --grad_accumulation='
      f'{config.grad_accumulation} gives {rows} rows a micro-batch, which do not '
      f'divide over data*fsdp = {shards} of --mesh={config.mesh}. Choose a batch '
      f'size that is a multiple of {shards * config.grad_accumulation}.'
    )
