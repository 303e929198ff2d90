"""Preference losses: hand-worked numbers, TRL's own, and exact gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.losses import preference as pref

# Three pairs in two rows of two places; the last place is free, and holds rubbish.
CHOSEN, REJECTED = (-12.5, -3.25, -40.0), (-14.0, -2.5, -31.0)
REF_CHOSEN, REF_REJECTED = (-13.0, -3.0, -42.5), (-12.0, -4.0, -30.0)
NUM_CHOSEN, NUM_REJECTED = (5, 2, 17), (7, 3, 11)


def rows(chosen, rejected, free=0):
  flat = [x for pair in zip(chosen, rejected) for x in pair] + [free, free]
  return np.array(flat, np.float64).reshape(2, 4)


LOGPS = rows(CHOSEN, REJECTED, free=-3.0)
REFERENCE = rows(REF_CHOSEN, REF_REJECTED, free=-5.0)
NUM_TOKENS = rows(NUM_CHOSEN, NUM_REJECTED).astype(np.int32)
DESIRABLE = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
KL = 0.7

LOSSES = {
  'dpo': lambda x: pref.dpo_loss(x, REFERENCE, NUM_TOKENS, beta=0.1),
  'dpo smoothed, with sft': lambda x: pref.dpo_loss(
    x, REFERENCE, NUM_TOKENS, beta=0.3, label_smoothing=0.2, sft_weight=0.4
  ),
  'ipo': lambda x: pref.ipo_loss(x, REFERENCE, NUM_TOKENS, beta=0.2),
  'orpo': lambda x: pref.orpo_loss(x, NUM_TOKENS, beta=0.1),
  'simpo': lambda x: pref.simpo_loss(x, NUM_TOKENS, beta=2.0, gamma=0.7),
  'kto': lambda x: pref.kto_loss(
    x,
    REFERENCE,
    NUM_TOKENS,
    DESIRABLE,
    jnp.asarray(KL, x.dtype),
    beta=0.3,
    desirable_weight=1.5,
    undesirable_weight=0.8,
  ),
}


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


# Loss of one pair and its derivatives by the two log-probabilities, from the papers.


def dpo_by_hand(c, r, rc, rr, nc, nr, *, beta, smoothing=0.0, sft=0.0):
  h = beta * ((c - r) - (rc - rr))
  loss = -(1 - smoothing) * math.log(sigmoid(h)) - smoothing * math.log(sigmoid(-h))
  slope = beta * (-(1 - smoothing) * sigmoid(-h) + smoothing * sigmoid(h))
  return loss - sft * c / nc, slope - sft / nc, -slope


def ipo_by_hand(c, r, rc, rr, nc, nr):
  error = (c - rc) / nc - (r - rr) / nr - 1 / (2 * 0.2)
  return error**2, 2 * error / nc, -2 * error / nr


def orpo_by_hand(c, r, rc, rr, nc, nr):
  p, q = math.exp(c / nc), math.exp(r / nr)
  log_ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
  loss = -c / nc - 0.1 * math.log(sigmoid(log_ratio))
  slope = -0.1 * sigmoid(-log_ratio)  # d odds / d log p = 1 / (1 - p)
  return loss, (-1 + slope / (1 - p)) / nc, -slope / (1 - q) / nr


def simpo_by_hand(c, r, rc, rr, nc, nr):
  margin = 2.0 * (c / nc - r / nr) - 0.7
  slope = -2.0 * sigmoid(-margin)
  return -math.log(sigmoid(margin)), slope / nc, -slope / nr


def kto_by_hand(c, r, rc, rr, nc, nr):
  good, bad = sigmoid(0.3 * (c - rc - KL)), sigmoid(0.3 * (KL - (r - rr)))
  loss = 1.5 * (1 - good) + 0.8 * (1 - bad)
  return loss, -1.5 * 0.3 * good * (1 - good), 0.8 * 0.3 * bad * (1 - bad)


BY_HAND = {
  'dpo': functools.partial(dpo_by_hand, beta=0.1),
  'dpo smoothed, with sft': functools.partial(
    dpo_by_hand, beta=0.3, smoothing=0.2, sft=0.4
  ),
  'ipo': ipo_by_hand,
  'orpo': orpo_by_hand,
  'simpo': simpo_by_hand,
  'kto': kto_by_hand,
}


@pytest.mark.parametrize(
  ('dtype', 'rtol'), [(np.float32, 2e-5), (np.float64, 1e-10)], ids=['f32', 'f64']
)
@pytest.mark.parametrize('name', LOSSES)
def test_losses_and_gradients_by_hand(name, dtype, rtol):
  pairs = zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, NUM_CHOSEN, NUM_REJECTED)
  by_hand = [BY_HAND[name](*pair) for pair in pairs]
  with jax.enable_x64(dtype == np.float64):
    grad_fn = jax.value_and_grad(LOSSES[name], has_aux=True)
    (loss, (weight, _)), grads = grad_fn(jnp.asarray(LOGPS, dtype))
    assert loss.dtype == dtype
  np.testing.assert_allclose(loss, sum(loss for loss, _, _ in by_hand), rtol=rtol)
  expected = rows([c for _, c, _ in by_hand], [r for _, _, r in by_hand])
  np.testing.assert_allclose(grads, expected, rtol=rtol)
  assert weight == (6 if name == 'kto' else 3)  # completions, or pairs


@pytest.mark.parametrize('name', LOSSES)
def test_what_a_free_place_holds_does_not_matter(name):
  changed = LOGPS.copy()
  changed[1, 2:] = (-77.0, 0.0)
  (loss, (weight, metrics)) = LOSSES[name](jnp.asarray(LOGPS))
  (other, (other_weight, other_metrics)) = LOSSES[name](jnp.asarray(changed))
  assert (loss, weight) == (other, other_weight)
  for key, value in metrics.items():
    assert value == other_metrics[key], key


# By TRL 1.16.0: the loss code of its DPO, KTO, CPO (SimPO, smoothed DPO) and ORPO
# trainers, called in float64 with these log-probabilities.


def mean(name):
  loss, (weight, metrics) = LOSSES[name](jnp.asarray(LOGPS, jnp.float32))
  return loss / weight, {key: value / weight for key, value in metrics.items()}


@pytest.mark.parametrize(
  ('name', 'loss', 'chosen', 'rejected', 'margin'),
  [
    ('dpo', 0.6312640019868893, 0.0916666667, -0.05, 0.1416666667),
    ('ipo', 6.4508727459141175, 0.1833333333, -0.1, 0.2833333333),
  ],
)
def test_losses_and_rewards_are_those_of_trl(name, loss, chosen, rejected, margin):
  ours, metrics = mean(name)
  assert ours == pytest.approx(loss, rel=1e-6)
  assert metrics['rewards/chosen'] == pytest.approx(chosen, rel=1e-6)
  assert metrics['rewards/rejected'] == pytest.approx(rejected, rel=1e-6)
  assert metrics['rewards/margins'] == pytest.approx(margin, rel=1e-6)
  assert metrics['rewards/accuracies'] == pytest.approx(2 / 3)
  assert metrics['logps/chosen'] == pytest.approx(-18.5833333333)
  assert metrics['logps/rejected'] == pytest.approx(-15.8333333333)


def test_the_other_losses_are_those_of_trl():
  logps = jnp.asarray(LOGPS, jnp.float32)
  smoothed, _ = pref.dpo_loss(
    logps, REFERENCE, NUM_TOKENS, beta=0.1, label_smoothing=0.2
  )
  assert smoothed / 3 == pytest.approx(0.6596, abs=5e-5)
  orpo, metrics = mean('orpo')
  assert orpo == pytest.approx(2.2561, abs=5e-5)
  assert metrics['log_odds_ratio'] == pytest.approx(-0.3996, abs=5e-5)
  assert metrics['rewards/chosen'] == pytest.approx(
    -(0.25 + 0.1625 + 0.2353) / 3, abs=1e-4
  )
  simpo, metrics = mean('simpo')
  assert simpo == pytest.approx((1.8678 + 2.3804 + 0.5845) / 3, abs=5e-5)
  assert metrics['rewards/rejected'] == pytest.approx(
    -(4 + 1.6667 + 5.6364) / 3, abs=1e-4
  )


def test_kto_and_its_reference_point_are_those_of_trl():
  policy = np.array([[-9.0, -20.0, -7.0, 1.0], [-11.0, -4.0, -6.0, 1.0]])
  reference = np.array([[-10.0, -21.0, -6.5, 0.0], [-12.5, -5.0, -6.25, 0.0]])
  num_tokens = np.array([[4, 9, 3, 0], [5, 2, 3, 0]])
  total, number = pref.kto_reference_point(policy, reference, num_tokens)
  assert (total, number) == (4.25, 6)
  loss, (weight, metrics) = pref.kto_loss(
    jnp.asarray(LOGPS, jnp.float32),
    REFERENCE,
    NUM_TOKENS,
    DESIRABLE,
    total / number,
    beta=0.3,
    desirable_weight=1.5,
    undesirable_weight=0.8,
  )
  assert loss / weight == pytest.approx(0.5294183939021678, rel=1e-6)
  assert metrics['kl'] / weight == pytest.approx(0.7083333333, rel=1e-6)
  assert metrics['desirable'] == 3
  assert metrics['rewards/chosen'] / 3 == pytest.approx(0.275, rel=1e-5)
  assert metrics['rewards/rejected'] / 3 == pytest.approx(-0.15, rel=1e-5)


def test_dpo_of_a_policy_that_is_its_reference_is_log_2():
  loss, (weight, metrics) = pref.dpo_loss(
    jnp.asarray(LOGPS, jnp.float32),
    jnp.asarray(LOGPS, jnp.float32),
    rows((3, 4, 5), (2, 9, 6), free=1).astype(np.int32),
    beta=0.1,
  )
  assert weight == 4
  assert loss / weight == np.float32(math.log(2))
  assert metrics['rewards/accuracies'] == 0


def test_orpo_of_equal_completions_has_an_odds_term_of_log_2():
  loss, _ = pref.orpo_loss(jnp.array([[-6.0, -4.0]]), jnp.array([[3, 2]]), beta=0.5)
  assert loss == pytest.approx(2.0 + 0.5 * math.log(2), rel=1e-6)


@pytest.mark.parametrize('logp', [0.0, -1e-9, -1e-5, -0.69, -1.0, -30.0, -200.0])
def test_orpo_is_finite_and_right_at_both_ends_of_the_range(logp):
  """A completion the model is sure of, or cannot imagine."""
  pair = jnp.array([[logp, -1.0]])
  value = lambda x: pref.orpo_loss(x, jnp.array([[1, 1]]), beta=1.0)[0]
  loss, grads = jax.value_and_grad(value)(pair)
  assert np.isfinite(loss) and np.isfinite(grads).all()
  sure = min(logp, -1e-7)
  log_odds = sure - math.log(-math.expm1(sure))
  other = -1.0 - math.log(-math.expm1(-1.0))
  ratio = log_odds - other
  softplus = math.log1p(math.exp(-ratio)) if ratio > -500 else -ratio
  assert loss == pytest.approx(-logp + softplus, rel=1e-5, abs=1e-6)


def test_no_gradient_reaches_the_reference_or_the_reference_point():
  reference = jnp.asarray(REFERENCE, jnp.float32)
  logps = jnp.asarray(LOGPS, jnp.float32)
  for loss in (
    lambda ref: pref.dpo_loss(logps, ref, NUM_TOKENS, beta=0.1)[0],
    lambda ref: pref.ipo_loss(logps, ref, NUM_TOKENS, beta=0.1)[0],
    lambda ref: pref.kto_loss(logps, ref, NUM_TOKENS, DESIRABLE, ref.sum(), beta=0.1)[
      0
    ],
  ):
    assert not jax.grad(loss)(reference).any()


def test_sums_by_text():
  values = np.array([[1.0, 2.0, 4.0, np.nan, 8.0], [np.inf, 16.0, 32.0, 64.0, 128.0]])
  segments = np.array([[1, 1, 2, 3, 3], [0, 1, 1, 3, 0]])
  mask = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]], bool)
  sums = pref.segment_sums(values, segments, mask, 4)
  np.testing.assert_array_equal(sums, [[3, 0, 8, 0], [32, 0, 64, 0]])
  grads = jax.grad(lambda x: (pref.segment_sums(x, segments, mask, 4) ** 2).sum())
  np.testing.assert_array_equal(grads(values), [[6, 6, 0, 0, 16], [0, 0, 64, 128, 0]])
