"""A model of two narrow layers and runs of a few steps, for tests of training."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mrjax import trees
from mrjax.checkpoint import orbax
from mrjax.checkpoint.directories import copy_side_files
from mrjax.checkpoint.hf import save_hf
from mrjax.checkpoint.source import resolve_model
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import sft
from mrjax.sharding.mesh import make_mesh

ASSETS = Path(__file__).parents[1] / 'mrjax' / 'assets'
SHAPE = {
  'hidden_size': 64,  # a block of NF4
  'intermediate_size': 128,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
}


def write_model(directory: Path, *, dtype=ml_dtypes.bfloat16, seed: int = 0) -> str:
  """Writes a random Llama in the Hugging Face format, with a real tokenizer."""
  side = directory.with_name(f'{directory.name}_side')
  side.mkdir(parents=True)
  copy_side_files(ASSETS / 'tiny-0.2m', side)
  hf_config = json.loads((side / 'config.json').read_text()) | SHAPE
  (side / 'config.json').write_text(json.dumps(hf_config))
  config = DecoderConfig.from_hf(hf_config)
  init = lambda: Decoder(config).init(
    jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)
  )
  save_hf(jax.jit(init)()['params'], config, side, directory, dtype=dtype)
  return str(directory)


def make_config(model: str, output_dir: Path, **changes: Any) -> sft.Config:
  """Four steps over 24 short texts, packed into about ten rows."""
  fields: dict[str, Any] = {
    'model': model,
    'data': 'arithmetic:train?size=24&steps=1',
    'prompt_template': 'qa',
    'output_dir': str(output_dir),
    'mesh': 'data:2,fsdp:2,tensor:2',
    'batch_size': 8,
    'num_steps': 4,
    'learning_rate': 1e-3,
    'warmup_steps': 1,
    'max_length': 160,
    'log_every': 1,
    'tensorboard': False,
  }
  return sft.Config(**(fields | changes))


def weights_of(model: str | Path) -> dict[str, np.ndarray]:
  """All weights that `--model` gives, float32 by path."""
  mesh = make_mesh('data:1', jax.devices()[:1])
  params = resolve_model(str(model)).load_params(mesh, jnp.float32)
  return {name: np.asarray(x) for name, x in trees.flatten(params).items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def metrics_of(run_dir: str | Path) -> list[dict[str, Any]]:
  lines = (Path(run_dir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def steps_of(run_dir: str | Path) -> list[int]:
  """Steps with a checkpoint."""
  return sorted(int(p.name) for p in (Path(run_dir) / 'checkpoints').glob('[0-9]*'))


def read_tree(directory: Path) -> dict[str, jax.Array]:
  """The arrays of an Orbax directory by path, on one device."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    for name, x in orbax.tree_shapes(directory).items()
  }
  return trees.flatten(orbax.load_tree(directory, trees.unflatten(like)))
