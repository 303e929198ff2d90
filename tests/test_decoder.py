"""The decoder's own equalities; those with transformers are in `test_parity.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.models.cache import Lanes, empty_cache, store
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


def start_rows(decoder, params, cache_dtype=jnp.float32):
  """A cache with prompts of 3 and 2 tokens, in other slots than the first."""
  lengths, limits = jnp.array([3, 2]), jnp.array([10, 9])
  prefix = decoder.apply(
    {'params': params},
    TOKENS[:, :4],
    lengths_P=lengths,
    max_lengths_P=limits,
    method='prefill',
  )
  cache = empty_cache(
    CONFIG,
    cache_dtype,
    num_groups=2,
    num_slots=3,
    slot_places=64,
    num_rows=2,
    num_places=64,
  )
  slots = jnp.array([2, 1])
  cache = cache.fill_slots(prefix, jnp.array([0, 1]), slots)
  return cache, Lanes(slots, lengths, jnp.zeros(2, jnp.int32), limits)


def one_more(lanes: Lanes) -> Lanes:
  return lanes._replace(own_lengths_B=lanes.own_lengths_B + 1)


@pytest.mark.parametrize('fixed_tiles', [False, True])
def test_peeked_tokens_are_as_if_each_came_next_alone(fixed_tiles):
  decoder = Decoder(CONFIG, scan_layers=False, fixed_tiles=fixed_tiles)
  params = unstack_layers(init(Decoder(CONFIG)), CONFIG.num_layers)
  decode, peek = (
    jax.jit(functools.partial(decoder.apply, {'params': params}, method=method))
    for method in ('decode', 'peek')
  )
  cache, lanes = start_rows(decoder, params)
  for i in range(3):
    _, cache = decode(TOKENS[:, 4 + i], lanes, cache)
    lanes = one_more(lanes)
  candidates_BT = jnp.array([[5, 1, 9, 5, 0], [3, 3, 2, 8, 7]])
  outputs_BTV, kvs = peek(candidates_BT, lanes, cache)
  for t in range(5):
    expected_BV, after = decode(candidates_BT[:, t], lanes, cache)
    np.testing.assert_allclose(outputs_BTV[:, t], expected_BV, atol=1e-5)
    written = cache.write([(k[:, t], v[:, t]) for k, v in kvs], lanes)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), written, after
    )
    token_B = TOKENS[:, 8]
    np.testing.assert_allclose(
      decode(token_B, one_more(lanes), written)[0],
      decode(token_B, one_more(lanes), after)[0],
      atol=1e-5,
    )


def test_int8_keys_and_values_stay_within_half_a_step():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 5, 7)) * rng.choice([1e-6, 1.0, 300.0], size=(3, 5, 1))
  x[1, 2] = 0
  stored = store(jnp.asarray(x, jnp.float32), jnp.dtype('int8'))
  assert stored.values.dtype == jnp.int8 and stored.scales.dtype == jnp.float32
  back = np.asarray(stored.values, np.float64) * np.asarray(stored.scales)[..., None]
  step = np.abs(x).max(axis=-1, keepdims=True) / 127
  assert (np.abs(back - x) <= 0.5001 * step).all()
  assert not back[1, 2].any()


@pytest.mark.parametrize('cache_dtype', [jnp.bfloat16, jnp.int8])
def test_a_narrow_cache_changes_logits_little(cache_dtype):
  decoder = Decoder(CONFIG, scan_layers=False)
  params = unstack_layers(init(Decoder(CONFIG)), CONFIG.num_layers)
  logits = []
  for dtype in (jnp.float32, jnp.dtype(cache_dtype)):
    cache, lanes = start_rows(decoder, params, dtype)
    for i in range(4):
      new, cache = decoder.apply(
        {'params': params}, TOKENS[:, 4 + i], lanes, cache, method='decode'
      )
      lanes = one_more(lanes)
      logits.append(new)
  for wide, narrow in zip(logits[:4], logits[4:], strict=True):
    error = np.abs(narrow - wide).max() / np.abs(wide).max()
    assert 0 < error < 0.01


def test_low_precision_gives_float32_logits():
  decoder = Decoder(CONFIG, dtype=jnp.bfloat16)
  assert decoder.apply({'params': init(decoder)}, TOKENS).dtype == jnp.float32
