"""DecoderConfig: what config.json files of several ages and families say."""

import dataclasses
import json

import pytest

from mrjax.models.config import (
  ARCHITECTURES,
  ConfigError,
  DecoderConfig,
  load_hf_config,
)

BASE = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 50,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 64,
}
LLAMA3 = {
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
LONGROPE = {'short_factor': [1.0, 1.5], 'long_factor': [2.0, 9.5]}


def of(family: str, **changes) -> DecoderConfig:
  name = next(name for name, key in ARCHITECTURES.items() if key == family)
  return DecoderConfig.from_hf(BASE | {'architectures': [name]} | changes)


@pytest.mark.parametrize(
  ('family', 'old', 'new'),
  [
    (
      'llama',
      {'rope_theta': 5e5, 'rope_scaling': None, 'torch_dtype': 'bfloat16'},
      {
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5},
        'dtype': 'float32',
      },
    ),
    (
      'llama',
      {'rope_theta': 5e5, 'rope_scaling': LLAMA3 | {'rope_type': 'llama3'}},
      {'rope_parameters': LLAMA3 | {'rope_type': 'llama3', 'rope_theta': 5e5}},
    ),
    (
      'llama',
      {'rope_theta': 1e4, 'rope_scaling': {'type': 'linear', 'factor': 2.5}},
      {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.5}},
    ),
    (
      'phi3',
      {
        'rope_theta': 1e4,
        'original_max_position_embeddings': 16,
        'rope_scaling': LONGROPE | {'type': 'su'},
      },
      {
        'rope_parameters': LONGROPE
        | {
          'rope_type': 'longrope',
          'rope_theta': 1e4,
          'original_max_position_embeddings': 16,
        }
      },
    ),
    (
      'phi3',
      {'rope_theta': 1e4, 'partial_rotary_factor': 0.5},
      {
        'rope_parameters': {
          'rope_type': 'default',
          'rope_theta': 1e4,
          'partial_rotary_factor': 0.5,
        }
      },
    ),
    (
      'qwen2',
      {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 2},
      {
        'use_sliding_window': True,
        'sliding_window': 8,
        'layer_types': ['full_attention', 'full_attention', 'sliding_attention'],
      },
    ),
    (
      'gemma2',
      {'sliding_window': 8},
      {
        'sliding_window': 8,
        'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
      },
    ),
    (
      'gemma',
      {'hidden_act': 'gelu', 'hidden_activation': None},
      {'hidden_activation': 'gelu_pytorch_tanh'},
    ),
  ],
)
def test_old_and_new_forms_mean_the_same(family, old, new):
  assert of(family, **old) == of(family, **new)


def test_fields_of_a_llama3_file():
  config = of('llama', rope_scaling=LLAMA3 | {'rope_type': 'llama3'}, rope_theta=5e5)
  assert (config.head_dim, config.attention_scale) == (4, 0.5)
  assert config.layer_windows == (None, None, None)
  assert not config.tie_embeddings
  assert dataclasses.asdict(config.rope) == {
    'theta': 5e5,
    'kind': 'llama3',
    'rotary_dim': 4,
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_positions': 8192,
    'short_factors': (),
    'long_factors': (),
    'attention_factor': 1.0,
  }


def test_longrope_attention_factor_follows_the_length_ratio():
  rope = LONGROPE | {'type': 'longrope'}
  config = of('phi3', rope_scaling=rope, original_max_position_embeddings=16)
  # sqrt(1 + ln(64 / 16) / ln 16) = sqrt(1.5)
  assert config.rope.attention_factor == pytest.approx(1.5**0.5)
  assert (config.rope.original_max_positions, config.rope.long_factors) == (
    16,
    (2, 9.5),
  )
  equal = of(
    'phi3',
    rope_scaling=rope,
    original_max_position_embeddings=16,
    max_position_embeddings=16,
  )
  assert equal.rope.attention_factor == 1.0


def test_defaults_of_the_families():
  assert of('qwen3').head_dim == 128
  assert of('gemma').head_dim == 256
  assert of('gemma', head_dim=4).tie_embeddings
  assert of('gemma2', query_pre_attn_scalar=16).attention_scale == 0.25
  assert of('mistral', sliding_window=4096).layer_windows == (4096,) * 3
  assert of('qwen2', sliding_window=8).layer_windows == (None,) * 3
  assert of('qwen2').qkv_bias and not of('qwen2', attention_bias=True).output_bias
  assert not of('mistral', attention_bias=True).qkv_bias


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'architectures': ['MambaForCausalLM']}, "'MambaForCausalLM' is not supported"),
    ({'architectures': None, 'model_type': 'bert'}, "'bert' is not supported"),
    (
      {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
      "'dynamic' is not supported",
    ),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "'yarn' is not supported"),
    ({'rope_scaling': {'type': 'linear'}}, "no field 'factor'"),
    ({'vocab_size': '50'}, "vocab_size is '50', want a positive integer"),
    ({'num_hidden_layers': 0}, 'num_layers is 0, want a positive integer'),
    ({'hidden_act': 'relu'}, "'relu' is not supported"),
    ({'num_key_value_heads': 4}, '6 is not a multiple of num_key_value_heads 4'),
    ({'hidden_size': 25}, '25 is not a multiple of num_attention_heads 6'),
    (
      {'architectures': ['Phi3ForCausalLM'], 'rope_scaling': LONGROPE | {'type': 'su'}},
      "no field 'original_max_position_embeddings'",
    ),
    (
      {
        'architectures': ['Phi3ForCausalLM'],
        'original_max_position_embeddings': 16,
        'rope_scaling': {
          'type': 'su',
          'short_factor': [1.0, 1.0],
          'long_factor': [1.0, 1.0, 1.0],
        },
      },
      'long_factor has 3 entries, want 2',
    ),
    (
      {
        'architectures': ['Qwen2ForCausalLM'],
        'use_sliding_window': True,
        'sliding_window': 4,
        'layer_types': ['full_attention', 'chunked_attention', 'full_attention'],
      },
      'chunked_attention',
    ),
    (
      {
        'architectures': ['Gemma2ForCausalLM'],
        'sliding_window': 4,
        'layer_types': ['full_attention'],
      },
      '1 layer windows for 3 layers',
    ),
    (
      {'architectures': ['MistralForCausalLM'], 'sliding_window': 0},
      'sliding_window is 0',
    ),
  ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
  with pytest.raises(ConfigError, match=message):
    DecoderConfig.from_hf(BASE | changes)


def test_a_missing_field_is_named():
  fields = {name: value for name, value in BASE.items() if name != 'vocab_size'}
  with pytest.raises(ConfigError, match="no field 'vocab_size'"):
    DecoderConfig.from_hf(fields)


def test_load_hf_config_names_what_is_wrong_with_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config\.json does not exist'):
    load_hf_config(tmp_path)
  path = tmp_path / 'config.json'
  path.write_text('{"vocab_size": 5')
  with pytest.raises(ConfigError, match='not valid JSON'):
    load_hf_config(tmp_path)
  path.write_text('[1]')
  with pytest.raises(ConfigError, match='holds a list'):
    load_hf_config(tmp_path)
  path.write_text(json.dumps(BASE))
  assert DecoderConfig.from_hf(load_hf_config(tmp_path)).vocab_size == 50
