"""Preference records in TRL's formats.

A pair is `prompt`, `chosen` and `rejected`; a judged completion (for KTO) is `prompt`,
`completion` and `label`. Texts are strings, or lists of messages. Where a pair has no
prompt, it is the beginning that both of its sides share.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mrjax.data.messages import check_messages
from mrjax.records import DataError, Record, expand_inputs, read_numbered

Text = str | tuple[Record, ...]  # or messages


@dataclasses.dataclass(frozen=True)
class PreferenceRecord:
  """A prompt and two completions; `where` names the record in errors."""

  where: str
  prompt: Text
  chosen: Text
  rejected: Text
  options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class JudgedRecord:
  """A prompt and a completion that is desirable or not; `where` is for errors."""

  where: str
  prompt: Text
  completion: Text
  desirable: bool
  options: tuple[str, ...] = ()


def load_preferences(data: str) -> list[PreferenceRecord]:
  """The pairs of a file, directory or glob of JSON Lines (`jsonl:` may stand before).

  Raises:
    DataError: A record of another shape; names the file and line.
  """
  return [
    _parsed(parse_preference, path, line, record) for path, line, record in _read(data)
  ]


def load_judged(data: str) -> list[JudgedRecord]:
  """The judged completions of a file, directory or glob; a pair gives one of each kind.

  Raises:
    DataError: A record of another shape; names the file and line.
  """
  records: list[JudgedRecord] = []
  for path, line, record in _read(data):
    if 'label' in record:
      records.append(_parsed(parse_judged, path, line, record))
      continue
    pair = _parsed(parse_preference, path, line, record)
    for completion, desirable in ((pair.chosen, True), (pair.rejected, False)):
      records.append(
        JudgedRecord(pair.where, pair.prompt, completion, desirable, pair.options)
      )
  return records


def parse_preference(record: Record, *, where: str) -> PreferenceRecord:
  """The record in checked form.

  Raises:
    ValueError: A side is missing, or has the wrong type; an empty chosen completion.
  """
  missing = [name for name in ('chosen', 'rejected') if record.get(name) is None]
  if missing:
    raise ValueError(
      f'missing field(s) {missing}; a preference record has prompt, chosen and '
      f'rejected; this one has {sorted(record)}'
    )
  texts = {
    name: _text(record[name], name)
    for name in ('prompt', 'chosen', 'rejected')
    if record.get(name) is not None
  }
  if len({type(text) for text in texts.values()}) > 1:
    raise ValueError(f'{", ".join(texts)} must all be strings, or all messages')
  if 'prompt' not in texts:
    shared = _shared_beginning(texts['chosen'], texts['rejected'])
    texts = {name: text[len(shared) :] for name, text in texts.items()}
    if shared == ():
      raise ValueError('chosen and rejected share no message, so there is no prompt')
    texts['prompt'] = shared
  if not texts['chosen']:
    raise ValueError("field 'chosen' is empty: there is nothing to prefer")
  return PreferenceRecord(where, **texts, options=tuple(record.get('options') or ()))


def parse_judged(record: Record, *, where: str) -> JudgedRecord:
  """The record in checked form.

  Raises:
    ValueError: A field is missing or has the wrong type; empty and yet desirable.
  """
  names = ('prompt', 'completion', 'label')
  missing = [name for name in names if record.get(name) is None]
  if missing:
    raise ValueError(
      f'missing field(s) {missing}; a record for KTO has {", ".join(names)}; this one '
      f'has {sorted(record)}'
    )
  prompt, completion = (_text(record[name], name) for name in names[:2])
  label = record['label']
  if type(prompt) is not type(completion):
    raise ValueError('prompt, completion must all be strings, or all messages')
  if not isinstance(label, bool):
    raise ValueError(f"field 'label' is {label!r:.40}, want true or false")
  if label and not completion:
    raise ValueError("field 'completion' is empty, and yet desirable")
  options = tuple(record.get('options') or ())
  return JudgedRecord(where, prompt, completion, label, options)


def _read(data: str):
  for path in expand_inputs(data.removeprefix('jsonl:')):
    for line, record in read_numbered(path):
      yield path, line, record


def _parsed(parse, path: Path, line: int, record: Record):
  try:
    return parse(record, where=f'{path}:{line}')
  except ValueError as error:
    raise DataError(path, line, str(error)) from None


def _text(value: Any, name: str) -> Any:
  if isinstance(value, str):
    return value
  if not isinstance(value, list) or not value:
    raise ValueError(f'field {name!r} must be a string, or a list of messages')
  return check_messages(value, name)


def _shared_beginning(chosen: Any, rejected: Any) -> Any:
  """The longest that leaves something of both; spaces before the sides are theirs."""
  shared = 0
  for a, b in zip(chosen[:-1], rejected[:-1]):
    if a != b:
      break
    shared += 1
  return chosen[:shared].rstrip(' ') if isinstance(chosen, str) else chosen[:shared]
