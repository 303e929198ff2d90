"""Supervised fine-tuning: records in, a run directory with checkpoints out."""

import dataclasses
from typing import Any

from mrjax.data.sft import Example, encode_sft, load_sft_records
from mrjax.lora import masks
from mrjax.losses.tokens import cross_entropy
from mrjax.models.decoder import Decoder
from mrjax.runs import training
from mrjax.training import step


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
  """`data` are SFT records (file, directory, glob) or problems (NAME:SPLIT)."""


def run(config: Config) -> dict[str, Any]:
  """Fine-tunes and leaves a run directory that `--model` accepts.

  Returns:
    See `training.train`.
  """
  setup = training.start(config)
  batches = _batches(config, setup, config.data)
  loss_fn = make_loss_fn(setup.decoder)
  evaluate = None
  if config.eval_data:
    eval_batches = _batches(config, setup, config.eval_data)
    evaluate = training.make_evaluate(setup, loss_fn, eval_batches)
  return training.train(config, setup, batches, loss_fn=loss_fn, evaluate=evaluate)


def make_loss_fn(decoder: Decoder) -> step.LossFn:
  """Next-token cross-entropy of the supervised tokens, as a `step.LossFn`."""

  def loss_fn(trainable, frozen, batch, key):
    del key  # nothing here is random
    logits_BTV: Any = decoder.apply(
      {'params': masks.merge(trainable, frozen)},
      batch['tokens'],
      positions_BT=batch['positions'],
      segments_BT=batch['segments'],
    )
    loss, num_tokens = cross_entropy(
      logits_BTV, batch['tokens'], batch['loss_mask'], batch['segments']
    )
    return loss, (num_tokens, {})

  return loss_fn


def _batches(config: Config, setup: training.Setup, data: str):
  examples: list[Example] = encode_sft(
    load_sft_records(data, data_root=config.data_root),
    setup.tokenizer,
    template=config.prompt_template,
    max_length=config.max_length,
    overlong=config.overlong,
  )
  return training.make_batches(config, [(example,) for example in examples])
