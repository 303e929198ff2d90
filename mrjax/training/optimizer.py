"""AdamW with the usual schedules, as in Loshchilov and Hutter 2019."""

import dataclasses

import jax
import optax

from mrjax import trees
from mrjax.training.ranges import (
  BELOW_ONE,
  NOT_NEGATIVE,
  POSITIVE,
  SHARE,
  check_ranges,
)

SCHEDULES = ('constant', 'linear', 'cosine')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Defaults are those of the transformers `Trainer`, but for the schedule's floor."""

  learning_rate: float = 2e-5
  schedule: str = 'cosine'
  warmup_steps: int = 0  # optimizer steps of linear rise from 0
  warmup_ratio: float = 0.0  # used where warmup_steps is 0; share of all steps
  final_lr_ratio: float = 0.0  # learning rate at the last step over the peak
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  weight_decay: float = 0.0  # on matrices only: not on biases and norm scales
  clip_norm: float | None = 1.0  # global gradient norm; 0 turns clipping off
  lora_plus_ratio: float = 1.0  # learning rate of lora_b over that of lora_a

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f'--schedule={self.schedule}: want one of {", ".join(SCHEDULES)}.'
      )
    check_ranges(
      self,
      {
        'learning_rate': NOT_NEGATIVE,
        'warmup_steps': NOT_NEGATIVE,
        'warmup_ratio': BELOW_ONE,
        'final_lr_ratio': SHARE,
        'beta1': BELOW_ONE,
        'beta2': BELOW_ONE,
        'epsilon': POSITIVE,
        'weight_decay': NOT_NEGATIVE,
        'clip_norm': NOT_NEGATIVE,
        'lora_plus_ratio': POSITIVE,
      },
    )


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate of each step in 0 ... num_steps - 1; warm-up never starts at zero."""
  # Round up, as transformers does: 3% of 174 steps are 6 warm-up steps.
  warmup = config.warmup_steps or -int(-config.warmup_ratio * num_steps // 1)
  peak, floor = config.learning_rate, config.learning_rate * config.final_lr_ratio
  decay_steps = max(num_steps - warmup, 1)
  if config.schedule == 'constant':
    main = optax.constant_schedule(peak)
  elif config.schedule == 'linear':
    main = optax.linear_schedule(peak, floor, decay_steps)
  else:
    main = optax.cosine_decay_schedule(peak, decay_steps, config.final_lr_ratio)
  if not warmup:
    return main
  rise = lambda step: peak * (step + 1) / warmup
  return optax.join_schedules([rise, main], [warmup])


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW.

  `lora_b` takes steps `lora_plus_ratio` times as long, as in LoRA+ (Hayou et al. 2024,
  https://arxiv.org/abs/2402.12354); its weight decay is scaled likewise.
  """
  decayed = lambda params: trees.map_named(
    lambda name, _: not name.endswith(('/bias', '/scale')), params
  )
  steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  adamw = optax.adamw(
    schedule,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  steps.append(adamw)
  if config.lora_plus_ratio != 1.0:
    steps.append(_lengthen('/lora_b', config.lora_plus_ratio))
  return optax.chain(*steps)


def _lengthen(ending: str, ratio: float) -> optax.GradientTransformation:
  """Multiplies the updates of the leaves whose path has this ending."""

  def update(updates, params=None):
    del params
    return trees.map_named(
      lambda name, x: ratio * x if name.endswith(ending) else x, updates
    )

  return optax.stateless(update)


def state_specs(tx: optax.GradientTransformation, params, specs):
  """Partition specs of the optimizer state: moments lie with their parameters.

  Args:
    tx: The optimizer.
    params: Parameter shapes.
    specs: The tree of specs (or shardings) of the parameters; scalars of the state
      get the empty spec through `jax.sharding.PartitionSpec()`.
  """
  return optax.tree_map_params(
    tx,
    lambda _, spec: spec,
    jax.eval_shape(tx.init, params),
    specs,
    transform_non_params=lambda _: jax.sharding.PartitionSpec(),
  )
