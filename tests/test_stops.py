"""Stop strings end rows at the token that completes them, and impossible ones raise."""

import io
import random
from pathlib import Path

import pytest

from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.data.tokenizer_training import train_bpe_tokenizer
from mrjax.runs.stops import StopStrings
from mrjax.sampling.engine import STEPS_A_DISPATCH
from mrjax.sampling.requests import Request

TEXT = (
  'Tom had 12 apples. Then he gave 3 to Zoë, and 4 to Jürgen!\nHow many are left? '
  '12 - 3 - 4 = 5. Über 5 € sind zu 你好世界 viel 😀🎉 naïve.\n\n'
  'The answer is: \\boxed{5}. '
)


def byte_level(folder: Path) -> Tokenizer:
  train_bpe_tokenizer([TEXT], vocab_size=300, output_dir=folder)
  return load_tokenizer(folder)


def sentencepiece_model(folder: Path, *, byte_fallback: bool) -> Tokenizer:
  import sentencepiece

  model = io.BytesIO()
  ascii_lines = [line for line in TEXT.splitlines() * 20 if line]
  ascii_lines = [line.encode('ascii', 'ignore').decode() for line in ascii_lines]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(ascii_lines),
    model_writer=model,
    model_type='bpe',
    vocab_size=360 if byte_fallback else 90,
    hard_vocab_limit=False,
    byte_fallback=byte_fallback,
    minloglevel=2,
  )
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'tokenizer.model'
  path.write_bytes(model.getvalue())
  return load_tokenizer(path)


def whole_words(folder: Path) -> Tokenizer:
  import transformers
  from tokenizers import Tokenizer as Backbone
  from tokenizers import models, pre_tokenizers

  words = ['<unk>', 'Tom', 'had', 'apples', '.', '12']
  vocabulary = {word: i for i, word in enumerate(words)}
  backbone = Backbone(models.WordLevel(vocabulary, unk_token='<unk>'))
  backbone.pre_tokenizer = pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backbone, unk_token='<unk>', eos_token='.'
  ).save_pretrained(folder)
  return load_tokenizer(folder)


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
  folder = tmp_path_factory.mktemp('tokenizers')
  return {
    'byte level': byte_level(folder / 'bytes'),
    'byte fallback': sentencepiece_model(folder / 'fallback', byte_fallback=True),
    'characters': sentencepiece_model(folder / 'characters', byte_fallback=False),
    'words': whole_words(folder / 'words'),
  }


def naive_end(
  tokenizer: Tokenizer, request: Request, row: list[int], stops: list[str]
) -> int | None:
  for number in range(1, len(row) + 1):
    text = tokenizer.decode_continuation(request.prompt_ids, row[:number])
    if any(stop in text for stop in stops):
      return number
  return None


def cut_anywhere(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
  """Ids of the text encoded in pieces of random lengths."""
  ids, start = [], 0
  while start < len(text):
    end = start + rng.choice([1, 1, 2, 3, 5, 20])
    ids += tokenizer.encode_prompt(text[start:end], add_bos=False)
    start = end
  return ids


@pytest.mark.parametrize('name', ['byte level', 'byte fallback', 'characters'])
def test_rows_end_where_a_scan_of_every_token_ends_them(name, tokenizers):
  tokenizer, rng = tokenizers[name], random.Random(name)
  num_found = num_spanning = 0
  for case in range(150):
    text = TEXT[rng.randrange(60) :] + TEXT * rng.randrange(2)
    request = Request('p', tuple(tokenizer.encode_prompt('Tom had')))
    row = cut_anywhere(tokenizer, text, rng)
    if case % 3 == 0:  # also what no text gives: bytes out of order, spaces anywhere
      rng.shuffle(row)
    whole = tokenizer.decode_continuation(request.prompt_ids, row)
    stops = ['TTT']
    for _ in range(rng.randrange(1, 4)):
      # From anywhere but mostly late, so that several looks come before the end.
      start = rng.randrange(len(whole)) if rng.random() < 0.3 else len(whole) - 30
      stops.append(whole[max(start, 0) :][: rng.choice([1, 2, 4, 9, 25])])
    stops = [stop for stop in stops if '\ufffd' not in stop and '⁇' not in stop]
    expected = naive_end(tokenizer, request, row, stops)
    ends, looked = StopStrings(stops, tokenizer), 0
    found = None
    while found is None and looked < len(row):
      looked += min(rng.randrange(1, STEPS_A_DISPATCH + 1), len(row) - looked)
      found = ends.num_tokens_to_keep(request, row[:looked])
    assert found == expected, (stops, whole)
    if found is None:
      continue
    num_found += 1
    kept = tokenizer.decode_continuation(request.prompt_ids, row[:found])
    assert any(stop in kept for stop in stops)
    assert not any(stop in ends.cut(kept) for stop in stops)
    last = tokenizer.decode_continuation(row[: found - 1], row[found - 1 : found])
    num_spanning += not any(stop in last for stop in stops)
  assert num_found > 80 and num_spanning > 40


def test_a_character_in_bytes_ends_a_row_with_its_last_byte(tokenizers):
  tokenizer = tokenizers['byte fallback']
  request = Request('p', tuple(tokenizer.encode_prompt('Tom')))
  row = tokenizer.encode_prompt('a😀世a', add_bos=False)
  four, three = StopStrings(['😀'], tokenizer), StopStrings(['世'], tokenizer)
  end = next(n for n in range(len(row)) if '😀' in tokenizer.decode(row[:n]))
  assert four.num_tokens_to_keep(request, row) == end
  assert four.num_tokens_to_keep(request, row[: end - 1]) is None
  assert three.num_tokens_to_keep(request, row) == end + 3


def test_a_look_that_begins_inside_a_character_loses_nothing(tokenizers):
  # The first token of the second look is the last byte of a character, whose bytes
  # before it were decoded as three characters.
  tokenizer = tokenizers['byte fallback']
  request = Request('p', tuple(tokenizer.encode_prompt('Tom')))
  row = tokenizer.encode_prompt('😀' * 20 + '🎉🎂🎁', add_bos=False)
  end = len(row)
  row += tokenizer.encode_prompt('a', add_bos=False)[-1:] * (STEPS_A_DISPATCH - 1)
  ends = StopStrings(['🎉🎂🎁'], tokenizer)
  assert ends.num_tokens_to_keep(request, row[: end - 1]) is None
  assert ends.num_tokens_to_keep(request, row) == end


@pytest.mark.parametrize(
  ('name', 'stop', 'character'),
  [
    ('characters', 'Zoë', 'ë'),
    ('characters', 'the end 世', '世'),
    ('words', 'apples\n', '\n'),
    ('words', 'Quit', 'Q'),
  ],
)
def test_a_string_that_can_never_be_produced_is_refused(
  name, stop, character, tokenizers
):
  with pytest.raises(ValueError, match='can never be produced') as caught:
    StopStrings(['apples', stop], tokenizers[name])
  assert repr(stop) in str(caught.value) and repr(character) in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'stop'),
  [
    ('byte level', 'Zoë 世 😀 never seen: ж\t\x00'),
    ('byte fallback', 'Zoë 世 😀 never seen: ж\t'),
    ('byte fallback', '① ﬁ'),  # which its encoder would write as 1 and fi
    ('characters', 'Tom had 12'),
    ('characters', 'T o m'),
    ('words', 'Tom had'),
    ('words', 'om h'),
  ],
)
def test_what_may_be_produced_is_taken(name, stop, tokenizers):
  StopStrings([stop], tokenizers[name])


def test_an_empty_string_is_refused(tokenizers):
  with pytest.raises(ValueError, match='empty'):
    StopStrings(['a', ''], tokenizers['byte level'])
