"""Text of token ids as they come: what a stop string or a reader can see so far."""

from collections.abc import Callable, Sequence

# Tokens of context that decide how the next one is decoded (leading spaces, characters
# spread over several tokens).
CONTEXT_TOKENS = 8


class TextStream:
  """Text of a growing list of ids; a character appears once all its bytes are there."""

  def __init__(self, decode: Callable[[Sequence[int]], str], prefix: Sequence[int]):
    self._decode = decode
    self._ids = [int(i) for i in prefix[-CONTEXT_TOKENS:]]
    self._start = 0  # where the window that is decoded begins
    self._told = len(self._ids)  # ids whose text is out
    self.text = ''

  def push(self, token_id: int) -> str:
    """Takes one id and returns the text it completes, often one word or nothing."""
    self._ids.append(int(token_id))
    new = self._pending()
    # A trailing U+FFFD is a character whose bytes are not all there yet.
    if not new or new.endswith('\ufffd'):
      return ''
    self._start, self._told = self._told, len(self._ids)
    self.text += new
    return new

  def finish(self) -> str:
    """Returns what was held back, broken characters as U+FFFD."""
    new = self._pending()
    self._start = self._told = len(self._ids)
    self.text += new
    return new

  def _pending(self) -> str:
    known = self._decode(self._ids[self._start : self._told])
    return self._decode(self._ids[self._start :])[len(known) :]
