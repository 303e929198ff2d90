"""Value models in training: their head, their loss, their evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax.data.batches import TextBatches
from mrjax.lora import masks
from mrjax.losses import value
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import training
from mrjax.runs.value_model import value_shapes
from mrjax.sharding.rules import param_shardings
from mrjax.training import loop, step

PyTree = Any
INIT_MODES = ('random', 'zero', 'reuse', 'warmstart')


def value_outputs(
  decoder: Decoder,
  params: PyTree,
  batch: step.Batch,
  head: ValueHead,
  *,
  use_bias: bool = True,
) -> jax.Array:
  """Head outputs that value each text up to each token, float32 [B, T, width].

  Args:
    decoder: With the value head.
    params: All its weights.
    batch: `tokens`, `segments` and `positions` [B, T].
    head: What the outputs mean.
    use_bias: Whether the head's bias gets a gradient.
  """
  if not use_bias:
    bias = jax.lax.stop_gradient(params['value_head']['bias'])
    params = params | {'value_head': params['value_head'] | {'bias': bias}}
  apply: Any = lambda method: decoder.apply(
    {'params': params},
    batch['tokens'],
    positions_BT=batch['positions'],
    segments_BT=batch['segments'],
    method=method,
  )
  if head.classifier_type == 'V':
    return apply(None)
  kernel_DO, bias_O = params['value_head']['kernel'], params['value_head']['bias']
  return value.taken_token_outputs(
    apply('hidden'), kernel_DO, bias_O, batch['tokens'], head
  )


def make_loss_fn(decoder: Decoder, head: ValueHead, *, use_bias: bool) -> step.LossFn:
  """`losses.value.value_loss` of the batch's `reward` [B, S], as a `step.LossFn`."""

  def loss_fn(trainable, frozen, batch, key):
    del key  # nothing here is random
    params = masks.merge(trainable, frozen)
    outputs_BTA = value_outputs(decoder, params, batch, head, use_bias=use_bias)
    return value.value_loss(
      outputs_BTA, batch['reward'], batch['segments'], batch['loss_mask'], head
    )

  return loss_fn


def make_prepare(
  config: DecoderConfig, head: ValueHead, mesh: Mesh, *, init_mode: str, seed: int
) -> Callable[[PyTree], PyTree]:
  """A function that gives loaded weights their value head.

  The language-model head goes. The bias begins at zero, and the kernel, by `init_mode`:
  'zero', so that every logit is 0; 'random', normal with the model's own deviation;
  'reuse', each token's row of the language-model head, once for every atom (a 'V' head
  has no tokens: random); 'warmstart', as it was loaded.
  """
  shapes = value_shapes(config, head, jnp.float32)['value_head']
  shardings = param_shardings({'value_head': shapes}, mesh)['value_head']
  reuse = init_mode == 'reuse' and head.classifier_type == 'Q'

  def make_head(rows_VD) -> PyTree:
    shape = shapes['kernel'].shape
    if reuse:
      kernel_DO = jnp.repeat(rows_VD.T.astype(jnp.float32), head.width, axis=1)
    elif init_mode == 'zero':
      kernel_DO = jnp.zeros(shape, jnp.float32)
    else:
      key = jax.random.key(seed)
      kernel_DO = config.initializer_range * jax.random.normal(key, shape, jnp.float32)
    return {'kernel': kernel_DO, 'bias': jnp.zeros(shape[1:], jnp.float32)}

  def prepare(params: PyTree) -> PyTree:
    rest = {n: t for n, t in params.items() if n not in ('lm_head', 'value_head')}
    if init_mode == 'warmstart':
      return rest | {'value_head': params['value_head']}
    rows_VD = None
    if reuse and config.tie_embeddings:
      rows_VD = params['embed']['embedding']
    elif reuse:
      rows_VD = params['lm_head']['kernel'].T
    made = jax.jit(make_head, out_shardings=shardings)(rows_VD)
    return rest | {'value_head': made}

  return prepare


def make_evaluate(
  setup: training.Setup, head: ValueHead, batches: Mapping[str, TextBatches]
) -> training.Evaluate:
  """Evaluation of a value model on named data sets.

  Returns:
    A function that gives, under NAME_..., the `loss`, the numbers of
    `losses.value.evaluate` over supervised tokens, and for 'mle' the mean `variance`
    and `entropy` of the predictions; and, as `loss`, that of the first data set.
  """

  def forward(trainable, frozen, batch):
    params = masks.merge(trainable, frozen)

    def one(micro):
      outputs_BTA = value_outputs(setup.decoder, params, micro, head)
      loss, (weight, _) = value.value_loss(
        outputs_BTA, micro['reward'], micro['segments'], micro['loss_mask'], head
      )
      found = {'predictions': value.expected_rewards(outputs_BTA, head)}
      if head.loss_type == 'mle':
        found['variance'], found['entropy'] = value.spreads(outputs_BTA, head)
      return loss, weight, found

    return jax.lax.map(one, batch)

  # All of it is small, and every process wants all of it.
  forward = jax.jit(forward, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))

  def evaluate_one(found: TextBatches, trainable, frozen) -> dict[str, float]:
    losses, weights = 0.0, 0.0
    tokens: dict[str, list[np.ndarray]] = {'rewards': []}
    for batch in found.one_epoch():
      loss_A, weight_A, per_token = forward(
        trainable, frozen, loop.shard_batch(batch, setup.mesh)
      )
      losses += float(loss_A.sum())
      weights += float(weight_A.sum())
      mask = batch['loss_mask']
      numbers = np.maximum(batch['segments'] - 1, 0)
      rewards = np.take_along_axis(batch['reward'], numbers, axis=-1)
      tokens['rewards'].append(rewards[mask])
      for name, values in per_token.items():
        tokens.setdefault(name, []).append(np.asarray(values)[mask])
    joined = {name: np.concatenate(parts) for name, parts in tokens.items()}
    numbers = value.evaluate(joined.pop('predictions'), joined.pop('rewards'), head)
    means = {name: float(values.mean()) for name, values in joined.items()}
    return {'loss': losses / weights} | numbers | means

  def evaluate(trainable, frozen) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in batches.items():
      for key, number in evaluate_one(found, trainable, frozen).items():
        metrics[f'{name}_{key}'] = number
    return {'loss': metrics[f'{next(iter(batches))}_loss']} | metrics

  return evaluate
