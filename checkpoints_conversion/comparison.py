"""A checkpoint held against transformers: logits, and greedy continuations."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.data.tokenization import load_tokenizer
from mrjax.records import read_jsonl

PROMPTS = (
  'Natalia sold 48 clips in April and half as many in May. How many did she sell?',
  'The sum of two numbers is 21 and their difference is 3. The larger one is',
  'Once upon a time',
)


@dataclasses.dataclass(frozen=True)
class Config:
  hf_dir: str = ''
  checkpoint: str = ''
  prompts: str = ''  # JSON Lines with a field `prompt`; empty: three built-in ones
  greedy_tokens: int = 0  # tokens to compare; 0: logits alone
  tolerance: float = 1e-3  # largest difference of two logits, absolute
  mesh: str = 'data:1,fsdp:-1'


def run(config: Config) -> list[str]:
  """Prints one line for each prompt.

  Returns:
    What does not agree, one line each; empty when all does.
  """
  try:
    import torch  # noqa: F401
  except ImportError:
    raise ImportError(
      'verify compares with transformers on torch, which is not installed: '
      'pip install torch'
    ) from None
  hf, ours = resolve_model(config.hf_dir), resolve_model(config.checkpoint)
  if hf.params_dir is not None:
    raise ValueError(f'--hf_dir={config.hf_dir} is no Hugging Face model directory.')
  tokenizer = load_tokenizer(str(hf.hf_dir))
  texts = PROMPTS
  if config.prompts:
    texts = tuple(r['prompt'] for r in read_jsonl(config.prompts, required=('prompt',)))
  prompts = [tokenizer.encode_prompt(text) for text in texts]
  # One model after the other, so that large ones need not fit into memory together.
  want_logits, want_ids = _torch_outputs(hf, prompts, config.greedy_tokens)
  got_logits, got_ids = _our_outputs(ours, prompts, config.greedy_tokens, config.mesh)

  faults = []
  for i, (want, got) in enumerate(zip(want_logits, got_logits)):
    difference = float(np.abs(want - got).max())
    agree = int((want.argmax(-1) == got.argmax(-1)).sum())
    print(
      f'prompt {i}: {len(prompts[i])} tokens, max abs difference of logits '
      f'{difference:.2e}, same best token at {agree} of {len(want)}'
    )
    if not difference <= config.tolerance:  # NaN too
      faults.append(
        f'prompt {i}: logits differ by {difference:.2e}, allowed {config.tolerance:.2e}'
      )
    got_here = got_ids[i][: len(want_ids[i])]  # transformers may stop at an EOS
    if config.greedy_tokens:
      print(f'  greedy: {tokenizer.decode_continuation(prompts[i], got_here)!r}')
    if got_here != want_ids[i]:
      first = next(j for j, (a, b) in enumerate(zip(got_here, want_ids[i])) if a != b)
      theirs = tokenizer.decode_continuation(prompts[i], want_ids[i])
      faults.append(
        f'prompt {i}: greedy token {first} is {got_here[first]}, transformers has '
        f'{want_ids[i][first]}: {theirs!r}'
      )
  return faults


def _torch_outputs(
  source: ModelSource, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[np.ndarray], list[list[int]]]:
  """Logits [T, V] of every prompt, and its greedy continuation, by transformers."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    source.hf_dir, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  logits, continuations = [], []
  with torch.no_grad():
    for prompt in prompts:
      tokens = torch.tensor([prompt])
      logits.append(model(tokens).logits[0].numpy())
      ids: list[int] = []
      if num_tokens:
        whole = model.generate(
          tokens,
          attention_mask=torch.ones_like(tokens),
          do_sample=False,
          num_beams=1,
          max_new_tokens=num_tokens,
        )
        ids = whole[0, len(prompt) :].tolist()
      continuations.append(ids)
  return logits, continuations


def _our_outputs(
  source: ModelSource, prompts: Sequence[Sequence[int]], num_tokens: int, mesh_spec: str
) -> tuple[list[np.ndarray], list[list[int]]]:
  """The same by mrjax: whole forward passes, nothing but the decoder itself."""
  import jax
  import jax.numpy as jnp

  from mrjax.models.decoder import Decoder
  from mrjax.sharding.mesh import make_mesh

  mesh = make_mesh(mesh_spec)
  decoder = Decoder(source.config)
  params = source.load_params(mesh, jnp.float32)
  forward = jax.jit(
    lambda params, tokens_1T, segments_1T: decoder.apply(
      {'params': params}, tokens_1T, segments_BT=segments_1T
    )[0]
  )
  room = max(map(len, prompts)) + num_tokens
  logits, continuations = [], []
  for prompt in prompts:
    ids = list(prompt)
    for i in range(1 + num_tokens):
      row = np.zeros((1, room), np.int32)
      row[0, : len(ids)] = ids
      places = (np.arange(room)[None] < len(ids)).astype(np.int32)
      logits_TV = np.asarray(forward(params, row, places))
      if i == 0:
        logits.append(logits_TV[: len(prompt)])
      ids.append(int(logits_TV[len(ids) - 1].argmax()))
    continuations.append(ids[len(prompt) : len(prompt) + num_tokens])
  return logits, continuations
