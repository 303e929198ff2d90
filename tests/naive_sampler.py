"""A sampler by definition: whole forward passes over the text for every token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.losses.value import ValueHead, expected_rewards
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling.guidance import GuidanceConfig, kl_per_token, offsets
from mrjax.sampling.guide import Guide
from mrjax.sampling.logits import (
  Controls,
  penalize,
  row_keys,
  sample,
  scale_and_filter,
)
from mrjax.sampling.requests import Request, hash_problem_id
from mrjax.sharding.mesh import make_mesh
from mrjax.sharding.rules import param_shardings

_SIZES = {
  'vocab_size': 54,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'max_position_embeddings': 128,
}
LLAMA = DecoderConfig.from_hf(
  _SIZES
  | {
    'architectures': ['LlamaForCausalLM'],
    'initializer_range': 0.6,  # wide, so that the distributions are far from flat
  }
)
GEMMA2 = DecoderConfig.from_hf(
  _SIZES
  | {
    'architectures': ['Gemma2ForCausalLM'],
    'sliding_window': 5,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'initializer_range': 0.3,
  }
)
# A guide of another size with the same vocabulary.
QWEN = DecoderConfig.from_hf(
  _SIZES
  | {
    'architectures': ['Qwen2ForCausalLM'],
    'hidden_size': 20,
    'num_hidden_layers': 3,
    'head_dim': 10,
    'num_attention_heads': 2,
    'initializer_range': 0.5,
  }
)
ONE_DEVICE = 'data:1'


def mesh_of(spec: str):
  num_devices = 1 if spec == ONE_DEVICE else 8
  return make_mesh(spec, jax.devices()[:num_devices])


@functools.cache
def init_fn(config: DecoderConfig, num_value_outputs: int = 0):
  # Cached with its compiled form, as the engines of most tests start from it.
  decoder = Decoder(config, num_value_outputs=num_value_outputs)
  return jax.jit(lambda key: decoder.init(key, jnp.zeros((1, 4), jnp.int32))['params'])


def init_params(config: DecoderConfig, mesh, *, num_value_outputs: int = 0):
  params = init_fn(config, num_value_outputs)(jax.random.key(5))
  return jax.device_put(params, param_shardings(params, mesh))


def make_guide(head: ValueHead, guidance: GuidanceConfig, spec=ONE_DEVICE) -> Guide:
  """A guide with random weights, its head scaled up so that values differ."""
  outputs = head.num_outputs(QWEN.vocab_size)
  params = init_params(QWEN, mesh_of(spec), num_value_outputs=outputs)
  params['value_head']['kernel'] *= 3
  return Guide(QWEN, params, head, guidance)


def rows_of(completions) -> dict:
  """Completions by problem and sample; none may come twice."""
  rows = {}
  for completion in completions:
    name = completion.problem_id, completion.sample_index
    assert name not in rows
    rows[name] = completion
  return rows


class NaiveRow(NamedTuple):
  """What a plain sampler gives, a list entry a token."""

  token_ids: list[int]
  logprobs: list[float]
  sampling_logprobs: list[float]
  values: list[float]
  kls: list[float]


def naive_row(
  config: DecoderConfig, request: Request, sample_index: int, guide: Guide | None = None
) -> NaiveRow:
  """The row that `init_params` gives."""
  params = init_params(config, mesh_of(ONE_DEVICE))
  asked = request.params
  one = lambda value, dtype=jnp.float32: jnp.asarray([value], dtype)
  controls = Controls(
    temperature_B=one(asked.temperature),
    top_k_B=one(asked.top_k, jnp.int32),
    top_p_B=one(asked.top_p),
    min_p_B=one(asked.min_p),
    repetition_penalty_B=one(asked.repetition_penalty),
  )
  key = row_keys(
    one(asked.seed, jnp.uint32),
    hash_problem_id(request.problem_id)[None],
    one(sample_index, jnp.uint32),
  )[0]
  ids, row = list(request.prompt_ids), NaiveRow([], [], [], [], [])
  for step in range(asked.max_new_tokens):
    logits_BV = last_outputs(Decoder(config), params, [ids])
    seen_BV = np.zeros(logits_BV.shape, bool)
    seen_BV[0, ids] = True
    shaped_BV = _penalize(
      logits_BV, jnp.asarray(seen_BV), controls.repetition_penalty_B
    )
    outputs_VA = None
    if guide is not None and asked.eta:
      outputs_VA = _values_of_next_tokens(guide, ids)
      best = np.argsort(-np.asarray(shaped_BV[0]), kind='stable')
      chosen = best[: guide.guidance.num_candidates(len(best))]
      added = _offsets(
        outputs_VA[None, chosen], one(asked.eta), guide.head, guide.guidance
      )
      shaped_BV = shaped_BV.at[0, chosen].add(added[0])
    keys = jax.random.fold_in(key, step)[None]
    token, logp, sampling_logp = (
      x[0].item() for x in _sample(logits_BV, controls, keys, shaped_BV=shaped_BV)
    )
    unfiltered = controls
    if asked.temperature == 0:
      unfiltered = controls.replace(
        top_k_B=one(0, jnp.int32), top_p_B=one(1), min_p_B=one(0)
      )
    kl = _kl(shaped_BV, logits_BV, unfiltered)
    ids.append(token)
    row.token_ids.append(token)
    row.logprobs.append(logp)
    row.sampling_logprobs.append(sampling_logp)
    row.kls.append(kl[0].item())
    if outputs_VA is not None:
      row.values.append(expected_rewards(outputs_VA[token], guide.head).item())
    if token in asked.stop_ids:
      break
  return row


_sample, _penalize = jax.jit(sample), jax.jit(penalize)
_offsets = jax.jit(offsets, static_argnums=(2, 3))


@jax.jit
def _kl(shaped_BV, logits_BV, controls):
  weights_BV = scale_and_filter(shaped_BV, controls)
  return kl_per_token(weights_BV, logits_BV, controls.temperature_B)


def _values_of_next_tokens(guide: Guide, ids: list[int]) -> jax.Array:
  """Outputs for each token that may come next, [V, width]."""
  num_tokens = guide.config.vocab_size
  outputs = guide.head.num_outputs(num_tokens)
  decoder = Decoder(guide.config, num_value_outputs=outputs)
  if guide.head.classifier_type == 'Q':
    last = last_outputs(decoder, guide.params, [ids])
    return last.reshape(num_tokens, guide.head.width)
  return last_outputs(decoder, guide.params, [[*ids, t] for t in range(num_tokens)])


def last_outputs(decoder: Decoder, params, texts) -> jax.Array:
  """Head outputs at the end of texts of one length."""
  length = len(texts[0])
  padded = [[*text, *[0] * (128 - length)] for text in texts]
  return forward(decoder)(params, jnp.asarray(padded))[:, length - 1]


@functools.cache
def forward(decoder: Decoder):
  """From parameters and ids [B, T] to head outputs [B, T, outputs], compiled."""
  return jax.jit(lambda params, ids_BT: decoder.apply({'params': params}, ids_BT))
