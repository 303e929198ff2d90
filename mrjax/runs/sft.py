"""Supervised fine-tuning: records in, a run directory with checkpoints out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mrjax.data.sft import Example, encode_sft, load_sft_records
from mrjax.lora import masks
from mrjax.losses.tokens import chunked_cross_entropy
from mrjax.models.decoder import Decoder
from mrjax.models.head import head_function
from mrjax.runs import training
from mrjax.training import step


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
  """`data` are SFT records (file, directory, glob) or problems (NAME:SPLIT)."""


def run(
  config: Config, *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
  """Fine-tunes and leaves a run directory that `--model` accepts.

  Args:
    config: Of the run.
    devices: To run on; by default all.

  Returns:
    See `training.train`.
  """
  setup = training.start(config, devices=devices)
  plan = training.make_plan(config, setup)
  batches = _batches(config, setup, config.data)
  loss_fn = make_loss_fn(setup.decoder, chunk_size=config.loss_chunk or None)
  evaluate = None
  if config.eval_data:
    eval_batches = _batches(config, setup, config.eval_data)
    evaluate = training.make_evaluate(setup, loss_fn, eval_batches)
  return training.train(
    config, setup, batches, plan=plan, loss_fn=loss_fn, evaluate=evaluate
  )


def make_loss_fn(decoder: Decoder, *, chunk_size: int | None = None) -> step.LossFn:
  """Next-token cross-entropy of the supervised tokens, as a `step.LossFn`.

  Args:
    decoder: A language model.
    chunk_size: Tokens that go through the head together; None: as many as is fast.
  """

  def loss_fn(trainable, frozen, batch, key):
    model = decoder if key is not None else decoder.clone(lora_dropout=0.0)
    params = masks.merge(trainable, frozen)
    hidden_BTD: Any = model.apply(
      {'params': params},
      batch['tokens'],
      positions_BT=batch['positions'],
      segments_BT=batch['segments'],
      rngs=None if key is None else {'dropout': key},
      method='hidden',
    )
    head, head_params = head_function(model, params)
    loss, num_tokens = chunked_cross_entropy(
      head,
      head_params,
      hidden_BTD,
      batch['tokens'],
      batch['loss_mask'],
      batch['segments'],
      chunk_size=chunk_size,
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
