"""The engine gives each row what a plain sampler gives it alone, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_sampler import (
  GEMMA2,
  LLAMA,
  ONE_DEVICE,
  forward,
  init_params,
  mesh_of,
  naive_row,
  rows_of,
)

from mrjax.models.decoder import Decoder
from mrjax.sampling import compiled, prefill
from mrjax.sampling.engine import Engine
from mrjax.sampling.requests import Request, RequestError, SamplingParams
from mrjax.sharding.mesh import MeshError


def make_engine(config=LLAMA, spec=ONE_DEVICE, **kwargs) -> Engine:
  mesh = mesh_of(spec)
  return Engine(config, init_params(config, mesh), mesh, **kwargs)


@functools.cache
def shared_engine(config=LLAMA) -> Engine:
  return make_engine(config, max_batch=24)


def make_requests(num=5, *, num_samples=3, **changes) -> list[Request]:
  """Prompts of different lengths, each with its own sampling parameters."""
  rng = np.random.default_rng(0)
  kinds = [
    {'temperature': 0.9, 'top_p': 0.9},
    {'temperature': 0.0},
    {'temperature': 1.1, 'top_k': 7, 'min_p': 0.02},
    {'temperature': 1.0, 'repetition_penalty': 1.3},
    {'temperature': 0.7, 'top_p': 0.8, 'top_k': 20},
  ]
  return [
    Request(
      f'problem-{i}',
      tuple(rng.integers(1, 54, size=rng.integers(1, 20)).tolist()),
      num_samples=num_samples,
      params=SamplingParams(
        **{
          'max_new_tokens': 9 + i % 3,
          'seed': 11 + i,
          'stop_ids': (2, 3, 20, 30, 40),
          **kinds[i % len(kinds)],
          **changes,
        }
      ),
    )
    for i in range(num)
  ]


def ids_of(completions) -> dict:
  return {name: row.token_ids for name, row in rows_of(completions).items()}


@pytest.mark.parametrize('config', [LLAMA, GEMMA2], ids=['llama', 'gemma2'])
def test_rows_are_those_of_a_plain_sampler(config):
  requests = make_requests()
  rows = rows_of(shared_engine(config).generate(requests))
  assert len(rows) == 15
  for request in requests:
    for index in (0, 2):
      row = rows[request.problem_id, index]
      naive = naive_row(config, request, index)
      ids = naive.token_ids
      assert row.token_ids == ids
      np.testing.assert_allclose(row.logprobs, naive.logprobs, atol=2e-4)
      np.testing.assert_allclose(
        row.sampling_logprobs, naive.sampling_logprobs, atol=2e-4
      )
      stopped = ids[-1] in request.params.stop_ids
      assert row.finish_reason == ('stop' if stopped else 'length')
      assert row.num_tokens == len(ids) <= request.params.max_new_tokens
      assert row.seed == request.params.seed
  reasons = {row.finish_reason for row in rows.values()}
  assert reasons == {'stop', 'length'}  # the test saw both


def test_the_cache_grows_without_a_seam():
  request = make_requests(1, max_new_tokens=103, stop_ids=(), temperature=0.8)[0]
  engine = make_engine(max_batch=14)
  row = rows_of(engine.generate([request]))['problem-0', 1]
  assert sum('resize' in name for name in engine.compiled.names) == 1
  assert row.token_ids == naive_row(LLAMA, request, 1).token_ids


def test_rows_do_not_depend_on_order_neighbours_or_batch_size():
  requests = make_requests(7, num_samples=4)
  expected = ids_of(shared_engine().generate(requests))
  assert ids_of(shared_engine().generate(requests[::-1])) == expected
  alone = ids_of(shared_engine().generate(requests[3:4]))
  assert alone == {name: expected[name] for name in alone}
  assert ids_of(make_engine(max_batch=3).generate(requests)) == expected


def test_samples_may_be_asked_for_in_parts():
  whole = make_requests(3, num_samples=7)
  expected = ids_of(shared_engine().generate(whole))
  parts = []
  for request in whole:
    common = (request.problem_id, request.prompt_ids)
    parts.append(Request(*common, 2, request.params))
    parts.append(Request(*common, 5, request.params, first_sample_index=2))
  assert ids_of(shared_engine().generate(parts)) == expected


@pytest.mark.parametrize(
  'spec', ['data:8', 'fsdp:8', 'fsdp:4,tensor:2', 'data:2,fsdp:2,tensor:2']
)
def test_meshes_give_the_same_rows(spec):
  requests = make_requests(5, num_samples=3)
  expected = rows_of(shared_engine().generate(requests))
  rows = rows_of(make_engine(spec=spec, max_batch=16).generate(requests))
  assert rows.keys() == expected.keys()
  assert rows == expected


def test_prompts_read_in_blocks_give_the_same_rows(monkeypatch):
  requests = make_requests(8, num_samples=2)
  expected = ids_of(shared_engine().generate(requests))
  monkeypatch.setattr(prefill, 'CHUNK', 3 * 64)  # three prompts at once
  assert ids_of(make_engine(max_batch=16).generate(requests)) == expected


def test_seeds_and_indices_change_drawn_rows_alone():
  ids = ids_of(shared_engine().generate(make_requests(2, num_samples=6, stop_ids=())))
  drawn = {tuple(ids['problem-0', i]) for i in range(6)}
  assert len(drawn) > 3
  assert len({tuple(ids['problem-1', i]) for i in range(6)}) == 1  # temperature 0
  other = ids_of(
    shared_engine().generate(make_requests(2, num_samples=6, stop_ids=(), seed=99))
  )
  assert other['problem-1', 0] == ids['problem-1', 0]
  assert other['problem-0', 0] != ids['problem-0', 0]


def test_changing_controls_compiles_nothing(monkeypatch):
  monkeypatch.setattr(compiled, '_PROGRAMS', {})
  engine = make_engine(max_batch=15)
  list(engine.generate(make_requests()))
  assert engine.compiled.count == 3  # an empty state, filling slots, decoding
  assert engine.compiled.seconds > 0
  list(engine.generate(make_requests(seed=3, temperature=0.3, top_p=0.2, stop_ids=())))
  assert engine.compiled.count == 3
  again = make_engine(max_batch=15)
  list(again.generate(make_requests()))
  assert again.compiled.count == 0  # another engine of the same shape


def test_a_callback_ends_rows_on_the_host():
  requests = make_requests(3, num_samples=2, stop_ids=(), max_new_tokens=70)
  whole = ids_of(shared_engine().generate(requests))

  def stop_after_a_five(request, token_ids):
    assert request in requests
    return token_ids.index(5) + 1 if 5 in token_ids else None

  rows = rows_of(shared_engine().generate(requests, should_stop=stop_after_a_five))
  assert any(5 in ids for ids in whole.values())
  assert any(5 not in ids for ids in whole.values())
  for name, ids in whole.items():
    expected = ids[: ids.index(5) + 1] if 5 in ids else ids
    assert rows[name].token_ids == expected
    assert len(rows[name].logprobs) == len(expected)
    assert rows[name].finish_reason == ('stop' if 5 in ids else 'length')


def test_scores_are_the_log_probabilities_of_a_full_forward():
  engine = shared_engine()
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 54, size=size).tolist() for size in (1, 40, 7, 33, 120)] * 6
  scores = engine.score(texts)
  params = init_params(LLAMA, mesh_of(ONE_DEVICE))
  for text, logps_T in zip(texts[:5], scores[:5]):
    padded_BT = jnp.asarray([text + [0] * (128 - len(text))])
    logits_TV = forward(Decoder(LLAMA))(params, padded_BT)[0]
    expected_TV = jax.nn.log_softmax(logits_TV)
    expected_T = [0.0] + [expected_TV[t, text[t + 1]] for t in range(len(text) - 1)]
    np.testing.assert_allclose(logps_T, expected_T, atol=1e-4)
  for first, again in zip(scores[:5], scores[5:10]):
    np.testing.assert_allclose(first, again, atol=1e-4)


def test_drawn_rows_score_as_they_were_drawn():
  requests = make_requests(num_samples=2)
  rows = list(shared_engine().generate(requests))
  prompts = {request.problem_id: list(request.prompt_ids) for request in requests}
  texts = [prompts[row.problem_id] + row.token_ids for row in rows]
  for row, logps_T in zip(rows, shared_engine().score(texts)):
    np.testing.assert_allclose(logps_T[-row.num_tokens :], row.logprobs, atol=1e-4)


def test_no_requests_give_no_rows():
  assert list(shared_engine().generate([])) == []
  assert shared_engine().score([]) == []


def test_donated_parameters_are_given_back():
  mesh = mesh_of(ONE_DEVICE)
  params = init_params(LLAMA, mesh)
  expected = ids_of(shared_engine().generate(make_requests(2)))
  engine = Engine(LLAMA, params, mesh, max_batch=24, donate_params=True)
  stacked = jax.tree.leaves(params['layers'])
  assert all(leaf.is_deleted() for leaf in stacked)
  assert ids_of(engine.generate(make_requests(2))) == expected


def test_bfloat16_keeps_its_weights_and_cache_in_bfloat16():
  engine = make_engine(dtype=jnp.bfloat16, max_batch=4)
  assert engine._weights[0]['layers_1']['mlp']['up']['kernel'].dtype == jnp.bfloat16
  rows = rows_of(engine.generate(make_requests(1)))
  assert all(np.isfinite(row.logprobs).all() for row in rows.values())


def test_a_prompt_that_is_too_long_is_refused_before_any_work(caplog):
  long = Request('long', (7,) * 110, 2, SamplingParams(max_new_tokens=20))
  engine = make_engine(max_batch=4)
  with pytest.raises(RequestError, match=r"'long' has 110 tokens.*limit is\s+128"):
    engine.generate([*make_requests(), long])
  assert engine.compiled.count == 0


def test_long_prompts_are_cut_at_their_start_where_allowed(caplog):
  prompt = tuple(np.random.default_rng(1).integers(1, 54, size=130).tolist())
  params = SamplingParams(max_new_tokens=10, temperature=0.0)
  engine = make_engine(max_batch=4, truncate_prompts=True)
  with caplog.at_level('WARNING'):
    cut = ids_of(engine.generate([Request('p', prompt, 1, params)]))
  assert '1 of 1 prompts were cut' in caplog.text
  assert cut == ids_of(engine.generate([Request('p', prompt[-118:], 1, params)]))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'temperature': -1.0}, 'temperature is -1'),
    ({'temperature': float('nan')}, 'temperature is nan'),
    ({'top_p': 0.0}, '0 < top_p <= 1'),
    ({'top_p': 1.5}, '0 < top_p <= 1'),
    ({'top_k': -1}, 'top_k is -1'),
    ({'min_p': 2.0}, 'min_p is 2'),
    ({'max_new_tokens': 0}, 'max_new_tokens is 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'seed': 2**32}, r'seed < 2\*\*32'),
  ],
)
def test_parameters_out_of_range_are_refused(changes, message):
  with pytest.raises(RequestError, match=message):
    SamplingParams(**changes)


def test_requests_out_of_range_are_refused():
  with pytest.raises(RequestError, match='no tokens'):
    Request('p', ())
  with pytest.raises(RequestError, match='num_samples'):
    Request('p', (1,), 0)
  with pytest.raises(RequestError, match='Sample indices'):
    Request('p', (1,), 2, first_sample_index=-1)
  with pytest.raises(RequestError, match='token id 54; the model has ids 0 to 53'):
    shared_engine().generate(
      [Request('p', (1, 54), params=SamplingParams(max_new_tokens=5))]
    )
  with pytest.raises(RequestError, match='Text 1 has 0 tokens'):
    shared_engine().score([[1], []])
  with pytest.raises(RequestError, match='token id -2'):
    shared_engine().score([[1, -2]])


def test_meshes_that_do_not_divide_are_refused():
  with pytest.raises(MeshError, match='max_batch 4 is less than 8'):
    make_engine(spec='data:8', max_batch=4)
  params = init_params(LLAMA, mesh_of(ONE_DEVICE))
  with pytest.raises(MeshError, match='does not divide'):
    Engine(LLAMA, params, mesh_of('tensor:8'))


def test_rows_without_finite_logits_end_as_errors_and_the_others_go_on():
  mesh = mesh_of(ONE_DEVICE)
  params = init_params(LLAMA, mesh)
  bad = 7  # a token whose embedding gives no finite logits once it is read
  table = params['embed']['embedding']
  params['embed']['embedding'] = table.at[bad].set(np.nan)
  requests = make_requests(6, num_samples=3, stop_ids=())
  rows = rows_of(Engine(LLAMA, params, mesh, max_batch=8).generate(requests))
  expected = rows_of(shared_engine().generate(requests))
  reasons = {row.finish_reason for row in rows.values()}
  assert reasons == {'error', 'length'}
  for request in requests:
    for i in range(3):
      name = request.problem_id, i
      whole = expected[name].token_ids
      ids = whole[: whole.index(bad) + 1] if bad in whole[:-1] else whole
      if bad in request.prompt_ids:
        ids = []
      assert rows[name].token_ids == ids
      assert len(rows[name].logprobs) == len(ids)
      failed = len(ids) < len(whole)
      assert rows[name].finish_reason == ('error' if failed else 'length')
