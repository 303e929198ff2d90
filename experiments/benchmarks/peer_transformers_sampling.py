"""The other side of `experiments.benchmarks.sampling`: transformers' `generate`.

Usage: peer_transformers_sampling.py DIRECTORY dynamic|static; for each line of its
input it samples once and prints one JSON line.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NUM_SAMPLES, MAX_NEW_TOKENS, PROMPTS_AT_ONCE, PAD_ID = 16, 128, 16, 0


def main() -> None:
  directory, cache = Path(sys.argv[1]), sys.argv[2]
  model = AutoModelForCausalLM.from_pretrained(
    directory / 'model', dtype=torch.float32
  ).eval()
  prompts = sorted(json.loads((directory / 'prompts.json').read_text()), key=len)
  for _ in sys.stdin:
    start = time.perf_counter()
    num_tokens = 0
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
      chunk = prompts[first : first + PROMPTS_AT_ONCE]
      num_tokens += sample(model, chunk, cache)
    seconds = time.perf_counter() - start
    print(json.dumps({'num_tokens': num_tokens, 'seconds': seconds}), flush=True)


def sample(model, prompts: list[list[int]], cache: str) -> int:
  length = max(map(len, prompts))
  ids = torch.tensor([[PAD_ID] * (length - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
  with torch.inference_mode():
    out = model.generate(
      input_ids=ids,
      attention_mask=mask,
      do_sample=True,
      temperature=0.8,
      top_p=0.95,
      top_k=0,
      num_return_sequences=NUM_SAMPLES,
      max_new_tokens=MAX_NEW_TOKENS,
      min_new_tokens=MAX_NEW_TOKENS,
      eos_token_id=None,
      pad_token_id=PAD_ID,
      **({'cache_implementation': 'static'} if cache == 'static' else {}),
    )
  return out[:, length:].numel()


if __name__ == '__main__':
  main()
