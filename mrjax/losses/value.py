"""Value models as in Q# (Zhou et al. 2025, https://arxiv.org/abs/2502.20548).

A value model predicts the reward that a text will have once the reference policy has
finished it. It learns by plain supervision: every supervised token of a text bears the
text's own reward as its label.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mrjax.losses.preference import Summed, segment_sums

CLASSIFIER_TYPES = ('V', 'Q')
LOSS_TYPES = ('bce', 'mse', 'mle')
_CHUNK = 256  # tokens of each row whose head columns are in memory at once


@dataclasses.dataclass(frozen=True)
class ValueHead:
  """What the outputs of a value head mean.

  Attributes:
    classifier_type: 'V': the outputs at a token are the value of the text up to it, the
      token included. 'Q': they hold, for every token y of the vocabulary, the value of
      going on with y.
    loss_type: 'bce' and 'mse' have one logit a value and rewards in [0, 1]; 'mle' has
      logits of a distribution over atoms.
    num_atoms: Atoms of 'mle', evenly spaced over [v_min, v_max], ends included.
    v_min: Lowest reward.
    v_max: Highest reward.
  """

  classifier_type: str = 'V'
  loss_type: str = 'mle'
  num_atoms: int = 11
  v_min: float = 0.0
  v_max: float = 1.0

  def __post_init__(self):
    for name, known in (
      ('classifier_type', CLASSIFIER_TYPES),
      ('loss_type', LOSS_TYPES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'--{name}={getattr(self, name)}: want one of {", ".join(known)}.'
        )
    if self.num_atoms < 2:
      raise ValueError(f'--num_atoms={self.num_atoms}: want at least 2.')
    if not self.v_min < self.v_max:
      raise ValueError(f'--v_min={self.v_min}, --v_max={self.v_max}: want min < max.')
    if self.loss_type != 'mle' and (self.v_min, self.v_max) != (0.0, 1.0):
      raise ValueError(
        f'--loss_type={self.loss_type} predicts a probability: it wants --v_min=0 and '
        f'--v_max=1, not {self.v_min} and {self.v_max}.'
      )

  @property
  def width(self) -> int:
    """Outputs that make one value: 1, or the number of atoms."""
    return self.num_atoms if self.loss_type == 'mle' else 1

  def num_outputs(self, vocab_size: int) -> int:
    """Outputs at a token. Those of 'Q' are token-major: token * width + atom."""
    return self.width * (vocab_size if self.classifier_type == 'Q' else 1)

  def atoms(self) -> np.ndarray:
    """The rewards that 'mle' has a logit for, float64 [num_atoms]."""
    return np.linspace(self.v_min, self.v_max, self.num_atoms)


def taken_token_outputs(
  hidden_BTD: jax.Array,
  kernel_DO: jax.Array,
  bias_O: jax.Array,
  tokens_BT: jax.Array,
  head: ValueHead,
) -> jax.Array:
  """Outputs of a 'Q' head for the tokens that were taken, float32 [B, T, width].

  Entry t is read from the hidden state before token t, at the rows of token t: it is
  the value of the text with that token, as in 'V'. Entry 0 is meaningless. Only these
  columns of the head are computed.

  Args:
    hidden_BTD: Hidden states after the final norm.
    kernel_DO: The head's kernel, O = V * width.
    bias_O: The head's bias.
    tokens_BT: int32 token ids.
    head: Of type 'Q'.
  """
  num_rows, length = tokens_BT.shape
  chunk = min(_CHUNK, length)
  spare = -length % chunk
  before_BTD = jnp.pad(hidden_BTD, ((0, 0), (1, spare), (0, 0)))[:, :-1]
  tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, spare)))
  kernel_DVA = kernel_DO.reshape(kernel_DO.shape[0], -1, head.width)
  bias_VA = bias_O.reshape(-1, head.width)

  # Recomputed in the backward pass: the columns are `width` times the hidden states.
  @jax.checkpoint
  def one(inputs):
    hidden_BCD, ids_BC = inputs
    columns_DBCA = kernel_DVA[:, ids_BC].astype(jnp.float32)
    values_BCA = jnp.einsum(
      'BCD,DBCA->BCA',
      hidden_BCD.astype(jnp.float32),
      columns_DBCA,
      precision=jax.lax.Precision.HIGHEST,
    )
    return values_BCA + bias_VA[ids_BC].astype(jnp.float32)

  split = lambda x: x.reshape(num_rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
  values_NBCA = jax.lax.map(one, (split(before_BTD), split(tokens_BT)))
  values_BTA = values_NBCA.swapaxes(0, 1).reshape(num_rows, -1, head.width)
  return values_BTA[:, :length]


def expected_rewards(outputs: jax.Array, head: ValueHead) -> jax.Array:
  """The reward that outputs [..., width] predict, float32 [...]."""
  outputs = outputs.astype(jnp.float32)
  if head.loss_type != 'mle':
    return jax.nn.sigmoid(outputs[..., 0])
  return (jax.nn.softmax(outputs) * jnp.asarray(head.atoms(), jnp.float32)).sum(-1)


def spreads(outputs: jax.Array, head: ValueHead) -> tuple[jax.Array, jax.Array]:
  """Variance, and entropy in nats, of the distributions that 'mle' predicts."""
  logps = jax.nn.log_softmax(outputs.astype(jnp.float32))
  atoms = jnp.asarray(head.atoms(), jnp.float32)
  off = atoms - expected_rewards(outputs, head)[..., None]
  return (jnp.exp(logps) * off**2).sum(-1), -(jnp.exp(logps) * logps).sum(-1)


def token_losses(outputs: jax.Array, rewards: jax.Array, head: ValueHead) -> jax.Array:
  """Loss of each prediction, float32 [...].

  'bce': binary cross-entropy with logits. 'mse': squared error of the probability.
  'mle': negative log-likelihood of the atom that is nearest to the reward; halfway
  between two, of the one with the even number.

  Args:
    outputs: [..., width].
    rewards: float32 [...]: in [0, 1], or what the atoms span; beyond it the end is
      taken.
    head: What the outputs mean.
  """
  outputs = outputs.astype(jnp.float32)
  if head.loss_type == 'bce':
    logits = outputs[..., 0]
    return jax.nn.softplus(logits) - rewards * logits
  if head.loss_type == 'mse':
    return (jax.nn.sigmoid(outputs[..., 0]) - rewards) ** 2
  share = (rewards - head.v_min) / (head.v_max - head.v_min)
  atom = jnp.round(share * (head.num_atoms - 1)).astype(jnp.int32)
  atom = jnp.clip(atom, 0, head.num_atoms - 1)
  logps = jax.nn.log_softmax(outputs)
  return -jnp.take_along_axis(logps, atom[..., None], axis=-1)[..., 0]


def value_loss(
  outputs_BTA: jax.Array,
  rewards_BS: jax.Array,
  segments_BT: jax.Array,
  loss_mask_BT: jax.Array,
  head: ValueHead,
) -> Summed:
  """Sum over texts of the mean loss of their supervised tokens.

  Every text has the same weight, however long it is.

  Args:
    outputs_BTA: Outputs at each token: of a 'V' head, or `taken_token_outputs`.
    rewards_BS: float32 reward of each text; entry s is that of segment s + 1.
    segments_BT: int32 text numbers 1, 2, ..., 0 for padding.
    loss_mask_BT: True on supervised tokens.
    head: What the outputs mean.

  Returns:
    The sum; the number of texts with a supervised token; and, summed over texts, the
    mean `prediction`, its `accuracy` (see `evaluate`) and the `reward`.
  """
  rewards_BT = rewards_of_tokens(rewards_BS, segments_BT)
  predictions_BT = expected_rewards(outputs_BTA, head)
  per_token = {
    'loss': token_losses(outputs_BTA, rewards_BT, head),
    'prediction': predictions_BT,
    'accuracy': _is_good(predictions_BT, head) == _is_good(rewards_BT, head),
    'reward': rewards_BT,
  }
  sums = lambda x_BT: segment_sums(
    x_BT.astype(jnp.float32), segments_BT, loss_mask_BT, rewards_BS.shape[1]
  )
  num_tokens_BS = sums(jnp.ones_like(rewards_BT))
  weight = (num_tokens_BS > 0).sum().astype(jnp.float32)
  per_token_share_BS = 1 / jnp.maximum(num_tokens_BS, 1)
  totals = {name: (sums(x) * per_token_share_BS).sum() for name, x in per_token.items()}
  return totals.pop('loss'), (weight, totals)


def rewards_of_tokens(rewards_BS: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """The reward of the text that each token belongs to, [B, T]; rubbish on padding."""
  return jnp.take_along_axis(rewards_BS, jnp.maximum(segments_BT - 1, 0), axis=1)


def evaluate(
  predictions: np.ndarray, rewards: np.ndarray, head: ValueHead
) -> dict[str, float]:
  """Numbers that say how good predictions [N] of rewards [N] are.

  Returns:
    `explained_variance` (1 - var(error) / var(reward)) and `r2` (1 - mean squared error
    / var(reward)), which are there where the rewards vary; `accuracy`, of telling
    rewards above the middle of their range from the others; `auc`, the chance that such
    a reward has a higher prediction than another one (ties count half), where there are
    both; and `prediction_min`, `prediction_max`, `prediction_mean`.

  Raises:
    ValueError: No prediction, or another number of rewards.
  """
  predictions = np.asarray(predictions, np.float64)
  rewards = np.asarray(rewards, np.float64)
  if predictions.shape != rewards.shape or predictions.size == 0:
    raise ValueError(
      f'{predictions.shape} predictions of {rewards.shape} rewards: want as many, and '
      'at least one'
    )
  good, called_good = _is_good(rewards, head), _is_good(predictions, head)
  numbers = {
    'accuracy': float(np.mean(good == called_good)),
    'prediction_min': float(predictions.min()),
    'prediction_max': float(predictions.max()),
    'prediction_mean': float(predictions.mean()),
  }
  if variance := float(rewards.var()):
    errors = predictions - rewards
    numbers['explained_variance'] = 1 - float(errors.var()) / variance
    numbers['r2'] = 1 - float(np.mean(errors**2)) / variance
  if good.any() and not good.all():
    numbers['auc'] = _auc(predictions, good)
  return numbers


def _is_good(rewards, head: ValueHead):
  return rewards > (head.v_min + head.v_max) / 2


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
  """Area under the ROC curve by ranks; tied scores share the mean of theirs."""
  _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
  num_positive = int(positive.sum())
  num_negative = len(positive) - num_positive
  wins = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
  return float(wins / (num_positive * num_negative))
