"""Preference losses over the log-probabilities of whole completions.

All arrays are [B, S]: S completions in each of B rows. In the losses over pairs, text
0, 2, 4, ... of a row is a chosen completion and the text after it the rejected one of
the same prompt. A completion without tokens is a free place, and counts for nothing.

Every loss returns `(loss, (weight, metrics))`: the sum over pairs (over completions in
KTO), their number, and sums of what is logged; who calls divides by the number. Rewards
carry the names that TRL gives them.
"""

import jax
import jax.numpy as jnp

Summed = tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]

# The log-odds of ORPO are infinite at log p = 0. Below this the odds term is flat.
_MAX_LOGP = -1e-7


def segment_sums(
  values_BT: jax.Array, segments_BT: jax.Array, mask_BT: jax.Array, num_segments: int
) -> jax.Array:
  """Sums over the tokens of each text, [B, num_segments] in the dtype of the values.

  Args:
    values_BT: One number a token; where `mask_BT` is False it may be anything, NaN too.
    segments_BT: int32 text numbers 1, 2, ... of each token, 0 for padding.
    mask_BT: True on the tokens that are summed.
    num_segments: Texts a row may hold; entry s is the sum of text s + 1.
  """
  numbers_S = jnp.arange(1, num_segments + 1)
  here_BTS = mask_BT[..., None] & (segments_BT[..., None] == numbers_S)
  return jnp.where(here_BTS, values_BT[..., None], 0).sum(axis=1)


def dpo_loss(
  logps_BS: jax.Array,
  reference_BS: jax.Array,
  num_tokens_BS: jax.Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  sft_weight: float = 0.0,
) -> Summed:
  """Direct preference optimisation, log(2) a pair where policy and reference agree.

  Eq. 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; labels are smoothed
  as in Mitchell 2023, https://ericmitchell.ai/cdpo.pdf (not TRL's `robust` form, which
  may fall below 0).

  Args:
    logps_BS: float32 log-probabilities of completions under the policy, in nats.
    reference_BS: The same under the frozen reference; no gradient flows through it.
    num_tokens_BS: Tokens of each completion, EOS included; 0 marks a free place.
    beta: Strength of the pull towards the reference, > 0.
    label_smoothing: Share of labels that are taken to be wrong, in [0, 0.5).
    sft_weight: Weight of the chosen completions' negative log-likelihood a token.
  """
  ratios_BS = logps_BS - jax.lax.stop_gradient(reference_BS)
  margin_BP = beta * (ratios_BS[:, ::2] - ratios_BS[:, 1::2])
  loss_BP = _smoothed_logistic(margin_BP, label_smoothing)
  metrics = {}
  if sft_weight:
    metrics['nll'] = -_token_means(logps_BS, num_tokens_BS)[:, ::2]
    loss_BP += sft_weight * metrics['nll']
  return _sum_pairs(loss_BP, beta * ratios_BS, logps_BS, num_tokens_BS, metrics)


def ipo_loss(
  logps_BS: jax.Array,
  reference_BS: jax.Array,
  num_tokens_BS: jax.Array,
  *,
  beta: float,
) -> Summed:
  """Identity preference optimisation: the margin a token is drawn to 1 / (2 beta).

  Eq. 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036, where `beta` is tau.
  Log-ratios are divided by the number of tokens first, as TRL does on the authors'
  word; the paper does not say so. See `dpo_loss` for the arguments.
  """
  ratios_BS = logps_BS - jax.lax.stop_gradient(reference_BS)
  means_BS = _token_means(ratios_BS, num_tokens_BS)
  loss_BP = (means_BS[:, ::2] - means_BS[:, 1::2] - 1 / (2 * beta)) ** 2
  return _sum_pairs(loss_BP, beta * ratios_BS, logps_BS, num_tokens_BS)


def orpo_loss(logps_BS: jax.Array, num_tokens_BS: jax.Array, *, beta: float) -> Summed:
  """Odds-ratio preference optimisation; it needs no reference.

  Eq. 6 and 7 of Hong et al. 2024, https://arxiv.org/abs/2403.07691, with the mean
  log-probability of a token. The supervised term is that of the chosen completions, all
  of equal weight (as in LLaMA-Factory); TRL's counts prompts and padding too.

  Args:
    logps_BS: float32 log-probabilities of completions, in nats.
    num_tokens_BS: Tokens of each completion, EOS included; 0 marks a free place.
    beta: Weight of the odds term (lambda in the paper), > 0.
  """
  means_BS = _token_means(logps_BS, num_tokens_BS)
  odds_BS = means_BS - _log1mexp(means_BS)
  log_odds_ratio_BP = odds_BS[:, ::2] - odds_BS[:, 1::2]
  nll_BP = -means_BS[:, ::2]
  loss_BP = nll_BP - beta * jax.nn.log_sigmoid(log_odds_ratio_BP)
  metrics = {'nll': nll_BP, 'log_odds_ratio': log_odds_ratio_BP}
  return _sum_pairs(loss_BP, beta * means_BS, logps_BS, num_tokens_BS, metrics)


def simpo_loss(
  logps_BS: jax.Array, num_tokens_BS: jax.Array, *, beta: float, gamma: float
) -> Summed:
  """Simple preference optimisation; it needs no reference.

  Eq. 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734.

  Args:
    logps_BS: float32 log-probabilities of completions, in nats.
    num_tokens_BS: Tokens of each completion, EOS included; 0 marks a free place.
    beta: Scale of the rewards, > 0; 2 to 2.5 in the paper.
    gamma: Margin that is asked for between the rewards, >= 0.
  """
  rewards_BS = beta * _token_means(logps_BS, num_tokens_BS)
  loss_BP = -jax.nn.log_sigmoid(rewards_BS[:, ::2] - rewards_BS[:, 1::2] - gamma)
  return _sum_pairs(loss_BP, rewards_BS, logps_BS, num_tokens_BS)


def kto_reference_point(
  logps_BS: jax.Array, reference_BS: jax.Array, num_tokens_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Summed log-ratios of completions to prompts not their own, and their number.

  The mean, clamped from below at 0, estimates the divergence from the reference that
  `kto_loss` takes as `kl`.
  """
  ratios_BS = jnp.where(num_tokens_BS > 0, logps_BS - reference_BS, 0.0)
  return ratios_BS.sum(), (num_tokens_BS > 0).sum().astype(jnp.float32)


def kto_loss(
  logps_BS: jax.Array,
  reference_BS: jax.Array,
  num_tokens_BS: jax.Array,
  desirable_BS: jax.Array,
  kl: jax.Array,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> Summed:
  """Kahneman-Tversky optimisation: single completions, each desirable or not.

  Eq. 7 of Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.

  Args:
    logps_BS: float32 log-probabilities of completions under the policy, in nats.
    reference_BS: The same under the frozen reference; no gradient flows through it.
    num_tokens_BS: Tokens of each completion, EOS included; 0 marks a free place.
    desirable_BS: bool; whether a completion is a good one.
    kl: The reference point, >= 0: see `kto_reference_point`. No gradient flows.
    beta: Risk aversion, > 0.
    desirable_weight: Weight of the loss of desirable completions.
    undesirable_weight: Weight of the others'.

  Returns:
    As every loss here, over completions. Each `rewards/` metric is the sum over the
    completions of its kind: divide it by `desirable`, or by what is left.
  """
  ratios_BS = logps_BS - jax.lax.stop_gradient(reference_BS)
  surplus_BS = beta * (ratios_BS - jax.lax.stop_gradient(kl))
  loss_BS = jnp.where(
    desirable_BS,
    desirable_weight * jax.nn.sigmoid(-surplus_BS),
    undesirable_weight * jax.nn.sigmoid(surplus_BS),
  )
  there_BS = num_tokens_BS > 0
  weight = there_BS.sum().astype(jnp.float32)
  add = lambda x_BS, where_BS: jnp.where(there_BS & where_BS, x_BS, 0.0).sum()
  rewards_BS = beta * ratios_BS
  metrics = {
    'rewards/chosen': add(rewards_BS, desirable_BS),
    'rewards/rejected': add(rewards_BS, ~desirable_BS),
    'logps/chosen': add(logps_BS, desirable_BS),
    'logps/rejected': add(logps_BS, ~desirable_BS),
    'desirable': add(1.0, desirable_BS),
    'kl': kl * weight,
  }
  return add(loss_BS, True), (weight, metrics)


def _token_means(values_BS: jax.Array, num_tokens_BS: jax.Array) -> jax.Array:
  return values_BS / jnp.maximum(num_tokens_BS, 1)


def _smoothed_logistic(margin: jax.Array, label_smoothing: float) -> jax.Array:
  loss = -jax.nn.log_sigmoid(margin)
  if not label_smoothing:
    return loss
  flipped = -jax.nn.log_sigmoid(-margin)
  return (1 - label_smoothing) * loss + label_smoothing * flipped


def _log1mexp(logp: jax.Array) -> jax.Array:
  """log(1 - p) from log p < 0, after Maechler 2012: exact near both ends."""
  logp = jnp.minimum(logp, _MAX_LOGP)
  near_one = logp > -jnp.log(2.0)
  return jnp.where(near_one, jnp.log(-jnp.expm1(logp)), jnp.log1p(-jnp.exp(logp)))


def _sum_pairs(loss_BP, rewards_BS, logps_BS, num_tokens_BS, metrics=None) -> Summed:
  there_BP = (num_tokens_BS[:, ::2] > 0) & (num_tokens_BS[:, 1::2] > 0)
  chosen_BP, rejected_BP = rewards_BS[:, ::2], rewards_BS[:, 1::2]
  per_pair = {
    'rewards/chosen': chosen_BP,
    'rewards/rejected': rejected_BP,
    'rewards/margins': chosen_BP - rejected_BP,
    'rewards/accuracies': (chosen_BP > rejected_BP).astype(jnp.float32),
    'logps/chosen': logps_BS[:, ::2],
    'logps/rejected': logps_BS[:, 1::2],
  } | (metrics or {})
  add = lambda x_BP: jnp.where(there_BP, x_BP, 0.0).sum()
  weight = there_BP.sum().astype(jnp.float32)
  return add(loss_BP), (weight, {name: add(x) for name, x in per_pair.items()})
