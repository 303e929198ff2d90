"""Stop strings: where the text of a growing row of tokens first holds one."""

import bisect
from collections.abc import Sequence

from mrjax.data.tokenization import Tokenizer
from mrjax.sampling.engine import STEPS_BETWEEN_CHECKS
from mrjax.sampling.requests import Request

_MAX_TOKENS_A_CHARACTER = 4  # a character of UTF-8 may come byte by byte


class StopStrings:
  """Ends rows at stop strings; a string may spread over several tokens."""

  def __init__(self, stops: Sequence[str], tokenizer: Tokenizer):
    self._stops = tuple(stops)
    self._tokenizer = tokenizer
    longest = max(map(len, stops))
    self._window = STEPS_BETWEEN_CHECKS + _MAX_TOKENS_A_CHARACTER * (longest + 1)

  def num_tokens_to_keep(
    self, request: Request, token_ids: Sequence[int]
  ) -> int | None:
    """How many tokens the row has up to the one that completes a stop string.

    Returns:
      None where no stop string ends within the last tokens; those before must have
      been looked at already, as `Engine` does every `STEPS_BETWEEN_CHECKS` tokens.
    """
    first = max(0, len(token_ids) - self._window)
    before, recent = [*request.prompt_ids, *token_ids[:first]], token_ids[first:]

    def holds(number: int) -> bool:
      text = self._tokenizer.decode_continuation(before, recent[:number])
      return any(stop in text for stop in self._stops)

    if not holds(len(recent)):
      return None
    return first + 1 + bisect.bisect_left(range(1, len(recent)), True, key=holds)

  def cut(self, text: str) -> str:
    """The text before the first stop string."""
    places = [text.find(stop) for stop in self._stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]
