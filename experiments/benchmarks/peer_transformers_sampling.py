"""The transformers side of `experiments.benchmarks.sampling`: `generate`.

Usage: peer_transformers_sampling.py JOB dynamic|static; for each line of its input it
does the job once and prints one JSON line. A batch runs to its longest row.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers

# The fastest of 4, 8, 16 and 64 prompts of 16 samples where this was tried.
ROWS_AT_ONCE, PAD_ID = 256, 0


def main() -> None:
  job = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['model'], dtype=torch.float32
  ).eval()
  versions = {'transformers': transformers.__version__, 'torch': torch.__version__}
  for _ in sys.stdin:
    start = time.perf_counter()
    rows = []
    for chunk in chunks(job):
      rows += sample(model, job, chunk, cache=sys.argv[2])
    answer = {
      'seconds': time.perf_counter() - start,
      'num_tokens': sum(map(len, rows)),
      'versions': versions,
    }
    if not job['temperature']:
      answer['token_ids'] = rows
    print(json.dumps(answer), flush=True)


def chunks(job):
  """Numbers of prompts that run together, of about the same length."""
  at_once = min(job['prompts_at_once'], ROWS_AT_ONCE // len(job['lengths'][0]))
  order = sorted(range(len(job['prompts'])), key=lambda i: len(job['prompts'][i]))
  return [order[first : first + at_once] for first in range(0, len(order), at_once)]


def sample(model, job, chunk, *, cache):
  """Token ids of all rows of a chunk, each as long as the job wants it."""
  prompts = [job['prompts'][i] for i in chunk]
  lengths = [length for i in chunk for length in job['lengths'][i]]
  width = max(map(len, prompts))
  ids = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
  controls = dict[str, object](do_sample=False)
  if job['temperature']:
    controls = dict(
      do_sample=True,
      temperature=job['temperature'],
      top_p=job['top_p'],
      top_k=0,
      num_return_sequences=len(lengths) // len(chunk),
    )
  if cache == 'static':
    controls['cache_implementation'] = 'static'
  with torch.inference_mode():
    out = model.generate(
      input_ids=ids,
      attention_mask=mask,
      max_new_tokens=max(lengths),
      min_new_tokens=max(lengths),
      eos_token_id=None,
      pad_token_id=PAD_ID,
      **controls,
    )
  rows = out[:, width:].tolist()
  return [row[:length] for row, length in zip(rows, lengths, strict=True)]


if __name__ == '__main__':
  main()
