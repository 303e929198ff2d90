"""Records with completions, as token ids."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from mrjax.data.tokenization import Tokenizer
from mrjax.models.config import DecoderConfig
from mrjax.records import DataError, Record, read_numbered
from mrjax.runs.sampled_prompts import SampledPrompts, load_sampled_prompts


@dataclasses.dataclass(frozen=True)
class Text:
  """A record as a text for a model; `chosen` are the places of its completion."""

  record: Record
  ids: list[int]
  chosen: list[int]

  @property
  def token_ids(self) -> list[int]:
    """Those of the completion."""
    return [self.ids[i] for i in self.chosen]


class Reader:
  """Reads records for one model.

  A record has `prompt` and `completion`, which are tokenized as one string, as in
  training; or it is a sample: `token_ids`, with `prompt_ids` or with the `problem_id`
  of a run of `sample` or `evaluate` whose directory the file lies in.
  """

  def __init__(self, tokenizer: Tokenizer, config: DecoderConfig, *, name: str):
    """Takes what the model needs; `name` is for errors."""
    self._tokenizer, self._config, self._name = tokenizer, config, name
    self._folders: dict[Path, SampledPrompts] = {}

  def read(self, paths: Sequence[Path]) -> Iterator[Text]:
    """Yields every record of the files.

    Raises:
      DataError: A record that cannot be scored, by file and line.
      ValueError: The prompts of samples are not known, or have another tokenizer.
    """
    for path in paths:
      for line, record in read_numbered(path):
        if 'token_ids' in record and 'completion' not in record:
          text = self._sample(path, line, record)
        else:
          text = self._pair(path, line, record)
        if len(text.ids) > (most := self._config.max_positions):
          raise DataError(
            path,
            line,
            f'{len(text.ids)} tokens, but the model reads at most {most}; shorten the '
            'record or leave it out',
          )
        if text.chosen and text.chosen[0] == 0:
          raise DataError(
            path, line, 'the first token has nothing before it; give a longer prompt'
          )
        yield text

  def _pair(self, path: Path, line: int, record: Record) -> Text:
    if missing := [name for name in ('prompt', 'completion') if name not in record]:
      raise DataError(
        path,
        line,
        f'missing field(s) {missing}; the record has {sorted(record)}. Want prompt and '
        'completion, or the token_ids of a sample',
      )
    for name in ('prompt', 'completion'):
      if not isinstance(record[name], str):
        raise DataError(path, line, f'field {name!r} is no string')
    ids, loss_mask = self._tokenizer.encode_pair(record['prompt'], record['completion'])
    return Text(record, ids, [i for i, chosen in enumerate(loss_mask) if chosen])

  def _sample(self, path: Path, line: int, record: Record) -> Text:
    prompt_ids = record.get('prompt_ids')
    if prompt_ids is None:
      prompt_ids = self._prompt_ids(path, line, record)
    for name, ids in (('prompt_ids', prompt_ids), ('token_ids', record['token_ids'])):
      if not self._are_ids(ids):
        raise DataError(
          path,
          line,
          f'field {name!r} is {ids!r:.80}, want a list of token ids from 0 to '
          f'{self._config.vocab_size - 1}',
        )
    ids = [*prompt_ids, *record['token_ids']]
    return Text(record, ids, list(range(len(prompt_ids), len(ids))))

  def _prompt_ids(self, path: Path, line: int, record: Record) -> Sequence[int]:
    folder = path.parent
    if folder not in self._folders:
      prompts = load_sampled_prompts(folder)
      prompts.tokenizer.check_same(self._tokenizer, f'the model {self._name}')
      self._folders[folder] = prompts
    name = record.get('problem_id')
    ids = self._folders[folder].ids
    if not isinstance(name, str) or name not in ids:
      raise DataError(
        path,
        line,
        f'problem_id {name!r} is none of the problems that {folder / "config.json"} '
        'names',
      )
    return ids[name]

  def _are_ids(self, ids: object) -> bool:
    return isinstance(ids, list | tuple) and all(
      type(i) is int and 0 <= i < self._config.vocab_size for i in ids
    )
