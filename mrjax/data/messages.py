"""Conversations as records hold them: lists of messages, each of a role and a text."""

from typing import Any

from mrjax.records import Record

# What chat templates of the supported families know.
ROLES = ('system', 'developer', 'user', 'assistant', 'tool', 'function', 'ipython')


def check_messages(value: Any, name: str) -> tuple[Record, ...]:
  """The messages of a record's field.

  Args:
    value: What the field holds.
    name: Of the field, for errors.

  Raises:
    ValueError: No list, an empty one, a message without role or content, a role that
      no chat template knows.
  """
  if not isinstance(value, list) or not value:
    raise ValueError(f'field {name!r} must be a list of messages, not empty')
  for message in value:
    if not isinstance(message, dict) or not all(
      isinstance(message.get(key), str) for key in ('role', 'content')
    ):
      raise ValueError(
        f'field {name!r}: a message needs role and content, both strings: '
        f'{message!r:.80}'
      )
    if message['role'] not in ROLES:
      raise ValueError(
        f'field {name!r}: a message has the role {message["role"]!r:.40}; want one of '
        f'{", ".join(ROLES)}'
      )
  return tuple(value)
