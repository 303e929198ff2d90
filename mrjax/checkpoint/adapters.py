"""What `--adapter` names: where an adapter is, what it is, what it was trained on.

An adapter checkpoint is a directory of

    mrjax.json   what it is: `format_version`, `kind`, `lora`, `base`, `dtypes`
    hf/          config.json, tokenizer and their kin of its base
    adapter/     its leaves (Orbax)

`lora` has the fields of `LoraConfig`, so that nothing is typed again; `base` has
`model`, the name of the model it goes on, and `fingerprint`, by which that is
recognised (`quantize` says in which form the fingerprint was taken). The checkpoints of
a run that trained an adapter hold the same.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint import orbax, store
from mrjax.checkpoint.directories import (
  CheckpointError,
  copy_side_files,
  new_directory,
  steps_of,
)
from mrjax.checkpoint.fingerprint import fingerprint
from mrjax.checkpoint.peft import PeftAdapter, check_peft, load_peft, read_peft
from mrjax.checkpoint.peft_config import CONFIG
from mrjax.lora.adapters import LoraConfig, adapter_shapes, check_adapter
from mrjax.models.config import DecoderConfig
from mrjax.sharding.rules import param_shardings

PyTree = Any


@dataclasses.dataclass(frozen=True)
class AdapterSource:
  """An adapter that was found and not yet loaded.

  Attributes:
    name: What it was asked for by.
    lora: What it is.
    base: `model`, `fingerprint` and `quantize` of what it goes on, as far as known.
    dtypes: Tensors and dtypes of the PEFT adapter that it is, where that is known.
    hf_dir: Holds config.json and the tokenizer of its base, where they came along.
    leaves_dir: Orbax directory of the leaves; None where `peft` has them.
    peft: A PEFT directory.
  """

  name: str
  lora: LoraConfig
  base: Mapping[str, str]
  dtypes: Mapping[str, str] | None = None
  hf_dir: Path | None = None
  leaves_dir: Path | None = None
  peft: PeftAdapter | None = None

  def load(self, config: DecoderConfig, mesh: Mesh, dtype: Any = jnp.float32) -> PyTree:
    """The adapter's leaves (scanned form), sharded over `mesh`.

    Args:
      config: The decoder that it goes on.
      mesh: Where to.
      dtype: Dtype of the leaves; None keeps what is stored.

    Raises:
      AdapterError: It does not fit `config`.
      CheckpointError: Damaged files.
      MeshError: A dimension that does not divide over the mesh.
    """
    if self.peft is not None:
      return load_peft(self.peft, config, mesh, dtype)
    assert self.leaves_dir is not None
    stored = orbax.tree_shapes(self.leaves_dir)
    check_adapter(config, self.lora, trees.unflatten(stored), where=self.name)
    like = trees.map_named(
      lambda name, sharding: jax.ShapeDtypeStruct(
        stored[name].shape, dtype or stored[name].dtype, sharding=sharding
      ),
      param_shardings(adapter_shapes(config, self.lora), mesh),
    )
    return orbax.load_tree(self.leaves_dir, like)

  def check_fits(self, config: DecoderConfig) -> None:
    """Holds names, ranks and shapes of the leaves against a model; loads none.

    Raises:
      AdapterError: It does not fit `config`.
      CheckpointError: Damaged files.
    """
    if self.peft is not None:
      check_peft(self.peft, config)
      return
    assert self.leaves_dir is not None
    stored = orbax.tree_shapes(self.leaves_dir)
    check_adapter(config, self.lora, trees.unflatten(stored), where=self.name)

  def check_base(self, params: PyTree) -> None:
    """Raises CheckpointError where the adapter is known to go on other weights.

    Args:
      params: Weights of the base, in the dtypes they are stored in, or quantised where
        `base['quantize']` says how.
    """
    wanted = self.base.get('fingerprint')
    if wanted and fingerprint(params) != wanted:
      raise CheckpointError(
        f'{self.name} was trained on {self.base.get("model")!r} with other weights '
        'than these. Give the model that it was trained on.'
      )


def resolve_adapter(name: str) -> AdapterSource:
  """Finds the adapter that `--adapter` names.

  Args:
    name: A PEFT directory, an adapter checkpoint, a run that trained an adapter, or a
      step of one: RUN/checkpoints/STEP.

  Raises:
    FileNotFoundError: No such directory, or one that holds no adapter.
    AdapterError: A PEFT adapter that is not supported.
    CheckpointError: Damaged files, or a model.
  """
  path = Path(name).expanduser().absolute()
  if (path / CONFIG).is_file():
    found = read_peft(path)
    base = {'model': found.base} if found.base else {}
    return AdapterSource(name, found.lora, base, found.dtypes, peft=found)
  if (path / orbax.MARKER).is_file():
    facts = orbax.read_marker(path, kind='adapter')
    return _from_facts(name, facts, path / 'hf', path / store.ADAPTER)
  if (path / 'checkpoints').is_dir():
    steps = steps_of(path)
    if not steps:
      raise CheckpointError(f'{name} is a training run without a finished checkpoint.')
    path = path / 'checkpoints' / str(steps[-1])
  if (path / store.ADAPTER).is_dir():
    facts = store.read_metadata(path)
    return _from_facts(name, facts, path.parents[1] / 'hf', path / store.ADAPTER)
  if (path / store.WHOLE).is_dir() or (path / store.PART).is_dir():
    raise CheckpointError(
      f'{name} holds a model, no adapter: its run trained weights of the model itself. '
      'Commands that want a model take it as --model (orbax_to_hf as --checkpoint).'
    )
  raise FileNotFoundError(
    f'Adapter {name!r}: want a directory with {CONFIG} (PEFT), {orbax.MARKER} (an '
    'mrjax adapter), or hf/ and checkpoints/ (a training run).'
  )


def save_adapter(
  directory: str | Path,
  adapter: PyTree,
  lora: LoraConfig,
  *,
  hf_dir: str | Path,
  base: Mapping[str, str],
  dtypes: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes an adapter checkpoint; nothing is at `directory` before all of it is.

  Args:
    directory: The new checkpoint.
    adapter: Its leaves (scanned form).
    lora: Its configuration.
    hf_dir: Whose config.json, tokenizer and their kin are taken over.
    base: `model` and `fingerprint` of the model it goes on.
    dtypes: Of the PEFT tensors that `adapter` is, unchanged.
    overwrite: Replace an earlier checkpoint.

  Raises:
    FileExistsError: See `new_directory`.
  """
  with new_directory(directory, marker=orbax.MARKER, overwrite=overwrite) as partial:
    if jax.process_index() == 0:
      copy_side_files(hf_dir, partial / 'hf')
      facts = {
        'format_version': orbax.FORMAT_VERSION,
        'kind': 'adapter',
        'lora': dataclasses.asdict(lora),
        'base': dict(base),
        'dtypes': dict(dtypes) if dtypes else None,
      }
      text = json.dumps(facts, indent=2) + '\n'
      (partial / orbax.MARKER).write_text(text, encoding='utf-8')
    orbax.save_tree(partial / store.ADAPTER, adapter)


def _from_facts(
  name: str, facts: Mapping[str, Any], hf_dir: Path, leaves_dir: Path
) -> AdapterSource:
  try:
    fields = dict(facts['lora'])
    lora = LoraConfig(**(fields | {'targets': tuple(fields['targets'])}))
    base = {key: str(value or '') for key, value in facts['base'].items()}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise CheckpointError(
      f'{name} does not say what adapter it is: {error!r}.'
    ) from None
  return AdapterSource(name, lora, base, facts.get('dtypes'), hf_dir, leaves_dir)
