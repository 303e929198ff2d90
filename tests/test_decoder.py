"""The decoder's own equalities; those with transformers are in `test_parity.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.models.cache import make_cache
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers

CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['MistralForCausalLM'],
    'vocab_size': 37,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 6,
    'sliding_window': 5,
    'initializer_range': 0.2,
  }
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 37)


def init(decoder: Decoder):
  return decoder.init(jax.random.key(1), TOKENS)['params']


@pytest.mark.parametrize('num_outputs', [1, 37, 5 * 37])
def test_value_head_is_a_float32_product_with_the_hidden_states(num_outputs):
  decoder = Decoder(CONFIG, dtype=jnp.bfloat16, num_value_outputs=num_outputs)
  params = init(decoder)
  assert 'lm_head' not in params
  bias = jnp.arange(num_outputs, dtype=jnp.float32)
  params['value_head']['bias'] = bias
  values = decoder.apply({'params': params}, TOKENS)
  hidden = decoder.apply({'params': params}, TOKENS, method='hidden')
  assert hidden.dtype == jnp.bfloat16
  assert values.dtype == jnp.float32
  kernel = np.asarray(params['value_head']['kernel'], np.float64)
  want = np.asarray(hidden, np.float64) @ kernel + np.asarray(bias)
  assert values.shape == (2, 11, num_outputs)
  np.testing.assert_allclose(values, want, atol=1e-5)


def test_value_model_and_language_model_share_the_backbone():
  language, value = Decoder(CONFIG), Decoder(CONFIG, num_value_outputs=3)
  params = init(language)
  rest = {k: v for k, v in params.items() if k != 'lm_head'}
  a = language.apply({'params': params}, TOKENS, method='hidden')
  b = value.apply({'params': rest}, TOKENS, method='hidden')
  np.testing.assert_array_equal(a, b)


def test_several_tokens_at_once_decode_like_one_by_one():
  decoder = Decoder(CONFIG, scan_layers=False)
  params = unstack_layers(init(Decoder(CONFIG)), CONFIG.num_layers)
  lengths, limits = jnp.array([4, 3]), jnp.array([10, 9])
  _, prefix = decoder.apply(
    {'params': params},
    TOKENS[:, :4],
    lengths_P=lengths,
    max_lengths_P=limits,
    method='prefill',
  )
  cache = make_cache(CONFIG, prefix, prompt_lengths_P=lengths, num_rows=2, num_places=7)
  new = TOKENS[:, 5:11]

  def decode(cache, start, stop):
    return decoder.apply(
      {'params': params},
      new[:, start:stop],
      positions_BT=lengths[:, None] + jnp.arange(start, stop),
      max_lengths_B=limits,
      cache=cache,
      method='decode',
    )

  first, once = decode(cache, 0, 2)
  rest, once = decode(once, 2, 6)
  together = jnp.concatenate([first, rest], axis=1)
  single, step_cache = [], cache
  for i in range(6):
    logits, step_cache = decode(step_cache, i, i + 1)
    single.append(logits[:, 0])
  np.testing.assert_allclose(together, jnp.stack(single, axis=1), atol=1e-5)
  np.testing.assert_array_equal(once.own_positions_BC, step_cache.own_positions_BC)


def test_low_precision_gives_float32_logits():
  decoder = Decoder(CONFIG, dtype=jnp.bfloat16)
  assert decoder.apply({'params': init(decoder)}, TOKENS).dtype == jnp.float32
