"""The Tunix side of `experiments.benchmarks.sampling`: its Sampler.

Usage: peer_tunix_sampling.py JOB; for each line of its input it does the job once and
prints one JSON line. A batch runs to its longest row; it is compiled for that length
before it counts.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params

# The size hardly matters: 5.7 to 7.1 thousand tokens/s where five were tried.
ROWS_AT_ONCE, PAD_ID, NO_ID = 32, 0, -1


class Ids:
  """A tokenizer whose texts are token ids, for the Sampler takes nothing else."""

  encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
  decode = staticmethod(lambda ids, **_: '')
  bos_id = staticmethod(lambda: None)
  eos_id = staticmethod(lambda: NO_ID)
  pad_id = staticmethod(lambda: PAD_ID)


def main() -> None:
  job = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
  sampler = make_sampler(job)
  versions = {
    name: importlib.metadata.version(name) for name in ('google-tunix', 'jax')
  }
  for _ in sys.stdin:
    start = time.perf_counter()
    rows = []
    for chunk in chunks(job):
      rows += sample(sampler, job, chunk)
    answer = {
      'seconds': time.perf_counter() - start,
      'num_tokens': sum(map(len, rows)),
      'versions': versions,
    }
    if not job['temperature']:
      answer['token_ids'] = rows
    print(json.dumps(answer), flush=True)


def make_sampler(job):
  c = json.loads((Path(job['model']) / 'config.json').read_text(encoding='utf-8'))
  config = llama.ModelConfig(
    num_layers=c['num_hidden_layers'],
    vocab_size=c['vocab_size'],
    embed_dim=c['hidden_size'],
    hidden_dim=c['intermediate_size'],
    num_heads=c['num_attention_heads'],
    head_dim=c['head_dim'],
    num_kv_heads=c['num_key_value_heads'],
    rope_theta=c['rope_parameters']['rope_theta'],
    norm_eps=c['rms_norm_eps'],
    weight_tying=c['tie_word_embeddings'],
  )
  mesh = jax.make_mesh(
    (1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  with mesh:
    model = llama_params.create_model_from_safe_tensors(
      job['model'], config, mesh, dtype=jnp.float32
    )
  return sampler_lib.Sampler(
    model,
    Ids(),
    sampler_lib.CacheConfig(
      cache_size=padded_length(job['prompts']) + max(map(max, job['lengths'])),
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    ),
  )


def padded_length(prompts):
  """The power of two that the Sampler pads its prompts to when nothing is said."""
  return 1 << (max(map(len, prompts)) - 1).bit_length()


def chunks(job):
  """Numbers of prompts that run together, of about the same length."""
  at_once = min(job['prompts_at_once'], ROWS_AT_ONCE // len(job['lengths'][0]))
  order = sorted(range(len(job['prompts'])), key=lambda i: len(job['prompts'][i]))
  return [order[first : first + at_once] for first in range(0, len(order), at_once)]


def sample(sampler, job, chunk):
  """Token ids of all rows of a chunk, each as long as the job wants it."""
  pairs = [(i, length) for i in chunk for length in job['lengths'][i]]
  controls = {}
  if job['temperature']:
    controls = {'temperature': job['temperature'], 'top_p': job['top_p']}
  out = sampler(
    [' '.join(map(str, job['prompts'][i])) for i, _ in pairs],
    max_generation_steps=max(length for _, length in pairs),
    eos_tokens=[NO_ID],
    seed=chunk[0],
    **controls,
  )
  rows = zip(out.tokens, pairs, strict=True)
  return [tokens[:length].tolist() for tokens, (_, length) in rows]


if __name__ == '__main__':
  main()
