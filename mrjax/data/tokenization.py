"""Text to token ids and back; the one place where BOS and EOS are decided.

The rules, for every tokenizer:

- BOS stands once at the front where the tokenizer's own post-processor puts one, and
  never twice: a chat template that writes its own BOS gets no second.
- A completion ends with exactly one EOS.
- Prompt and completion are tokenised as one string. A token belongs to the completion
  iff it holds at least one character of it, so a token that straddles the boundary is
  supervised.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrjax.data.tokenizer_backends import (
  Backend,
  FastBackend,
  SentencePieceBackend,
  Span,
)
from mrjax.data.tokenizer_training import train_bpe_tokenizer

__all__ = [
  'Message',
  'Tokenizer',
  'load_tokenizer',
  'train_bpe_tokenizer',
]

Message = Mapping[str, Any]

# Tokens of context that decide how the next one is decoded (leading spaces, characters
# spread over several tokens).
_CONTEXT_TOKENS = 8
# <|reserved_special_token_5|> of Llama 3, <unused7> of Gemma
_RESERVED = re.compile(r'^[<\[].*(reserved|unused).*[>\]]$')


class Tokenizer:
  """A tokenizer with one convention for BOS, EOS and offsets."""

  def __init__(self, backend: Backend, *, eos_ids: Iterable[int] = ()):
    """Wraps a backend; `eos_ids` are more ids that end a text (generation config)."""
    self._backend = backend
    own = [] if backend.eos_id is None else [backend.eos_id]
    self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_ids]))
    self.eos_id: int | None = self.eos_ids[0] if self.eos_ids else None
    self.bos_id: int | None = backend.bos_id
    self.adds_bos: bool = backend.adds_bos
    # Padding is told by masks alone, so any id will do where there is no pad token.
    self.pad_id: int = backend.pad_id if backend.pad_id is not None else 0

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the highest id, added tokens included."""
    return max(self._backend.vocabulary().values()) + 1

  def check_fits(self, num_embeddings: int) -> None:
    """Raises ValueError where the model has no embedding for some id."""
    if self.vocab_size > num_embeddings:
      raise ValueError(
        f'the tokenizer has ids up to {self.vocab_size - 1}, the model only '
        f'{num_embeddings} embeddings; give the tokenizer the model was trained with'
      )

  def check_same(self, other: 'Tokenizer', what: str) -> None:
    """Raises ValueError where the ids of `other` stand for other tokens than these.

    Compared are the tokens of all ids, special ones included. A token whose name says
    that it is reserved may be any other in the other tokenizer: releases of one model
    family fill such places one by one. Where texts begin and end may differ: the ids
    of both models are made by one tokenizer.

    Args:
      other: Its tokenizer.
      what: Names what reads ids of this tokenizer too, e.g. 'the value model runs/v'.
    """
    ours, theirs = (
      {i: token for token, i in tokenizer._backend.vocabulary().items()}
      for tokenizer in (self, other)
    )
    for i in sorted(ours.keys() | theirs.keys()):
      a, b = ours.get(i), theirs.get(i)
      if a != b and not any(_RESERVED.search(token or '') for token in (a, b)):
        show = lambda token: 'no token' if token is None else repr(token)
        raise ValueError(
          f'{what} has another tokenizer: id {i} is {show(b)} there and {show(a)} '
          'here; both must share one vocabulary'
        )

  def encode_prompt(self, text: str, *, add_bos: bool = True) -> list[int]:
    """Returns the ids of a text to be continued.

    Args:
      text: The rendered prompt.
      add_bos: Whether the tokenizer's own convention for BOS applies. False for text
        that a chat template rendered: the template has the say then.
    """
    ids, _ = self._encode(text, add_bos=add_bos)
    return ids

  def encode_pair(
    self, prompt: str, completion: str, *, add_bos: bool = True
  ) -> tuple[list[int], list[bool]]:
    """Returns ids of `prompt + completion + EOS` and the mask of supervised tokens.

    Raises:
      ValueError: The tokenizer has no EOS.
    """
    ids, spans = self._encode(prompt + completion, add_bos=add_bos)
    loss_mask = [end > len(prompt) and end > start for start, end in spans]
    return self._end_once(ids, loss_mask)

  def encode_messages(
    self, messages: Sequence[Message]
  ) -> tuple[list[int], list[bool]]:
    """Returns the ids of a rendered conversation and the mask of supervised tokens.

    Supervised are the assistant's turns, each with its end-of-turn token, by offsets in
    the text that the chat template renders for the whole conversation.

    Raises:
      ValueError: No chat template, no assistant turn, or a template that renders the
        beginning of a conversation differently once it goes on.
    """
    if all(message.get('role') != 'assistant' for message in messages):
      raise ValueError('no message has the role "assistant": nothing to learn from')
    text = self.render_chat(messages)
    turns = []
    for i, message in enumerate(messages):
      if message.get('role') != 'assistant':
        continue
      before = self.render_chat(messages[:i], add_generation_prompt=True)
      after = self.render_chat(messages[: i + 1])
      if not text.startswith(after) or not after.startswith(before):
        raise ValueError(
          f'the chat template does not keep message {i} as it was once the chat '
          'goes on, so its tokens cannot be told apart; train on prompt/completion '
          'records with the last turn as completion'
        )
      turns.append((len(before), len(after)))
    ids, spans = self._encode(text, add_bos=False)
    loss_mask = [False] * len(ids)
    for turn_start, turn_end in turns:
      inside = [
        i
        for i, (start, end) in enumerate(spans)
        if end > turn_start and end > start and start < turn_end
      ]
      # What a template writes after the end of the turn (a newline) is never sampled.
      ends = [i for i in inside if ids[i] in self.eos_ids]
      for i in inside:
        loss_mask[i] = not ends or i <= ends[-1]
    if any(ids[i] in self.eos_ids and loss_mask[i] for i in _last_turn(spans, turns)):
      return ids, loss_mask
    return self._end_once(ids, loss_mask)

  def render_chat(
    self, messages: Sequence[Message], *, add_generation_prompt: bool = False
  ) -> str:
    """Returns the conversation as the tokenizer's chat template writes it.

    Raises:
      ValueError: The tokenizer has no chat template, or the template refuses.
    """
    if self._backend.chat_template is None:
      raise ValueError(
        'the tokenizer has no chat template: give a --tokenizer with one, or, where '
        'prompts are strings and not messages, another --prompt_template'
      )
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if not messages:
      return ''
    try:
      rendered = render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        chat_template=self._backend.chat_template,
        add_generation_prompt=add_generation_prompt,
        bos_token=self._backend.bos_token or '',
        eos_token=self._backend.eos_token or '',
      )
    except jinja2.TemplateError as error:
      raise ValueError(f'the chat template refuses these messages: {error}') from None
    texts = rendered[0] if isinstance(rendered, tuple) else rendered
    return texts[0]

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of the ids; bytes that are no UTF-8 become U+FFFD."""
    return self._backend.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special_tokens
    )

  def decode_continuation(self, prefix: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that `ids` add after the ids `prefix`.

    Decoding `ids` alone would lose the space that many tokenizers hide in the first
    token of a continuation.
    """
    context = [int(i) for i in prefix[-_CONTEXT_TOKENS:]]
    return self.decode([*context, *ids])[len(self.decode(context)) :]

  def fingerprint(self) -> str:
    """Returns a SHA-256 of what decides the ids: vocabulary, merges, special tokens."""
    content = {
      'vocabulary': sorted(self._backend.vocabulary().items()),
      'definition': self._backend.definition(),
      'special': [self.bos_id, list(self.eos_ids), self.adds_bos],
      'chat_template': self._backend.chat_template,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def _encode(self, text: str, *, add_bos: bool) -> tuple[list[int], list[Span]]:
    try:
      ids, spans = self._backend.encode(text)
    except (TypeError, RuntimeError) as error:  # what the bindings raise for bad text
      raise ValueError(f'cannot tokenise {text!r:.80}: not valid Unicode') from error
    if add_bos and self.adds_bos and ids[:1] != [self.bos_id]:
      assert self.bos_id is not None
      return [self.bos_id, *ids], [(0, 0), *spans]
    return list(ids), list(spans)

  def _end_once(
    self, ids: list[int], loss_mask: list[bool]
  ) -> tuple[list[int], list[bool]]:
    if self.eos_id is None:
      raise ValueError(
        'the tokenizer has no EOS token, so no completion could ever end'
      )
    end = len(ids)
    while end and ids[end - 1] in self.eos_ids and loss_mask[end - 1]:
      end -= 1
    last = ids[end] if end < len(ids) else self.eos_id
    return [*ids[:end], last], [*loss_mask[:end], True]


def _last_turn(spans: Sequence[Span], turns: Sequence[Span]) -> list[int]:
  start, end = turns[-1]
  return [i for i, span in enumerate(spans) if start < span[1] and span[0] < end]


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Returns the tokenizer of a folder, a hub id, or a sentencepiece `.model` file.

  A folder's `tokenizer.json` wins over its `tokenizer.model`. The ids that end a text
  are the tokenizer's EOS and those of `generation_config.json`. No code of the folder
  is run.

  Raises:
    FileNotFoundError: No such folder, or no tokenizer in it, or the hub not reachable.
    ValueError: Files that are not what they should be.
  """
  place = Path(path)
  if place.is_file():
    if place.suffix == '.json':
      place = place.parent
    else:
      return Tokenizer(SentencePieceBackend(place, settings={}, chat_template=None))
  if place.is_dir():
    if not (place / 'tokenizer.json').exists() and (place / 'tokenizer.model').exists():
      return _load_sentencepiece_folder(place)
    known = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt')
    if not any((place / name).exists() for name in known):
      raise FileNotFoundError(
        f'{place} holds no tokenizer.json and no tokenizer.model; copy the tokenizer '
        'of the model there or give --tokenizer'
      )
  return _load_hf(str(path) if not place.is_dir() else str(place))


def _load_hf(path: str) -> Tokenizer:
  from transformers import AutoTokenizer, GenerationConfig

  try:
    hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
  except OSError as error:
    raise FileNotFoundError(
      f'{path!r} is no folder here, and the Hugging Face hub did not give a tokenizer '
      f'of that name: {str(error)[:200]}'
    ) from None
  except Exception as error:  # the libraries raise bare Exceptions for broken files
    reason = (str(error).splitlines() or [''])[0][:200]
    raise ValueError(
      f'cannot read the tokenizer of {path!r} ({type(error).__name__}: {reason}); copy '
      'tokenizer.json and tokenizer_config.json of the model there again, or give '
      '--tokenizer'
    ) from error
  if Path(path).is_dir():
    return Tokenizer(FastBackend(hf_tokenizer), eos_ids=_folder_eos_ids(Path(path)))
  try:
    more = GenerationConfig.from_pretrained(path).eos_token_id
  except OSError:  # many models have none
    more = None
  return Tokenizer(FastBackend(hf_tokenizer), eos_ids=_as_ids(more))


def _load_sentencepiece_folder(folder: Path) -> Tokenizer:
  settings = _read_json(folder / 'tokenizer_config.json')
  template = settings.get('chat_template')
  if (folder / 'chat_template.jinja').exists():
    template = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  backend = SentencePieceBackend(
    folder / 'tokenizer.model', settings=settings, chat_template=template
  )
  return Tokenizer(backend, eos_ids=_folder_eos_ids(folder))


def _folder_eos_ids(folder: Path) -> list[int]:
  return _as_ids(_read_json(folder / 'generation_config.json').get('eos_token_id'))


def _as_ids(value: Any) -> list[int]:
  if value is None:
    return []
  return [int(i) for i in value] if isinstance(value, list | tuple) else [int(value)]


def _read_json(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None
