"""Value guidance: hand-worked numbers, and equality with the formulas in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.losses.value import ValueHead
from mrjax.sampling.guidance import (
  GuidanceConfig,
  find,
  guide,
  kl_per_token,
  offsets,
  to_paper_eta,
  top_candidates,
)
from mrjax.sampling.guide import outputs_of_tokens
from mrjax.sampling.logits import Controls, scale_and_filter

BCE, MSE = (ValueHead(loss_type=name) for name in ('bce', 'mse'))
BERNOULLI = GuidanceConfig(mode='bernoulli')
EXPECTATION = GuidanceConfig(mode='expectation')
CD = GuidanceConfig(mode='bernoulli', cd_baseline=True)
MLE = GuidanceConfig()

# Four tokens under other ids: 2, 0, 3, 1, so that a place is never its token.
IDS = [2, 0, 3, 1]
REFERENCE = [0.5, 0.3, 0.15, 0.05]
VALUE_LOGITS = [0.0, math.log(3), -math.log(3)]  # p = .5, .75, .25; none of the fourth


def controls(temperature: float, top_p: float = 1.0) -> Controls:
  return Controls(
    temperature_B=jnp.array([temperature]),
    top_k_B=jnp.array([0]),
    top_p_B=jnp.array([top_p]),
    min_p_B=jnp.array([0.0]),
    repetition_penalty_B=jnp.array([1.0]),
  )


def by_hand(config: GuidanceConfig, *, eta: float, temperature=1.0, top_p=1.0):
  """Probabilities of the four tokens, and KL, through all steps."""
  logits_V = np.zeros(4)
  logits_V[IDS] = np.log(REFERENCE)
  logits_BV = jnp.asarray(logits_V[None], jnp.float32)
  candidates_Bk = top_candidates(logits_BV, 3)
  assert candidates_Bk.tolist() == [IDS[:3]]
  offsets_Bk = offsets(
    jnp.array(VALUE_LOGITS)[None, :, None], jnp.array([eta]), BCE, config
  )
  guided_BV = guide(logits_BV, candidates_Bk, offsets_Bk)
  weights_BV = scale_and_filter(guided_BV, controls(temperature, top_p))
  kl_B = kl_per_token(weights_BV, logits_BV, jnp.array([temperature]))
  probabilities_V = np.asarray(weights_BV[0] / weights_BV.sum())
  return probabilities_V[IDS].tolist(), kl_B.item()


@pytest.mark.parametrize(
  ('config', 'options', 'probabilities', 'kl'),
  [
    (BERNOULLI, {}, [0.493827, 0.370370, 0.111111, 0.024691], 0.021144),
    (BERNOULLI, {'temperature': 0.5}, [0.618956, 0.348162, 0.031335, 0.001547], None),
    (BERNOULLI, {'temperature': 0.8}, [0.532890, 0.371932, 0.082578, 0.012599], None),
    (BERNOULLI, {'top_p': 0.9}, [0.506329, 0.379747, 0.113924, 0], 0.064543),
    # Without guidance the KL is that of the filter: -log of the mass kept.
    (BERNOULLI, {'eta': 0.0, 'top_p': 0.9}, [10 / 19, 6 / 19, 3 / 19, 0], 0.051293),
    (BERNOULLI, {'eta': 0.0}, REFERENCE, 0),
    (CD, {}, [0.481851, 0.380491, 0.109838, 0.027820], None),
    # log p: the token that is no candidate rises.
    (EXPECTATION, {}, [0.444444, 0.4, 0.066667, 0.088889], None),
    (EXPECTATION, {'eta': 0.0}, REFERENCE, 0),
    (GuidanceConfig(mode='disabled'), {}, REFERENCE, 0),
  ],
)
def test_four_tokens_by_hand(config, options, probabilities, kl):
  found, found_kl = by_hand(config, **{'eta': math.log(3)} | options)
  assert found == pytest.approx(probabilities, abs=1e-6)
  if kl is None:  # no number worked by hand: the definition, in float64
    temperature = options.get('temperature', 1.0)
    reference = np.array(REFERENCE) ** (1 / temperature)
    guided = np.array(probabilities)
    kl = (guided * np.log(guided / (reference / reference.sum()))).sum()
  assert found_kl == pytest.approx(kl, abs=2e-6)


def test_the_baseline_is_the_same_in_both_of_its_modes():
  outputs = jnp.array([[[0.3], [-2.0]]])
  eta = jnp.array([7.0])
  other = GuidanceConfig(mode='expectation', cd_baseline=True)
  expected = 7 / (1 + np.exp([-0.3, 2.0]))
  for config in (CD, other):
    for head in (BCE, MSE):
      found = offsets(outputs, eta, head, config)
      np.testing.assert_allclose(found, expected[None], rtol=1e-6)


def test_bernoulli_offsets_by_hand_are_within_zero_and_eta():
  p = np.array([0.01, 0.1, 0.5, 0.9])
  logits = np.concatenate([[-50], np.log(p / (1 - p)), [50]])
  found = offsets(jnp.asarray(logits)[None, :, None], jnp.array([10.0]), BCE, BERNOULLI)
  expected = [0, 5.399314, 7.697823, 9.306898, 9.894645, 10]
  assert found[0].tolist() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize('eta', [0.5, 30.0, 100.0])
def test_offsets_neither_overflow_nor_vanish(eta):
  logits = np.array([-50.0, -49.5, -3, 0, 3, 50])
  eta_B = jnp.array([eta])
  exact = np.logaddexp(0, eta + logits) - np.logaddexp(0, logits)
  outputs = jnp.asarray(logits)[None, :, None]
  found = offsets(outputs, eta_B, BCE, BERNOULLI)
  np.testing.assert_allclose(found[0], exact, rtol=1e-6, atol=1e-5)
  found = offsets(outputs, eta_B, BCE, EXPECTATION)
  np.testing.assert_allclose(found[0], -np.logaddexp(0, -logits), rtol=1e-5)
  # Both ends of three atoms, up to 50 nats apart.
  atoms = np.stack([0 * logits, 0 * logits - 5, logits], axis=-1)
  shares = atoms - np.logaddexp.reduce(atoms, axis=-1)[:, None]
  exact = np.logaddexp.reduce(shares + eta * np.array([0, 0.5, 1]), axis=-1)
  found = offsets(jnp.asarray(atoms)[None], eta_B, ValueHead(num_atoms=3), MLE)
  np.testing.assert_allclose(found[0], exact - exact.min(), rtol=1e-6, atol=1e-5)


def test_mle_offsets_by_hand_are_relative_to_the_lowest():
  head = ValueHead(num_atoms=3)
  pmfs = np.array([[0.25, 0.5, 0.25], [1, 1e-30, 1e-30], [1e-30, 1e-30, 1]])
  eta_B = jnp.array([math.log(4)])
  found = offsets(jnp.log(jnp.asarray(pmfs))[None], eta_B, head, MLE)
  assert found[0].tolist() == pytest.approx([0.810930, 0, 1.386294], abs=1e-6)
  # Without the worthless one the lowest is the first: log 2.25 goes off both.
  found = offsets(jnp.log(jnp.asarray(pmfs[[0, 2]]))[None], eta_B, head, MLE)
  assert found[0].tolist() == pytest.approx([0, math.log(4 / 2.25)], abs=1e-6)


def test_mle_of_two_atoms_is_bernoulli_up_to_the_minimum():
  rng = np.random.default_rng(0)
  logits_Bk = rng.normal(size=(5, 7)) * 4
  eta_B = jnp.asarray(rng.uniform(0.1, 12, 5), jnp.float32)
  bernoulli_Bk = offsets(jnp.asarray(logits_Bk[..., None]), eta_B, BCE, BERNOULLI)
  # Whatever both outputs have in common is no matter.
  common_Bk = rng.normal(size=(5, 7))
  both_BkA = jnp.asarray(np.stack([common_Bk, common_Bk + logits_Bk], axis=-1))
  mle_Bk = offsets(both_BkA, eta_B, ValueHead(num_atoms=2), MLE)
  expected_Bk = bernoulli_Bk - bernoulli_Bk.min(axis=-1, keepdims=True)
  np.testing.assert_allclose(mle_Bk, expected_Bk, atol=1e-5)


ALL_MODES = [
  (BCE, BERNOULLI),
  (MSE, CD),
  (MSE, EXPECTATION),
  (ValueHead(v_min=-1.0, v_max=3.0, num_atoms=6), MLE),
]


@pytest.mark.parametrize(('head', 'config'), ALL_MODES)
def test_each_row_has_its_own_eta(head, config):
  rng = np.random.default_rng(1)
  outputs_BkA = jnp.asarray(rng.normal(size=(4, 9, head.width)), jnp.float32)
  eta_B = jnp.array([0.3, 10.0, 0.0, 2.0])
  found_Bk = offsets(outputs_BkA, eta_B, head, config)
  assert found_Bk.dtype == jnp.float32 and found_Bk.shape == (4, 9)
  alone_Bk = np.concatenate(
    [
      offsets(outputs_BkA[row : row + 1], eta_B[row : row + 1], head, config)
      for row in range(4)
    ]
  )
  np.testing.assert_allclose(found_Bk, alone_Bk, rtol=1e-6)
  is_zero_Bk = np.asarray(found_Bk) == 0
  assert is_zero_Bk[2].all() and not is_zero_Bk[[0, 1, 3]].all(axis=1).any()
  if config == EXPECTATION:  # 10 or 2 is no matter
    again_Bk = offsets(outputs_BkA, jnp.array([10.0, 2.0, 0.0, 0.3]), head, config)
    assert np.array_equal(found_Bk, again_Bk)


@pytest.mark.parametrize(('head', 'config'), ALL_MODES)
def test_eta_0_is_plain_decoding_bit_for_bit(head, config):
  rng = np.random.default_rng(2)
  logits_BV = jnp.asarray(rng.normal(size=(3, 11)) * 5, jnp.float32)
  outputs_BkA = jnp.asarray(rng.normal(size=(3, 5, head.width)), jnp.float32)
  outputs_BkA = outputs_BkA.at[1, 2].set(jnp.nan).at[2, 0].set(jnp.inf)

  @jax.jit
  def guided(eta_B):
    candidates_Bk = top_candidates(logits_BV, 5)
    return guide(logits_BV, candidates_Bk, offsets(outputs_BkA, eta_B, head, config))

  assert np.array_equal(guided(jnp.zeros(3)), logits_BV)
  mixed_BV = guided(jnp.array([4.0, 4.0, 0.0]))
  assert not np.array_equal(mixed_BV[0], logits_BV[0])
  assert not np.isfinite(mixed_BV[1]).all()  # for the engine to end the row
  assert np.array_equal(mixed_BV[2], logits_BV[2])


@pytest.mark.parametrize(('num_rows', 'k', 'num_atoms'), [(3, 20, 11), (16, 7, 5)])
@pytest.mark.parametrize('bias', [0.0, 1.0])
def test_a_head_that_tells_no_candidates_apart_is_plain_decoding_under_mle(
  num_rows, k, num_atoms, bias
):
  """Bit for bit, at any eta; a bias that all share is no matter either."""
  rng = np.random.default_rng(3)
  outputs_A = bias * rng.normal(size=num_atoms)
  outputs_BkA = jnp.broadcast_to(jnp.asarray(outputs_A), (num_rows, k, num_atoms))
  eta_B = jnp.asarray(rng.uniform(0.1, 20, num_rows), jnp.float32)
  run = jax.jit(offsets, static_argnums=(2, 3))
  head = ValueHead(num_atoms=num_atoms)
  assert np.array_equal(run(outputs_BkA, eta_B, head, MLE), np.zeros((num_rows, k)))


def test_a_zero_head_is_no_plain_decoding_in_the_other_modes():
  """As published: the candidates move together, against the tokens that are none."""
  outputs_BkA, eta_B = jnp.zeros((1, 3, 1)), jnp.array([10.0])
  found = offsets(outputs_BkA, eta_B, BCE, BERNOULLI)
  np.testing.assert_allclose(found, math.log((1 + math.exp(10)) / 2), rtol=1e-6)
  np.testing.assert_allclose(offsets(outputs_BkA, eta_B, BCE, CD), 5.0)
  found = offsets(outputs_BkA, eta_B, BCE, EXPECTATION)
  np.testing.assert_allclose(found, -math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
  ('paper_eta', 'right', 'cd_left'),
  [(0.1, 0.997540, 0.622459), (1.0, 0.495606, 0.512497)],
)
def test_guidance_takes_the_risky_branch_and_the_baseline_does_not(
  paper_eta, right, cd_left
):
  """Section 4.1 of the paper: left pays .1 for sure, right pays 1 once in 20 times."""
  reference_BV = jnp.log(jnp.array([[0.5, 0.5]]))
  eta = 1 / paper_eta
  assert to_paper_eta(eta) == pytest.approx(paper_eta)
  weights_Ak = np.full((2, 11), 1e-30)
  weights_Ak[0, 1] = 1.0
  weights_Ak[1, [0, 10]] = 0.95, 0.05
  outputs = {
    MLE: (ValueHead(), np.log(weights_Ak)),
    CD: (MSE, np.log([[0.1 / 0.9], [0.05 / 0.95]])),
  }
  policy = {}
  for config, (head, outputs_kA) in outputs.items():
    candidates_Bk = top_candidates(reference_BV, 2)
    outputs_BkA = jnp.asarray(outputs_kA)[candidates_Bk]
    offsets_Bk = offsets(outputs_BkA, jnp.array([eta]), head, config)
    policy[config] = jax.nn.softmax(guide(reference_BV, candidates_Bk, offsets_Bk)[0])
  assert policy[MLE][1] == pytest.approx(right, abs=2e-6)
  assert policy[CD][0] == pytest.approx(cd_left, abs=2e-6)


@pytest.mark.parametrize(('paper_eta', 'value'), [(0.1, 0.700513), (1.0, 0.082422)])
def test_offsets_are_the_soft_value_over_the_eta_of_the_paper(paper_eta, value):
  logits_BkA = jnp.log(jnp.array([[[0.05 / 0.95]]]))
  eta_B = jnp.array([1 / paper_eta])
  found = paper_eta * offsets(logits_BkA, eta_B, BCE, BERNOULLI)
  # eta ln(.95 + .05 exp(1 / eta)).
  assert found.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
  ('num_rows', 'vocab_size', 'k'),
  [
    (5, 7, 1),
    (5, 7, 7),
    (6, 512, 20),
    (3, 3072, 3),  # from here in two levels: a whole number of blocks,
    (4, 3073, 3),  # one token more,
    (2, 20543, 20),  # and one less
    (2, 1025, 1),
  ],
)
def test_candidates_are_the_highest_logits_and_the_lowest_ids_of_ties(
  num_rows, vocab_size, k
):
  rng = np.random.default_rng(vocab_size)
  logits_BV = rng.normal(size=(num_rows, vocab_size)).astype(np.float32)
  logits_BV[0] = np.round(logits_BV[0])  # ties, of both zeros as well
  logits_BV[1] = -np.inf
  logits_BV[1, 3 :: max(1, vocab_size // 2)] = -1.0  # fewer than k
  if num_rows > 2:
    logits_BV[2] = np.where(rng.random(vocab_size) < 0.5, 0.0, -0.0)
  run = jax.jit(top_candidates, static_argnums=1)
  found_Bk = np.asarray(run(jnp.asarray(logits_BV), k))
  assert found_Bk.dtype == np.int32
  expected_Bk = np.argsort(-logits_BV, axis=-1, kind='stable')[:, :k]
  if k == vocab_size:
    expected_Bk = np.broadcast_to(np.arange(k), (num_rows, k))
  assert np.array_equal(found_Bk, expected_Bk)
  # A row of NaN, which the engine ends, is no matter for the others.
  logits_BV[0] = np.nan
  found_Bk = np.asarray(run(jnp.asarray(logits_BV), k))
  assert np.array_equal(found_Bk[1:], expected_Bk[1:])
  assert ((found_Bk >= 0) & (found_Bk < vocab_size)).all()


@pytest.mark.parametrize('head', [ValueHead('Q', 'bce'), ValueHead('Q', num_atoms=3)])
def test_a_q_head_gives_the_rows_of_the_candidates(head):
  num_rows, vocab_size, k, width = 4, 9, 5, 6
  rng = np.random.default_rng(4)
  hidden_BD = rng.normal(size=(num_rows, width)).astype(np.float32)
  kernel_DO = rng.normal(size=(width, vocab_size * head.width)).astype(np.float32)
  bias_O = rng.normal(size=vocab_size * head.width).astype(np.float32)
  ids_Bk = np.stack([rng.permutation(vocab_size)[:k] for _ in range(num_rows)])
  params = {'value_head': {'kernel': jnp.asarray(kernel_DO.T), 'bias': bias_O}}
  found_BkA = outputs_of_tokens(
    jnp.asarray(hidden_BD), jax.tree.map(jnp.asarray, params), jnp.asarray(ids_Bk), head
  )
  whole_BVA = (hidden_BD @ kernel_DO + bias_O).reshape(num_rows, vocab_size, -1)
  expected_BkA = np.take_along_axis(whole_BVA, ids_Bk[..., None], axis=1)
  np.testing.assert_allclose(found_BkA, expected_BkA, atol=1e-6)


def test_offsets_reach_their_tokens_alone():
  logits_BV = jnp.arange(15.0).reshape(3, 5)
  candidates_Bk = jnp.array([[4, 0], [1, 3], [2, 1]])
  offsets_Bk = jnp.array([[0.5, 0.25], [-1.0, 2.0], [0.0, 8.0]])
  found_BV = guide(logits_BV, candidates_Bk, offsets_Bk)
  expected_BV = np.arange(15.0).reshape(3, 5)
  for row, (ids, added) in enumerate(zip(candidates_Bk.tolist(), offsets_Bk.tolist())):
    expected_BV[row, ids] += added
  assert found_BV.dtype == jnp.float32
  assert np.array_equal(found_BV, expected_BV)


def test_places_of_sampled_tokens():
  candidates_Bk = jnp.array([[4, 0, 7], [1, 3, 4], [2, 1, 0]])
  assert find(candidates_Bk, jnp.array([7, 0, 2])).tolist() == [2, -1, 0]


def test_kl_is_that_of_each_row_at_its_temperature():
  rng = np.random.default_rng(5)
  reference_BV = rng.normal(size=(6, 31)) * 3
  guided_BV = reference_BV + rng.normal(size=(6, 31))
  temperature_B = np.array([1.0, 0.5, 0.0, 2.0, 0.8, 0.7])
  is_kept_BV = rng.random((6, 31)) < 0.6
  reference_BV[4, ~is_kept_BV[4]] = -np.inf  # what neither gives
  scale_B1 = np.where(temperature_B > 0, temperature_B, 1)[:, None]
  weights_BV = np.where(is_kept_BV, np.exp(guided_BV / scale_B1), 0) * rng.random(
    (6, 1)
  )
  p_BV = weights_BV / weights_BV.sum(axis=-1, keepdims=True)
  q_BV = np.exp(reference_BV / scale_B1)
  q_BV /= q_BV.sum(axis=-1, keepdims=True)
  logs_BV = np.log(np.where(is_kept_BV, p_BV / np.where(q_BV > 0, q_BV, 1), 1))
  found_B = jax.jit(kl_per_token)(
    jnp.asarray(weights_BV, jnp.float32),
    jnp.asarray(reference_BV, jnp.float32),
    jnp.asarray(temperature_B, jnp.float32),
  )
  assert found_B.dtype == jnp.float32
  np.testing.assert_allclose(found_B, (p_BV * logs_BV).sum(axis=-1), atol=2e-6)


def test_kl_of_strong_guidance_is_finite():
  """The token that guidance lifts is one that the reference's float32 cannot hold."""
  reference_BV = jnp.array([[0.0, -120.0, -121.0]])
  guided_BV = guide(reference_BV, jnp.array([[0, 1]]), jnp.array([[0.0, 200.0]]))
  weights_BV = scale_and_filter(guided_BV, controls(1.0))
  kl_B = kl_per_token(weights_BV, reference_BV, jnp.array([1.0]))
  assert kl_B.tolist() == pytest.approx([120.0])


def test_kl_without_guidance_is_0_up_to_rounding_and_never_below():
  rng = np.random.default_rng(6)
  logits_BV = jnp.asarray(rng.normal(size=(40, 3001)) * 4, jnp.float32)
  row = controls(0.8)
  weights_BV = scale_and_filter(logits_BV, jax.tree.map(lambda x: x.repeat(40), row))
  kl_B = kl_per_token(weights_BV, logits_BV, jnp.full(40, 0.8))
  assert (kl_B >= 0).all() and (kl_B < 1e-5).all()


def test_conversions_of_eta():
  assert to_paper_eta(4.0) == 0.25
  assert to_paper_eta(0.0) == math.inf
  for bad in (-0.5, math.inf, math.nan):
    with pytest.raises(ValueError, match=r'--eta=.*at least 0, and finite'):
      to_paper_eta(bad)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'mode': 'mean'}, r'--guidance_mode=mean: want one of bernoulli, mle, expect'),
    ({'top_k': 0}, r'--guidance_top_k=0: want at least 1, or -1 for the whole'),
    ({'top_k': -2}, r'--guidance_top_k=-2: want'),
    ({'cd_baseline': True}, r'--cd_baseline with --guidance_mode=mle: .*bernoulli or'),
    (
      {'cd_baseline': True, 'mode': 'disabled'},
      r'--cd_baseline with --guidance_mode=disabled: .*leave it out',
    ),
  ],
)
def test_contradictions_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    GuidanceConfig(**options)


def test_a_head_trained_for_another_mode_is_refused():
  fitting = {
    'bernoulli': {'bce', 'mse'},
    'mle': {'mle'},
    'expectation': {'bce', 'mse'},
    'disabled': {'bce', 'mse', 'mle'},
  }
  for mode, losses in fitting.items():
    for loss in ('bce', 'mse', 'mle'):
      check = functools.partial(
        GuidanceConfig(mode=mode).check, ValueHead(loss_type=loss), vocab_size=50
      )
      if loss in losses:
        check()
        continue
      with pytest.raises(ValueError, match=f'mode={mode} with .*loss_type={loss}') as e:
        check()
      others = [name for name in fitting if loss in fitting[name]]
      assert f'guide by {" or ".join(others)}' in str(e.value)


def test_a_v_head_does_not_read_a_big_vocabulary_at_every_token():
  whole, many = GuidanceConfig(top_k=-1), GuidanceConfig(top_k=1025)
  for config in (whole, many):
    with pytest.raises(ValueError, match=r'top_k=.*=V: .* tokens for each .*=20, or'):
      config.check(ValueHead('V'), vocab_size=128256)
    config.check(ValueHead('V'), vocab_size=1024)
    config.check(ValueHead('Q'), vocab_size=128256)
  GuidanceConfig(mode='disabled', top_k=-1).check(ValueHead('V'), vocab_size=128256)
  assert whole.num_candidates(77) == many.num_candidates(77) == 77
  assert GuidanceConfig().num_candidates(77) == 20
