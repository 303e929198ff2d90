"""Planned memory is that of the arrays, and enough for the programs."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import trees
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs.sampling_memory import rows_at_once
from mrjax.sampling import programs
from mrjax.sampling.drawing import Models
from mrjax.sampling.memory import MemoryPlan, plan_memory, weight_bytes
from mrjax.sampling.plan import Layout
from mrjax.sampling.requests import Request, SamplingParams
from mrjax.sampling.weights import split_layers
from mrjax.sharding.mesh import make_mesh

CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 334,
    'hidden_size': 48,
    'intermediate_size': 80,
    'num_hidden_layers': 3,
    'num_attention_heads': 6,
    'num_key_value_heads': 2,
    'head_dim': 16,
    'max_position_embeddings': 512,
  }
)
LAYOUT = Layout(
  groups=5,
  group_size=4,
  slots=2,
  slot_places=128,
  slot_samples=7,
  place_buckets=(64, 192),
)


def make_decoder(dtype=jnp.float32) -> Decoder:
  return Decoder(CONFIG, dtype=dtype, scan_layers=False, fixed_tiles=True)


def on_device_0(tree) -> int:
  device = jax.devices()[0]
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.parametrize('spec', ['data:1', 'data:2,tensor:2'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_weights_are_what_a_device_holds(spec, dtype):
  mesh = make_mesh(spec, jax.devices()[: 4 if '2' in spec else 1])
  init = lambda: Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = split_layers(jax.jit(init)()['params'], mesh, dtype=dtype, donate=False)
  assert weight_bytes(make_decoder(dtype), mesh) == on_device_0(params)


@pytest.mark.parametrize('spec', ['data:1', 'data:2,tensor:2'])
@pytest.mark.parametrize(
  ('cache_dtype', 'penalises'), [('float32', True), ('bfloat16', False), ('int8', True)]
)
def test_the_state_is_what_a_device_holds(spec, cache_dtype, penalises):
  mesh = make_mesh(spec, jax.devices()[: 4 if '2' in spec else 1])
  models = Models(make_decoder())
  planned = plan_memory(
    models, mesh, LAYOUT, cache_dtype=cache_dtype, num_stops=16, penalises=penalises
  )
  held = {}
  for places in LAYOUT.place_buckets:
    state = programs.empty_state(
      models,
      jnp.dtype(cache_dtype),
      LAYOUT,
      num_places=places,
      shards=mesh.shape['data'],
      num_stops=16,
      penalises=penalises,
    )
    state = jax.device_put(state, programs.state_shardings(state, mesh))
    held[places] = on_device_0(state)
  assert (planned.growth, planned.state) == (held[64], held[192])


@pytest.mark.parametrize('cache_dtype', ['float32', 'int8'])
def test_programs_stay_below_the_plan(cache_dtype):
  mesh = make_mesh('data:1', jax.devices()[:1])
  models = Models(make_decoder())
  planned = plan_memory(models, mesh, LAYOUT, cache_dtype=cache_dtype)
  init = lambda: Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = split_layers(jax.jit(init)()['params'], mesh, dtype=np.float32, donate=False)
  state = programs.empty_state(
    models, jnp.dtype(cache_dtype), LAYOUT, num_places=192, shards=1, num_stops=8
  )
  B = LAYOUT.lanes
  decode = programs.decode_program(models, mesh, num_steps=32)
  arguments = (params, None), state, np.zeros(B, bool), np.zeros(1, np.int32)
  with jax.set_mesh(mesh):
    compiled = jax.jit(decode, donate_argnums=(1,)).lower(*arguments).compile()
  needed = compiled.memory_analysis()
  arrays = needed.argument_size_in_bytes + needed.output_size_in_bytes
  arrays -= needed.alias_size_in_bytes
  assert needed.temp_size_in_bytes + arrays <= planned.total
  # And the plan is no wild guess.
  assert needed.temp_size_in_bytes <= planned.decode < 20 * needed.temp_size_in_bytes
  assert trees.num_bytes(params) == planned.weights


def rows_within(limit, *, max_batch=0, num_samples=300, **kwargs):
  mesh = make_mesh('data:2', jax.devices()[:2])
  params = SamplingParams(max_new_tokens=190, stop_ids=(2,))
  return rows_at_once(
    Models(make_decoder()),
    mesh,
    [Request('p', (1,) * 100, num_samples, params)] * 3,
    cache_dtype=jnp.float32,
    max_batch=max_batch,
    may_stop=False,
    limit=limit,
    **kwargs,
  )


def test_as_many_rows_as_memory_allows_and_rows_need(caplog):
  caplog.set_level(logging.INFO)
  assert rows_within(10**12) == 512  # 256 lanes on each of two CPU devices
  assert 'Memory for 512 rows: ' in caplog.text
  assert 'a device: weights 0.00 GB' in caplog.text
  assert rows_within(10**12, num_samples=9) == 32  # for 27 rows
  fitting = [rows_within(limit * 10**7) for limit in (1, 2, 4, 8, 16)]
  assert fitting == sorted(fitting) and fitting[0] < 128 < fitting[-1]
  assert all(rows.bit_count() == 1 for rows in fitting)
  assert rows_within(10**12, max_batch=77) == 77


def test_what_cannot_fit_is_refused():
  fits = rows_within(4 * 10**7)
  with pytest.raises(ValueError, match=f'Pass --max_batch={fits} or less, or --max_'):
    rows_within(4 * 10**7, max_batch=512)
  with pytest.raises(
    ValueError, match=r'0\.00 GB\. Split the weights with --mesh=tensor'
  ):
    rows_within(10**6)


def test_a_plan_reads_as_one_line():
  plan = MemoryPlan(10**9, 2 * 10**9, 3 * 10**8, 10**8, 2 * 10**8)
  assert plan.total == 3_300_000_000
  assert str(plan) == (
    '3.30 GB a device: weights 1.00 GB, cache and rows 2.00 GB, to work in 0.30 GB'
  )
