r"""Sampling with a 1M Llama on a CPU: mrjax beside transformers' `generate`.

64 prompts of one sentence (at most 64 tokens), 16 samples each, 128 new tokens each,
temperature 0.8, top-p 0.95, float32, random weights, no early ends. Every contender
has a process of its own, which loads, compiles and warms up once; then they take turns
and each turn is timed until the last token is on the host. The result is the ratio of
the medians.

The other side is transformers as it comes and with its static cache, 16 prompts x 16
samples at a time (the fastest of 4, 8, 16 and 64 prompts where this was tried). It
needs torch, here or in an environment of its own:

  python -m experiments.benchmarks.sampling --peer_python=PATH/TO/ENV/bin/python \
    --data=gsm8k:test --data_root=PATH --output=sampling.jsonl
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.figures import emit, hardware
from mrjax.runs import cli
from mrjax.runs.common import environment

_PEERS = flags.DEFINE_list(
  'peers', ['transformers', 'transformers_static'], 'Contenders beside mrjax.'
)
_PEER_PYTHON = flags.DEFINE_string(
  'peer_python', sys.executable, 'Python with torch and transformers.'
)
_DATA = flags.DEFINE_string('data', 'arithmetic:test?size=500', 'Source of prompts.')
_DATA_ROOT = flags.DEFINE_string('data_root', '', 'Local copies of data sets.')
_NUM_PROMPTS = flags.DEFINE_integer(
  'num_prompts', 64, 'Prompts a turn; fewer for a quick look.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of each contender.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
_CONTENDER = flags.DEFINE_enum('contender', '', ['', 'mrjax'], 'Used by itself.')
_DIRECTORY = flags.DEFINE_string('directory', '', 'Used by itself: model and prompts.')

NUM_SAMPLES, MAX_NEW_TOKENS = 16, 128
_MAX_PROMPT_TOKENS = 64
_MODEL = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 512,
  'hidden_size': 128,
  'intermediate_size': 384,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'head_dim': 32,
  'max_position_embeddings': 512,
  'rms_norm_eps': 1e-5,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
  'tie_word_embeddings': False,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
  'dtype': 'float32',
}


def main(argv: Sequence[str]) -> None:
  del argv
  if _CONTENDER.value == 'mrjax':
    _serve_mrjax(Path(_DIRECTORY.value))
    return
  with tempfile.TemporaryDirectory() as name:
    _prepare(Path(name))
    peer = Path(__file__).with_name('peer_transformers_sampling.py')
    commands = {
      'mrjax': [
        *(sys.executable, '-m', 'experiments.benchmarks.sampling'),
        *('--contender=mrjax', f'--directory={name}'),
      ]
    }
    for contender in _PEERS.value:
      cache = {'transformers': 'dynamic', 'transformers_static': 'static'}
      if contender not in cache:
        raise ValueError(f'--peers: no {contender!r}, want one of {", ".join(cache)}')
      commands[contender] = [_PEER_PYTHON.value, str(peer), name, cache[contender]]
    rates = _take_turns(commands)
  medians = {key: float(np.median(values)) for key, values in rates.items()}
  emit(
    'sampling_1m_float32',
    _OUTPUT.value,
    data=_DATA.value,
    num_prompts=_NUM_PROMPTS.value,
    num_samples=NUM_SAMPLES,
    max_new_tokens=MAX_NEW_TOKENS,
    tokens_per_second=rates,
    medians=medians,
    ratios={key: medians['mrjax'] / value for key, value in medians.items()},
    versions=environment()['versions'],
  )


def _take_turns(commands: dict[str, list[str]]) -> dict[str, list[float]]:
  """Starts all contenders, then asks them one after the other for a timed run."""
  # One CPU device a core for mrjax: rows are independent, and a device alone leaves
  # the other cores idle between its bigger products.
  environ = os.environ | {'JAX_NUM_CPU_DEVICES': str(hardware()['cores'])}
  # Huge pages are what our own programs ask for; peers run as they come.
  environ.pop('GLIBC_TUNABLES', None)
  rates: dict[str, list[float]] = {name: [] for name in commands}
  with contextlib.ExitStack() as stack:
    processes = {}
    for name, command in commands.items():
      processes[name] = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
      )
      stack.callback(processes[name].kill)
      _ask(name, processes[name])  # loads and warms up before the next one starts
    for _ in range(_ROUNDS.value):
      for name, process in processes.items():
        rates[name].append(_ask(name, process))
        print(name, f'{rates[name][-1]:.0f} tokens/s', flush=True)
  return rates


def _ask(name: str, process: subprocess.Popen) -> float:
  assert process.stdin is not None and process.stdout is not None
  process.stdin.write('run\n')
  process.stdin.flush()
  line = process.stdout.readline()
  if not line:
    raise ValueError(f'{name} ended early; its output above says why')
  result: dict[str, Any] = json.loads(line)
  assert result['num_tokens'] == _NUM_PROMPTS.value * NUM_SAMPLES * MAX_NEW_TOKENS
  return result['num_tokens'] / result['seconds']


def _prepare(directory: Path) -> None:
  """Writes the model and the prompts, as token ids, that all contenders read."""
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.hf import save_hf
  from mrjax.data.problems import load_problems
  from mrjax.data.tokenization import load_tokenizer
  from mrjax.data.tokenizer_training import train_bpe_tokenizer
  from mrjax.models.config import DecoderConfig
  from mrjax.models.decoder import Decoder

  problems = load_problems(_DATA.value, data_root=_DATA_ROOT.value or None)
  texts = [re.split(r'(?<=[.?!])\s', problem.question)[0] for problem in problems]
  side = directory / 'side'
  train_bpe_tokenizer(texts, vocab_size=512, output_dir=side)
  tokenizer = load_tokenizer(str(side))
  texts = texts[: _NUM_PROMPTS.value]
  prompts = [tokenizer.encode_prompt(text)[:_MAX_PROMPT_TOKENS] for text in texts]
  (directory / 'prompts.json').write_text(json.dumps(prompts))
  (side / 'config.json').write_text(json.dumps(_MODEL))
  config = DecoderConfig.from_hf(_MODEL)
  init = lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  save_hf(jax.jit(init)()['params'], config, side, directory / 'model')


def _serve_mrjax(directory: Path) -> None:
  import jax.numpy as jnp

  from mrjax.checkpoint.source import resolve_model
  from mrjax.sampling.engine import Engine
  from mrjax.sampling.requests import Request, SamplingParams
  from mrjax.sharding.mesh import make_mesh

  mesh = make_mesh('data:-1')
  source = resolve_model(str(directory / 'model'))
  engine = Engine(source.config, source.load_params(mesh, dtype=jnp.float32), mesh)
  params = SamplingParams(
    temperature=0.8, top_p=0.95, max_new_tokens=MAX_NEW_TOKENS, seed=1
  )
  requests = [
    Request(f'p{i}', tuple(ids), NUM_SAMPLES, params)
    for i, ids in enumerate(json.loads((directory / 'prompts.json').read_text()))
  ]
  for _ in sys.stdin:
    start = time.perf_counter()
    num_tokens = sum(row.num_tokens for row in engine.generate(requests))
    seconds = time.perf_counter() - start
    print(json.dumps({'num_tokens': num_tokens, 'seconds': seconds}), flush=True)


if __name__ == '__main__':
  cli.run(main)
