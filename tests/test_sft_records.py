"""SFT records to ids and masks, and ids and masks to padded batches."""

import json
import logging

import numpy as np
import pytest

from mrjax.data.batches import bucket_length, pad_batch
from mrjax.data.problems import load_problems
from mrjax.data.sft import (
  Example,
  SftRecord,
  encode_sft,
  parse_sft,
  read_sft,
  sft_from_problems,
)
from mrjax.data.tokenization import load_tokenizer, train_bpe_tokenizer
from mrjax.records import DataError, Problem

MESSAGES = [
  {'role': 'user', 'content': 'q'},
  {'role': 'assistant', 'content': 'abc'},
]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A token a byte, `<s>` in front: lengths can be counted by hand."""
  folder = tmp_path_factory.mktemp('bytes')
  train_bpe_tokenizer(['a'], vocab_size=259, output_dir=folder)
  (folder / 'chat_template.jinja').write_text(
    '{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}'
    '{{ eos_token if m.role == "assistant" }}{% endfor %}'
    '{% if add_generation_prompt %}[a]{% endif %}'
  )
  return load_tokenizer(folder)


def write(tmp_path, *records):
  path = tmp_path / 'sft.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def test_prompt_and_completion_as_they_stand(tokenizer, tmp_path):
  path = write(tmp_path, {'prompt': 'ab', 'completion': ' cde'})
  (example,) = encode_sft(read_sft(path), tokenizer, max_length=8)
  assert example.ids.dtype == np.int32 and example.loss_mask.dtype == bool
  assert len(example.ids) == 1 + 2 + 4 + 1
  assert example.ids[0] == 1 and example.ids[-1] == 2
  assert example.loss_mask.tolist() == [False] * 3 + [True] * 5


def test_a_template_is_put_around_them(tokenizer, tmp_path):
  path = write(tmp_path, {'prompt': 'ab', 'completion': 'cde', 'options': ['A)1']})
  (example,) = encode_sft(read_sft(path), tokenizer, template='qa', max_length=99)
  text = 'Question: ab\nOptions: A)1\nAnswer: cde'
  assert tokenizer.decode(example.ids) == text
  assert example.loss_mask.sum() == len(' cde') + 1


def test_conversations(tokenizer, tmp_path):
  """TRL writes them as `messages`, or as lists under `prompt` and `completion`."""
  path = write(
    tmp_path,
    {'messages': MESSAGES},
    {'prompt': MESSAGES[:1], 'completion': MESSAGES[1:]},
  )
  a, b = encode_sft(read_sft(path), tokenizer, max_length=99)
  assert tokenizer.decode(a.ids, skip_special_tokens=False) == '<s>[u]q[a]abc</s>'
  assert a.loss_mask.tolist() == [False] * 8 + [True] * 4
  assert (a.ids == b.ids).all() and (a.loss_mask == b.loss_mask).all()
  with pytest.raises(ValueError, match=r'sft\.jsonl:1: .* give --prompt_template=chat'):
    encode_sft(read_sft(path), tokenizer, template='qa', max_length=99)


def test_problems_become_records(tokenizer):
  problems = load_problems('arithmetic:train?size=3&form=choice')
  records = sft_from_problems(problems)
  examples = encode_sft(records, tokenizer, template='qa', max_length=900)
  for problem, example in zip(problems, examples, strict=True):
    supervised = tokenizer.decode(example.ids[example.loss_mask])
    assert supervised == ' ' + problem.solution
    assert problem.options[2] in tokenizer.decode(example.ids)
  with pytest.raises(ValueError, match="'7' has no solution"):
    sft_from_problems([Problem(id='7', question='q', answer='1')])


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'prompt': 'a'}, r"missing field\(s\) \['completion'\]"),
    ({'text': 'a'}, r"missing field\(s\) \['prompt', 'completion'\]"),
    ({'prompt': 'a', 'completion': ''}, 'nothing to learn'),
    ({'prompt': 3, 'completion': 'b'}, "'prompt' is int"),
    ({'prompt': MESSAGES, 'completion': 'b'}, "'prompt' is list"),
    ({'messages': []}, 'list of messages'),
    ({'messages': 'hi'}, 'list of messages'),
    ({'messages': [{'content': 'a'}]}, 'needs role and content'),
    ({'messages': [{'role': 'user', 'content': None}]}, 'needs role and content'),
    (
      {'messages': [{'role': 'gpt', 'content': 'a'}]},
      "has the role 'gpt'; want one of system, developer, user, assistant",
    ),
    ({'messages': MESSAGES[:1]}, r"'messages' has no message .*; its roles are user$"),
    ({'prompt': MESSAGES, 'completion': MESSAGES[:1]}, "'completion' has no message"),
  ],
)
def test_bad_records_are_named(tmp_path, record, message):
  path = write(tmp_path, {'prompt': 'a', 'completion': 'b'}, record)
  with pytest.raises(DataError, match=message) as error:
    read_sft(path)
  assert str(error.value).startswith(f'{path}:2: ')


def test_empty_prompts_are_fine(tokenizer):
  record = parse_sft({'prompt': '', 'completion': 'ab'}, where='x:1')
  (example,) = encode_sft([record], tokenizer, max_length=4)
  assert example.loss_mask.tolist() == [False, True, True, True]


LONG = [
  SftRecord('f:1', 'abc', 'de'),  # 7 tokens
  SftRecord('f:2', 'a', 'b'),  # 4
  SftRecord('f:3', 'abc', 'defgh'),  # 10
]


def test_long_records_are_refused(tokenizer):
  with pytest.raises(ValueError, match=r'f:3: 10 tokens, .*=9; .* --overlong=truncate'):
    encode_sft(LONG, tokenizer, max_length=9)


def test_long_records_are_dropped_and_counted(tokenizer, caplog):
  with caplog.at_level(logging.INFO):
    examples = encode_sft(LONG, tokenizer, max_length=6, overlong='drop')
  assert [len(example.ids) for example in examples] == [4]
  assert caplog.messages == [
    'SFT data: 1 of 3 records, 4 tokens, 2 supervised, longest 4; 0 truncated and 2 '
    'dropped at max_length=6'
  ]
  with pytest.raises(ValueError, match='all 3 records are longer'):
    encode_sft(LONG, tokenizer, max_length=3, overlong='drop')


def test_long_records_are_truncated_and_counted(tokenizer, caplog):
  with caplog.at_level(logging.INFO):
    examples = encode_sft(LONG, tokenizer, max_length=6, overlong='truncate')
  assert [len(example.ids) for example in examples] == [6, 4, 6]
  assert tokenizer.decode(examples[2].ids) == 'abcde'
  assert 2 not in examples[2].ids
  assert '2 truncated and 0 dropped' in caplog.messages[0]


def test_a_text_without_a_supervised_token_is_refused(tokenizer):
  with pytest.raises(ValueError, match=r'f:1: no supervised .* give --overlong=drop'):
    encode_sft(LONG, tokenizer, max_length=4, overlong='truncate')


def test_other_errors(tokenizer):
  with pytest.raises(ValueError, match='training data are empty'):
    encode_sft([], tokenizer, max_length=9)
  with pytest.raises(ValueError, match='overlong='):
    encode_sft(LONG, tokenizer, max_length=9, overlong='cut')
  with pytest.raises(ValueError, match='want one of'):
    encode_sft(LONG, tokenizer, max_length=9, template='gsm')


def test_buckets_are_few():
  lengths = {bucket_length(n, multiple=64, max_length=200) for n in range(1, 201)}
  assert lengths == {64, 128, 192, 200}
  assert all(bucket_length(n, multiple=64, max_length=200) >= n for n in range(1, 201))
  with pytest.raises(ValueError, match='201 tokens do not fit'):
    bucket_length(201, multiple=64, max_length=200)


def test_padding():
  examples = [
    Example(np.array([1, 5, 2], np.int32), np.array([False, True, True])),
    Example(
      np.array([1, 7, 8, 9, 2], np.int32), np.array([False, False, False, True, True])
    ),
  ]
  batch = pad_batch(examples, max_length=20, multiple=3)
  assert {name: (x.dtype.name, x.shape) for name, x in batch.items()} == {
    'tokens': ('int32', (2, 6)),
    'segments': ('int32', (2, 6)),
    'positions': ('int32', (2, 6)),
    'loss_mask': ('bool', (2, 6)),
  }
  assert batch['tokens'].tolist() == [[1, 5, 2, 0, 0, 0], [1, 7, 8, 9, 2, 0]]
  assert batch['segments'].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
  assert batch['loss_mask'].astype(int).tolist() == [
    [0, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 0],
  ]
  with pytest.raises(ValueError, match='at least one'):
    pad_batch([], max_length=20)
