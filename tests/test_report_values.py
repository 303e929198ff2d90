"""Values in the report: on the right parts of the text, in the table, in the facts."""

import itertools
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import _dump_dom, _make, _sample, _summary, _write_run

from mrjax.data.arithmetic import generate_problems
from mrjax.data.tokenization import load_tokenizer
from mrjax.records import DataError
from mrjax.runs.report_tokens import TokenWidths

ASSETS = Path(__file__).parents[1] / 'mrjax' / 'assets'
PROMPT = 'Question: How many?\nAnswer:'


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory) -> dict[str, str]:
  """Where a byte-level tokenizer and one of sentencepiece are."""
  folder = tmp_path_factory.mktemp('spm')
  problems = generate_problems('train', size=200)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([f'{p.question} {p.solution}' for p in problems]),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=380,
    model_type='bpe',
    byte_fallback=True,
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  return {'bpe': 'tiny-1m', 'spm': str(folder)}


def load(name: str):
  return load_tokenizer(ASSETS / name if name == 'tiny-1m' else name)


def settled(tokenizer, token_ids, text: str) -> list[int]:
  """How much of the text is certain after each token: the definition, slowly."""
  prompt = tokenizer.encode_prompt(PROMPT)
  ends = []
  for count in range(1, len(token_ids) + 1):
    piece = tokenizer.decode_continuation(prompt, token_ids[:count])
    pairs = enumerate(zip(piece, text))
    same = next((i for i, (a, b) in pairs if a != b), min(len(piece), len(text)))
    ends.append(max(same, *ends, 0))
  return ends


def widths_of(ends, text: str) -> list[int]:
  """Differences, each character as many as JavaScript counts."""
  edges = [0, *ends]
  units = lambda part: len(part.encode('utf-16-le', 'surrogatepass')) // 2
  return [units(text[a:b]) for a, b in itertools.pairwise(edges)]


TEXTS = (
  ' Tom has 3*4=<<3*4=12>>12 apples.\n#### 12',
  'é漢🙂 x   y\n\n',
  ' 漢字' * 20 + ' and 12',
  '\ufffd a \ufffd',
)


@pytest.mark.parametrize('kind', ['bpe', 'spm'])
@pytest.mark.parametrize('text', TEXTS)
def test_widths_are_those_of_the_text_as_it_grows(tokenizers, kind, text):
  tokenizer = load(tokenizers[kind])
  widths = TokenWidths({'model': tokenizers[kind]})
  prompt = tokenizer.encode_prompt(PROMPT)
  ids = tokenizer.encode_prompt(PROMPT + text)[len(prompt) :]
  text = tokenizer.decode_continuation(prompt, ids)
  expected = widths_of(settled(tokenizer, ids, text), text)
  assert widths.of(text, ids) == expected
  assert widths.of(text, [*ids, tokenizer.eos_id]) == [*expected, 0]
  # A stop string cuts the text, not the tokens.
  cut = text[: len(text) // 2]
  ends = [min(end, len(cut)) for end in settled(tokenizer, ids, text)]
  assert widths.of(cut, ids) == widths_of(ends, cut)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(3, 500), min_size=1, max_size=30))
def test_any_tokens_fill_their_text(ids):
  """Of bytes that spell no character too."""
  tokenizer = load('tiny-1m')
  prompt = tokenizer.encode_prompt(PROMPT)
  text = tokenizer.decode_continuation(prompt, ids)
  widths = _ANY.of(text, ids)
  if widths is not None:
    assert sum(widths) == len(text.encode('utf-16-le')) // 2
    assert len(widths) == len(ids) and min(widths) >= 0
  else:
    assert '\ufffd' in text


_ANY = TokenWidths({'model': 'tiny-1m'})


def test_tokens_of_another_text_have_no_widths():
  ids = load('tiny-1m').encode_prompt(' 18 apples', add_bos=False)
  assert sum(_ANY.of(' 18 apples', ids)) == len(' 18 apples')
  for text, token_ids in (
    (' 17 apples', ids),
    (' 18 apples.', ids),
    (' 18 apples', ids[:-1]),
    (' 18 apples', [10**9]),
    (' 18 apples', [-1]),
    (' 18 apples', ['a']),
    (' 18 apples', []),
  ):
    assert _ANY.of(text, token_ids) is None, (text, token_ids)
  assert _ANY.of('', []) == []


def valued_sample(problem: int, index: int, **fields) -> dict:
  tokenizer = load('tiny-1m')
  text = _sample(problem, index)['text']
  ids = [*tokenizer.encode_prompt(text, add_bos=False), tokenizer.eos_id]
  text = tokenizer.decode_continuation(ids[:1], ids)
  values = [round((i * 0.37 + index / 7) % 1.0, 4) for i in range(len(ids))]
  values[1] = None
  more = {
    'token_ids': ids,
    'values': values,
    'value': values[-1],
    'kl_sum': index + 0.5,
  }
  return _sample(problem, index, text=text, **(more | fields))


def write(folder: Path, graded, model='tiny-1m') -> Path:
  return _write_run(
    folder, graded=graded, metrics=_summary(graded), config={'model': model}
  )


def test_the_page_holds_values_and_divergences(tmp_path):
  graded = [valued_sample(p, i) for p in range(3) for i in range(2)]
  graded[2]['values'][0] = 1.5
  write(tmp_path / 'a', graded)
  write(tmp_path / 'b', [_sample(p, i) for p in range(3) for i in range(2)])
  page = _make(f'{tmp_path / "a"},{tmp_path / "b"}', tmp_path)
  columns, plain = (run['samples'] for run in page.data['runs'])
  for i, record in enumerate(graded):
    heat = columns['heats'][str(i)]
    assert heat['values'] == [v if v is None else round(v, 3) for v in record['values']]
    assert len(heat['widths']) == len(record['token_ids'])
    assert sum(heat['widths']) == len(record['text'])
  assert columns['value'] == [round(record['value'], 3) for record in graded]
  assert columns['kl'] == [0.5, 1.5] * 3
  assert (plain['heats'], plain['value'], plain['kl']) == ({}, None, None)
  assert page.data['value_range'] == [0.0, 1.5]
  head, row_a, row_b = page.tables[0]
  assert head[-1] == 'Mean KL' and (row_a[-1], row_b[-1]) == ('1.000', '–')
  metrics = json.loads((tmp_path / 'a' / 'metrics.json').read_text())
  for name in ('best_of@2', 'weighted_maj@2'):
    cells = dict(zip(head, row_a))
    assert cells[name].startswith(f'{metrics[name]["value"]:.1%} [')
    assert dict(zip(head, row_b))[name] == '–'
  assert 'Mean KL' not in _make(f'{tmp_path / "b"}', tmp_path).text


@pytest.mark.parametrize(
  ('model', 'note'),
  [
    ('outputs/gone', 'the tokenizer of outputs/gone is not on this machine'),
    (
      'someone/never-fetched',
      'the tokenizer of someone/never-fetched is not on this machine',
    ),
    ('', 'the flags of the run name no model'),
  ],
)
def test_without_the_tokenizer_the_page_says_so(tmp_path, model, note):
  graded = [valued_sample(0, i) for i in range(2)]
  write(tmp_path / 'a', graded, model=model)
  page = _make(str(tmp_path / 'a'), tmp_path)
  assert f'a: the values of tokens are not shown: {note}' in page.text
  columns = page.data['runs'][0]['samples']
  assert columns['heats'] == {}
  assert columns['value'] == [round(record['value'], 3) for record in graded]


def test_samples_of_another_tokenizer_are_counted(tmp_path):
  graded = [valued_sample(p, 0) for p in range(5)]
  for record in graded[:2]:
    record['token_ids'].reverse()
  page = _make(str(write(tmp_path / 'a', graded)), tmp_path)
  assert 'the values of tokens are not shown for 2 of 5 samples' in page.text
  assert sorted(page.data['runs'][0]['samples']['heats']) == ['2', '3', '4']


@pytest.mark.parametrize('bad', [[0.5], ['a'] * 99, [True] * 99, 'values'])
def test_values_that_fit_no_tokens_are_named(tmp_path, bad):
  record = valued_sample(0, 0)
  if isinstance(bad, list) and len(bad) == 99:
    bad = bad[: len(record['token_ids'])]
  write(tmp_path / 'a', [record | {'values': bad}])
  with pytest.raises(DataError, match=r"graded\.jsonl:1: field 'values' is"):
    _make(str(tmp_path / 'a'), tmp_path)


def test_the_text_is_coloured_in_a_browser(tmp_path):
  tokenizer = load('tiny-1m')
  text = ' 漢🙂 needle #### 1'
  ids = [*tokenizer.encode_prompt(text, add_bos=False), tokenizer.eos_id]
  text = tokenizer.decode_continuation(ids[:1], ids)
  values = [round(i / (len(ids) - 1), 3) for i in range(len(ids))]
  values[-2] = None
  record = _sample(
    0, 0, text=text, token_ids=ids, values=values, kl_sum=2.5, value=0.75
  )
  write(tmp_path / 'a', [record])
  _make(str(tmp_path / 'a'), tmp_path)
  dom = _dump_dom(tmp_path / 'out' / 'report.html', 'find=NEEDLE', tmp_path)
  (shown,) = re.findall(r'<pre class="text heat".*?</pre>', dom, re.DOTALL)
  marked = shown.replace('<mark>', '').replace('</mark>', '')
  tokens = re.findall(r'title="([^"]*)"( style="[^"]*")?>([^<]*)</span>', marked)
  *inside, end = tokens
  assert ''.join(part for _, _, part in inside) == text
  assert end[2] == 'end 1' and end[1]
  widths = TokenWidths({'model': 'tiny-1m'}).of(text, ids)
  expected = [v for v, width in zip(values, widths, strict=True) if width]
  titles = ['no value' if v is None else f'{v:g}' for v in expected]
  assert [title for title, _, _ in inside] == titles
  assert [bool(style) for _, style, _ in inside] == [v is not None for v in expected]
  found = ''.join(re.findall('<mark>([^<]*)</mark>', shown))
  assert found == 'needle'
  assert 'value 0.75' in dom and 'KL 2.5' in dom and 'Value after each token' in dom
