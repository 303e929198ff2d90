"""What the contenders of the sampling benchmark are asked for: token ids in a file.

A job is a JSON object that says the same to everybody:

  model            directory of a Hugging Face model
  prompts          token ids of each prompt
  lengths          new tokens of each sample of each prompt; nothing else ends a row
  prompts_at_once  how many of the prompts are handed over together
  temperature      0 for greedy
  top_p
  top_k            0: no limit
  logprobs         whether they are wanted too
  guide            head of a value model that guides, V or Q; empty: none

Lengths are for stops: mrjax and vLLM end a row there and may not plan by them; whoever
runs a batch to the end of its longest row does that, and useful tokens alone count.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.llama_30m import MODEL as LLAMA_30M
from mrjax.sampling.requests import Request, SamplingParams

LLAMA_1M: dict[str, Any] = {
  **LLAMA_30M,
  'vocab_size': 512,
  'hidden_size': 128,
  'intermediate_size': 384,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'head_dim': 32,
  'max_position_embeddings': 512,
}
GUIDE: dict[str, Any] = {  # 8 million weights
  **LLAMA_30M,
  'hidden_size': 256,
  'intermediate_size': 704,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}
NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 64, 16, 128, 64
SOLUTION_SAMPLES = 4
SHARED_SAMPLES, SHARED_PROMPT_TOKENS, SHARED_NEW_TOKENS = 64, 512, 64
_SPECIAL_IDS = 3  # padding, begin and end come first


@dataclasses.dataclass(frozen=True)
class Job:
  """See the module."""

  model: str
  prompts: list[list[int]]
  lengths: list[list[int]]
  prompts_at_once: int
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  logprobs: bool = False
  guide: str = ''

  @property
  def num_tokens(self) -> int:
    return sum(map(sum, self.lengths))

  @property
  def rows_at_once(self) -> int:
    """Most rows that may run together."""
    rows = [len(lengths) for lengths in self.lengths]
    starts = range(0, len(rows), self.prompts_at_once)
    return max(sum(rows[start : start + self.prompts_at_once]) for start in starts)

  @property
  def max_length(self) -> int:
    """Places that any row may need, prompt and new tokens."""
    return max(map(len, self.prompts)) + max(map(max, self.lengths))

  def requests(self) -> list[Request]:
    """One a prompt for our engine, named by its number."""
    found = []
    for i, (ids, lengths) in enumerate(zip(self.prompts, self.lengths, strict=True)):
      params = tuple(
        SamplingParams(
          self.temperature,
          self.top_p,
          self.top_k,
          eta=1.0 if self.guide else 0.0,
          max_new_tokens=length,
          seed=1,
        )
        for length in lengths
      )
      same = len(set(params)) == 1
      found.append(
        Request(str(i), tuple(ids), len(lengths), params[0] if same else params)
      )
    return found

  def save(self, path: Path) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(self)))
    return path

  @classmethod
  def load(cls, path: str | Path) -> 'Job':
    return cls(**json.loads(Path(path).read_text()))


def fixed(model: str, prompts: list[list[int]]) -> Job:
  """Every sample of every prompt, all of the same length, from the nucleus."""
  lengths = [[MAX_NEW_TOKENS] * NUM_SAMPLES for _ in prompts]
  return Job(model, prompts, lengths, len(prompts), temperature=0.8, top_p=0.95)


def natural(model: str, prompts: list[list[int]]) -> Job:
  """As `fixed` with the lengths of short solutions: mean 48, from 4 to 128.

  They are drawn once, log-normal with median 42.5 and a spread of 0.6, each on its
  own; 2.4 % of them are cut at 128.
  """
  shape = (NUM_PROMPTS, NUM_SAMPLES)
  drawn = np.random.default_rng(0).lognormal(np.log(42.5), 0.6, shape)
  lengths = np.clip(np.rint(drawn), 1, MAX_NEW_TOKENS).astype(int)
  job = fixed(model, prompts)
  return dataclasses.replace(job, lengths=lengths[: len(prompts)].tolist())


def solutions(model: str, prompts: list[list[int]], lengths: Sequence[int]) -> Job:
  """Four samples of every prompt that end as reference solutions do.

  Args:
    model: A directory.
    prompts: As many as problems.
    lengths: Tokens of each problem's solution; every sample has that of some problem.
  """
  most = LLAMA_1M['max_position_embeddings'] - MAX_PROMPT_TOKENS
  drawn = np.random.default_rng(0).choice(lengths, (len(prompts), SOLUTION_SAMPLES))
  job = fixed(model, prompts)
  return dataclasses.replace(job, lengths=np.clip(drawn, 1, most).tolist())


def greedy(model: str, *, num_prompts: int, prompts_at_once: int) -> Job:
  """One greedy row of 128 new tokens from each of some prompts of 64 random tokens."""
  prompts = random_prompts(LLAMA_30M, [MAX_PROMPT_TOKENS] * num_prompts)
  return Job(model, prompts, [[MAX_NEW_TOKENS]] * num_prompts, prompts_at_once)


def shared_prefix(model: str, *, shared: bool) -> Job:
  """64 samples of 64 tokens: of one prompt of 512, or of 64 such prompts, one each.

  Without sharing the prompts differ, so that no engine can find them to be the same.
  """
  num_prompts = 1 if shared else SHARED_SAMPLES
  return Job(
    model,
    random_prompts(LLAMA_30M, [SHARED_PROMPT_TOKENS] * num_prompts),
    [[SHARED_NEW_TOKENS] * (SHARED_SAMPLES // num_prompts)] * num_prompts,
    num_prompts,
    temperature=0.8,
    top_p=0.95,
  )


def guided(model: str, guide: str, *, prompts_at_once: int) -> Job:
  """As `greedy`, guided by `guide` over 20 candidates, of which all tokens are drawn.

  A trained model draws few others, random weights hardly any but others; a head of type
  V then needs a second pass.
  """
  job = greedy(
    model, num_prompts=max(4, prompts_at_once), prompts_at_once=prompts_at_once
  )
  return dataclasses.replace(job, guide=guide, temperature=0.8, top_p=0.95, top_k=20)


def random_prompts(model: dict[str, Any], lengths: Sequence[int]) -> list[list[int]]:
  rng = np.random.default_rng(0)
  draw = lambda length: rng.integers(_SPECIAL_IDS, model['vocab_size'], length)
  return [draw(length).tolist() for length in lengths]


def make_guide(classifier_type: str):
  """A value model of a quarter of `LLAMA_30M`, with random weights."""
  import jax
  import jax.numpy as jnp

  from mrjax.losses.value import ValueHead
  from mrjax.models.config import DecoderConfig
  from mrjax.models.decoder import Decoder
  from mrjax.sampling.guidance import GuidanceConfig
  from mrjax.sampling.guide import Guide

  config, head = DecoderConfig.from_hf(GUIDE), ValueHead(classifier_type)
  decoder = Decoder(config, num_value_outputs=head.num_outputs(config.vocab_size))
  init = jax.jit(lambda key: decoder.init(key, jnp.zeros((1, 1), jnp.int32))['params'])
  return Guide(config, init(jax.random.key(1)), head, GuidanceConfig(top_k=20))


def sentence_prompts(
  data: str, data_root: str | None, *, work_dir: Path
) -> tuple[list[list[int]], list[int]]:
  """First sentences of all problems, and the lengths of their solutions, in tokens.

  The vocabulary, of 512, is learned from the sentences.
  """
  from mrjax.data.problems import load_problems
  from mrjax.data.tokenization import load_tokenizer
  from mrjax.data.tokenizer_training import train_bpe_tokenizer

  problems = load_problems(data, data_root=data_root)
  texts = [re.split(r'(?<=[.?!])\s', problem.question)[0] for problem in problems]
  train_bpe_tokenizer(texts, vocab_size=LLAMA_1M['vocab_size'], output_dir=work_dir)
  tokenizer = load_tokenizer(str(work_dir))
  prompts = [tokenizer.encode_prompt(text)[:MAX_PROMPT_TOKENS] for text in texts]
  solutions = [p.solution or p.answer or '' for p in problems]
  return prompts, [1 + len(tokenizer.encode_prompt(text)) for text in solutions]


def save_random_model(model: dict[str, Any], directory: Path) -> str:
  """Writes a model with random float32 weights; returns where."""
  import jax
  import jax.numpy as jnp

  from mrjax.checkpoint.hf import save_hf
  from mrjax.models.config import DecoderConfig
  from mrjax.models.decoder import Decoder

  side = directory / 'side'
  side.mkdir(parents=True)
  (side / 'config.json').write_text(json.dumps(model))
  config = DecoderConfig.from_hf(model)
  init = lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  save_hf(jax.jit(init)()['params'], config, side, directory / 'model')
  return str(directory / 'model')
