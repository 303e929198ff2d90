r"""Full fine-tuning of a 30M Llama on a CPU: mrjax beside TRL's SFTTrainer.

Both train on the same texts in the same batches of 8, float32, padded to the longest
text of the batch (in buckets of 64 for mrjax), completion-only loss; useful tokens
(padding not counted) a second, compilation and the first steps left out. The two take
turns, each round in a fresh process; the ratio of the medians is the result.

TRL needs torch and clashes with nothing here, but lives in an environment of its own:

  python -m experiments.benchmarks.sft --peer_python=PATH/TO/ENV/bin/python \
    --data=gsm8k:train --data_root=PATH --output=sft.jsonl
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.figures import emit
from mrjax.runs import cli
from mrjax.runs.common import environment

_PEER_PYTHON = flags.DEFINE_string(
  'peer_python', '', 'Python with torch and trl; empty measures mrjax alone.'
)
_DATA = flags.DEFINE_string(
  'data', 'arithmetic:train?size=400', 'Problems to train on.'
)
_DATA_ROOT = flags.DEFINE_string('data_root', '', 'Local copies of data sets.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of each contender.')
_STEPS = flags.DEFINE_integer('steps', 10, 'Timed steps a round.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
_CONTENDER = flags.DEFINE_enum('contender', '', ['', 'mrjax'], 'Used by itself.')
_DIRECTORY = flags.DEFINE_string('directory', '', 'Used by itself: model and data.')

BATCH_SIZE = 8
_WARMUP_STEPS = 2
_MODEL: dict[str, Any] = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 8192,
  'hidden_size': 512,
  'intermediate_size': 1408,
  'num_hidden_layers': 8,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 64,
  'max_position_embeddings': 1024,
  'rms_norm_eps': 1e-5,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
  'tie_word_embeddings': False,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
  'dtype': 'float32',
}


def main(argv: Sequence[str]) -> None:
  del argv
  if _CONTENDER.value == 'mrjax':
    print(json.dumps(_time_mrjax(Path(_DIRECTORY.value), _STEPS.value)))
    return
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    _prepare(directory)
    contenders = {
      'mrjax': [
        *(sys.executable, '-m', 'experiments.benchmarks.sft', '--contender=mrjax'),
        *(f'--directory={directory}', f'--steps={_STEPS.value}'),
      ]
    }
    if _PEER_PYTHON.value:
      peer = Path(__file__).with_name('peer_trl_sft.py')
      contenders['trl'] = [_PEER_PYTHON.value, str(peer), str(directory)]
      contenders['trl'] += [str(_STEPS.value + _WARMUP_STEPS), str(_WARMUP_STEPS)]
    rates: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(_ROUNDS.value):
      for key, command in contenders.items():
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
          raise ValueError(f'{key} failed: {result.stderr[-2000:]}')
        rates[key].append(
          json.loads(result.stdout.splitlines()[-1])['tokens_per_second']
        )
        print(key, f'{rates[key][-1]:.0f} useful tokens/s', flush=True)
  _report(rates)


def _prepare(directory: Path) -> None:
  """Writes the model, its tokenizer and the texts that both contenders read."""
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.hf import save_hf
  from mrjax.data.problems import load_problems
  from mrjax.data.prompts import render_completion, render_prompt
  from mrjax.data.tokenizer_training import train_bpe_tokenizer
  from mrjax.models.config import DecoderConfig
  from mrjax.models.decoder import Decoder
  from mrjax.records import write_jsonl

  problems = load_problems(_DATA.value, data_root=_DATA_ROOT.value or None)
  pairs = [
    {
      'prompt': render_prompt('qa', p).text,
      'completion': render_completion('qa', p),
    }
    for p in problems
  ]
  rng = np.random.default_rng(0)
  num_texts = BATCH_SIZE * (_STEPS.value + _WARMUP_STEPS)
  chosen = [pairs[i] for i in rng.integers(len(pairs), size=num_texts)]
  write_jsonl(directory / 'texts.jsonl', chosen)
  side = directory / 'side'
  train_bpe_tokenizer(
    (pair['prompt'] + pair['completion'] for pair in pairs),
    vocab_size=_MODEL['vocab_size'],
    output_dir=side,
  )
  (side / 'config.json').write_text(json.dumps(_MODEL))
  config = DecoderConfig.from_hf(_MODEL)
  init = lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  save_hf(jax.jit(init)()['params'], config, side, directory / 'model')


def _time_mrjax(directory: Path, steps: int) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.source import resolve_model
  from mrjax.data.batches import pad_batch
  from mrjax.data.sft import encode_sft, read_sft
  from mrjax.data.tokenization import load_tokenizer
  from mrjax.models.decoder import Decoder
  from mrjax.runs.sft import make_loss_fn
  from mrjax.sharding.mesh import make_mesh
  from mrjax.training import loop, optimizer, step

  mesh = make_mesh('data:1', jax.devices()[:1])
  source = resolve_model(str(directory / 'model'))
  examples = encode_sft(
    read_sft(directory / 'texts.jsonl'),
    load_tokenizer(str(source.hf_dir)),
    max_length=1024,
  )
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 2e-5)
  state = step.init_state(source.load_params(mesh, jnp.float32), tx)
  loss_fn = make_loss_fn(Decoder(source.config))
  train_step = jax.jit(
    functools.partial(step.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0
  )
  batches = [
    {k: v[None] for k, v in pad_batch(examples[i : i + 8], max_length=1024).items()}
    for i in range(0, len(examples), BATCH_SIZE)
  ]
  by_shape = {batch['tokens'].shape: batch for batch in batches}
  with jax.set_mesh(mesh):
    for batch in by_shape.values():  # compiles, and warms up
      state, metrics = train_step(state, {}, loop.shard_batch(batch, mesh))
    float(metrics['loss'])
    start = time.perf_counter()
    for batch in batches[-steps:]:
      state, metrics = train_step(state, {}, loop.shard_batch(batch, mesh))
    loss = float(metrics['loss'])
    seconds = time.perf_counter() - start
  useful = sum(int((batch['segments'] != 0).sum()) for batch in batches[-steps:])
  return {'tokens_per_second': useful / seconds, 'loss': loss}


def _report(rates: dict[str, list[float]]) -> None:
  medians = {key: float(np.median(values)) for key, values in rates.items()}
  ratio = {'ratio': medians['mrjax'] / medians['trl']} if 'trl' in medians else {}
  emit(
    'sft_30m_float32',
    _OUTPUT.value,
    data=_DATA.value,
    batch_size=BATCH_SIZE,
    steps=_STEPS.value,
    useful_tokens_per_second=rates,
    medians=medians,
    **ratio,
    versions=environment()['versions'],
  )


if __name__ == '__main__':
  cli.run(main)
