"""Preference losses of a decoder, as `step.LossFn`: from packed rows to pairs.

A reference policy comes from one of three places: the weights without their adapter, a
second tree of weights beside the frozen ones, or log-probabilities that were computed
before and lie in the batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mrjax.data.preference_batches import MISMATCHED
from mrjax.lora import masks
from mrjax.lora.adapters import without_adapter
from mrjax.losses import preference
from mrjax.losses.tokens import chunked_next_token_logps, next_token_mask
from mrjax.models.decoder import Decoder
from mrjax.models.head import head_function
from mrjax.training import step
from mrjax.training.ranges import NOT_NEGATIVE, POSITIVE, Range, check_ranges

PyTree = Any
# Each loss, with the options that it has beside `beta`.
LOSSES: dict[str, tuple[str, ...]] = {
  'dpo': ('label_smoothing', 'sft_weight'),
  'orpo': (),
  'ipo': (),
  'simpo': ('gamma',),
  'kto': ('desirable_weight', 'undesirable_weight'),
}
NEED_REFERENCE = ('dpo', 'ipo', 'kto')
ADAPTER_OFF, RESIDENT, PRECOMPUTED = 'adapter_off', 'resident', 'precomputed'
REFERENCE = 'reference'  # weights in `frozen`, or log-probabilities [B, S] in a batch


class Policies(NamedTuple):
  """What trains, and where its reference's log-probabilities come from.

  Attributes:
    decoder: What trains.
    reference: ADAPTER_OFF, RESIDENT (`frozen[REFERENCE]` are its weights), PRECOMPUTED
      (`batch[REFERENCE]` are its log-probabilities), or empty.
    reference_decoder: Of RESIDENT; None where it is `decoder`.
  """

  decoder: Decoder
  reference: str = ''
  reference_decoder: Decoder | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Which loss, and its numbers; see `mrjax.losses.preference`."""

  loss: str = 'dpo'
  beta: float = 0.1
  label_smoothing: float = 0.0  # dpo: share of labels taken to be wrong
  sft_weight: float = 0.0  # dpo: weight of the chosen completions' own loss
  gamma: float = 0.5  # simpo: margin between the rewards
  desirable_weight: float = 1.0  # kto
  undesirable_weight: float = 1.0  # kto

  def __post_init__(self):
    if self.loss not in LOSSES:
      raise ValueError(f'--loss={self.loss}: want one of {", ".join(LOSSES)}.')
    check_ranges(
      self,
      {
        'beta': POSITIVE,
        'label_smoothing': Range('a number in [0, 0.5)', lambda x: 0 <= x < 0.5),
        'sft_weight': NOT_NEGATIVE,
        'gamma': NOT_NEGATIVE,
        'desirable_weight': NOT_NEGATIVE,
        'undesirable_weight': NOT_NEGATIVE,
      },
    )
    if not (self.desirable_weight or self.undesirable_weight):
      raise ValueError(
        '--desirable_weight=0 --undesirable_weight=0: want one of them above 0, else '
        'nothing is learnt.'
      )
    for field in dataclasses.fields(LossConfig):
      value = getattr(self, field.name)
      users = [loss for loss, options in LOSSES.items() if field.name in options]
      if users and self.loss not in users and value != field.default:
        raise ValueError(
          f'--{field.name}={value} is for --loss={users[0]}; it means nothing to '
          f'{self.loss}.'
        )


def completion_logps(
  decoder: Decoder,
  params: PyTree,
  batch: step.Batch,
  num_texts: int,
  key=None,
  *,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability and number of tokens of the completion of every text, [B, S].

  Args:
    decoder: A language model.
    params: All its weights.
    batch: `tokens`, `segments`, `positions` and `loss_mask` [B, T].
    num_texts: Most texts that a row holds, S.
    key: Of dropout; None for none.
    chunk_size: Tokens that go through the head together; None: as many as is fast.
  """
  if key is None:
    decoder = decoder.clone(lora_dropout=0.0)
  hidden_BTD: Any = decoder.apply(
    {'params': params},
    batch['tokens'],
    positions_BT=batch['positions'],
    segments_BT=batch['segments'],
    rngs=None if key is None else {'dropout': key},
    method='hidden',
  )
  head, head_params = head_function(decoder, params)
  mask_BT = next_token_mask(batch['loss_mask'], batch['segments'])
  logps_BT = chunked_next_token_logps(
    head,
    head_params,
    hidden_BTD,
    batch['tokens'],
    mask_BT,
    chunk_size=chunk_size,
  )
  sums = lambda x_BT: preference.segment_sums(
    x_BT, batch['segments'], mask_BT, num_texts
  )
  return sums(logps_BT), sums(jnp.ones_like(mask_BT, jnp.int32))


def make_loss_fn(
  policies: Policies,
  config: LossConfig,
  *,
  num_texts: int,
  chunk_size: int | None = None,
) -> step.LossFn:
  """The loss over pairs, or over KTO's completions.

  Args:
    policies: What trains, and its reference.
    config: Which loss.
    num_texts: Most texts that a row holds, S.
    chunk_size: As for `completion_logps`.
  """

  def loss_fn(trainable, frozen, batch, key):
    params = _weights(trainable, frozen)
    logps_BS, num_tokens_BS = completion_logps(
      policies.decoder, params, batch, num_texts, key, chunk_size=chunk_size
    )
    if config.loss == 'orpo':
      return preference.orpo_loss(logps_BS, num_tokens_BS, beta=config.beta)
    if config.loss == 'simpo':
      return preference.simpo_loss(
        logps_BS, num_tokens_BS, beta=config.beta, gamma=config.gamma
      )
    reference_BS = _reference_logps(
      policies, params, frozen, batch, num_texts, chunk_size
    )
    if config.loss == 'kto':
      return preference.kto_loss(
        logps_BS,
        reference_BS,
        num_tokens_BS,
        batch['desirable'],
        batch['kl'],
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
      )
    loss, options = preference.ipo_loss, {}
    if config.loss == 'dpo':
      loss = preference.dpo_loss
      options = {name: getattr(config, name) for name in LOSSES['dpo']}
    return loss(logps_BS, reference_BS, num_tokens_BS, beta=config.beta, **options)

  return loss_fn


def make_reference_point(
  policies: Policies, *, num_texts: int, chunk_size: int | None = None
) -> Callable[[PyTree, PyTree, step.Batch], step.Batch]:
  """A function that puts KTO's reference point into a batch before its loss is taken.

  It is the same for all micro-batches, so accumulation does not change a step.

  Args:
    policies: What trains, and its reference.
    num_texts: Most mismatched texts that a row holds.
    chunk_size: As for `completion_logps`.

  Returns:
    (trainable, frozen, batch) -> batch, where the arrays [A, ...] of mismatched texts
    are replaced by `kl` [A].
  """

  def add(trainable, frozen, batch):
    own = {n: x for n, x in batch.items() if not n.startswith(MISMATCHED)}
    others = {
      n.removeprefix(MISMATCHED): x
      for n, x in batch.items()
      if n.startswith(MISMATCHED)
    }
    params = _weights(trainable, frozen)

    def one(micro):
      logps_BS, num_tokens_BS = completion_logps(
        policies.decoder, params, micro, num_texts, chunk_size=chunk_size
      )
      reference_BS = _reference_logps(
        policies, params, frozen, micro, num_texts, chunk_size
      )
      return preference.kto_reference_point(logps_BS, reference_BS, num_tokens_BS)

    totals_A, numbers_A = jax.lax.map(one, others)
    kl = jnp.maximum(totals_A.sum() / jnp.maximum(numbers_A.sum(), 1), 0)
    return own | {'kl': jnp.full(totals_A.shape, kl)}

  return add


def kto_train_step(
  state: step.TrainState,
  frozen: PyTree,
  batch: step.Batch,
  *,
  add_reference_point: Callable[[PyTree, PyTree, step.Batch], step.Batch],
  **options: Any,
) -> tuple[step.TrainState, dict[str, jax.Array]]:
  """`step.train_step` for KTO; `options` are those of it."""
  batch = add_reference_point(state.params, frozen, batch)
  state, metrics = step.train_step(state, frozen, batch, **options)
  return state, by_kind(metrics)


def kto_evaluate_step(
  trainable: PyTree,
  frozen: PyTree,
  batch: step.Batch,
  *,
  loss_fn: step.LossFn,
  add_reference_point: Callable[[PyTree, PyTree, step.Batch], step.Batch],
) -> dict[str, jax.Array]:
  """`step.evaluate_step` for KTO; its sums go through `by_kind` once they are means."""
  batch = add_reference_point(trainable, frozen, batch)
  return step.evaluate_step(trainable, frozen, batch, loss_fn=loss_fn)


def by_kind(metrics: dict[str, Any]) -> dict[str, Any]:
  """KTO's mean metrics with those of each kind of completion divided by its share."""
  desirable = metrics['desirable']
  shares = {'chosen': desirable, 'rejected': 1 - desirable}
  means = {
    f'{name}/{kind}': metrics[f'{name}/{kind}'] / jnp.maximum(share, 1e-9)
    for name in ('rewards', 'logps')
    for kind, share in shares.items()
  }
  margin = means['rewards/chosen'] - means['rewards/rejected']
  return metrics | means | {'rewards/margins': margin}


def _weights(trainable: PyTree, frozen: PyTree) -> PyTree:
  return masks.merge(trainable, {n: t for n, t in frozen.items() if n != REFERENCE})


def _reference_logps(
  policies: Policies,
  params: PyTree,
  frozen: PyTree,
  batch: step.Batch,
  num_texts: int,
  chunk_size: int | None,
) -> jax.Array:
  if policies.reference == PRECOMPUTED:
    return batch[REFERENCE]
  if policies.reference == RESIDENT:
    decoder, weights = policies.reference_decoder, frozen[REFERENCE]
  else:
    decoder, weights = None, without_adapter(params)
  logps_BS, _ = completion_logps(
    decoder or policies.decoder,
    jax.lax.stop_gradient(weights),
    batch,
    num_texts,
    chunk_size=chunk_size,
  )
  return logps_BS
