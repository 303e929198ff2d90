"""Stop strings: where the text of a growing row of tokens first holds one."""

import bisect
from collections.abc import Iterable, Sequence

from mrjax.data.tokenization import Tokenizer
from mrjax.sampling.engine import STEPS_A_DISPATCH
from mrjax.sampling.requests import Request

_MAX_TOKENS_A_CHARACTER = 4  # a character of UTF-8 may come byte by byte
# Where recent tokens begin inside a character, each of its bytes before may have been
# decoded as a character, and as many are then missing at the beginning of their text.
_MAX_LOST_CHARACTERS = 3
_NO_CHARACTER = '\ufffd'  # what bytes that spell no character are decoded as


class StopStrings:
  """Ends rows at stop strings; a string may spread over several tokens."""

  def __init__(self, stops: Sequence[str], tokenizer: Tokenizer):
    """Takes at least one string.

    Raises:
      ValueError: A string that is empty, which every text holds, or that has a
        character which no tokens of the tokenizer are decoded as.
    """
    if not all(stops):
      raise ValueError('a stop string is empty: it would end every row')
    _check_producible(stops, tokenizer)
    self._stops = tuple(stops)
    self._tokenizer = tokenizer
    most_characters = max(map(len, stops)) + _MAX_LOST_CHARACTERS
    self._window = STEPS_A_DISPATCH + _MAX_TOKENS_A_CHARACTER * most_characters

  def num_tokens_to_keep(
    self, request: Request, token_ids: Sequence[int]
  ) -> int | None:
    """How many tokens the row has up to the one that completes a stop string.

    Returns:
      None where no stop string ends within the last tokens; those before must have
      been looked at already, as `Engine` does every `STEPS_A_DISPATCH` tokens.
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


def _check_producible(stops: Iterable[str], tokenizer: Tokenizer) -> None:
  """Raises ValueError for a character that no tokens can be decoded as.

  Certain is that only of a character that does not survive encoding and decoding, is in
  the text of no token, and cannot be spelled in bytes. A string whose characters can
  all be produced is taken, be it ever so unlikely.
  """

  def survives(character: str) -> bool:
    ids = tokenizer.encode_prompt(f'a{character}a', add_bos=False)
    return character in tokenizer.decode(ids)

  doubtful = {c for stop in stops for c in set(stop) if not survives(c)}
  if not doubtful:
    return
  produced: set[str] = set()
  for i in range(tokenizer.vocab_size):
    produced.update(tokenizer.decode([i, i]))  # twice: with what stands between tokens
  if _NO_CHARACTER in produced:
    return  # tokens that are parts of characters: some sequence may spell any of them
  for stop in stops:
    never = sorted(doubtful.intersection(stop) - produced)
    if never:
      raise ValueError(
        f'the stop string {stop!r} can never be produced: no token of the tokenizer '
        f'has {", ".join(map(repr, never))} in its text. Leave it out of --stop, or '
        'give the tokenizer the model was trained with'
      )
