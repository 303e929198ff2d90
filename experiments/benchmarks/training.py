r"""Fine-tuning a 30M Llama on a CPU: mrjax beside TRL (with PEFT) and Tunix.

All train on the same texts with completion-only loss, float32, AdamW. What counts are
useful tokens (padding left out) a second, without compilation and the first steps.

  mrjax          rows of 512 packed by best fit, 3 a step: about 9 texts
  trl            SFTTrainer as it comes: 8 texts a step, padded to the longest
  trl_packed     SFTTrainer with packing: 3 rows of 512
  tunix          PeftTrainer: 8 texts a step, all padded to the longest of the data

each in full and with LoRA of rank 16 on all linear layers. Contenders take turns, each
turn in a fresh process; results are ratios of the medians, and peak memory. TRL and
Tunix live in environments of their own, for their pins clash with ours:

  python -m experiments.benchmarks.training --peers=trl,tunix \
    --trl_python=ENV/bin/python --tunix_python=ENV2/bin/python \
    --data=gsm8k:train --data_root=PATH --output=training.jsonl
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks.figures import emit, peak_memory_mb
from experiments.benchmarks.llama_30m import LORA_ALPHA, LORA_RANK, MODEL, ROW_LENGTH
from mrjax.runs import cli
from mrjax.runs.common import environment

_PEERS = flags.DEFINE_list('peers', [], 'Of trl and tunix.')
_TRL_PYTHON = flags.DEFINE_string(
  'trl_python', sys.executable, 'Python with torch, trl and peft.'
)
_TUNIX_PYTHON = flags.DEFINE_string(
  'tunix_python', sys.executable, 'Python with google-tunix.'
)
_DATA = flags.DEFINE_string(
  'data', 'arithmetic:train?size=2000', 'Problems to train on.'
)
_DATA_ROOT = flags.DEFINE_string('data_root', '', 'Local copies of data sets.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of each contender.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 10, 'Timed steps a turn.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
_OWN = ('mrjax_full', 'mrjax_lora')
_CONTENDER = flags.DEFINE_enum('contender', '', ['', *_OWN], 'Used by itself.')
_DIRECTORY = flags.DEFINE_string('directory', '', 'Used by itself: model and data.')

TEXTS_A_STEP, ROWS_A_STEP, WARMUP_STEPS = 8, 3, 2


def main(argv: Sequence[str]) -> None:
  del argv
  if _CONTENDER.value:
    lora = _CONTENDER.value == 'mrjax_lora'
    print(json.dumps(_time_mrjax(Path(_DIRECTORY.value), _STEPS.value, lora)))
    return
  with tempfile.TemporaryDirectory() as name:
    _prepare(Path(name))
    found = _take_turns(_commands(name))
  rates = {key: [turn['tokens_per_second'] for turn in found[key]] for key in found}
  medians = {key: float(np.median(values)) for key, values in rates.items()}
  emit(
    'training_30m_float32',
    _OUTPUT.value,
    data=_DATA.value,
    steps=_STEPS.value,
    useful_tokens_per_second=rates,
    medians=medians,
    ratios={
      key: medians['mrjax_lora' if 'lora' in key else 'mrjax_full'] / value
      for key, value in medians.items()
      if 'mrjax' not in key
    },
    lora_to_full=medians['mrjax_lora'] / medians['mrjax_full'],
    peak_memory_mb={
      key: max(turn['peak_memory_mb'] for turn in found[key]) for key in found
    },
    versions=environment()['versions'],
  )


def _commands(directory: str) -> dict[str, list[str]]:
  own = [sys.executable, '-m', 'experiments.benchmarks.training']
  own += [f'--directory={directory}', f'--steps={_STEPS.value}']
  commands = {name: [*own, f'--contender={name}'] for name in _OWN}
  here = Path(__file__).parent
  for peer in _PEERS.value:
    if peer not in ('trl', 'tunix'):
      raise ValueError(f'--peers: no {peer!r}, want trl or tunix.')
    python = {'trl': _TRL_PYTHON, 'tunix': _TUNIX_PYTHON}[peer].value
    variants = ['full', 'lora']
    if peer == 'trl':
      variants += ['full_packed', 'lora_packed']
    for variant in variants:
      script = str(here / f'peer_{peer}_training.py')
      commands[f'{peer}_{variant}'] = [
        *(python, script, directory, variant, str(_STEPS.value), str(WARMUP_STEPS))
      ]
  return commands


def _take_turns(commands: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
  found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
  # Huge pages are what our own programs ask for; peers run as they come.
  environ = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  for _ in range(_ROUNDS.value):
    for name, command in commands.items():
      result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environ
      )
      if result.returncode:
        raise ValueError(f'{name} failed: {result.stderr[-2000:]}')
      found[name].append(json.loads(result.stdout.splitlines()[-1]))
      last = found[name][-1]
      print(
        f'{name}: {last["tokens_per_second"]:.0f} useful tokens/s, peak '
        f'{last["peak_memory_mb"]:,.0f} MB',
        flush=True,
      )
  return found


def _prepare(directory: Path) -> None:
  """Writes the model, its tokenizer and the texts that all contenders read."""
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
  side = directory / 'side'
  train_bpe_tokenizer(
    (pair['prompt'] + pair['completion'] for pair in pairs),
    vocab_size=MODEL['vocab_size'],
    output_dir=side,
  )
  rng = np.random.default_rng(0)
  num_texts = 2 * TEXTS_A_STEP * (_STEPS.value + WARMUP_STEPS)
  chosen = [pairs[i] for i in rng.integers(len(pairs), size=num_texts)]
  write_jsonl(directory / 'texts.jsonl', chosen)
  (side / 'config.json').write_text(json.dumps(MODEL))
  config = DecoderConfig.from_hf(MODEL)
  init = lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  save_hf(jax.jit(init)()['params'], config, side, directory / 'model')


def _time_mrjax(directory: Path, steps: int, lora: bool) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.source import resolve_model
  from mrjax.data.batches import TextBatches
  from mrjax.data.sft import encode_sft, read_sft
  from mrjax.data.tokenization import load_tokenizer
  from mrjax.lora import masks
  from mrjax.lora.adapters import LoraConfig, init_adapter, targets_named
  from mrjax.models.decoder import Decoder
  from mrjax.runs.sft import make_loss_fn
  from mrjax.runs.training_config import Config
  from mrjax.sharding.mesh import make_mesh
  from mrjax.training import loop, optimizer, step

  mesh = make_mesh('data:1', jax.devices()[:1])
  source = resolve_model(str(directory / 'model'))
  examples = encode_sft(
    read_sft(directory / 'texts.jsonl'),
    load_tokenizer(str(source.hf_dir)),
    max_length=ROW_LENGTH,
    overlong='drop',
  )
  batches = TextBatches(
    [(example,) for example in examples], row_length=ROW_LENGTH, batch_size=ROWS_A_STEP
  )
  params = source.load_params(mesh, dtype=jnp.float32)
  trainable, frozen, scale = params, {}, None
  if lora:
    adapter = LoraConfig(LORA_RANK, LORA_ALPHA, targets=targets_named('all_linear'))
    own = jax.jit(functools.partial(init_adapter, source.config, adapter))
    trainable, frozen, scale = own(jax.random.key(0)), params, adapter.scale
    params = masks.merge(trainable, frozen)
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), lambda _: 2e-5)
  state = step.init_state(trainable, tx)
  del params, trainable
  decoder = Decoder(source.config, lora_scale=scale, remat=Config.remat)
  loss_fn = make_loss_fn(decoder)
  train_step = jax.jit(
    functools.partial(step.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0
  )
  useful, start = 0, 0.0
  metrics: dict[str, jax.Array] = {}
  with jax.set_mesh(mesh):
    for i in range(WARMUP_STEPS + steps):
      if i == WARMUP_STEPS:
        jax.block_until_ready(metrics)
        useful, start = 0, time.perf_counter()
      batch = batches(i)
      state, metrics = train_step(state, frozen, loop.shard_batch(batch, mesh))
      useful += int((batch['segments'] != 0).sum())
    loss = float(metrics['loss'])
    seconds = time.perf_counter() - start
  return {
    'tokens_per_second': useful / seconds,
    'loss': loss,
    'peak_memory_mb': peak_memory_mb(),
  }


if __name__ == '__main__':
  cli.run(main)
