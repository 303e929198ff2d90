"""Value models as in Q#: records with rewards in, a run directory with one out."""

import dataclasses
import logging
import math
from typing import Any

import jax

from mrjax.data.batches import TextBatches
from mrjax.data.values import (
  Labels,
  ValueRecord,
  check_disjoint,
  drop_no_variation,
  encode_values,
  load_values,
  sample_records,
  split_id_eval,
)
from mrjax.losses.value import ValueHead
from mrjax.runs import training
from mrjax.runs.value_model import as_value_source, write_value_head
from mrjax.runs.value_steps import (
  INIT_MODES,
  make_evaluate,
  make_loss_fn,
  make_prepare,
)
from mrjax.training.ranges import BELOW_ONE, FINITE, POSITIVE, Range, check_ranges

INFERENCE_MODES = ('bernoulli', 'expectation')


@dataclasses.dataclass(frozen=True)
class Config(training.Config, ValueHead):
  """`data` are value records: a file, directory or glob for each round, with commas.

  `eval_data` are records of other problems ("ood"); a share of `data` is held out too
  ("id"). All weights train.
  """

  learning_rate: float = 2e-5
  schedule: str = 'constant'
  weight_decay: float = 0.01
  clip_norm: float | None = None  # None: 5 for a V head, none for Q, as published
  num_epochs: float = 5.0
  overlong: str = 'truncate'
  use_bias: bool = False  # of the head; without, it stays zero
  init_mode: str = 'random'  # of the head
  use_all_ref_tokens: bool = True  # supervise the whole roll-out, not one token alone
  drop_no_variation: bool = False  # problems whose rewards are all equal
  inference_mode: str = 'bernoulli'  # what the head is trained for
  cd_baseline: bool = False  # labels are plain rewards whatever the inference mode
  eta: float = 10.0  # guidance strength that `expectation` puts into the labels
  shift_reward: float = 0.0  # taken from every reward
  scale_reward: float = 1.0  # factor of the shifted reward
  id_eval_ratio: float = 0.1  # share of the records held out, in [0, 1)
  eval_max_size: int = 1000  # records of each evaluation, at most

  def __post_init__(self):
    if self.clip_norm is None:
      clip_norm = 5.0 if self.classifier_type == 'V' else 0.0
      object.__setattr__(self, 'clip_norm', clip_norm)  # so that it is recorded
    super().__post_init__()
    ValueHead.__post_init__(self)
    for name, known in (
      ('init_mode', INIT_MODES),
      ('inference_mode', INFERENCE_MODES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'--{name}={getattr(self, name)}: want one of {", ".join(known)}.'
        )
    if self.has_adapter or self.quantize or self.trainable:
      raise ValueError(
        'Value models train all their weights: leave --lora_rank, --adapter, '
        '--quantize and --trainable out.'
      )
    check_ranges(
      self,
      {
        'v_min': FINITE,
        'v_max': FINITE,
        'eta': POSITIVE,
        'shift_reward': FINITE,
        'scale_reward': Range(
          'a finite number other than 0', lambda x: math.isfinite(x) and x != 0
        ),
        'id_eval_ratio': BELOW_ONE,
      },
    )
    if self.eval_max_size < 1:
      raise ValueError(f'--eval_max_size={self.eval_max_size}: want at least 1.')

  @property
  def evaluates(self) -> bool:
    return bool(self.eval_data) or self.id_eval_ratio > 0

  @property
  def head(self) -> ValueHead:
    """What the outputs of the head mean."""
    fields = dataclasses.fields(ValueHead)
    return ValueHead(**{field.name: getattr(self, field.name) for field in fields})

  @property
  def labels(self) -> Labels:
    """How rewards become labels."""
    exponential = self.inference_mode == 'expectation' and not self.cd_baseline
    return Labels(
      self.shift_reward,
      self.scale_reward,
      self.eta if exponential else None,
      self.v_min,
      self.v_max,
    )


def run(config: Config) -> dict[str, Any]:
  """Trains a value model and leaves a run directory that `resolve_value_model` reads.

  Evaluations report `id_...` and `ood_...`: the loss and the numbers of
  `losses.value.evaluate` over supervised tokens, and for 'mle' the mean `variance` and
  `entropy` of the predictions. The best checkpoint is that of the least id loss (ood
  where there is no other).

  Returns:
    See `training.train`.
  """
  setup = training.start(config)
  head = config.head
  vocab_size = setup.source.config.vocab_size
  stored = as_value_source(setup.source)
  setup = dataclasses.replace(
    setup,
    source=stored or setup.source,
    decoder=setup.decoder.clone(num_value_outputs=head.num_outputs(vocab_size)),
  )
  if config.init_mode == 'warmstart':
    _check_warmstart(config, stored.head if stored else None)
  if config.init_mode == 'reuse' and (head.classifier_type == 'V' or stored):
    if head.classifier_type == 'Q':
      raise ValueError(
        f'--init_mode=reuse takes the rows of a language-model head, and '
        f'{config.model} is a value model. Give --init_mode=warmstart or random.'
      )
    logging.info('A V head has no row to reuse: the backbone is, the head is random.')
  plan = training.make_plan(
    config,
    setup,
    prepare=make_prepare(
      setup.source.config,
      head,
      setup.mesh,
      init_mode=config.init_mode,
      seed=config.seed,
    ),
    head_outputs=head.width,
  )
  batches = {
    name: _batches(config, records, vocab_size, name=name)
    for name, records in _records(config).items()
  }
  training_batches = batches.pop('train')
  evaluate = make_evaluate(setup, head, batches) if batches else None
  if not config.dry_run:
    training.prepare_output(config)
    if jax.process_index() == 0:
      write_value_head(config.output_dir, head)
    config = dataclasses.replace(config, overwrite=False)
  return training.train(
    config,
    setup,
    training_batches,
    loss_fn=make_loss_fn(setup.decoder, head, use_bias=config.use_bias),
    weight='texts',
    evaluate=evaluate,
    plan=plan,
  )


def _check_warmstart(config: Config, stored: ValueHead | None) -> None:
  if stored is None:
    raise ValueError(
      f'--init_mode=warmstart wants a --model that is a value model; {config.model} '
      'has no value head.'
    )
  own, old = dataclasses.asdict(config.head), dataclasses.asdict(stored)
  if changed := [f'--{name}={old[name]}' for name in old if own[name] != old[name]]:
    raise ValueError(
      f'--init_mode=warmstart goes on with the head of --model={config.model}, which '
      f'is another one: pass {" ".join(changed)} as it has.'
    )


def _records(config: Config) -> dict[str, list[ValueRecord]]:
  """Records by use: train, id and ood, the last two where there are any."""
  records = load_values(config.data)
  ood = load_values(config.eval_data) if config.eval_data else []
  check_disjoint(records, ood)
  if config.drop_no_variation:
    records = drop_no_variation(records)
  training_records, held_out = split_id_eval(
    records, ratio=config.id_eval_ratio, seed=config.seed
  )
  few = lambda found: sample_records(
    found, max_size=config.eval_max_size, seed=config.seed
  )
  found = {'train': training_records, 'id': few(held_out), 'ood': few(ood)}
  return {name: records for name, records in found.items() if records}


def _batches(
  config: Config, records: list[ValueRecord], vocab_size: int, *, name: str
) -> TextBatches:
  texts, rewards = encode_values(
    records,
    config.labels,
    vocab_size=vocab_size,
    max_length=config.max_length,
    overlong=config.overlong,
    # The published numbers on unseen problems are over all tokens of a roll-out.
    whole_rollout=config.use_all_ref_tokens or name == 'ood',
  )
  return training.make_batches(config, texts, labels={'reward': rewards})
