"""Trains the embedded tiny Llamas from random weights on generated problems."""

import dataclasses
import functools
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mrjax.checkpoint.hf import save_hf
from mrjax.checkpoint.source import resolve_model
from mrjax.data import arithmetic
from mrjax.data.batches import pad_batch
from mrjax.data.prompts import render_completion, render_prompt
from mrjax.data.sft import Example
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.data.tokenizer_training import train_bpe_tokenizer
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.records import Problem
from mrjax.runs import common
from mrjax.runs.sft import make_loss_fn
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import born_sharded
from mrjax.training import loop, optimizer, step

_TOKENIZER_TEXTS = 20_000  # problems the vocabulary is made from
_WINDOW = (
  8  # batches whose texts are sorted by length together, so that little is padded
)
_MAX_LENGTH = 1024  # positions of the models
_BUCKET = 32  # batch lengths are multiples of it: a dozen compilations at most
_FIRST_SEED = 1000  # seeds of problems below it are left to the users
# More short problems than the default mix has: tiny models learn long chains from them.
_STEP_WEIGHTS = {1: 25, 2: 27, 3: 22, 4: 14, 5: 8, 6: 4}
PROMPT_TEMPLATE = 'qa'

# The name says how many weights a model has. All share one tokenizer, so that any of
# them can guide, teach or judge any other.
SIZES: dict[str, dict[str, Any]] = {
  'tiny-0.2m': {
    'hidden_size': 64,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'intermediate_size': 192,
  },
  'tiny-1m': {
    'hidden_size': 128,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'intermediate_size': 384,
  },
  'tiny-3m': {
    'hidden_size': 192,
    'num_hidden_layers': 6,
    'num_attention_heads': 6,
    'intermediate_size': 576,
  },
}


@dataclasses.dataclass(frozen=True)
class Config:
  size: str  # a name in SIZES
  output_dir: str  # gets the Hugging Face directory
  start_from: str = ''  # model of the same size to go on from; empty starts at random
  tokenizer: str = ''  # directory of a tokenizer to reuse; empty trains one
  vocab_size: int = 512
  num_steps: int = 1500
  batch_size: int = 64  # texts a step
  learning_rate: float = 3e-3
  warmup_steps: int = 50
  weight_decay: float = 0.05
  beta2: float = 0.98
  seed: int = 0
  log_every: int = 50
  overwrite: bool = False

  def __post_init__(self):
    if self.size not in SIZES:
      raise ValueError(f'--size={self.size}: want one of {", ".join(SIZES)}.')


def run(config: Config) -> dict[str, Any]:
  """Trains one model and writes it in the Hugging Face format, in bfloat16.

  Returns:
    The last loss and the number of weights, texts and tokens.
  """
  output_dir = Path(config.output_dir)
  if output_dir.exists() and not config.overwrite:
    raise common.OutputError(
      f'{output_dir} exists. Choose another --output_dir, or pass --overwrite.'
    )
  common.make_folder(output_dir.parent, output=output_dir)
  num_texts = config.num_steps * config.batch_size
  problems = _problems(num_texts, config.seed)
  pairs = [
    (render_prompt(PROMPT_TEMPLATE, p).text, render_completion(PROMPT_TEMPLATE, p))
    for p in problems
  ]
  with tempfile.TemporaryDirectory() as scratch:
    side_files = Path(scratch) / 'hf'
    _write_side_files(config, side_files, pairs)
    tokenizer = load_tokenizer(str(side_files))
    hf_config = json.loads((side_files / 'config.json').read_text(encoding='utf-8'))
    decoder_config = DecoderConfig.from_hf(hf_config)
    examples = [
      Example(np.array(ids, np.int32), np.array(mask, bool))
      for ids, mask in (tokenizer.encode_pair(*pair) for pair in pairs)
    ]
    state, last = _train(config, decoder_config, examples)
    save_hf(
      state.params,
      decoder_config,
      side_files,
      output_dir,
      dtype=ml_dtypes.bfloat16,
      overwrite=config.overwrite,
    )
  return {
    'size': config.size,
    'num_params': decoder_config.num_params,
    'num_texts': num_texts,
    'num_tokens': sum(len(example.ids) for example in examples),
    'loss': last['loss'],
  }


def _problems(size: int, seed: int) -> list[Problem]:
  """Training problems; those of the mix that seed 0 gives first are left out."""
  make = functools.partial(
    arithmetic.generate_problems, 'train', step_weights=_STEP_WEIGHTS
  )
  kept_back = {p.question for p in make()}
  problems = make(size=size + len(kept_back), seed=seed + _FIRST_SEED)
  return [p for p in problems if p.question not in kept_back][:size]


def _write_side_files(config: Config, directory: Path, pairs) -> None:
  """Everything of the Hugging Face directory but the weights."""
  if config.tokenizer:
    directory.mkdir()
    for path in sorted(Path(config.tokenizer).glob('*token*.json')):
      shutil.copyfile(path, directory / path.name)
  else:
    texts = (prompt + done for prompt, done in pairs[:_TOKENIZER_TEXTS])
    train_bpe_tokenizer(texts, vocab_size=config.vocab_size, output_dir=directory)
  tokenizer: Tokenizer = load_tokenizer(str(directory))
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id}
  shape = SIZES[config.size]
  hf_config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'num_key_value_heads': shape['num_attention_heads'],
    'hidden_act': 'silu',
    'max_position_embeddings': _MAX_LENGTH,
    'rms_norm_eps': 1e-5,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
    'tie_word_embeddings': False,
    'attention_bias': False,
    'mlp_bias': False,
    'initializer_range': 0.02,
    'pad_token_id': tokenizer.pad_id,
    'dtype': 'bfloat16',
  }
  common.write_json(directory / 'config.json', hf_config | shape | ids)
  common.write_json(directory / 'generation_config.json', ids)


def _train(config: Config, decoder_config: DecoderConfig, examples):
  mesh = make_mesh('data:1', jax.devices()[:1])
  decoder = Decoder(decoder_config)
  if config.start_from:
    params = resolve_model(config.start_from).load_params(mesh, dtype=jnp.float32)
  else:
    init = lambda key: decoder.init(key, jnp.zeros((1, 1), jnp.int32))['params']
    params = born_sharded(init, mesh, jax.random.key(config.seed))
  opt_config = optimizer.OptimizerConfig(
    learning_rate=config.learning_rate,
    warmup_steps=config.warmup_steps,
    beta2=config.beta2,
    weight_decay=config.weight_decay,
  )
  tx = optimizer.make_optimizer(
    opt_config, optimizer.make_schedule(opt_config, config.num_steps)
  )

  last: dict[str, float] = {}

  def on_step(done: int, metrics: dict[str, float]) -> None:
    last.update(metrics)
    if done % config.log_every == 0 or done == config.num_steps:
      logging.info(
        'step %d/%d loss %.4f, %.0f tokens/s',
        done,
        config.num_steps,
        metrics['loss'],
        metrics['tokens'] / metrics['seconds'],
      )

  train_step = jax.jit(
    functools.partial(step.train_step, loss_fn=make_loss_fn(decoder), tx=tx),
    donate_argnums=0,
  )
  _, state = loop.fit(
    step.init_state(params, tx),
    lambda state, batch: train_step(state, {}, batch),
    lambda i: _batch(examples, i, config.batch_size, config.seed),
    mesh=mesh,
    start_step=0,
    num_steps=config.num_steps,
    on_step=on_step,
    save=lambda done, state: None,
  )
  return state, last


def _batch(examples, index: int, batch_size: int, seed: int) -> dict[str, np.ndarray]:
  """Texts of similar length: a window of batches is sorted, cut, and shuffled."""
  window, place = divmod(index, _WINDOW)
  first = window * _WINDOW * batch_size
  chosen = examples[first : first + _WINDOW * batch_size]
  chosen = sorted(chosen, key=lambda example: len(example.ids))
  order = np.random.default_rng((seed, window)).permutation(len(chosen) // batch_size)
  start = int(order[place]) * batch_size
  batch = pad_batch(
    chosen[start : start + batch_size], max_length=_MAX_LENGTH, multiple=_BUCKET
  )
  return {name: x[None] for name, x in batch.items()}
