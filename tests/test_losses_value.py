"""Value losses: hand-worked numbers, equality of the Q form with the whole head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.losses.value import (
  ValueHead,
  evaluate,
  expected_rewards,
  rewards_of_tokens,
  spreads,
  taken_token_outputs,
  token_losses,
  value_loss,
)

BCE, MSE = (ValueHead(loss_type=name) for name in ('bce', 'mse'))
MLE = ValueHead()


@pytest.mark.parametrize(
  ('head', 'logit', 'reward', 'loss'),
  [
    (BCE, 2.0, 1.0, 0.126928),
    (BCE, 2.0, 0.0, 2.126928),
    (BCE, -90.0, 1.0, 90.0),
    (BCE, 1.0, 0.25, math.log(1 + math.e) - 0.25),  # soft labels, of expectation mode
    (MSE, 2.0, 1.0, 0.014209),
    (MSE, 2.0, 0.0, 0.775803),
  ],
)
def test_bernoulli_losses_by_hand(head, logit, reward, loss):
  ours = token_losses(jnp.array([[logit]]), jnp.array([reward]), head)
  assert ours.tolist() == pytest.approx([loss], abs=1e-6)
  predicted = expected_rewards(jnp.array([[logit]]), head)
  assert predicted.tolist() == pytest.approx([1 / (1 + math.exp(-logit))], rel=1e-6)


def test_texts_have_equal_weight_however_long():
  """Logits 0, 1, 2 of reward 1, and 0, -1 of reward 0; other tokens do not count."""
  outputs = jnp.array([[[9.0], [0.0], [1.0], [2.0], [-9.0], [0.0], [-1.0], [7.0]]])
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
  mask = jnp.array([[0, 1, 1, 1, 0, 1, 1, 0]], bool)
  rewards = jnp.array([[1.0, 0.0, 1.0]])  # the third place is free
  loss, (weight, metrics) = value_loss(outputs, rewards, segments, mask, BCE)
  assert weight == 2
  assert loss == pytest.approx(0.377779 + 0.503204, abs=1e-6)
  assert loss / weight != pytest.approx(0.427949, abs=1e-3)  # the mean over tokens
  assert metrics['reward'] == 1
  sure, doubtful = (0.5 + 0.731059 + 0.880797) / 3, (0.5 + 0.268941) / 2
  assert metrics['prediction'] == pytest.approx(sure + doubtful, rel=1e-5)
  # 0.5 is no call of "good": wrong once in the first text, right in the second.
  assert metrics['accuracy'] == pytest.approx(2 / 3 + 1)
  grads = jax.grad(lambda x: value_loss(x, rewards, segments, mask, BCE)[0])(outputs)
  expected = [0, -0.5 / 3, -0.268941 / 3, -0.119203 / 3, 0, 0.5 / 2, 0.268941 / 2, 0]
  np.testing.assert_allclose(grads[0, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize('loss_type', ['bce', 'mse', 'mle'])
def test_gradients_by_hand(loss_type):
  """In float64, of two packed texts whose tokens weigh 1/3 and 1/2, and of padding."""
  head = ValueHead(loss_type=loss_type, num_atoms=5)
  rng = np.random.default_rng(4)
  outputs = rng.normal(0, 2, (1, 8, head.width)).astype(np.float32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
  mask = np.array([[0, 1, 1, 1, 0, 1, 1, 0]], bool)
  rewards = np.array([[0.8, 0.25]], np.float32)  # the nearest atoms: 3 and 1 of 5
  grads = jax.grad(lambda x: value_loss(x, rewards, segments, mask, head)[0])(outputs)
  exact = outputs.astype(np.float64)
  want = np.zeros_like(exact)
  for t in np.flatnonzero(mask[0]):
    text = segments[0, t] - 1
    reward, x = float(rewards[0, text]), exact[0, t]
    if loss_type == 'mle':
      slope = np.exp(x) / np.exp(x).sum() - np.eye(5)[(3, 1)[text]]
    else:
      p = 1 / (1 + np.exp(-x))
      slope = p - reward if loss_type == 'bce' else 2 * (p - reward) * p * (1 - p)
    want[0, t] = slope / (3, 2)[text]
  np.testing.assert_allclose(grads, want, atol=1e-7)


def test_rewards_go_to_the_nearest_atom():
  uniform = jnp.zeros((7, 11))
  rewards = jnp.array([0.0, 0.04, 0.2, 0.36, 1.0, 1.7, -0.3])
  grads = jax.grad(lambda x: token_losses(x, rewards, MLE).sum())(uniform)
  assert np.argmin(grads, axis=-1).tolist() == [0, 0, 2, 4, 10, 10, 0]
  np.testing.assert_allclose(
    token_losses(uniform, rewards, MLE), math.log(11), rtol=1e-6
  )


def test_halves_go_to_the_even_atom():
  head = ValueHead(num_atoms=5)  # atoms 0, .25, .5, .75, 1
  rewards = jnp.array([0.125, 0.375, 0.625, 0.875])
  grads = jax.grad(lambda x: token_losses(x, rewards, head).sum())(jnp.zeros((4, 5)))
  assert np.argmin(grads, axis=-1).tolist() == [0, 2, 2, 4]


def test_atoms_may_span_any_range():
  head = ValueHead(num_atoms=4, v_min=-2.0, v_max=1.0)
  np.testing.assert_array_equal(head.atoms(), [-2, -1, 0, 1])
  outputs = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]])) + 5
  rewards = jnp.array([[-2.0], [-0.9], [0.3], [1.0]])
  losses = [token_losses(outputs, reward, head)[0] for reward in rewards]
  assert losses == pytest.approx([-math.log(p) for p in (0.1, 0.2, 0.3, 0.4)], rel=1e-5)
  mean = -0.2 - 0.2 + 0.4
  assert expected_rewards(outputs, head)[0] == pytest.approx(mean, abs=1e-6)
  variance, entropy = spreads(outputs, head)
  assert variance[0] == pytest.approx(0.1 * 4 + 0.2 + 0.4, rel=1e-5)
  expected = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
  assert entropy[0] == pytest.approx(expected, rel=1e-5)


def test_two_atoms_are_a_bernoulli():
  head = ValueHead(num_atoms=2)
  logits = jnp.array([-3.0, 0.0, 0.4, 8.0])
  rewards = jnp.array([1.0, 0.0, 1.0, 0.0])
  outputs = jnp.stack([jnp.zeros(4), logits], axis=-1)
  np.testing.assert_allclose(
    token_losses(outputs, rewards, head),
    token_losses(logits[:, None], rewards, BCE),
    rtol=1e-5,
  )


@pytest.mark.parametrize('loss_type', ['bce', 'mle'])
@pytest.mark.parametrize('length', [5, 600])  # one chunk, and three, the last not full
def test_the_outputs_of_taken_tokens_are_those_of_the_whole_head(loss_type, length):
  head = ValueHead('Q', loss_type, num_atoms=3)
  num_rows, hidden_size, vocab = 2, 6, 13
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (num_rows, length, hidden_size))
  kernel = jax.random.normal(keys[1], (hidden_size, head.num_outputs(vocab)))
  bias = jax.random.normal(keys[2], (head.num_outputs(vocab),))
  tokens = jax.random.randint(keys[3], (num_rows, length), 0, vocab)
  weights = jnp.arange(length) % 7  # no token like another; the first counts nothing

  def whole(hidden, kernel, bias):
    outputs = hidden @ kernel + bias
    outputs = outputs.reshape(num_rows, length, vocab, head.width)
    outputs = jnp.take_along_axis(outputs[:, :-1], tokens[:, 1:, None, None], axis=2)[
      :, :, 0
    ]
    return jnp.pad(outputs, ((0, 0), (1, 0), (0, 0)))

  def taken(hidden, kernel, bias):
    return taken_token_outputs(hidden, kernel, bias, tokens, head)

  args = hidden, kernel, bias
  np.testing.assert_allclose(taken(*args)[:, 1:], whole(*args)[:, 1:], atol=1e-5)
  total = lambda outputs_of: (
    lambda *args: (jnp.tanh(outputs_of(*args)) * weights[:, None]).sum()
  )
  ours, theirs = (jax.grad(total(f), (0, 1, 2))(*args) for f in (taken, whole))
  for mine, his in zip(ours, theirs):
    np.testing.assert_allclose(mine, his, atol=3e-6 * length)


def test_rewards_of_tokens():
  rewards = jnp.array([[0.5, 1.0, 0.0], [0.25, 0.75, 0.0]])
  segments = jnp.array([[1, 1, 2, 3], [2, 1, 0, 0]])
  spread = rewards_of_tokens(rewards, segments)
  np.testing.assert_array_equal(spread[0], [0.5, 0.5, 1, 0])
  np.testing.assert_array_equal(spread[1, :2], [0.75, 0.25])


def test_evaluation_numbers_by_hand():
  rewards = np.array([0, 0, 1, 1, 1])
  predictions = np.array([0.2, 0.6, 0.6, 0.4, 0.9])
  numbers = evaluate(predictions, rewards, BCE)
  errors = np.array([0.2, 0.6, -0.4, -0.6, -0.1])
  assert numbers['r2'] == pytest.approx(1 - (errors**2).mean() / 0.24)
  assert numbers['explained_variance'] == pytest.approx(
    1 - ((errors**2).mean() - 0.06**2) / 0.24
  )
  assert numbers['accuracy'] == pytest.approx(3 / 5)
  # Of six pairs four are in order, one is tied, one is not.
  assert numbers['auc'] == pytest.approx(4.5 / 6)
  assert (numbers['prediction_min'], numbers['prediction_max']) == (0.2, 0.9)
  assert numbers['prediction_mean'] == pytest.approx(0.54)


def test_the_auc_of_many_predictions_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(3)
  rewards = rng.integers(0, 2, 200)
  predictions = rng.integers(0, 40, 200) / 40  # many ties
  good, bad = predictions[rewards == 1], predictions[rewards == 0]
  pairs = good[:, None] - bad
  expected = ((pairs > 0).sum() + (pairs == 0).sum() / 2) / pairs.size
  assert evaluate(predictions, rewards, BCE)['auc'] == pytest.approx(expected)


def test_what_is_not_defined_is_left_out():
  numbers = evaluate(np.array([0.3, 0.4]), np.array([1.0, 1.0]), BCE)
  assert not {'auc', 'r2', 'explained_variance'} & numbers.keys()
  assert numbers['accuracy'] == 0
  wide = ValueHead(v_min=-1.0, v_max=1.0)  # 0 is its middle, and no good reward
  numbers = evaluate(np.array([0.3, -0.4]), np.array([0.5, 0.0]), wide)
  assert numbers['accuracy'] == 1 and numbers['auc'] == 1
  with pytest.raises(ValueError, match='as many'):
    evaluate(np.array([0.3]), np.array([1.0, 1.0]), BCE)
  with pytest.raises(ValueError, match='at least one'):
    evaluate(np.array([]), np.array([]), BCE)


def test_head_widths():
  vocab = 17
  widths = {
    (kind, loss): ValueHead(kind, loss, num_atoms=5).num_outputs(vocab)
    for kind in 'VQ'
    for loss in ('bce', 'mse', 'mle')
  }
  assert widths == {
    ('V', 'bce'): 1,
    ('V', 'mse'): 1,
    ('V', 'mle'): 5,
    ('Q', 'bce'): 17,
    ('Q', 'mse'): 17,
    ('Q', 'mle'): 85,
  }


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'classifier_type': 'A'}, '--classifier_type=A: want one of V, Q'),
    ({'loss_type': 'hinge'}, '--loss_type=hinge: want one of bce, mse, mle'),
    ({'num_atoms': 1}, '--num_atoms=1'),
    ({'v_min': 1.0}, r'--v_min=1.0, --v_max=1.0'),
    ({'loss_type': 'bce', 'v_max': 2.0}, 'predicts a probability'),
  ],
)
def test_bad_heads_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    ValueHead(**changes)
