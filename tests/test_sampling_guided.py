"""The engine with a guide: equal to full forward passes, and plain where it is off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_sampler import (
  LLAMA,
  ONE_DEVICE,
  QWEN,
  init_params,
  last_outputs,
  make_guide,
  mesh_of,
  naive_row,
  rows_of,
)

from mrjax.losses.value import ValueHead
from mrjax.models.cache import Lanes, empty_cache
from mrjax.models.decoder import Decoder, unstack_layers
from mrjax.sampling.engine import Engine
from mrjax.sampling.guidance import GuidanceConfig
from mrjax.sampling.guide import GuideModel, by_token, propose, settle
from mrjax.sampling.requests import Request, RequestError, SamplingParams

CASES = {
  'V-mle': (ValueHead('V', num_atoms=5), GuidanceConfig(top_k=4)),
  'V-bernoulli-all': (ValueHead('V', 'bce'), GuidanceConfig('bernoulli', top_k=-1)),
  'Q-mle': (ValueHead('Q', num_atoms=3), GuidanceConfig(top_k=6)),
  'Q-expectation': (ValueHead('Q', 'mse'), GuidanceConfig('expectation', top_k=9)),
}
V_MLE, Q_MLE = CASES['V-mle'], CASES['Q-mle']


def make_requests(etas=(4.0, 0.0, 9.0, 2.0, 6.0, 3.0), **changes) -> list[Request]:
  """Prompts of different lengths; hot enough that tokens beyond the candidates come."""
  rng = np.random.default_rng(1)
  kinds = [
    {'temperature': 1.3},
    {'temperature': 1.0, 'top_p': 0.9},
    {'temperature': 0.0},
    {'temperature': 1.5, 'repetition_penalty': 1.4},
    {'temperature': 0.8, 'top_p': 0.8, 'top_k': 20},
    {'temperature': 1.7, 'min_p': 0.01},
  ]
  return [
    Request(
      f'problem-{i}',
      tuple(rng.integers(1, 54, size=length).tolist()),
      num_samples=2,
      params=SamplingParams(
        **{'max_new_tokens': 12 + i, 'stop_ids': (2, 3), 'seed': i, 'eta': eta}
        | kind
        | changes
      ),
    )
    for i, (eta, kind, length) in enumerate(zip(etas, kinds, (5, 1, 17, 64, 9, 65)))
  ]


@functools.cache
def engine_of(case, max_batch=5) -> Engine:
  mesh = mesh_of(ONE_DEVICE)
  guide = make_guide(*case) if case else None
  return Engine(LLAMA, init_params(LLAMA, mesh), mesh, max_batch=max_batch, guide=guide)


@pytest.mark.parametrize('name', CASES)
def test_rows_are_those_of_full_forward_passes(name):
  guide = make_guide(*CASES[name])
  requests = make_requests()
  rows = rows_of(engine_of(CASES[name]).generate(requests))
  num_outside = 0
  for request in requests:
    row, naive = rows[request.problem_id, 1], naive_row(LLAMA, request, 1, guide)
    assert row.token_ids == naive.token_ids
    np.testing.assert_allclose(row.logprobs, naive.logprobs, atol=3e-4)
    np.testing.assert_allclose(
      row.sampling_logprobs, naive.sampling_logprobs, atol=1e-3
    )
    np.testing.assert_allclose(row.kls, naive.kls, atol=1e-3)
    if request.params.eta:
      np.testing.assert_allclose(row.values, naive.values, atol=3e-4)
      plain = naive_row(LLAMA, request, 1)
      num_outside += plain.token_ids != naive.token_ids
    else:
      assert row.values is None
  assert num_outside >= 3  # guidance changed these rows


@pytest.mark.parametrize('name', CASES)
def test_eta_0_is_plain_decoding_bit_for_bit(name):
  plain = rows_of(engine_of(None).generate(make_requests((0.0,) * 6)))
  some = rows_of(engine_of(CASES[name]).generate(make_requests((0.0, 3.0) * 3)))
  none = rows_of(engine_of(CASES[name]).generate(make_requests((0.0,) * 6)))
  for (problem_id, index), row in plain.items():
    same = [none[problem_id, index]]
    if int(problem_id[-1]) % 2 == 0:
      same.append(some[problem_id, index])
    for other in same:
      assert other.values is None
      assert dataclasses.replace(other, kls=None) == row


def test_a_zero_head_is_plain_decoding_under_mle():
  for head, guidance in (V_MLE, Q_MLE):
    mesh = mesh_of(ONE_DEVICE)
    guide = make_guide(head, guidance)
    zero = jax.tree.map(jnp.zeros_like, guide.params['value_head'])
    guide = dataclasses.replace(guide, params=guide.params | {'value_head': zero})
    engine = Engine(LLAMA, init_params(LLAMA, mesh), mesh, max_batch=5, guide=guide)
    rows = rows_of(engine.generate(make_requests((5.0,) * 6)))
    plain = rows_of(engine_of(None).generate(make_requests((0.0,) * 6)))
    for name, row in rows.items():
      np.testing.assert_allclose(row.values, 0.5, atol=1e-6)
      assert dataclasses.replace(row, kls=None, values=None) == plain[name]


def test_disabled_guidance_is_plain_decoding():
  case = V_MLE[0], GuidanceConfig('disabled')
  rows = rows_of(engine_of(case).generate(make_requests((5.0,) * 6)))
  plain = rows_of(engine_of(None).generate(make_requests((0.0,) * 6)))
  for name, row in rows.items():
    assert row.kls is not None and row.values is None
    assert dataclasses.replace(row, kls=None) == plain[name]


@pytest.mark.parametrize(
  ('case', 'spec'), [(V_MLE, 'data:2,fsdp:2,tensor:2'), (Q_MLE, 'data:8')]
)
def test_meshes_give_the_same_rows(case, spec):
  mesh = mesh_of(spec)
  guide = make_guide(*case, spec=spec)
  engine = Engine(LLAMA, init_params(LLAMA, mesh), mesh, max_batch=16, guide=guide)
  expected = rows_of(engine_of(case).generate(make_requests()))
  for name, row in rows_of(engine.generate(make_requests())).items():
    assert row.token_ids == expected[name].token_ids
    np.testing.assert_allclose(row.kls, expected[name].kls, atol=1e-3)


@pytest.mark.parametrize('head', [V_MLE[0], Q_MLE[0]], ids=['V', 'Q'])
def test_ten_guided_steps_leave_the_cache_of_a_fresh_prefill(head):
  """Of candidates and of tokens that were none."""
  guide = make_guide(head, GuidanceConfig(top_k=5))
  outputs = head.num_outputs(QWEN.vocab_size)
  decoder = Decoder(QWEN, scan_layers=False, num_value_outputs=outputs)
  params = by_token(
    unstack_layers(guide.params, QWEN.num_layers), head, mesh_of(ONE_DEVICE)
  )
  model = GuideModel(decoder, head, guide.guidance)
  rng = np.random.default_rng(3)
  prompts = [rng.integers(54, size=length).tolist() for length in (4, 9, 7)]
  B, num_steps = len(prompts), 10
  lengths_B = jnp.asarray([len(prompt) - 1 for prompt in prompts])
  tokens_BS = np.zeros((B, 16), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BS[row, : len(prompt)] = prompt
  cache = empty_cache(
    QWEN,
    jnp.float32,
    num_groups=B,
    num_slots=1,
    slot_places=16,
    num_rows=B,
    num_places=16,
  )
  most_B = jnp.full(B, 32)
  prefix = decoder.apply(
    {'params': params},
    jnp.asarray(tokens_BS),
    lengths_P=model.num_read(lengths_B),
    max_lengths_P=most_B,
    method='prefill',
  )
  cache = cache.fill_slots(prefix, jnp.arange(B), jnp.zeros(B, jnp.int32))

  @jax.jit
  def step(cache, tokens_B, own_B, logits_BV, drawn_B):
    lanes = model.places(Lanes(jnp.zeros(B, jnp.int32), lengths_B, own_B, most_B))
    guided_B = jnp.ones(B, bool)
    proposal = propose(model, params, cache, lanes, tokens_B, logits_BV, guided_B)
    cache, values_B = settle(model, params, lanes, proposal, drawn_B, guided_B)
    return cache, proposal, values_B

  texts = [list(prompt) for prompt in prompts]
  num_outside = 0
  for i in range(num_steps):
    logits_BV = rng.normal(size=(B, 54)).astype(np.float32)
    best_BV = np.argsort(-logits_BV, axis=1)
    places_B = np.where(rng.random(B) < 0.5, rng.integers(5, size=B), 20)
    num_outside += int((places_B == 20).sum())
    drawn_B = best_BV[np.arange(B), places_B]
    cache, proposal, values_B = step(
      cache,
      jnp.asarray([text[-1] for text in texts]),
      jnp.full(B, i),
      jnp.asarray(logits_BV),
      jnp.asarray(drawn_B),
    )
    for text, token in zip(texts, drawn_B.tolist()):
      text.append(token)
    assert np.isfinite(values_B).all()
    assert np.array_equal(proposal.candidates_Bk, best_BV[:, :5])
  assert 5 < num_outside < 25
  for row, (text, prompt) in enumerate(zip(texts, prompts)):
    whole = decoder.apply(
      {'params': params},
      jnp.asarray([text]),
      lengths_P=jnp.asarray([len(text)]),
      max_lengths_P=jnp.asarray([32]),
      method='prefill',
    )
    start = len(prompt) if head.classifier_type == 'V' else len(prompt) - 1
    for layer, (k, v) in enumerate(whole):
      for own, fresh in ((cache.own_k, k), (cache.own_v, v)):
        np.testing.assert_allclose(
          own[layer].values[row, :, :num_steps],
          fresh[0, :, start : start + num_steps],
          rtol=1e-5,
          atol=1e-5,
        )


def test_a_guide_without_finite_outputs_ends_the_rows_it_guides():
  mesh = mesh_of(ONE_DEVICE)
  guide = make_guide(*V_MLE)
  bad = jax.tree.map(lambda x: x * jnp.nan, guide.params['value_head'])
  guide = dataclasses.replace(guide, params=guide.params | {'value_head': bad})
  engine = Engine(LLAMA, init_params(LLAMA, mesh), mesh, max_batch=5, guide=guide)
  etas = (0.0, 3.0) * 3
  rows = rows_of(engine.generate(make_requests(etas)))
  plain = rows_of(engine_of(None).generate(make_requests((0.0,) * 6)))
  for (problem_id, index), row in rows.items():
    if etas[int(problem_id[-1])]:
      assert row.finish_reason == 'error' and row.token_ids == []
    else:
      assert row.token_ids == plain[problem_id, index].token_ids


def test_values_are_those_of_a_full_forward_pass():
  request = make_requests()[0]
  for head, guidance in (V_MLE, Q_MLE):
    guide = make_guide(head, guidance)
    row = next(iter(engine_of((head, guidance)).generate([request])))
    outputs = head.num_outputs(QWEN.vocab_size)
    decoder = Decoder(QWEN, num_value_outputs=outputs)
    text = [*request.prompt_ids, *row.token_ids]
    read = text if head.classifier_type == 'V' else text[:-1]
    outputs_O = last_outputs(decoder, guide.params, [read])[0]
    if head.classifier_type == 'Q':
      outputs_O = outputs_O.reshape(-1, head.width)[text[-1]]
    expected = (jax.nn.softmax(outputs_O) * head.atoms()).sum()
    assert row.values[-1] == pytest.approx(float(expected), abs=1e-4)


def test_guides_that_do_not_fit_are_refused():
  mesh = mesh_of(ONE_DEVICE)
  params = init_params(LLAMA, mesh)
  guide = make_guide(*V_MLE)
  other = dataclasses.replace(QWEN, vocab_size=55)
  with pytest.raises(ValueError, match='55 token ids and the model 54'):
    Engine(LLAMA, params, mesh, guide=dataclasses.replace(guide, config=other))
  with pytest.raises(ValueError, match='--guidance_mode=bernoulli with a value model'):
    guidance = GuidanceConfig('bernoulli')
    Engine(LLAMA, params, mesh, guide=dataclasses.replace(guide, guidance=guidance))
  with pytest.raises(RequestError, match='there is no value model to guide by'):
    engine_of(None).generate(make_requests())
  short = dataclasses.replace(QWEN, max_positions=64)
  engine = Engine(LLAMA, params, mesh, guide=dataclasses.replace(guide, config=short))
  with pytest.raises(RequestError, match='the limit is 64'):
    engine.generate(make_requests())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eta': -1.0}, 'eta is -1.0, want a finite strength >= 0'),
    ({'eta': float('inf')}, 'eta is inf'),
    (
      {'repetition_penalty': 0.0},
      'repetition_penalty is 0.0, want a finite',
    ),
  ],
)
def test_parameters_out_of_range_are_refused(changes, message):
  with pytest.raises(RequestError, match=message):
    SamplingParams(**changes)
