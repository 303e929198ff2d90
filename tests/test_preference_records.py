"""Preference records in TRL's formats, and the texts that training gets from them."""

import json
import logging

import numpy as np
import pytest

from mrjax.data.preference import (
  JudgedRecord,
  PreferenceRecord,
  load_judged,
  load_preferences,
)
from mrjax.data.preference_encoding import encode_judged, encode_preferences
from mrjax.data.tokenization import load_tokenizer, train_bpe_tokenizer
from mrjax.records import DataError


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A token a byte, `<s>` in front: lengths can be counted by hand."""
  folder = tmp_path_factory.mktemp('bytes')
  train_bpe_tokenizer(['a'], vocab_size=259, output_dir=folder)
  (folder / 'chat_template.jinja').write_text(
    '{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}'
    '{{ eos_token + "\\n" if m.role == "assistant" }}{% endfor %}'
    '{% if add_generation_prompt %}[a]{% endif %}'
  )
  return load_tokenizer(folder)


def write(tmp_path, *records):
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def text_of(tokenizer, example):
  return tokenizer.decode(example.ids, skip_special_tokens=False)


def supervised(tokenizer, example):
  ids = example.ids[example.loss_mask]
  return tokenizer.decode(ids, skip_special_tokens=False)


def test_pairs_of_strings(tokenizer, tmp_path):
  path = write(tmp_path, {'prompt': 'ab', 'chosen': ' cde', 'rejected': ' f'})
  ((chosen, rejected),) = encode_preferences(
    load_preferences(path), tokenizer, max_length=8
  )
  assert chosen.ids.dtype == np.int32 and chosen.loss_mask.dtype == bool
  assert text_of(tokenizer, chosen) == '<s>ab cde</s>'
  assert supervised(tokenizer, chosen) == ' cde</s>'
  assert supervised(tokenizer, rejected) == ' f</s>'
  assert chosen.where == rejected.where == f'{path}:1'


def test_a_template_is_put_around_strings(tokenizer, tmp_path):
  path = write(
    tmp_path, {'prompt': 'q', 'chosen': 'c', 'rejected': 'd', 'options': ['A)1']}
  )
  ((_, rejected),) = encode_preferences(
    load_preferences(f'jsonl:{path}'), tokenizer, template='qa', max_length=99
  )
  assert text_of(tokenizer, rejected) == '<s>Question: q\nOptions: A)1\nAnswer: d</s>'
  assert supervised(tokenizer, rejected) == ' d</s>'


CHAT = [user('q'), assistant('x'), user('r')]


def test_conversations_supervise_what_follows_the_prompt_alone(tokenizer, tmp_path):
  """Earlier answers are part of the prompt; both forms of TRL say the same."""
  path = write(
    tmp_path,
    {'prompt': CHAT, 'chosen': [assistant('c')], 'rejected': [assistant('de')]},
    {'chosen': [*CHAT, assistant('c')], 'rejected': [*CHAT, assistant('de')]},
  )
  explicit, implicit = encode_preferences(
    load_preferences(path), tokenizer, max_length=99
  )
  chosen, rejected = explicit
  # The newline that the template writes after the end of the turn is never sampled.
  assert text_of(tokenizer, chosen) == '<s>[u]q[a]x</s>\n[u]r[a]c</s>'
  assert supervised(tokenizer, chosen) == 'c</s>'
  assert supervised(tokenizer, rejected) == 'de</s>'
  for a, b in zip(explicit, implicit):
    assert (a.ids == b.ids).all() and (a.loss_mask == b.loss_mask).all()
  with pytest.raises(ValueError, match=r'pairs\.jsonl:1: .* --prompt_template=chat'):
    encode_preferences(load_preferences(path), tokenizer, template='qa', max_length=99)


@pytest.mark.parametrize(
  ('chosen', 'rejected', 'prompt'),
  [
    ('2 + 2 = 4', '2 + 2 = 5', '2 + 2 ='),  # the space belongs to the sides, as in TRL
    ('so: yes', 'so: yesno', 'so: ye'),
    ('a', 'b', ''),
  ],
)
def test_the_prompt_of_strings_may_be_what_they_share(
  tmp_path, chosen, rejected, prompt
):
  path = write(tmp_path, {'chosen': chosen, 'rejected': rejected})
  (record,) = load_preferences(path)
  assert record.prompt == prompt
  assert (prompt + record.chosen, prompt + record.rejected) == (chosen, rejected)


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, r"missing field\(s\) \['rejected'\]"),
    ({'prompt': 'a', 'chosen': '', 'rejected': 'b'}, 'nothing to prefer'),
    ({'prompt': 'a', 'chosen': 3, 'rejected': 'b'}, "'chosen' must be a string"),
    ({'prompt': 'a', 'chosen': [], 'rejected': 'b'}, "'chosen' must be a string"),
    ({'prompt': CHAT, 'chosen': 'b', 'rejected': 'c'}, 'all be strings, or all mess'),
    ({'chosen': CHAT, 'rejected': [user('z'), user('y')]}, 'share no message'),
    (
      {'prompt': [user(None)], 'chosen': CHAT, 'rejected': CHAT},
      "'prompt': a message needs role and content",
    ),
    (
      {'chosen': CHAT, 'rejected': [{'role': 'gpt', 'content': 'a'}]},
      "'rejected': a message has the role 'gpt'; want one of",
    ),
  ],
)
def test_bad_pairs_are_named(tmp_path, record, message):
  path = write(tmp_path, {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, record)
  for load in (load_preferences, load_judged):
    with pytest.raises(DataError, match=message) as error:
      load(path)
    assert str(error.value).startswith(f'{path}:2: ')


EQUAL = [
  PreferenceRecord('f:1', 'p', 'a', 'b'),
  PreferenceRecord('f:2', 'p', 'abcdef', 'abcdeg'),  # equal up to 7 tokens
  PreferenceRecord('f:3', 'p', 'same', 'same'),
]


def test_a_pair_without_a_difference_is_refused(tokenizer):
  with pytest.raises(ValueError, match=r'^f:3: chosen and .* give --equal_pairs=drop'):
    encode_preferences(EQUAL, tokenizer, max_length=99)
  with pytest.raises(ValueError, match=r'^f:2: chosen and rejected are the same'):
    encode_preferences(EQUAL, tokenizer, max_length=7, overlong='truncate')


def test_equal_pairs_are_dropped_and_counted(tokenizer, caplog):
  with caplog.at_level(logging.INFO):
    pairs = encode_preferences(
      EQUAL, tokenizer, max_length=7, overlong='truncate', equal='drop'
    )
  assert len(pairs) == 1
  assert caplog.messages == [
    'Preference data: 1 of 3 pairs, 8 tokens, 4 supervised, longest 4; 1 truncated and '
    '0 dropped at max_length=7, 2 dropped because chosen equals rejected'
  ]
  with pytest.raises(ValueError, match=r'no pair is left of 1: 0 are longer .* 1 have'):
    encode_preferences(EQUAL[2:], tokenizer, max_length=9, equal='drop')


LONG = [
  PreferenceRecord('f:1', 'p', 'a', 'b'),
  PreferenceRecord('f:2', 'p', 'a', 'bcdefgh'),  # 4 and 10 tokens
]


def test_long_pairs_by_policy(tokenizer, caplog):
  with pytest.raises(ValueError, match=r'^f:2: 10 tokens, .* give --overlong=truncate'):
    encode_preferences(LONG, tokenizer, max_length=9)
  with caplog.at_level(logging.INFO):
    pairs = encode_preferences(LONG, tokenizer, max_length=9, overlong='drop')
    assert len(pairs) == 1
    pairs = encode_preferences(LONG, tokenizer, max_length=6, overlong='truncate')
  assert '0 truncated and 1 dropped' in caplog.messages[0]
  assert '1 truncated and 0 dropped' in caplog.messages[1]
  assert [text_of(tokenizer, text) for text in pairs[1]] == ['<s>pa</s>', '<s>pbcde']
  with pytest.raises(ValueError, match=r'^f:1: no supervised .* give --overlong=drop'):
    encode_preferences(LONG, tokenizer, max_length=2, overlong='truncate')
  with pytest.raises(ValueError, match='no pair is left of 2: 2 are longer'):
    encode_preferences(LONG, tokenizer, max_length=3, overlong='drop')


def test_other_errors(tokenizer):
  for encode in (encode_preferences, encode_judged):
    with pytest.raises(ValueError, match='preference data are empty'):
      encode([], tokenizer, max_length=9)
    with pytest.raises(ValueError, match='overlong='):
      encode(LONG, tokenizer, max_length=9, overlong='cut')
    with pytest.raises(ValueError, match='want one of'):
      encode(LONG, tokenizer, max_length=9, template='gsm')
  with pytest.raises(ValueError, match='equal='):
    encode_preferences(LONG, tokenizer, max_length=9, equal='keep')


def test_judged_completions_and_their_mismatches(tokenizer, tmp_path):
  """A mismatch never takes a completion of the same prompt, as neighbours may have."""
  path = write(
    tmp_path,
    {'prompt': 'p', 'completion': 'one', 'label': True},
    {'prompt': 'p', 'completion': '', 'label': False},
    {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'p', 'completion': 'last', 'label': False},
  )
  judged = encode_judged(load_judged(path), tokenizer, max_length=7)
  assert judged.desirable.tolist() == [True, False, True, False, False]
  texts = [text_of(tokenizer, text) for text in judged.texts]
  assert texts == [
    '<s>pone</s>',
    '<s>p</s>',
    '<s>qgood</s>',
    '<s>qbad</s>',
    '<s>plast</s>',
  ]
  mismatched = [text_of(tokenizer, text) for text in judged.mismatched]
  assert mismatched == [
    '<s>pgood</s>',
    '<s>pgood</s>',
    '<s>qlast</s>',
    '<s>qlast</s>',
    '<s>pgood</s>',
  ]
  assert supervised(tokenizer, judged.mismatched[2]) == 'last</s>'


def test_a_mismatch_that_is_too_long_is_cut(tokenizer):
  records = [
    JudgedRecord('f:1', 'prompt', 'a', True),
    JudgedRecord('f:2', 'p', 'abcdef', False),
  ]
  judged = encode_judged(records, tokenizer, max_length=9)
  assert [len(text.ids) for text in judged.texts] == [9, 9]
  assert text_of(tokenizer, judged.mismatched[0]) == '<s>promptab'


@pytest.mark.parametrize('label', [True, False])
def test_judgements_of_one_kind_alone_are_warned_of(tokenizer, caplog, label):
  records = [JudgedRecord(f'f:{i}', 'pq'[i], 'a', label) for i in range(2)]
  encode_judged(records, tokenizer, max_length=8)
  kind = 'desirable' if label else 'undesirable'
  assert caplog.messages[0].startswith(f'All 2 completions are {kind}. KTO learns from')


def test_judged_records_by_length_and_balance(tokenizer, caplog):
  records = [
    JudgedRecord('f:1', 'p', 'a', True),
    JudgedRecord('f:2', 'q', 'b' * 9, True),
    JudgedRecord('f:3', 'r', 'c', False),
  ]
  with pytest.raises(ValueError, match=r'^f:2: 12 tokens'):
    encode_judged(records, tokenizer, max_length=8)
  with caplog.at_level(logging.INFO):
    judged = encode_judged(records, tokenizer, max_length=8, overlong='drop')
  assert judged.desirable.tolist() == [True, False]
  assert caplog.messages == [
    'Preference data: 2 of 3 completions, 1 desirable, 8 tokens, 4 supervised, longest '
    '4; 0 truncated and 1 dropped at max_length=8'
  ]
  with pytest.raises(ValueError, match='all 3 records are longer than max_length=3'):
    encode_judged(records, tokenizer, max_length=3, overlong='drop')
  with pytest.raises(ValueError, match='all 2 records have the same prompt'):
    encode_judged([records[0]] * 2, tokenizer, max_length=9)


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'prompt': 'a', 'label': True}, r"missing field\(s\) \['completion'\]"),
    ({'prompt': 'a', 'completion': 'b', 'label': 1}, "'label' is 1, want true"),
    ({'prompt': 'a', 'completion': '', 'label': True}, 'empty, and yet desirable'),
    ({'prompt': 'a', 'completion': CHAT, 'label': True}, 'all be strings'),
    ({'prompt': 'a', 'completion': 4, 'label': True}, "'completion' must be a string"),
  ],
)
def test_bad_judged_records_are_named(tmp_path, record, message):
  path = write(tmp_path, {'prompt': 'a', 'completion': 'b', 'label': False}, record)
  with pytest.raises(DataError, match=message) as error:
    load_judged(path)
  assert str(error.value).startswith(f'{path}:2: ')
