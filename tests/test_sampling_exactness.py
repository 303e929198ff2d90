"""On a CPU a row has the same bits whatever runs beside it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling.engine import Engine
from mrjax.sampling.requests import Request, SamplingParams
from mrjax.sharding.mesh import axis_sizes, make_mesh

# A product over many inputs to few outputs is what XLA shares out in most ways.
CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 213,
    'hidden_size': 48,
    'intermediate_size': 384,
    'num_hidden_layers': 2,
    'num_attention_heads': 6,
    'num_key_value_heads': 3,
    'head_dim': 16,
    'max_position_embeddings': 512,
    'initializer_range': 0.2,
  }
)
PARAMS = SamplingParams(
  temperature=0.9, top_p=0.9, max_new_tokens=60, seed=3, stop_ids=(4, 5, 6)
)


@functools.cache
def params():
  init = lambda: Decoder(CONFIG).init(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))
  return jax.jit(init)()['params']


@functools.cache
def requests() -> list[Request]:
  """Prompts of 1 to 120 tokens with 1 to 9 samples each."""
  rng = np.random.default_rng(7)
  lengths = [1, 120, 64, 65, 2, 30, 99, 77, 20]
  return [
    Request(f'p{i}', tuple(rng.integers(7, 211, length).tolist()), i + 1, PARAMS)
    for i, length in enumerate(lengths)
  ]


def rows_of(asked, *, max_batch=64, mesh='data:1'):
  sizes = axis_sizes(mesh).values()
  mesh = make_mesh(mesh, jax.devices()[: math.prod(sizes)])
  engine = Engine(CONFIG, params(), mesh, max_batch=max_batch)
  return {
    (row.problem_id, row.sample_index): (
      row.token_ids,
      row.finish_reason,
      row.logprobs,
      row.sampling_logprobs,
    )
    for row in engine.generate(asked)
  }


@functools.cache
def expected():
  rows = rows_of(requests())
  assert len(rows) == 45
  assert {reason for _, reason, _, _ in rows.values()} == {'stop', 'length'}
  return rows


def one_by_one() -> list[Request]:
  return [
    dataclasses.replace(request, num_samples=1, first_sample_index=i)
    for request in requests()
    for i in range(request.num_samples)
  ]


def with_a_long_neighbour() -> list[Request]:
  more = dataclasses.replace(PARAMS, max_new_tokens=130, stop_ids=())
  prompt = requests()[1].prompt_ids * 2
  return [*requests(), Request('long', prompt, 3, more)]


CASES = {
  'reversed': lambda: requests()[::-1],
  'alone': lambda: requests()[4:5],
  'short prompts only': lambda: [r for r in requests() if len(r.prompt_ids) < 65],
  'one by one': one_by_one,
  'with a long neighbour': with_a_long_neighbour,
}


@pytest.mark.parametrize('case', CASES)
def test_neighbours_change_no_bit(case):
  rows = rows_of(CASES[case]())
  assert sum(rows[name] == row for name, row in expected().items() if name in rows) == (
    len(rows) - 3 * (case == 'with a long neighbour')
  )


@pytest.mark.parametrize('max_batch', [5, 192])
def test_the_number_of_lanes_changes_no_bit(max_batch):
  many = [dataclasses.replace(r, num_samples=21) for r in requests()]
  rows = rows_of(many if max_batch > 64 else requests(), max_batch=max_batch)
  assert {name: rows[name] for name in expected()} == expected()


def test_a_lane_alone_changes_no_bit():
  rows = rows_of(requests()[:3], max_batch=1)
  assert rows == {name: row for name, row in expected().items() if name in rows}


@pytest.mark.parametrize('mesh', ['data:2', 'tensor:3', 'data:2,tensor:3'])
def test_meshes_change_no_bit(mesh):
  assert rows_of(requests(), max_batch=30, mesh=mesh) == expected()


def test_nor_one_of_a_log_probability_of_a_text():
  texts = [request.prompt_ids for request in requests() if len(request.prompt_ids) > 1]

  def score(spec, max_batch):
    mesh = make_mesh(spec, jax.devices()[: math.prod(axis_sizes(spec).values())])
    return Engine(CONFIG, params(), mesh, max_batch=max_batch).score(texts)

  scores = score('data:1', 64)
  for spec, max_batch in (('tensor:3', 5), ('data:2,tensor:3', 4)):
    for a, b in zip(score(spec, max_batch), scores, strict=True):
      np.testing.assert_array_equal(a, b)
