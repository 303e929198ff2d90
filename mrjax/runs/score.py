"""Scores given completions: records in, the same with log-probabilities out."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrjax.checkpoint.adapted import resolve_adapted
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.records import DataError, Record, expand_inputs, read_numbered, write_jsonl
from mrjax.runs import common
from mrjax.runs.grade import check_output
from mrjax.runs.progress import Progress
from mrjax.sampling.engine import Engine, check_mesh
from mrjax.sharding.mesh import make_mesh

_RECORDS_AT_ONCE = 2048  # sorted by length together, and held in memory


@dataclasses.dataclass(frozen=True)
class Config:
  """One scoring run."""

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  adapter: str = ''  # PEFT directory, mrjax adapter or run; empty: none
  input: str = ''  # records with `prompt` and `completion`; directory, file or glob
  output: str = ''  # one JSON Lines file
  tokenizer: str = ''  # empty: the model's own
  mesh: str = 'data:-1,fsdp:1,tensor:1'
  dtype: str = 'auto'
  max_batch: int = 64  # texts that run together, at most
  overwrite: bool = False

  def __post_init__(self):
    for name in ('model', 'input', 'output'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; it must be given.')
    if self.max_batch < 1:
      raise ValueError(f'--max_batch={self.max_batch}: want at least 1.')


@dataclasses.dataclass(frozen=True)
class _Text:
  record: Record
  ids: list[int]
  loss_mask: list[bool]


def run(config: Config) -> dict[str, Any]:
  """Scores every record, in order, and writes the output whole or not at all.

  A record gets `token_ids` (of the completion and its EOS), `logprobs` (one a token, in
  nats, under the model as it is), `logprob_sum` and `num_tokens`. Prompt and completion
  are tokenized as one string, as in training.

  Returns:
    `num_records`, `num_tokens` (scored ones), `mean_logprob` a token.

  Raises:
    DataError: A record without prompt or completion, or too long for the model.
    OutputError: The output exists and `overwrite` is off.
  """
  check_output(config.output, overwrite=config.overwrite)
  paths = expand_inputs(config.input)
  model = resolve_adapted(config.model, config.adapter)
  source = model.source
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  max_length = source.config.max_positions
  mesh = make_mesh(config.mesh)
  check_mesh(source.config, mesh, max_batch=config.max_batch)
  # Read once before any work is done: a bad record is found at once.
  num_records = sum(1 for _ in _read(paths, tokenizer, max_length))
  dtype = common.resolve_dtype(config.dtype)
  engine = Engine(
    source.config,
    model.load_params(mesh, dtype),
    mesh,
    dtype=dtype,
    max_batch=config.max_batch,
    donate_params=True,
  )
  totals = {'num_records': 0, 'num_tokens': 0}
  logprob = 0.0
  with Progress('score', total=num_records) as progress:

    def scored() -> Iterator[Record]:
      nonlocal logprob
      texts = _read(paths, tokenizer, max_length)
      while chunk := list(itertools.islice(texts, _RECORDS_AT_ONCE)):
        for text, logps_T in zip(chunk, engine.score([text.ids for text in chunk])):
          record = _scored(text, logps_T)
          totals['num_records'] += 1
          totals['num_tokens'] += record['num_tokens']
          logprob += record['logprob_sum']
          progress.add(rows=1, tokens=record['num_tokens'])
          yield record

    write_jsonl(config.output, scored())
  return totals | {'mean_logprob': logprob / max(totals['num_tokens'], 1)}


def _read(
  paths: Sequence[Path], tokenizer: Tokenizer, max_length: int
) -> Iterator[_Text]:
  for path in paths:
    for line, record in read_numbered(path, required=('prompt', 'completion')):
      for name in ('prompt', 'completion'):
        if not isinstance(record[name], str):
          raise DataError(path, line, f'field {name!r} is no string')
      ids, loss_mask = tokenizer.encode_pair(record['prompt'], record['completion'])
      if len(ids) > max_length:
        raise DataError(
          path,
          line,
          f'{len(ids)} tokens, but the model reads at most {max_length}; shorten the '
          'record or leave it out',
        )
      if loss_mask[0]:
        raise DataError(
          path, line, 'the first token has nothing before it; give a longer prompt'
        )
      yield _Text(record, ids, loss_mask)


def _scored(text: _Text, logps_T: np.ndarray) -> Record:
  chosen = [i for i, supervised in enumerate(text.loss_mask) if supervised]
  logps = logps_T[chosen]
  return text.record | {
    'token_ids': [text.ids[i] for i in chosen],
    'logprobs': logps.tolist(),
    'logprob_sum': float(np.sum(logps, dtype=np.float64)),
    'num_tokens': len(chosen),
  }
