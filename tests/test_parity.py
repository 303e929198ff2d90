"""Logits against transformers and torch in float32, for every family.

All weights are random, norms and biases too: what transformers starts at one or zero
would hide a swapped or forgotten parameter. Where a case is about one feature, the same
weights without it must miss the reference, so the case is known to exercise it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mrjax.checkpoint.hf import load_hf
from mrjax.models.cache import Lanes, empty_cache
from mrjax.models.config import DecoderConfig, RopeConfig, load_hf_config
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sharding.mesh import make_mesh

STORIES = Path(__file__).parents[1] / '..' / 'shared' / 'models' / 'stories260K'
# float32 rounding over a few layers stays below 2e-5 at logits of this size; the bar
# is what the project promises.
TOLERANCE = 1e-4
VOCAB = 37
SIZES = {
  'vocab_size': VOCAB,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'max_position_embeddings': 64,
  'pad_token_id': None,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'rope_theta': 500000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
# The 48 factors of Phi-3-mini-128k, to two decimals.
LONG_FACTORS = [
  *(1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4),
  *(7.7, 9.09, 12.2, 17.67, 24.46, 28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96),
  *(50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14),
  *(63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51),
  *(64.53, 64.84),
]
SHORT_FACTORS = [
  *(1.0, 1.02, 1.03, 1.03, 1.05, 1.05, 1.05, 1.05, 1.05, 1.07, 1.1, 1.11),
  *(1.16, 1.16, 1.17, 1.29, 1.34, 1.68, 1.79, 1.82, 1.85, 1.88, 1.91, 1.94),
  *(1.99, 2.02, 2.02, 2.02, 2.02, 2.02, 2.02, 2.03, 2.03, 2.03, 2.03, 2.03),
  *(2.03, 2.03, 2.03, 2.03, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84),
]
LONGROPE = {
  'hidden_size': 192,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
  'head_dim': None,
  'max_position_embeddings': 131072,
  'original_max_position_embeddings': 4096,
  'rope_parameters': {
    'rope_type': 'longrope',
    'rope_theta': 10000.0,
    'short_factor': SHORT_FACTORS,
    'long_factor': LONG_FACTORS,
  },
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, the length of its text, and what is taken away for the contrast."""

  architecture: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  length: int = 19
  without: dict[str, Any] = dataclasses.field(default_factory=dict)


NO_WINDOWS = {'layer_windows': (None,) * 3}
CASES = {
  'llama': Case('Llama'),
  'llama_mha_derived_head_dim': Case(
    'Llama',
    {'num_key_value_heads': 6, 'head_dim': None, 'rope_parameters': None},
  ),
  'llama_tied': Case('Llama', {'tie_word_embeddings': True}),
  'llama_biases': Case('Llama', {'attention_bias': True, 'mlp_bias': True}),
  'llama_linear_rope': Case(
    'Llama',
    {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}},
    without={'rope': RopeConfig(rotary_dim=8)},
  ),
  'llama3_rope': Case(
    'Llama',
    {
      'head_dim': 128,
      'rope_parameters': LLAMA3_ROPE,
      'max_position_embeddings': 131072,
    },
    length=300,
    without={'rope': RopeConfig(theta=500000.0, rotary_dim=128)},
  ),
  'mistral_window_shorter': Case('Mistral', {'sliding_window': 5}, without=NO_WINDOWS),
  'mistral_window_longer': Case('Mistral', {'sliding_window': 50}),
  'mistral_no_window': Case('Mistral', {'sliding_window': None}),
  'qwen2': Case('Qwen2', {'head_dim': None}),
  'qwen2_window': Case(
    'Qwen2',
    {
      'head_dim': None,
      'use_sliding_window': True,
      'sliding_window': 4,
      'max_window_layers': 1,
    },
    without=NO_WINDOWS,
  ),
  'qwen3': Case('Qwen3'),
  'qwen3_bias_tied': Case(
    'Qwen3', {'attention_bias': True, 'tie_word_embeddings': True}
  ),
  'gemma': Case('Gemma', {'num_key_value_heads': 1}),
  'gemma2': Case('Gemma2', {'sliding_window': 5}, without=NO_WINDOWS),
  'gemma2_window_longer': Case(
    'Gemma2', {'sliding_window': 4096, 'query_pre_attn_scalar': 3}
  ),
  'gemma2_attention_cap': Case(
    'Gemma2', {'query_pre_attn_scalar': 8}, without={'attention_softcap': None}
  ),
  'gemma2_logit_cap': Case('Gemma2', without={'logit_softcap': None}),
  'phi3': Case('Phi3', {'head_dim': None}),
  'phi3_window': Case(
    'Phi3', {'head_dim': None, 'sliding_window': 7}, without=NO_WINDOWS
  ),
  'phi3_partial_rotary': Case(
    'Phi3',
    {
      'head_dim': None,
      'hidden_size': 48,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 10000.0,
        'partial_rotary_factor': 0.75,
      },
    },
    without={'rope': RopeConfig(rotary_dim=8)},
  ),
  'phi3_longrope_short_row': Case('Phi3', LONGROPE, length=40),
  'phi3_longrope_long_row': Case('Phi3', LONGROPE, length=4110),
}


@functools.cache
def torch_model(name: str) -> torch.nn.Module:
  case = CASES[name]
  fields = SIZES | case.changes
  if fields['head_dim'] is None:
    del fields['head_dim']
  config_class = getattr(transformers, f'{case.architecture}Config')
  model_class = getattr(transformers, f'{case.architecture}ForCausalLM')
  model = model_class(config_class(**fields)).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for path, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim == 2:
        scale = 1.0 if 'embed' in path else p.shape[1] ** -0.5
        # Large scores and logits, or else soft caps would change nothing.
        large = case.architecture == 'Gemma2' and 'embed' not in path
        p.copy_(noise * scale * (6.0 if large else 1.0))
      elif 'norm' in path and 'gemma' not in model.config.model_type:
        p.copy_(1.0 + 0.3 * noise)
      else:
        p.copy_(0.3 * noise)
  # The reference formula; fused kernels know no soft caps.
  model.set_attn_implementation('eager')
  return model


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  """Saves the model of a case with transformers and loads it with mrjax, once."""

  @functools.cache
  def load_case(name: str) -> tuple[DecoderConfig, dict]:
    directory = tmp_path_factory.mktemp(name)
    torch_model(name).save_pretrained(directory)
    config = DecoderConfig.from_hf(load_hf_config(directory))
    mesh = make_mesh('', jax.devices()[:1])
    return config, load_hf(directory, config, mesh)

  return load_case


def random_tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(1).integers(3, VOCAB, shape).astype(np.int32)


def torch_logits(name: str, tokens_BT, mask_BT=None) -> np.ndarray:
  kwargs = {}
  if mask_BT is not None:
    mask = torch.tensor(mask_BT, dtype=torch.long)
    kwargs = {
      'attention_mask': mask,
      'position_ids': (mask.cumsum(-1) - 1).clamp(min=0),
    }
  with torch.no_grad():
    tokens = torch.tensor(tokens_BT, dtype=torch.long)
    return torch_model(name)(tokens, use_cache=False, **kwargs).logits.numpy()


def full_logits(config: DecoderConfig, params, tokens_BT, *, scan=True, **kwargs):
  decoder = Decoder(config, scan_layers=scan)
  if not scan:
    params = unstack_layers(params, config.num_layers)
  return np.asarray(
    jax.jit(decoder.apply)({'params': params}, jnp.asarray(tokens_BT), **kwargs)
  )


@pytest.mark.parametrize('name', CASES)
def test_logits_match_transformers(name, load):
  config, params = load(name)
  case = CASES[name]
  tokens_BT = random_tokens(2 if case.length < 1000 else 1, case.length)
  want = torch_logits(name, tokens_BT)
  got = full_logits(config, params, tokens_BT)
  assert got.dtype == np.float32
  assert np.abs(want).max() > 0.3  # or else any small number would pass
  assert np.abs(got - want).max() < TOLERANCE
  if case.without:
    other = dataclasses.replace(config, **case.without)
    assert np.abs(full_logits(other, params, tokens_BT) - want).max() > 10 * TOLERANCE


@pytest.mark.parametrize(
  'name', [n for n in CASES if CASES[n].length < 1000 and 'longer' not in n]
)
def test_left_padded_batch_matches_transformers(name, load):
  config, params = load(name)
  tokens_BT = random_tokens(3, 14)
  mask_BT = np.arange(14)[None] >= np.array([0, 3, 9])[:, None]
  want = torch_logits(name, np.where(mask_BT, tokens_BT, 0), mask_BT)
  got = full_logits(
    config,
    params,
    np.where(mask_BT, tokens_BT, 0),
    positions_BT=np.cumsum(mask_BT, axis=1, dtype=np.int32) - 1,
    segments_BT=mask_BT.astype(np.int32),
  )
  assert np.abs(got - want)[mask_BT].max() < TOLERANCE


@pytest.mark.parametrize('name', ['llama', 'gemma2', 'qwen3_bias_tied', 'phi3'])
def test_scanned_layers_equal_unrolled_ones(name, load):
  config, params = load(name)
  tokens_BT = random_tokens(2, 9)
  scanned = full_logits(config, params, tokens_BT)
  unrolled = full_logits(config, params, tokens_BT, scan=False)
  np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


@pytest.mark.parametrize(
  'name',
  [
    'llama',
    'llama3_rope',
    'mistral_window_shorter',
    'qwen2_window',
    'qwen3',
    'gemma',
    'gemma2',
    'phi3_partial_rotary',
    'phi3_longrope_short_row',
  ],
)
def test_cached_decode_equals_full_forward(name, load):
  """Two prompts of different length in one group, three rows each."""
  config, params = load(name)
  decoder = Decoder(config, scan_layers=False)
  variables = {'params': unstack_layers(params, config.num_layers)}
  lengths_P, num_new, num_rows = np.array([7, 4], np.int32), 6, 3
  prompts_PS = random_tokens(2, 7)
  new_BT = random_tokens(2 * num_rows, num_new)
  slots_B = np.repeat(np.arange(2, dtype=np.int32), num_rows)
  max_lengths_P = lengths_P + num_new

  # All but the last token of a prompt is shared by its rows.
  prefix = jax.jit(functools.partial(decoder.apply, method='prefill'))(
    variables, prompts_PS, lengths_P=lengths_P - 1, max_lengths_P=max_lengths_P
  )
  cache = empty_cache(
    config,
    jnp.float32,
    num_groups=1,
    num_slots=2,
    slot_places=64,
    num_rows=2 * num_rows,
    num_places=64,
  )
  cache = cache.fill_slots(prefix, jnp.zeros(2, jnp.int32), jnp.arange(2))
  decode = jax.jit(functools.partial(decoder.apply, method='decode'))
  lasts_B = prompts_PS[slots_B, lengths_P[slots_B] - 1]
  got = []
  for i, tokens_B in enumerate([lasts_B, *new_BT.T]):
    lanes = Lanes(
      slots_B,
      lengths_P[slots_B] - 1,
      np.full(2 * num_rows, i, np.int32),
      max_lengths_P[slots_B],
    )
    logits_BV, cache = decode(variables, tokens_B, lanes, cache)
    got.append(np.asarray(logits_BV))
  got = np.stack(got, axis=1)

  for row in range(2 * num_rows):
    length = lengths_P[slots_B[row]]
    whole_1T = np.concatenate([prompts_PS[slots_B[row]][:length], new_BT[row]])[None]
    want = torch_logits(name, whole_1T)[0, length - 1 :]
    assert np.abs(got[row] - want).max() < TOLERANCE


def test_longrope_takes_the_long_factors_by_row(load):
  """A long row in the batch does not change the numbers of a short one."""
  config, params = load('phi3_longrope_short_row')
  rope = dataclasses.replace(config.rope, original_max_positions=10)
  config = dataclasses.replace(config, rope=rope)
  tokens_BT = random_tokens(2, 14)
  segments_BT = (np.arange(14)[None] < np.array([8, 14])[:, None]).astype(np.int32)
  both = full_logits(config, params, tokens_BT, segments_BT=segments_BT)
  alone = full_logits(config, params, tokens_BT[:1, :8])
  np.testing.assert_allclose(both[0, :8], alone[0], atol=1e-5)


def test_stories260k_matches_transformers():
  if not STORIES.is_dir():
    pytest.skip(f'{STORIES} is not there: a real model to compare with, not shipped.')
  model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype='float32')
  config = DecoderConfig.from_hf(load_hf_config(STORIES))
  params = load_hf(STORIES, config, make_mesh('', jax.devices()[:1]))
  tokens_BT = np.random.default_rng(0).integers(3, 512, (2, 120)).astype(np.int32)
  with torch.no_grad():
    want = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  got = full_logits(config, params, tokens_BT)
  assert np.abs(got - want).max() < TOLERANCE
