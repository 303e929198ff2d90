"""Scores completions: records in, the same with log-probabilities or values out."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mrjax.checkpoint.adapted import resolve_adapted
from mrjax.checkpoint.source import ModelSource
from mrjax.data.tokenization import load_tokenizer
from mrjax.records import Record, expand_inputs, write_jsonl
from mrjax.runs import common
from mrjax.runs.grade import check_outputs
from mrjax.runs.progress import Progress
from mrjax.runs.score_records import Reader, Text
from mrjax.runs.value_model import ValueSource, resolve_value_model
from mrjax.runs.value_scores import ValueScorer
from mrjax.sampling.engine import Engine, check_mesh
from mrjax.sharding.mesh import make_mesh

_RECORDS_AT_ONCE = 2048  # sorted by length together, and held in memory


@dataclasses.dataclass(frozen=True)
class Config:
  """One scoring run, by a language model or by a value model."""

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  adapter: str = ''  # PEFT directory, mrjax adapter or run; empty: none
  value_model: str = ''  # run of train_value, in place of `model`
  values: bool = False  # by a value model: after every token, not the last alone
  input: str = ''  # records with completions; directory, file or glob
  output: str = ''  # one JSON Lines file
  tokenizer: str = ''  # empty: the model's own
  mesh: str = 'data:-1,fsdp:1,tensor:1'
  dtype: str = 'auto'
  max_batch: int = 64  # texts that run together, at most
  overwrite: bool = False

  def __post_init__(self):
    for name in ('input', 'output'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; it must be given.')
    if bool(self.model) == bool(self.value_model):
      raise ValueError(
        'Give either --model, for log-probabilities, or --value_model, for values.'
      )
    if self.value_model and self.adapter:
      raise ValueError('--adapter goes on --model; value models have none.')
    if self.values and not self.value_model:
      raise ValueError('--values wants a --value_model.')
    if self.max_batch < 1:
      raise ValueError(f'--max_batch={self.max_batch}: want at least 1.')


def run(config: Config) -> dict[str, Any]:
  """Scores every record, in order, and writes the output whole or not at all.

  Of `model`, a record gets `token_ids` (of the completion, its EOS included),
  `logprobs` (one a token, in nats, under the model as it is), `logprob_sum` and
  `num_tokens`. Of `value_model` it gets `value`, the reward expected at its last token
  (null where the completion has none); with `values` also that after each of
  `token_ids`. Which records there may be, `Reader` says.

  Returns:
    `num_records`, `num_tokens` (scored ones), and `mean_logprob` a token or
    `mean_value` a record.

  Raises:
    DataError: A record that cannot be read, or is too long for the model.
    OutputError: The output exists and `overwrite` is off, or is an input.
    ValueError: The model gives numbers that are not finite.
  """
  paths = expand_inputs(config.input)
  check_outputs(config.output, inputs=paths, overwrite=config.overwrite)
  if config.value_model:
    source: ModelSource = resolve_value_model(config.value_model)
  else:
    model = resolve_adapted(config.model, config.adapter)
    source = model.source
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  reader = Reader(tokenizer, source.config, name=source.name)
  mesh = make_mesh(config.mesh, jax.local_devices())
  check_mesh(source.config, mesh, max_batch=config.max_batch)
  # Read once before any work is done: a bad record is found at once.
  num_records = sum(1 for _ in reader.read(paths))
  dtype = common.resolve_dtype(config.dtype)
  score: Callable[[Sequence[Sequence[int]]], list[np.ndarray]]
  if isinstance(source, ValueSource):
    score = ValueScorer(source, mesh, dtype=dtype, max_batch=config.max_batch).values
  else:
    score = Engine(
      source.config,
      model.load_params(mesh, dtype),
      mesh,
      dtype=dtype,
      max_batch=config.max_batch,
      donate_params=True,
    ).score
  num_tokens, total, count = 0, 0.0, 0  # of what the mean is of
  with Progress('score', total=num_records) as progress:

    def scored() -> Iterator[Record]:
      nonlocal num_tokens, total, count
      texts = reader.read(paths)
      while chunk := list(itertools.islice(texts, _RECORDS_AT_ONCE)):
        for text, scores_T in zip(chunk, score([text.ids for text in chunk])):
          chosen = scores_T[text.chosen]
          if not np.isfinite(chosen).all():
            raise ValueError(
              f'{source.name} gives numbers that are not finite. Check its weights, or '
              'use --dtype=float32.'
            )
          if config.value_model:
            fields = _value_fields(text, chosen, all_of_them=config.values)
            total, count = total + (fields['value'] or 0.0), count + (chosen.size > 0)
          else:
            fields = _logprob_fields(text, chosen)
            total, count = total + fields['logprob_sum'], count + chosen.size
          num_tokens += chosen.size
          progress.add(rows=1, tokens=chosen.size)
          yield text.record | fields

    write_jsonl(config.output, scored())
  mean = 'mean_value' if config.value_model else 'mean_logprob'
  return {
    'num_records': num_records,
    'num_tokens': num_tokens,
    mean: total / max(count, 1),
  }


def _logprob_fields(text: Text, logps: np.ndarray) -> Record:
  return {
    'token_ids': text.token_ids,
    'logprobs': logps.tolist(),
    'logprob_sum': float(np.sum(logps, dtype=np.float64)),
    'num_tokens': len(logps),
  }


def _value_fields(text: Text, values: np.ndarray, *, all_of_them: bool) -> Record:
  fields: Record = {'value': float(values[-1]) if len(values) else None}
  if all_of_them:
    fields |= {'token_ids': text.token_ids, 'values': values.tolist()}
  return fields
