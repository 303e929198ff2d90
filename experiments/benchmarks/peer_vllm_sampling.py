"""The vLLM side of `experiments.benchmarks.sampling` and `.vllm_parity`.

Usage: peer_vllm_sampling.py JOB compiled|eager; for each line of its input it does the
job once and prints one JSON line. Rows of the job are requests of their own, in its
order; what vLLM remembers of prompts is forgotten before each time.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
  job = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
  # Offline, in this one process, with a thread a core.
  for name, value in {
    'HF_HUB_OFFLINE': '1',
    'VLLM_NO_USAGE_STATS': '1',
    'VLLM_LOGGING_LEVEL': 'ERROR',
    'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
    'VLLM_CPU_KVCACHE_SPACE': '1',  # GiB, more than any of the jobs fills
    'VLLM_CPU_OMP_THREADS_BIND': 'nobind',
    'OMP_NUM_THREADS': str(len(os.sched_getaffinity(0))),
  }.items():
    os.environ.setdefault(name, value)
  import torch  # they read the environment
  import vllm

  longest = max(map(len, job['prompts'])) + max(map(max, job['lengths']))
  engine = vllm.LLM(
    model=job['model'],
    skip_tokenizer_init=True,
    dtype='float32',
    max_model_len=longest,
    max_num_seqs=256,
    enforce_eager=sys.argv[2] == 'eager',
    seed=0,
  )
  versions = {'vllm': vllm.__version__, 'torch': torch.__version__}
  batches = list(requests(job, vllm.SamplingParams))
  for _ in sys.stdin:
    engine.reset_prefix_cache()
    start = time.perf_counter()
    rows = []
    for prompts, controls in batches:
      done = engine.generate(prompts, controls, use_tqdm=False)
      rows += [request.outputs[0] for request in done]
    answer = {
      'seconds': time.perf_counter() - start,
      'num_tokens': sum(len(row.token_ids) for row in rows),
      'versions': versions,
    }
    if not job['temperature']:
      answer['token_ids'] = [list(row.token_ids) for row in rows]
    if job.get('logprobs'):
      answer['logprobs'] = [
        [found[i].logprob for i, found in zip(row.token_ids, row.logprobs, strict=True)]
        for row in rows
      ]
    print(json.dumps(answer), flush=True)


def requests(job, make_controls):
  """The prompts and controls of the rows that are handed over together."""
  for first in range(0, len(job['prompts']), job['prompts_at_once']):
    numbers = range(len(job['prompts']))[first : first + job['prompts_at_once']]
    pairs = [(i, length) for i in numbers for length in job['lengths'][i]]
    yield (
      [{'prompt_token_ids': job['prompts'][i]} for i, _ in pairs],
      [
        make_controls(
          temperature=job['temperature'],
          top_p=job['top_p'],
          max_tokens=length,
          ignore_eos=True,
          detokenize=False,
          logprobs=0 if job.get('logprobs') else None,
        )
        for _, length in pairs
      ],
    )


if __name__ == '__main__':
  main()
