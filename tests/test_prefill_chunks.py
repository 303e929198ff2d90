"""Long prompts are read a chunk at a time, with the numbers of reading all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.models.attention import NO_WINDOW, attention
from mrjax.models.attention_blocks import chunk_attention
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sampling import compiled, prefill
from mrjax.sampling.engine import Engine
from mrjax.sampling.requests import Request, SamplingParams
from mrjax.sharding.mesh import make_mesh

SIZES = {
  'vocab_size': 42,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'max_position_embeddings': 512,
  'initializer_range': 0.3,
}
MODELS = {
  'window': {'architectures': ['MistralForCausalLM'], 'sliding_window': 45},
  'softcap': {
    'architectures': ['Gemma2ForCausalLM'],
    'sliding_window': 13,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 5.0,
    'query_pre_attn_scalar': 5,
    'hidden_activation': 'gelu_pytorch_tanh',
  },
  'longrope': {
    'architectures': ['Phi3ForCausalLM'],
    'original_max_position_embeddings': 90,
    'rope_scaling': {
      'type': 'longrope',
      'short_factor': [1.0, 1.1, 1.2, 1.5],
      'long_factor': [1.0, 2.0, 9.5, 30.0],
    },
  },
}


def model(name: str):
  config = DecoderConfig.from_hf(SIZES | MODELS[name])
  init = lambda: Decoder(config).init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))
  return config, jax.jit(init)()['params']


@pytest.mark.parametrize('softcap', [None, 1.5])
@pytest.mark.parametrize('window', [NO_WINDOW, 5, 23])
@pytest.mark.parametrize('block', [8, 24])
def test_attention_of_a_chunk_is_that_of_its_rows_in_the_whole(block, window, softcap):
  rng = np.random.default_rng(1)
  B, S, T, N, K, H = 2, 72, 24, 6, 3, 4
  q, k, v = (jnp.asarray(rng.normal(size=(B, S, n, H)), jnp.float32) for n in (N, K, K))
  kwargs = {'window': window, 'scale': 0.7, 'softcap': softcap}
  ones = np.ones((B, S), np.int32)
  positions = np.broadcast_to(np.arange(S), (B, S))
  want = attention(
    q, k, v, positions_BT=positions, segments_BT=ones, backend='reference', **kwargs
  )
  for start in range(0, S, T):
    later = np.arange(S)[:, None, None] >= start + T
    k_BKSH, v_BKSH = (jnp.where(later, jnp.nan, x).swapaxes(1, 2) for x in (k, v))
    here = slice(start, start + T)
    got = chunk_attention(
      q[:, here], k_BKSH, v_BKSH, start=start, block=block, **kwargs
    )
    np.testing.assert_allclose(got, want[:, here], atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_chunks_give_the_keys_and_values_of_the_whole(name):
  config, params = model(name)
  decoder = Decoder(config, scan_layers=False)
  apply = functools.partial(
    decoder.apply, {'params': unstack_layers(params, config.num_layers)}
  )
  tokens_PS = jax.random.randint(jax.random.key(0), (3, 96), 0, 41)
  lengths, limits = jnp.array([96, 70, 5]), jnp.array([100, 80, 120])
  whole = jax.jit(functools.partial(apply, method='prefill'))(
    tokens_PS, lengths_P=lengths, max_lengths_P=limits
  )
  chunk = jax.jit(functools.partial(apply, method='prefill_chunk'))
  parts = jax.tree.map(jnp.zeros_like, whole)
  for start in range(0, 96, 32):
    tokens_PT = tokens_PS[:, start : start + 32]
    parts = chunk(tokens_PT, parts, start=jnp.int32(start), max_lengths_P=limits)
  for i, length in enumerate(lengths.tolist()):
    cut = lambda tree, i=i, length=length: jax.tree.map(
      lambda x: x[i, :, :length], tree
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5), cut(parts), cut(whole)
    )


def requests() -> list[Request]:
  rng = np.random.default_rng(5)
  greedy = SamplingParams(temperature=0.0, max_new_tokens=9)
  return [
    Request(f'p{i}', tuple(rng.integers(0, 41, length).tolist()), 1 + i, greedy)
    for i, length in enumerate([150, 65, 249, 60, 129])
  ]


# Rounding to 8 bits may turn a last bit into a step of the stored numbers.
@pytest.mark.parametrize(
  ('name', 'cache_dtype', 'atol', 'mesh'),
  [
    ('window', 'int8', 5e-3, 'data:1'),
    ('longrope', 'float32', 1e-4, 'data:2,tensor:2'),
  ],
)
def test_chunks_change_no_completion(monkeypatch, name, cache_dtype, atol, mesh):
  config, params = model(name)
  mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == 'data:1' else 4])

  def rows():
    monkeypatch.setattr(compiled, '_PROGRAMS', {})
    engine = Engine(config, params, mesh, max_batch=16, cache_dtype=cache_dtype)
    done = list(engine.generate(requests()))
    return {(r.problem_id, r.sample_index): (r.token_ids, r.logprobs) for r in done}

  whole = rows()
  monkeypatch.setattr(prefill, 'CHUNK', 32)
  chunks = rows()
  assert len(chunks) == len(whole) == 15
  for key, (token_ids, logprobs) in whole.items():
    assert chunks[key][0] == token_ids
    np.testing.assert_allclose(chunks[key][1], logprobs, atol=atol)


def memory_of_reading(length: int) -> int:
  """Bytes of results and temporaries for one prompt, with wide feed-forward blocks."""
  config = DecoderConfig.from_hf(
    SIZES
    | {
      'architectures': ['LlamaForCausalLM'],
      'intermediate_size': 512,
      'num_attention_heads': 2,
      'num_key_value_heads': 1,
    }
  )
  decoder = Decoder(config, scan_layers=False)
  init = lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  read = jax.jit(functools.partial(prefill.read_prompts, decoder))
  params = jax.eval_shape(init)['params']
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
  lowered = read.lower(
    params, shape(1, length), lengths_P=shape(1), max_lengths_P=shape(1)
  )
  memory = lowered.compile().memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_memory_grows_with_the_chunk_and_what_is_stored(monkeypatch):
  stored = 2 * 2 * 1 * 8 * 4  # bytes a token: layers, keys and values, heads, width
  activations = 512 * 4
  grows = lambda: (memory_of_reading(2048) - memory_of_reading(1024)) / 1024
  assert grows() > activations
  monkeypatch.setattr(prefill, 'CHUNK', 128)
  assert stored <= grows() < 3 * stored < activations
  small = memory_of_reading(1024)
  monkeypatch.setattr(prefill, 'CHUNK', 512)
  assert memory_of_reading(1024) - small > (512 - 128) * activations
