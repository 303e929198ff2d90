"""Preference optimisation: pairs in, a run directory with checkpoints out."""

import dataclasses
import functools
from typing import Any

import numpy as np

from mrjax.data.batches import TextBatches
from mrjax.data.preference import load_judged, load_preferences
from mrjax.data.preference_batches import JudgedBatches
from mrjax.data.preference_encoding import (
  EQUAL_POLICIES,
  encode_judged,
  encode_preferences,
)
from mrjax.runs import preference_losses, reference, training
from mrjax.runs.preference_losses import (
  ADAPTER_OFF,
  NEED_REFERENCE,
  PRECOMPUTED,
  REFERENCE,
  RESIDENT,
  Policies,
)
from mrjax.training import step

REFERENCES = ('auto', ADAPTER_OFF, RESIDENT, PRECOMPUTED)
_TRAIN, _EVAL = 'train', 'eval'


@dataclasses.dataclass(frozen=True)
class Config(training.Config, preference_losses.LossConfig):
  """`data` and `eval_data` are preference records (file, directory, glob).

  A row has place for two texts of `max_length` tokens (KTO: for one).
  """

  learning_rate: float = 1e-5
  num_epochs: float = 1.0
  reference: str = 'auto'  # where the reference's log-probabilities come from
  reference_model: str = ''  # empty: the model as it is before it trains
  equal_pairs: str = 'error'  # pairs whose chosen equals its rejected: error or drop

  def __post_init__(self):
    super().__post_init__()
    preference_losses.LossConfig.__post_init__(self)
    for name, known in (('reference', REFERENCES), ('equal_pairs', EQUAL_POLICIES)):
      if getattr(self, name) not in known:
        raise ValueError(
          f'--{name}={getattr(self, name)}: want one of {", ".join(known)}.'
        )
    if self.loss not in NEED_REFERENCE:
      for name, default in (('reference', 'auto'), ('reference_model', '')):
        if getattr(self, name) != default:
          raise ValueError(
            f'--{name}={getattr(self, name)}: --loss={self.loss} has no reference.'
          )
    if self.reference == ADAPTER_OFF and self.reference_model:
      raise ValueError(
        f'--reference={ADAPTER_OFF} and --reference_model={self.reference_model} '
        'contradict each other: give one of them.'
      )
    if self.reference == ADAPTER_OFF and not self._only_adapter_trains:
      raise ValueError(
        f'--reference={ADAPTER_OFF}: more than an adapter trains, so the weights '
        f'without it are no reference. Give --lora_rank, or --reference={PRECOMPUTED}.'
      )

  @property
  def _only_adapter_trains(self) -> bool:
    return self.has_adapter and self.trainable in ('', 'lora')

  @property
  def reference_kind(self) -> str:
    """Where the reference's log-probabilities come from; empty for losses without."""
    if self.loss not in NEED_REFERENCE:
      return ''
    if self.reference != 'auto':
      return self.reference
    # An adapter that trains on is part of the policy that it begins with.
    if self._only_adapter_trains and not self.adapter and not self.reference_model:
      return ADAPTER_OFF
    return PRECOMPUTED


@dataclasses.dataclass(frozen=True)
class _Data:
  """Units of text with their labels; for KTO, the mismatched texts too."""

  units: list[Any]
  labels: dict[str, np.ndarray]
  mismatched: list[Any]


def run(config: Config) -> dict[str, Any]:
  """Trains on preferences and leaves a run directory that `--model` accepts.

  Each line of its metrics has the mean `rewards/chosen`, `rewards/rejected`,
  `rewards/margins` and `rewards/accuracies` (not for KTO, which has `kl`), as TRL
  defines them.

  Returns:
    See `training.train`; records are pairs, or KTO's completions.
  """
  setup = training.start(config)
  plan = training.make_plan(config, setup, row_length=_row_length(config))
  kind = config.reference_kind
  policies = Policies(setup.decoder, kind)
  found = None
  if kind in (RESIDENT, PRECOMPUTED):
    found = reference.find_reference(config, setup, config.reference_model)
  data = {_TRAIN: _load(config, setup, config.data)}
  if config.eval_data:
    data[_EVAL] = _load(config, setup, config.eval_data)
  logps: dict[str, np.ndarray] = {}
  constants = {}
  # What is finished needs no reference, which is a model to load.
  unlabelled = lambda: _batches(config, data[_TRAIN], _TRAIN, {})
  if found and not training.is_finished(config, unlabelled):
    if kind == RESIDENT:
      load = found.shapes if config.dry_run else found.load
      constants = {REFERENCE: load(setup.mesh)}
      policies = policies._replace(reference_decoder=found.decoder)
    else:
      config, logps = _precompute(config, setup, found, data)
  batches = {name: _batches(config, units, name, logps) for name, units in data.items()}
  make = functools.partial(_make_step, config, policies)
  loss_fn, train_step, _ = make(batches[_TRAIN])
  evaluate = None
  if config.eval_data:
    eval_loss_fn, _, eval_step = make(batches[_EVAL])
    evaluate = training.make_evaluate(
      setup, eval_loss_fn, batches[_EVAL], evaluate_step=eval_step
    )
    if config.loss == 'kto':
      evaluate = _finish_kto(evaluate)
  return training.train(
    config,
    setup,
    batches[_TRAIN],
    loss_fn=loss_fn,
    weight='completions' if config.loss == 'kto' else 'pairs',
    train_step=train_step,
    evaluate=evaluate,
    plan=plan,
    constants=constants,
  )


def _load(config: Config, setup: training.Setup, spec: str) -> _Data:
  options: dict[str, Any] = {
    'template': config.prompt_template,
    'max_length': config.max_length,
    'overlong': config.overlong,
  }
  if config.loss != 'kto':
    pairs = encode_preferences(
      load_preferences(spec), setup.tokenizer, equal=config.equal_pairs, **options
    )
    return _Data(pairs, {}, [])
  judged = encode_judged(load_judged(spec), setup.tokenizer, **options)
  return _Data(
    [(text,) for text in judged.texts],
    {'desirable': judged.desirable[:, None]},
    [(text,) for text in judged.mismatched],
  )


def _row_length(config: Config) -> int:
  return config.max_length * (1 if config.loss == 'kto' else 2)


def _precompute(
  config: Config,
  setup: training.Setup,
  policy: reference.ReferencePolicy,
  data: dict[str, _Data],
) -> tuple[Config, dict[str, np.ndarray]]:
  """The log-probabilities by name, and the configuration to go on with."""
  units = {name: found.units for name, found in data.items()}
  units |= {
    f'{name}_mismatched': found.mismatched
    for name, found in data.items()
    if found.mismatched
  }
  if config.dry_run:  # nothing is loaded, and numbers do not matter
    return config, {
      name: np.zeros((len(found), len(found[0])), np.float32)
      for name, found in units.items()
    }
  training.prepare_output(config)
  logps = reference.precompute(
    config, setup, policy, units, row_length=_row_length(config)
  )
  return dataclasses.replace(config, overwrite=False), logps


def _batches(
  config: Config, data: _Data, name: str, logps: dict[str, np.ndarray]
) -> TextBatches:
  def labels(name: str) -> dict[str, np.ndarray]:
    return {REFERENCE: logps[name]} if name in logps else {}

  row_length = _row_length(config)
  own = data.labels | labels(name)
  if not data.mismatched:
    return training.make_batches(config, data.units, row_length=row_length, labels=own)
  mismatched = training.make_batches(
    config, data.mismatched, row_length=row_length, labels=labels(f'{name}_mismatched')
  )
  return training.make_batches(
    config,
    data.units,
    row_length=row_length,
    labels=own,
    make=functools.partial(JudgedBatches, mismatched=mismatched),
  )


def _make_step(config: Config, policies: Policies, batches: TextBatches):
  """The loss, and what takes a step and an evaluation step with it."""
  chunk_size = config.loss_chunk or None
  loss_fn = preference_losses.make_loss_fn(
    policies, config, num_texts=batches.max_texts, chunk_size=chunk_size
  )
  if not isinstance(batches, JudgedBatches):
    return loss_fn, step.train_step, step.evaluate_step
  add = preference_losses.make_reference_point(
    policies, num_texts=batches.mismatched.max_texts, chunk_size=chunk_size
  )
  return (
    loss_fn,
    functools.partial(preference_losses.kto_train_step, add_reference_point=add),
    functools.partial(preference_losses.kto_evaluate_step, add_reference_point=add),
  )


def _finish_kto(evaluate: training.Evaluate) -> training.Evaluate:
  def finished(trainable, frozen):
    metrics = preference_losses.by_kind(evaluate(trainable, frozen))
    return {name: float(value) for name, value in metrics.items()}

  return finished
