"""Values by token: which part of a sample's text each token is."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mrjax
from mrjax.data.tokenization import Tokenizer, load_tokenizer

_RESTART = 8  # tokens; from there on those before are context alone


class TokenWidths:
  """Widths of tokens in the texts of one run, by the tokenizer that its flags name."""

  def __init__(self, settings: Mapping[str, Any]):
    """Takes the flags of the run: `tokenizer`, `model`.

    Raises:
      ValueError, OSError: The tokenizer is not here any more, or was never named.
    """
    self._tokenizer = _find_tokenizer(settings)
    self._vocab_size = self._tokenizer.vocab_size
    self._alone: dict[int, str] = {}

  def of(self, text: str, token_ids: Sequence[int]) -> list[int] | None:
    """How many characters of `text` each token adds, as JavaScript counts them.

    Adding none do special tokens, those that begin a character which another one ends,
    and those of a stop string. None where the tokens do not spell the text.
    """
    if not token_ids:
      return None if text else []
    if not all(type(i) is int and 0 <= i < self._vocab_size for i in token_ids):
      return None
    ends = self._quick_ends(text, token_ids)
    if ends is None:
      ends = self._ends(text, token_ids)
    if ends[-1] != len(text):
      return None
    if text.isascii():
      return [end - start for start, end in itertools.pairwise([0, *ends])]
    units = [0, *itertools.accumulate(1 + (c > '\uffff') for c in text)]
    return [units[end] - units[start] for start, end in itertools.pairwise([0, *ends])]

  def _quick_ends(self, text: str, token_ids: Sequence[int]) -> list[int] | None:
    """By the text of each token alone; None where it is not that in company."""
    pieces = [self._piece(i) for i in token_ids]
    if not ''.join(pieces).startswith(text):
      return None
    ends = itertools.accumulate(map(len, pieces))
    return [min(end, len(text)) for end in ends]

  def _piece(self, token_id: int) -> str:
    if token_id not in self._alone:
      piece = self._tokenizer.decode_continuation([token_id], [token_id])
      self._alone[token_id] = piece
    return self._alone[token_id]

  def _ends(self, text: str, token_ids: Sequence[int]) -> list[int]:
    """How much of the text is there after each token."""
    ends: list[int] = []
    start, base = 0, 0  # where the tokens and the text of a piece begin
    for count in range(1, len(token_ids) + 1):
      # The first token twice: it would lose its leading space at the very beginning.
      context = [token_ids[0], *token_ids[:start]]
      piece = self._tokenizer.decode_continuation(context, token_ids[start:count])
      same = _common_length(piece, text[base : base + len(piece)])
      ends.append(max(base + same, ends[-1] if ends else 0))
      if same == len(piece) and count - start >= _RESTART:
        start, base = count, base + same
    return ends


def _common_length(a: str, b: str) -> int:
  pairs = enumerate(zip(a, b))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _find_tokenizer(settings: Mapping[str, Any]) -> Tokenizer:
  """Without the network, and without a look at the weights."""
  name = settings.get('tokenizer') or settings.get('model')
  if not name or not isinstance(name, str):
    raise ValueError('the flags of the run name no model')
  path = Path(name).expanduser()
  if path.is_file():
    return load_tokenizer(path)
  # A model or checkpoint, a run, a step of a run, an embedded model.
  folders = [path, path / 'hf', path.absolute().parent.parent / 'hf']
  folders.append(Path(mrjax.__file__).parent / 'assets' / name)
  for folder in folders:
    if any((folder / file).is_file() for file in ('tokenizer.json', 'tokenizer.model')):
      return load_tokenizer(folder)
  import huggingface_hub

  try:
    return load_tokenizer(
      huggingface_hub.snapshot_download(name, local_files_only=True)
    )
  except Exception:  # of many kinds, and none says more
    raise ValueError(f'the tokenizer of {name} is not on this machine') from None
