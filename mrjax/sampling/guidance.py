"""Value guidance as in Q# (Zhou et al. 2025, https://arxiv.org/abs/2502.20548).

At each step a value model scores the k likeliest next tokens, the candidates, and their
logits are raised: to the reference policy times E[exp(eta * reward)]. The order is that
of the published code: candidates from the raw logits, offsets added, then temperature
and filters (see `logits`), which therefore see the guided distribution. Tokens that are
no candidates keep their logits.

`eta` is that of the published code and of `--eta`: a strength, 0 for none. The paper's
eta is the weight of the KL term, 1 over it: see `to_paper_eta`.

A value model that says the same of all candidates, as one with a zero head, leaves all
logits as they are in mode 'mle' alone. The offsets of the other modes are not relative:
under 'bernoulli' a zero head raises each candidate by log((1 + exp(eta)) / 2) over the
tokens that are none. What decodes plainly in every mode is eta = 0.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mrjax.losses.value import ValueHead, expected_rewards
from mrjax.sampling.logits import Array

MODES = {  # and the losses that train a value model for each
  'bernoulli': ('bce', 'mse'),
  'mle': ('mle',),
  'expectation': ('bce', 'mse'),
  'disabled': ('bce', 'mse', 'mle'),
}
_MAX_V_CANDIDATES = 1024
_BLOCK = 64  # tokens a maximum is taken of before the top-k of a big vocabulary


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  """How values become offsets of logits.

  Attributes:
    mode: 'bernoulli': rewards are 0 or 1, with the probability that the head says.
      'mle': their distribution over the atoms of the head; offsets are relative to the
      lowest of the candidates. 'expectation': the head was trained on
      exp(eta * (reward - 1)) with an eta that cannot be changed here; a row's eta only
      says whether it is guided (not 0). Its offsets are below 0, so tokens that are no
      candidates gain. 'disabled': offsets are 0.
    cd_baseline: Controlled decoding (the paper's CD) instead: eta times the expected
      reward. For the modes 'bernoulli' and 'expectation', which are then the same.
    top_k: Number of candidates; -1 or more than there are: the whole vocabulary.
  """

  mode: str = 'mle'
  cd_baseline: bool = False
  top_k: int = 20

  def __post_init__(self):
    if self.mode not in MODES:
      raise ValueError(f'--guidance_mode={self.mode}: want one of {", ".join(MODES)}.')
    if self.cd_baseline and self.mode not in ('bernoulli', 'expectation'):
      raise ValueError(
        f'--cd_baseline with --guidance_mode={self.mode}: it takes the place of the '
        'offsets of bernoulli or expectation; leave it out, or give one of these and a '
        'value model of --loss_type=mse or bce.'
      )
    if self.top_k < 1 and self.top_k != -1:
      raise ValueError(
        f'--guidance_top_k={self.top_k}: want at least 1, or -1 for the whole '
        'vocabulary; --guidance_mode=disabled guides no token.'
      )

  def num_candidates(self, vocab_size: int) -> int:
    return vocab_size if self.top_k == -1 else min(self.top_k, vocab_size)

  def check(self, head: ValueHead, *, vocab_size: int) -> None:
    """Whether a value model can guide like this.

    A 'V' head reads every candidate with a forward pass of its own (they run side by
    side), so that its cost a token is `num_candidates` times that of the value model; a
    'Q' head needs one pass whatever their number.

    Raises:
      ValueError: The head was trained for another mode, or is of type 'V' and would
        score more than 1,024 candidates a token.
    """
    if head.loss_type not in MODES[self.mode]:
      fitting = [mode for mode, losses in MODES.items() if head.loss_type in losses]
      raise ValueError(
        f'--guidance_mode={self.mode} with a value model of --loss_type='
        f'{head.loss_type}, which can guide by {" or ".join(fitting)}: give one of '
        f'these, or a value model of --loss_type={" or ".join(MODES[self.mode])}.'
      )
    num_candidates = self.num_candidates(vocab_size)
    if (
      self.mode != 'disabled'
      and head.classifier_type == 'V'
      and num_candidates > _MAX_V_CANDIDATES
    ):
      raise ValueError(
        f'--guidance_top_k={self.top_k} with a value model of --classifier_type=V: it '
        f'would read {num_candidates:,} tokens for each one drawn, and at most '
        f'{_MAX_V_CANDIDATES:,} are allowed; give --guidance_top_k=20, or a value '
        'model of --classifier_type=Q, which scores all in one pass.'
      )


def to_paper_eta(code_eta: float) -> float:
  """The eta of the paper (the weight of the KL term) of the code's; infinite of 0."""
  if not 0 <= code_eta < math.inf:
    raise ValueError(f'--eta={code_eta}: want a strength of at least 0, and finite.')
  return 1 / code_eta if code_eta else math.inf


def top_candidates(logits_BV: jax.Array, k: int) -> jax.Array:
  """The k likeliest tokens of each row, int32 [B, k]; of ties the lowest ids.

  Give the raw logits: before temperature, filters and offsets. The likeliest comes
  first, unless they are the whole vocabulary, which keeps its order.
  """
  num_rows, vocab_size = logits_BV.shape
  if k == vocab_size:
    return jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), (num_rows, k))
  logits_BV = logits_BV.astype(jnp.float32)
  # `top_k` puts -0 below 0, and XLA drops the addition of a zero.
  logits_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)
  if vocab_size < 16 * _BLOCK * k:
    return jax.lax.top_k(logits_BV, k)[1]
  # The k blocks with the highest maxima (of ties the first ones) hold the k highest
  # tokens: any other token has one of each of these blocks before it.
  spare = -vocab_size % _BLOCK
  padded_BV = jnp.pad(logits_BV, ((0, 0), (0, spare)), constant_values=-jnp.inf)
  blocks_BNM = padded_BV.reshape(num_rows, -1, _BLOCK)
  block_Bk = jnp.sort(jax.lax.top_k(blocks_BNM.max(axis=-1), k)[1], axis=-1)
  inside_BM = jnp.take_along_axis(blocks_BNM, block_Bk[:, :, None], axis=1).reshape(
    num_rows, -1
  )
  place_Bk = jax.lax.top_k(inside_BM, k)[1]
  chosen_Bk = jnp.take_along_axis(block_Bk, place_Bk // _BLOCK, axis=1)
  return chosen_Bk * _BLOCK + place_Bk % _BLOCK


def offsets(
  value_outputs_BkA: jax.Array,
  eta_B: jax.Array,
  head: ValueHead,
  config: GuidanceConfig,
) -> jax.Array:
  """What guidance adds to the logits of the candidates, float32 [B, k].

  Exactly 0 in rows of eta 0, whatever the outputs: these rows decode plainly, bit for
  bit. Outputs that are not finite give offsets that are not, in the other rows.

  Args:
    value_outputs_BkA: The value model's outputs for each candidate, A = `head.width`.
    eta_B: float32 guidance strength of each row, as `--eta`.
    head: What the outputs mean; `config.check` has passed it.
    config: Mode and baseline.
  """
  outputs_BkA = value_outputs_BkA.astype(jnp.float32)
  eta_B1 = eta_B.astype(jnp.float32)[:, None]
  if config.mode == 'disabled':
    return jnp.zeros(outputs_BkA.shape[:-1], jnp.float32)
  if config.cd_baseline:
    offsets_Bk = eta_B1 * expected_rewards(outputs_BkA, head)
  elif config.mode == 'bernoulli':  # log(1 - p + p * exp(eta)), without overflow
    logits_Bk = outputs_BkA[..., 0]
    offsets_Bk = jax.nn.softplus(eta_B1 + logits_Bk) - jax.nn.softplus(logits_Bk)
  elif config.mode == 'mle':
    atoms_A = jnp.asarray(head.atoms(), jnp.float32)
    logps_BkA = jax.nn.log_softmax(outputs_BkA)
    offsets_Bk = jax.nn.logsumexp(logps_BkA + eta_B1[..., None] * atoms_A, axis=-1)
    offsets_Bk -= offsets_Bk.min(axis=-1, keepdims=True)
  else:
    offsets_Bk = jax.nn.log_sigmoid(outputs_BkA[..., 0])
  return jnp.where(eta_B1 == 0, 0.0, offsets_Bk)


def guide(
  logits_BV: jax.Array, candidates_Bk: jax.Array, offsets_Bk: jax.Array
) -> jax.Array:
  """Logits with the offsets added to those of the candidates, float32 [B, V]."""
  # By row, so that a batch split over devices stays where it is.
  add = lambda logits_V, ids_k, offsets_k: logits_V.at[ids_k].add(
    offsets_k, unique_indices=True
  )
  return jax.vmap(add)(logits_BV.astype(jnp.float32), candidates_Bk, offsets_Bk)


def find(candidates_Bk: jax.Array, tokens_B: jax.Array) -> jax.Array:
  """The place of each row's token among its candidates, int32 [B]; -1 if it is none."""
  is_it_Bk = candidates_Bk == tokens_B[:, None]
  place_B = jnp.argmax(is_it_Bk, axis=-1).astype(jnp.int32)
  return jnp.where(is_it_Bk.any(axis=-1), place_B, -1)


def kl_per_token(
  weights_BV: jax.Array, reference_logits_BV: jax.Array, temperature_B: Array
) -> jax.Array:
  """KL from the reference to the distribution that is drawn from, in nats [B].

  sum p log(p / q), where p is the guided distribution after temperature and filters and
  q the reference's after temperature but before filters, as published: so without any
  guidance it is -log of the probability that the filters keep.

  Rows of temperature 0 are measured at temperature 1, as published: it says how far the
  guidance moved the distribution, not how unlikely the token taken was. The weights
  should then come from temperature 1 without filters.

  Args:
    weights_BV: Unnormalised probabilities p, as `logits.scale_and_filter` has them;
      0 for what is filtered out. Float32.
    reference_logits_BV: Logits before guidance, of any temperature.
    temperature_B: float32.
  """
  temperature_B1 = jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
  reference_logits_BV = reference_logits_BV.astype(jnp.float32)
  log_q_BV = jax.nn.log_softmax(reference_logits_BV / temperature_B1)
  total_B1 = weights_BV.sum(axis=-1, keepdims=True)
  is_kept_BV = weights_BV != 0
  log_p_BV = jnp.log(jnp.where(is_kept_BV, weights_BV, 1.0)) - jnp.log(total_B1)
  terms_BV = weights_BV / total_B1 * (log_p_BV - log_q_BV)
  # Below 0 by rounding alone.
  return jnp.maximum(jnp.where(is_kept_BV, terms_BV, 0.0).sum(axis=-1), 0.0)
