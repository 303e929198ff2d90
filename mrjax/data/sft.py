"""Supervised fine-tuning records, in TRL's formats, to token ids and loss masks."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mrjax.data.messages import check_messages
from mrjax.data.problems import load_problems
from mrjax.data.prompts import check_template, render_completion, render_prompt
from mrjax.data.tokenization import Tokenizer
from mrjax.records import (
  DataError,
  Problem,
  Record,
  expand_inputs,
  read_numbered,
)

OVERLONG_POLICIES = ('error', 'truncate', 'drop')


@dataclasses.dataclass(frozen=True)
class Example:
  """One training text.

  `ids` is int32 [T]. `loss_mask` is bool [T]: True on the tokens to be predicted, which
  are those of the completion and its EOS. `where` names its record in messages.
  """

  ids: np.ndarray
  loss_mask: np.ndarray
  where: str = ''


@dataclasses.dataclass(frozen=True)
class SftRecord:
  """A prompt and its completion, or a conversation; `where` names it in errors."""

  where: str
  prompt: str = ''
  completion: str = ''
  messages: tuple[Record, ...] = ()
  options: tuple[str, ...] = ()


def read_sft(path: str | Path) -> list[SftRecord]:
  """Returns the records of a JSON Lines file: `prompt` and `completion`, or `messages`.

  Prompts and completions may also be TRL's conversational form, lists of messages.

  Raises:
    DataError: A record of another shape; names the file and line.
  """
  records = []
  for line, record in read_numbered(path):
    try:
      records.append(parse_sft(record, where=f'{path}:{line}'))
    except ValueError as error:
      raise DataError(path, line, str(error)) from None
  return records


def parse_sft(record: Record, *, where: str) -> SftRecord:
  """Returns the record in checked form.

  Raises:
    ValueError: Neither `messages` nor `prompt` and `completion`, or wrong types; no
      turn of the assistant.
  """
  if 'messages' in record:
    messages = check_messages(record['messages'], 'messages')
    return SftRecord(where, messages=_answered(messages, 'messages'))
  missing = [name for name in ('prompt', 'completion') if record.get(name) is None]
  if missing:
    raise ValueError(
      f'missing field(s) {missing}; an SFT record has prompt and completion, or '
      f'messages; this one has {sorted(record)}'
    )
  prompt, completion = record['prompt'], record['completion']
  if isinstance(prompt, list) and isinstance(completion, list):
    answer = _answered(check_messages(completion, 'completion'), 'completion')
    return SftRecord(where, messages=check_messages(prompt, 'prompt') + answer)
  for name, value in (('prompt', prompt), ('completion', completion)):
    if not isinstance(value, str):
      raise ValueError(f'field {name!r} is {type(value).__name__}, want a string')
  if not completion:
    raise ValueError("field 'completion' is empty: there is nothing to learn from")
  options = record.get('options') or ()
  return SftRecord(where, prompt, completion, options=tuple(options))


def sft_from_problems(problems: Iterable[Problem]) -> list[SftRecord]:
  """Returns records that answer each problem with its solution.

  Raises:
    ValueError: A problem has no solution.
  """
  records = []
  for problem in problems:
    if not problem.solution:
      raise ValueError(f'problem {problem.id!r} has no solution to train on')
    records.append(
      SftRecord(
        problem.id, problem.question, problem.solution, options=problem.options or ()
      )
    )
  return records


def load_sft_records(data: str, *, data_root: str = '') -> list[SftRecord]:
  """SFT records of a file, directory or glob, or made of problems with solutions.

  `jsonl:PATH` may name either: a record with a `question` is a problem.
  """
  name, _, rest = data.partition(':')
  if name == 'jsonl' or not (rest and name.isidentifier()):
    spec = rest if name == 'jsonl' else data
    paths = expand_inputs(spec)
    _, first = next(read_numbered(paths[0]), (0, {}))
    if 'question' not in first:
      return [record for path in paths for record in read_sft(path)]
    data = f'jsonl:{spec}'
  return sft_from_problems(load_problems(data, data_root=data_root or None))


def encode_sft(
  records: Sequence[SftRecord],
  tokenizer: Tokenizer,
  *,
  template: str = 'raw',
  max_length: int,
  overlong: str = 'error',
) -> list[Example]:
  """Returns the records as training texts, and logs one line of counts.

  Args:
    records: At least one.
    tokenizer: Decides BOS and EOS.
    template: Prompt layout (see `prompts`) put around `prompt` and `completion`; 'raw'
      takes both as they stand, as TRL does. Conversations always go through the
      tokenizer's chat template.
    max_length: Longest text in tokens.
    overlong: What happens to longer ones: 'error', 'truncate' (their end is cut, EOS
      included) or 'drop'.

  Raises:
    ValueError: No records, a text too long, a text without a supervised token (also one
      whose whole completion would be cut), or all texts dropped. Names the record.
  """
  check_template(template, tokenizer)
  if overlong not in OVERLONG_POLICIES:
    raise ValueError(f'overlong={overlong!r}; want one of {OVERLONG_POLICIES}')
  if not records:
    raise ValueError('the training data are empty')
  examples = []
  truncated = dropped = 0
  for record in records:
    try:
      ids, loss_mask = _encode(record, tokenizer, template)
    except ValueError as error:
      raise ValueError(f'{record.where}: {error}') from None
    if len(ids) > max_length:
      if overlong == 'error':
        raise ValueError(
          f'{record.where}: {len(ids)} tokens, more than max_length={max_length}; '
          'raise --max_length, or give --overlong=truncate or --overlong=drop'
        )
      if overlong == 'drop':
        dropped += 1
        continue
      truncated += 1
      ids, loss_mask = ids[:max_length], loss_mask[:max_length]
    # The first token of a text is never predicted.
    if not any(loss_mask[1:]):
      raise ValueError(
        f'{record.where}: no supervised token among {len(ids)}; the completion is '
        f'empty or lies behind max_length={max_length}: raise --max_length, or give '
        '--overlong=drop'
      )
    examples.append(
      Example(np.array(ids, np.int32), np.array(loss_mask, bool), record.where)
    )
  if not examples:
    raise ValueError(f'all {dropped} records are longer than max_length={max_length}')
  logging.info(
    'SFT data: %d of %d records, %d tokens, %d supervised, longest %d; %d truncated '
    'and %d dropped at max_length=%d',
    len(examples),
    len(records),
    sum(len(example.ids) for example in examples),
    sum(int(example.loss_mask.sum()) for example in examples),
    max(len(example.ids) for example in examples),
    truncated,
    dropped,
    max_length,
  )
  return examples


def _encode(
  record: SftRecord, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[bool]]:
  if record.messages:
    if template not in ('raw', 'chat'):
      raise ValueError(
        'a record with messages goes through the chat template: give '
        f'--prompt_template=chat (or raw), not {template!r}'
      )
    return tokenizer.encode_messages(record.messages)
  problem = Problem(
    id=record.where,
    question=record.prompt,
    solution=record.completion,
    options=record.options or None,
  )
  prompt = render_prompt(template, problem, tokenizer=tokenizer)
  completion = render_completion(template, problem, tokenizer=tokenizer)
  return tokenizer.encode_pair(prompt.text, completion, add_bos=prompt.add_bos)


def _answered(messages: tuple[Record, ...], name: str) -> tuple[Record, ...]:
  roles = [message['role'] for message in messages]
  if 'assistant' not in roles:
    raise ValueError(
      f'field {name!r} has no message of the role assistant, so there is nothing to '
      f'learn from; its roles are {", ".join(roles):.80}'
    )
  return messages
