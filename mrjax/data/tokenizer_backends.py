"""Two libraries behind one face: HF fast tokenizers and raw sentencepiece models.

A `.model` file is read by sentencepiece itself: transformers' conversion of a bare file
drops the leading-space piece, and with it every id. A backend never adds a special
token; it recognises those that stand in the text.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Span = tuple[int, int]  # [start, end) in characters of the text


class Backend(Protocol):
  """What `Tokenizer` needs of a tokenizer library."""

  bos_token: str | None
  eos_token: str | None
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  adds_bos: bool  # whether a plain text of this tokenizer starts with BOS
  chat_template: str | None

  def encode(self, text: str) -> tuple[list[int], list[Span]]: ...

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

  def vocabulary(self) -> dict[str, int]: ...

  def definition(self) -> Any:
    """Returns JSON data that decides, with the vocabulary, how text is cut."""
    ...


class FastBackend:
  """A HF fast tokenizer, as `AutoTokenizer` builds it."""

  def __init__(self, hf_tokenizer: Any):
    if not getattr(hf_tokenizer, 'is_fast', False):
      raise ValueError(
        f'{type(hf_tokenizer).__name__} has no fast tokenizer; token offsets need one. '
        'Convert it to a tokenizer.json first'
      )
    self._tokenizer = hf_tokenizer.backend_tokenizer
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.bos_token = hf_tokenizer.bos_token
    self.eos_token = hf_tokenizer.eos_token
    self.bos_id = hf_tokenizer.bos_token_id
    self.eos_id = hf_tokenizer.eos_token_id
    self.pad_id = hf_tokenizer.pad_token_id
    # The post-processor is the authority: flags in config files are not always true.
    probe = hf_tokenizer('a')['input_ids']
    self.adds_bos = self.bos_id is not None and probe[:1] == [self.bos_id]
    # From here on it would only do harm: that of Llama 3 and Qwen cuts spaces off the
    # offsets, so that a token of spaces would belong to no text at all.
    self._tokenizer.post_processor = None
    template = hf_tokenizer.chat_template
    self.chat_template = (
      template.get('default') if isinstance(template, dict) else template
    )

  def encode(self, text: str) -> tuple[list[int], list[Span]]:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

  def vocabulary(self) -> dict[str, int]:
    return self._tokenizer.get_vocab(with_added_tokens=True)

  def definition(self) -> Any:
    data = json.loads(self._tokenizer.to_str())
    data['model'].pop('vocab')
    return {
      key: data[key]
      for key in ('added_tokens', 'normalizer', 'pre_tokenizer', 'decoder', 'model')
    }


class SentencePieceBackend:
  """A sentencepiece `.model` file, with the settings of a folder around it if any."""

  def __init__(
    self, path: Path, *, settings: dict[str, Any], chat_template: str | None
  ):
    import sentencepiece

    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
      raise ValueError(f'{path} is not a sentencepiece model: {error}') from None
    model = self._model
    # Control pieces are recognised in text, as HF does: chat templates write them.
    self._special = {
      model.id_to_piece(i): i for i in range(len(model)) if model.is_control(i)
    }
    longest_first = sorted(self._special, key=len, reverse=True)
    self._split = re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')
    self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
    self.eos_id = model.eos_id() if model.eos_id() >= 0 else None
    self.pad_id = model.pad_id() if model.pad_id() >= 0 else None
    self.bos_token = None if self.bos_id is None else model.id_to_piece(self.bos_id)
    self.eos_token = None if self.eos_id is None else model.id_to_piece(self.eos_id)
    self.adds_bos = (
      self.bos_id is not None and settings.get('add_bos_token') is not False
    )
    self.chat_template = chat_template

  def encode(self, text: str) -> tuple[list[int], list[Span]]:
    ids: list[int] = []
    spans: list[Span] = []
    start = 0
    for match in [*self._split.finditer(text), None]:
      end = len(text) if match is None else match.start()
      if end > start:
        self._encode_plain(text[start:end], start, ids, spans)
      if match is not None:
        ids.append(self._special[match.group()])
        spans.append(match.span())
        start = match.end()
    return ids, spans

  def _encode_plain(
    self, text: str, offset: int, ids: list[int], spans: list[Span]
  ) -> None:
    pieces = self._model.encode(text, return_type='proto').pieces
    # sentencepiece counts bytes; characters are what the rest of the code counts.
    char_at = [i for i, char in enumerate(text) for _ in char.encode()] + [len(text)]
    end_of_next = 0
    tail: list[tuple[int, Span]] = []
    for piece in reversed(pieces):
      begin, end = char_at[piece.begin], char_at[piece.end]
      # Only the last byte of a character spelled in bytes carries its width.
      if begin == end and self._model.is_byte(piece.id):
        end = end_of_next
      end_of_next = end
      tail.append((piece.id, (offset + begin, offset + end)))
    for piece_id, span in reversed(tail):
      ids.append(piece_id)
      spans.append(span)

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    if skip_special_tokens:
      special = set(self._special.values())
      return self._model.decode([i for i in ids if i not in special])
    text, plain = '', []
    for i in [*ids, None]:
      if i is not None and not self._model.is_control(i):
        plain.append(i)
        continue
      text += self._model.decode(plain) if plain else ''
      text += '' if i is None else self._model.id_to_piece(i)
      plain = []
    return text

  def vocabulary(self) -> dict[str, int]:
    return {self._model.id_to_piece(i): i for i in range(len(self._model))}

  def definition(self) -> Any:
    return self._model.serialized_model_proto().hex()
