"""The model that `--model` and `--adapter` name together."""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint.adapters import AdapterSource, resolve_adapter
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint, not_finite
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.lora import masks
from mrjax.lora.adapters import fold
from mrjax.sharding.mesh import MeshError, make_mesh

PyTree = Any


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
  """A model that was found and not yet loaded, and the adapter that goes on it.

  Attributes:
    source: The model; config and tokenizer are its own.
    adapter: None for the model as it is.
  """

  source: ModelSource
  adapter: AdapterSource | None = None

  def adapter_facts(self, mesh: Mesh) -> dict[str, Any]:
    """What tells the adapter from all others; `{}` where there is none.

    Args:
      mesh: Where its leaves are loaded to; the facts do not depend on it.

    Returns:
      `adapter_lora`, the fields of its `LoraConfig`, and `adapter_sha256`, the
      fingerprint of its leaves.

    Raises:
      AdapterError, CheckpointError, MeshError: As for `load_params`.
    """
    if self.adapter is None:
      return {}
    return {
      'adapter_lora': dataclasses.asdict(self.adapter.lora),
      'adapter_sha256': fingerprint(self._load_adapter(self.adapter, mesh)),
    }

  def load_params(self, mesh: Mesh, dtype: Any = None) -> PyTree:
    """Full-precision parameters with the adapter folded in, sharded over `mesh`.

    Sums are float32 and rounded to the dtypes that the weights are stored in, and only
    then to `dtype`: the numbers are those of the model that `fold_adapter` writes. So
    the stored dtypes, not `dtype`, decide how much memory loading takes.

    Args:
      mesh: Where to.
      dtype: Dtype of all parameters; None keeps what is stored.

    Raises:
      AdapterError: The adapter does not fit the model.
      CheckpointError, FileNotFoundError: Files that are missing or damaged, an adapter
        that is not finite or that was trained on other weights.
      MeshError: A dimension that does not divide over the mesh.
    """
    if self.adapter is None:
      return self.source.load_params(mesh, dtype)
    leaves = trees.flatten(self._fold(self.adapter, mesh))
    for name in leaves:  # one by one: each old leaf goes as its new one comes
      leaves[name] = leaves[name].astype(dtype or leaves[name].dtype)
    return trees.unflatten(leaves)

  def _fold(self, found: AdapterSource, mesh: Mesh) -> PyTree:
    adapter = self._load_adapter(found, mesh)
    quantize = found.base.get('quantize', '')
    if quantize:  # the fingerprint is that of the quantised weights
      found.check_base(self._load_quantized(mesh, quantize))
    params = self.source.load_params(mesh)
    if not quantize:
      found.check_base(params)
    lora = found.lora
    logging.info(
      'The adapter %s (rank %d, alpha %g, on %s) is folded into %s.',
      *(found.name, lora.rank, lora.alpha, ', '.join(lora.targets), self.source.name),
    )
    return fold(masks.merge(adapter, params), lora, donate=True)

  def _load_quantized(self, mesh: Mesh, quantize: str) -> PyTree:
    try:
      return self.source.load_params(mesh, quantize=quantize)
    except MeshError:  # it would cut blocks, which full-precision weights have not
      whole = make_mesh('data:-1', list(mesh.devices.flat))
      return self.source.load_params(whole, quantize=quantize)
    except CheckpointError as error:
      error.add_note(f'The adapter was trained on {quantize} weights of its base.')
      raise

  def _load_adapter(self, found: AdapterSource, mesh: Mesh) -> PyTree:
    adapter = found.load(self.source.config, mesh, jnp.float32)
    if bad := not_finite(adapter):
      raise CheckpointError(f'{found.name}: {bad[0]} holds NaN or infinite numbers.')
    return adapter


def resolve_adapted(model: str, adapter: str = '') -> AdaptedModel:
  """Finds what `--model` and `--adapter` name; an empty `adapter` is none.

  Raises:
    FileNotFoundError, AdapterError, CheckpointError, ConfigError: See `resolve_model`
      and `resolve_adapter`.
  """
  return AdaptedModel(
    resolve_model(model), resolve_adapter(adapter) if adapter else None
  )
