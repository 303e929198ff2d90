"""Log-probabilities of a reference policy, computed once and kept with the run."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.checkpoint.adapters import AdapterSource
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint, not_finite
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example
from mrjax.lora import masks
from mrjax.lora.adapters import adapter_shapes
from mrjax.models.decoder import Decoder
from mrjax.runs import common, training
from mrjax.runs.preference_losses import completion_logps
from mrjax.runs.progress import Progress
from mrjax.sharding.rules import param_shardings
from mrjax.training import loop

PyTree = Any
Units = Sequence[Sequence[Example]]


class ReferencePolicy(NamedTuple):
  """A frozen policy that was found and not yet loaded.

  Attributes:
    source: Its model.
    adapter: Its adapter, where it has one.
    quantize: As for `ModelSource.load_params`.
    decoder: What its weights go through.
  """

  source: ModelSource
  adapter: AdapterSource | None
  quantize: str
  decoder: Decoder

  def load(self, mesh: Mesh) -> PyTree:
    """Its weights as they are stored, with those of the adapter.

    Raises:
      CheckpointError: Damaged files, or weights that are not finite.
    """
    params = self.source.load_params(mesh, quantize=self.quantize)
    if self.adapter is not None:
      params = masks.merge(self.adapter.load(self.source.config, mesh), params)
    if bad := not_finite(params):
      names = [self.source.name, *([self.adapter.name] if self.adapter else [])]
      raise CheckpointError(
        f'The reference {" with ".join(names)}: {", ".join(bad[:4])} hold NaN or '
        'infinite numbers. The files are damaged, or the training that made them '
        'diverged.'
      )
    return params

  def shapes(self, mesh: Mesh) -> PyTree:
    """What `load` gives, as `jax.ShapeDtypeStruct` leaves with shardings."""
    shapes = self.source.param_shapes(None, quantize=self.quantize)
    if self.adapter is not None:
      own = adapter_shapes(self.source.config, self.adapter.lora)
      shapes = masks.merge(own, shapes)
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      param_shardings(shapes, mesh),
    )


def find_reference(
  config: training.Config, setup: training.Setup, name: str
) -> ReferencePolicy:
  """The model `name`; where that is empty, what trains as it is beforehand.

  Raises:
    ValueError: It cannot read the token ids of the run.
  """
  decoder = setup.decoder.clone(remat='none', lora_dropout=0.0)
  if not name:
    return ReferencePolicy(setup.source, setup.adapter, config.quantize, decoder)
  source = resolve_model(name)
  try:
    setup.tokenizer.check_fits(source.config.vocab_size)
  except ValueError as error:
    raise ValueError(
      f'--reference_model={name}: {error}; it must share the tokenizer of --model'
    ) from None
  decoder = decoder.clone(config=source.config, lora_scale=None)
  return ReferencePolicy(source, None, '', decoder)


def precompute(
  config: training.Config,
  setup: training.Setup,
  policy: ReferencePolicy,
  data: Mapping[str, Units],
  *,
  row_length: int,
) -> dict[str, np.ndarray]:
  """Log-probabilities of all completions under a policy, float32 [units, texts a unit].

  They are kept in OUTPUT_DIR/reference, with the fingerprints of weights and texts, and
  read from there where both are the same.

  Args:
    config: Of the run; its output directory is there.
    setup: Of the run.
    policy: The reference.
    data: Units of text by name.
    row_length: Tokens of a row.

  Raises:
    ValueError: A log-probability that is not finite; names the record.
  """
  params = policy.load(setup.mesh)
  facts = {
    'model': policy.source.name,
    'adapter': policy.adapter.name if policy.adapter else None,
    'weights': fingerprint(params),
    'dtype': np.dtype(policy.decoder.dtype).name,
  }
  found = {}
  for name, units in data.items():
    # Numbers tell where in the rows a text went; 0 is no text.
    numbers = 1 + np.arange(len(units) * len(units[0]), dtype=np.int32)
    batches = TextBatches(
      units,
      row_length=row_length,
      batch_size=config.batch_size,
      grad_accumulation=config.grad_accumulation,
      packing=config.packing,
      labels={'number': numbers.reshape(len(units), -1)},
    )
    path = Path(config.output_dir) / 'reference' / f'{name}.npy'
    key = facts | {'texts': batches.fingerprint()}
    logps = _read(path, key, shape=(len(units), len(units[0])))
    if logps is None:
      logps = _compute(
        setup, policy.decoder, params, batches, units, config.loss_chunk or None
      )
      _write(path, key, logps)
    else:
      logging.info('Reference log-probabilities are read from %s.', path)
    found[name] = logps
  return found


def _compute(
  setup: training.Setup,
  decoder: Decoder,
  params: PyTree,
  batches: TextBatches,
  units: Units,
  chunk_size: int | None,
) -> np.ndarray:
  def forward(params, batch):
    one = lambda micro: completion_logps(
      decoder, params, micro, batches.max_texts, chunk_size=chunk_size
    )[0]
    return jax.lax.map(one, batch)

  everywhere = NamedSharding(setup.mesh, PartitionSpec())
  forward = jax.jit(forward, out_shardings=everywhere)
  logps = np.zeros(len(units) * len(units[0]), np.float32)
  shown = jax.process_index() == 0
  with (
    jax.set_mesh(setup.mesh),
    Progress('reference', total=len(units), shown=shown) as progress,
  ):
    for batch in batches.one_epoch():
      numbers_ABS = batch.pop('number')
      there_ABS = numbers_ABS > 0
      values_ABS = np.asarray(forward(params, loop.shard_batch(batch, setup.mesh)))
      logps[numbers_ABS[there_ABS] - 1] = values_ABS[there_ABS]
      progress.add(
        rows=int(there_ABS.sum()) // len(units[0]),
        tokens=int((batch['segments'] > 0).sum()),
      )
  table = logps.reshape(len(units), -1)
  if bad := np.argwhere(~np.isfinite(table)).tolist():
    unit, text = bad[0]
    raise ValueError(
      f'{units[unit][text].where}: its log-probability under the reference is '
      f'{table[unit, text]}; look at the record and at the reference model'
    )
  return table


def _read(path: Path, key: Mapping[str, Any], *, shape) -> np.ndarray | None:
  """What process 0 finds on its disk, for all processes; None where it is another's."""
  logps = None
  if jax.process_index() == 0 and _key_of(path) == dict(key):
    logps = np.load(path, allow_pickle=False)
  if jax.process_count() == 1:
    return logps
  there = multihost_utils.broadcast_one_to_all(np.array(logps is not None))
  if not there:
    return None
  empty = np.zeros(shape, np.float32)
  return np.asarray(
    multihost_utils.broadcast_one_to_all(empty if logps is None else logps)
  )


def _key_of(path: Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None


def _write(path: Path, key: Mapping[str, Any], logps: np.ndarray) -> None:
  """The key is written last and deleted first: with it, the numbers are whole."""
  if jax.process_index() != 0:
    return
  path.parent.mkdir(exist_ok=True)
  path.with_suffix('.json').unlink(missing_ok=True)
  scratch = path.with_name(f'.{path.name}')
  with open(scratch, 'wb') as file:
    np.save(file, logps, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)
  common.write_json(path.with_suffix('.json'), dict(key))
