"""What `--model` names: where a model's weights, config and tokenizer are."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax import trees
from mrjax.checkpoint import orbax, weights
from mrjax.checkpoint.directories import CheckpointError, steps_of
from mrjax.checkpoint.fingerprint import fingerprint
from mrjax.checkpoint.hf import load_hf, stored_dtypes
from mrjax.checkpoint.peft_config import CONFIG
from mrjax.checkpoint.safetensors_files import DTYPES
from mrjax.checkpoint.store import ADAPTER, PART, WHOLE, read_metadata
from mrjax.lora import masks
from mrjax.lora.quantization import quantized_shapes
from mrjax.models.config import DecoderConfig, load_hf_config
from mrjax.sharding.rules import param_shardings

PyTree = Any
_ASSETS = Path(__file__).parents[1] / 'assets'
_HUB_ID = re.compile(r'[\w][\w.-]*(/[\w][\w.-]*)?')
# Never code and never pickles.
_HUB_FILES = ['model*.safetensors', '*.json', '*.jinja', '*.model', '*.txt']
_HUB_FILES += ['*.tiktoken', 'LICENSE*', 'NOTICE*']


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model that was found and not yet loaded.

  Attributes:
    name: What it was asked for by.
    hf_dir: Holds config.json and the tokenizer.
    config: The decoder that config.json describes.
    params_dir: Orbax directory of the parameters; None where `hf_dir` has safetensors.
    trained: A step of a run that trained some of the weights of the model `base`.
    base: See `trained`; all else then speaks of what training made of it.
    dtypes: Tensors and dtypes of the Hugging Face model that the weights are, where
      that is known: what `save_hf` needs for an exact export.
  """

  name: str
  hf_dir: Path
  config: DecoderConfig
  params_dir: Path | None = None
  dtypes: Mapping[str, str] | None = None
  trained: Path | None = None
  base: 'ModelSource | None' = None

  def param_shapes(self, dtype: Any = None, *, quantize: str = '') -> PyTree:
    """What `load_params` gives, as `jax.ShapeDtypeStruct` leaves.

    Raises:
      CheckpointError: `quantize`, and no Hugging Face files.
    """
    self._check_quantize(quantize)
    shapes = weights.param_shapes(self.config, dtype or jnp.float32)
    if dtype is None:
      stored = self._stored_dtypes()
      shapes = trees.map_named(
        lambda name, x: jax.ShapeDtypeStruct(x.shape, stored[name]), shapes
      )
    return quantized_shapes(shapes, self.config, quantize) if quantize else shapes

  def load_params(self, mesh: Mesh, dtype: Any = None, *, quantize: str = '') -> PyTree:
    """Parameters in the scanned form, sharded over `mesh`.

    Args:
      mesh: Where to.
      dtype: Dtype of all parameters; None keeps what is stored.
      quantize: See `load_hf`; needs a Hugging Face directory.

    Raises:
      CheckpointError, FileNotFoundError: Files that are missing, damaged, or not those
        of `config`.
      MeshError: A dimension that does not divide over the mesh.
    """
    self._check_quantize(quantize)
    if self.params_dir is None and self.base is None:
      return load_hf(self.hf_dir, self.config, mesh, dtype=dtype, quantize=quantize)
    if self.params_dir is None:
      return self._load_trained(mesh, dtype)
    stored = orbax.tree_shapes(self.params_dir)
    found = {name: leaf.shape for name, leaf in stored.items()}
    weights.check_leaves(self.config, found, where=str(self.params_dir))
    shardings = param_shardings(weights.param_shapes(self.config), mesh)
    like = trees.map_named(
      lambda name, sharding: jax.ShapeDtypeStruct(
        stored[name].shape, dtype or stored[name].dtype, sharding=sharding
      ),
      shardings,
    )
    return orbax.load_tree(self.params_dir, like)

  def _check_quantize(self, quantize: str) -> None:
    if quantize and (self.params_dir is not None or self.base is not None):
      raise CheckpointError(
        f'--quantize={quantize} reads Hugging Face files, and {self.name} has none. '
        'Convert it first with checkpoints_conversion.orbax_to_hf.'
      )

  def _load_trained(self, mesh: Mesh, dtype: Any) -> PyTree:
    """The base with what was trained in its place."""
    assert self.base is not None and self.trained is not None
    base = trees.flatten(self.base.load_params(mesh))
    step = self.trained
    found = orbax.tree_shapes(step / PART)
    shardings = trees.flatten(param_shardings(trees.unflatten(found), mesh))
    like = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
      for name, x in found.items()
    }
    trained = trees.flatten(orbax.load_tree(step / PART, trees.unflatten(like)))
    frozen = {
      name: x[: -len(trained[name])] if name in trained else x
      for name, x in base.items()
      if name not in trained or x.shape != trained[name].shape
    }
    wanted = read_metadata(step)['base']
    if fingerprint(trees.unflatten(frozen)) != wanted['fingerprint']:
      raise CheckpointError(
        f'{step} was trained from {wanted["model"]!r}, which has other weights now. '
        'Put the old ones back.'
      )
    whole = masks.merge(trees.unflatten(trained), trees.unflatten(frozen))
    return jax.tree.map(lambda x: x.astype(dtype or x.dtype), whole)

  def _stored_dtypes(self) -> dict[str, Any]:
    """Dtype of every leaf, as `load_params` keeps it."""
    if self.base is not None and self.trained is not None:
      trained = orbax.tree_shapes(self.trained / PART)
      return {
        name: jnp.promote_types(dtype, trained[name].dtype)
        if name in trained
        else dtype
        for name, dtype in self.base._stored_dtypes().items()
      }
    if self.params_dir is not None:
      return {n: leaf.dtype for n, leaf in orbax.tree_shapes(self.params_dir).items()}
    found = self.dtypes or stored_dtypes(self.hf_dir, self.config)
    by_leaf: dict[str, set] = {}
    for name, tensor in weights.hf_tensors(self.config).items():
      for rule in tensor.rules:
        by_leaf.setdefault(rule.ours, set()).add(DTYPES[found[name]])
    promote = functools.partial(functools.reduce, jnp.promote_types)
    return {name: promote(dtypes) for name, dtypes in by_leaf.items()}


def resolve_model(name: str) -> ModelSource:
  """Finds the model that `--model` names.

  Args:
    name: A directory (Hugging Face model, mrjax model checkpoint, training run, or one
      step of a run: RUN/checkpoints/STEP), the name of an embedded model, or a
      Hugging Face hub id, tried in this order.

  Raises:
    FileNotFoundError: Nothing of that name, or a hub that cannot be reached.
    CheckpointError, ConfigError: A directory that holds no whole, supported model.
  """
  path = Path(name).expanduser()
  if name and path.is_dir():
    return _from_directory(name, path)
  if name and (_ASSETS / name / 'config.json').is_file():
    return _from_hf(name, _ASSETS / name)
  if not _HUB_ID.fullmatch(name):
    raise FileNotFoundError(
      f'Model {name!r}: no such directory. Want a Hugging Face model directory, an '
      'mrjax checkpoint or run, an embedded model '
      f'({", ".join(embedded_models())}), or a hub id such as org/name.'
    )
  return _from_hf(name, _download(name))


def embedded_models() -> list[str]:
  """Names of the models that come with the package, smallest first."""
  directories = {path.parent for path in _ASSETS.glob('*/config.json')}
  size = lambda d: sum(path.stat().st_size for path in d.glob('*.safetensors'))
  return [directory.name for directory in sorted(directories, key=size)]


def _from_directory(name: str, path: Path) -> ModelSource:
  if (path / orbax.MARKER).is_file():
    facts = orbax.read_marker(path)
    return ModelSource(
      name, path / 'hf', _config(path / 'hf'), path / 'params', facts.get('dtypes')
    )
  if (path / 'hf').is_dir() and (path / 'checkpoints').is_dir():
    steps = steps_of(path)
    if not steps:
      raise CheckpointError(f'{path} is a training run without a finished checkpoint.')
    path = path / 'checkpoints' / str(steps[-1])
  run = path.absolute().parent.parent
  if path.absolute().parent.name == 'checkpoints' and (run / 'hf').is_dir():
    return _from_step(name, path, run / 'hf')
  if (path / CONFIG).is_file() and not any(path.glob('model*.safetensors')):
    raise CheckpointError(
      f'{name} holds no model but a PEFT adapter. Pass it as --adapter, and as --model '
      'what it was trained on.'
    )
  if not (path / 'config.json').is_file():
    raise FileNotFoundError(
      f'Model {name!r} holds neither config.json (a Hugging Face model), '
      f'{orbax.MARKER} (an mrjax checkpoint), nor hf/ and checkpoints/ (a training '
      'run).'
    )
  return _from_hf(name, path)


def _from_step(name: str, step: Path, hf_dir: Path) -> ModelSource:
  if (step / ADAPTER).is_dir():
    base = read_metadata(step)['base']['model']
    raise CheckpointError(
      f'{name} holds an adapter, no model. Pass --model={base} --adapter={name}.'
    )
  if (step / PART).is_dir():
    base = resolve_model(read_metadata(step)['base']['model'])
    return ModelSource(name, hf_dir, _config(hf_dir), trained=step, base=base)
  return ModelSource(name, hf_dir, _config(hf_dir), step / WHOLE)


def _from_hf(name: str, directory: Path) -> ModelSource:
  config = _config(directory)
  return ModelSource(name, directory, config, dtypes=stored_dtypes(directory, config))


def _config(hf_dir: Path) -> DecoderConfig:
  return DecoderConfig.from_hf(load_hf_config(hf_dir))


def _download(repo_id: str) -> Path:
  import huggingface_hub

  try:
    return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_HUB_FILES))
  except Exception as error:  # many kinds: offline, gated, unknown, disk full
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise FileNotFoundError(
      f'Model {repo_id!r}: no such directory and no embedded model '
      f'({", ".join(embedded_models())}), and the Hugging Face hub did not give it: '
      f'{type(error).__name__}: {reason} Fetch it where there is a network '
      f'(hf download {repo_id} --local-dir DIR) and pass the directory.'
    ) from error
