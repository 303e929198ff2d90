"""The files that weak-to-strong (arXiv 2407.13647) released, to and from our records.

Fine-tuning sets are {id, content, output} and preference pairs {id, instruction, input,
output: [chosen, rejected]}, both for LLaMA-Factory. Its `id` is the row of `train_2`,
which becomes the `problem_id` as a string: `split.train_2[int(problem_id)]` is the
problem where the split lists that row. `output` follows the prompt directly there, for
LLaMA-Factory tokenises the two apart; in our records it follows one space, as always
in the layout 'w2s'.
"""

from mrjax.records import Record

_SPACE = ' '


def from_released_sft(record: Record) -> Record:
  """Returns the SFT record of a released one; texts are kept to the letter.

  Raises:
    ValueError: A field is missing or has the wrong type.
  """
  return {
    'prompt': _text(record, 'content'),
    'completion': _SPACE + _text(record, 'output'),
    'problem_id': _name(record),
  }


def to_released_sft(record: Record) -> Record:
  """Returns a released record of an SFT record, the inverse of `from_released_sft`.

  Raises:
    ValueError: A field is missing, or the completion does not start with a space.
  """
  return {
    'id': _row(record),
    'content': _text(record, 'prompt'),
    'output': _unspaced(record, 'completion'),
  }


def from_released_pair(record: Record) -> Record:
  """Returns the preference record of a released pair.

  Raises:
    ValueError: A field is missing or has the wrong type, `output` is not a pair, or
      `input` is not empty (it always is in the release).
  """
  pair = record.get('output')
  if (
    not isinstance(pair, list)
    or len(pair) != 2
    or not all(isinstance(text, str) for text in pair)
  ):
    raise ValueError(
      f"field 'output' is {pair!r:.80}; want a list of two strings, [chosen, rejected]"
    )
  if record.get('input'):
    raise ValueError(
      f"field 'input' is {record['input']!r:.80}, want ''; put it into 'instruction'"
    )
  chosen, rejected = pair
  return {
    'prompt': _text(record, 'instruction'),
    'chosen': _SPACE + chosen,
    'rejected': _SPACE + rejected,
    'problem_id': _name(record),
  }


def to_released_pair(record: Record) -> Record:
  """Returns a released pair of a preference record: `from_released_pair` undone.

  Raises:
    ValueError: A field is missing, or a side does not start with a space.
  """
  return {
    'id': _row(record),
    'instruction': _text(record, 'prompt'),
    'input': '',
    'output': [_unspaced(record, 'chosen'), _unspaced(record, 'rejected')],
  }


def _text(record: Record, name: str) -> str:
  value = record.get(name)
  if not isinstance(value, str):
    raise ValueError(
      f'field {name!r} is {value!r:.80}, want a string; the record has {sorted(record)}'
    )
  return value


def _unspaced(record: Record, name: str) -> str:
  text = _text(record, name)
  if not text.startswith(_SPACE):
    raise ValueError(
      f'field {name!r} does not start with a space: {text!r:.80}; want a record in '
      "the layout 'w2s'"
    )
  return text[len(_SPACE) :]


def _name(record: Record) -> str:
  row = record.get('id')
  if type(row) not in (int, str) or row == '':
    raise ValueError(f"field 'id' is {row!r:.80}, want a whole number or a name")
  return str(row)


def _row(record: Record) -> int | str:
  """The row number where the problem id is one, else the id itself."""
  name = _text(record, 'problem_id')
  return int(name) if name.isdecimal() and str(int(name)) == name else name
