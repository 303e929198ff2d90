"""Value records: what is supervised, with which label, and what is refused."""

import json
import logging
import math

import numpy as np
import pytest

from mrjax.data.values import (
  Labels,
  ValueRecord,
  check_disjoint,
  drop_no_variation,
  encode_values,
  load_values,
  sample_records,
  split_id_eval,
)
from mrjax.records import DataError

# Prompt of 5 tokens; 4 tokens of guided prefix, of which the last is the first to be
# supervised; then a roll-out of 2 tokens and EOS.
ROW = {
  'problem_id': 'p0',
  'prompt_ids': [1, 11, 12, 13, 14],
  'response_ids': [21, 22, 23, 24, 31, 32, 2],
  'switch': 3,
  'reward': 1,
  'round': 1,
}


def record(problem_id='p', reward=1.0, **changes) -> ValueRecord:
  fields = {
    'prompt_ids': (1, 5),
    'response_ids': (6, 7, 2),
    'switch': 0,
    'round': 1,
    'where': f'f:{problem_id}',
  }
  return ValueRecord(problem_id=problem_id, reward=reward, **(fields | changes))


def write(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_the_roll_out_and_the_token_before_it_are_supervised(tmp_path):
  (row,) = load_values(write(tmp_path / 'r.jsonl', ROW))
  ((text,),), labels = encode_values([row], Labels(), vocab_size=33, max_length=12)
  assert text.ids.tolist() == ROW['prompt_ids'] + ROW['response_ids']
  assert text.ids.dtype == np.int32
  assert text.loss_mask.tolist() == [False] * 8 + [True] * 4
  assert labels.dtype == np.float32 and labels.tolist() == [[1.0]]
  assert text.where == f'{tmp_path / "r.jsonl"}:1'
  ((text,),), _ = encode_values(
    [row], Labels(), vocab_size=33, max_length=12, whole_rollout=False
  )
  assert text.loss_mask.tolist() == [False] * 8 + [True] + [False] * 3


def test_rounds_are_read_together(tmp_path):
  first = write(tmp_path / 'round1.jsonl', ROW)
  second = write(tmp_path / 'round2.jsonl', ROW | {'round': 2, 'reward': 0.5}, ROW)
  rows = load_values(f'{first},jsonl:{second}')
  assert [(row.round, row.reward) for row in rows] == [(1, 1.0), (2, 0.5), (1, 1.0)]


@pytest.mark.parametrize(
  ('labels', 'reward', 'label'),
  [
    (Labels(), 0.25, 0.25),
    (Labels(shift_reward=1.0, eta=2.0), 1, 1.0),  # expectation mode of the paper's code
    (Labels(shift_reward=1.0, eta=2.0), 0, 0.135335),
    (Labels(shift_reward=-1.0, scale_reward=0.5), -0.5, 0.25),
    (Labels(low=-2.0, high=0.0), -1.5, -1.5),
  ],
)
def test_labels_of_rewards(labels, reward, label):
  assert labels.label(record(reward=reward)) == pytest.approx(label, abs=1e-6)


def test_labels_out_of_range_are_refused():
  with pytest.raises(ValueError, match=r'^f:p: reward 1.5 gives the label 1.5, which'):
    encode_values([record(reward=1.5)], Labels(), vocab_size=9, max_length=9)
  with pytest.raises(ValueError, match=r'label 7.38906, .* --shift_reward'):
    encode_values([record()], Labels(eta=2.0), vocab_size=9, max_length=9)
  with pytest.raises(ValueError, match=r'reward 1.0 gives the label inf, which is not'):
    Labels(eta=1e5).label(record())


def test_problems_whose_rewards_never_vary_are_dropped(caplog):
  """All rounds count together."""
  rows = [
    *(record('always', reward=r) for r in (1, 1, 1)),
    *(record('never', reward=r) for r in (0, 0)),
    record('later', reward=1, round=1),
    record('later', reward=0, round=2),
  ]
  with caplog.at_level(logging.INFO):
    kept = drop_no_variation(rows)
  assert kept == rows[-2:]
  assert caplog.messages == [
    'Value data: 5 of 7 records dropped, of 2 of 3 problems whose rewards are all equal'
  ]
  with pytest.raises(
    ValueError, match=r'--drop_no_variation leaves none of 5 .* their 2 problems are'
  ):
    drop_no_variation(rows[:5])


def test_a_random_share_is_held_out():
  rows = [record(str(i)) for i in range(30)]
  training, held_out = split_id_eval(rows, ratio=0.1, seed=4)
  assert len(held_out) == 3
  assert sorted(training + held_out, key=rows.index) == rows
  assert split_id_eval(rows, ratio=0.1, seed=4) == (training, held_out)
  assert split_id_eval(rows, ratio=0.1, seed=5)[1] != held_out
  assert split_id_eval(rows, ratio=0.0, seed=4) == (rows, [])
  with pytest.raises(ValueError, match=r'left to train on, of 1: .* --id_eval_ratio'):
    split_id_eval(rows[:1], ratio=0.6, seed=4)


def test_evaluation_sets_are_capped():
  rows = [record(str(i)) for i in range(30)]
  few = sample_records(rows, max_size=4, seed=0)
  assert len(few) == 4 and sorted(few, key=rows.index) == few
  assert few != rows[:4]
  assert sample_records(rows, max_size=30, seed=0) == rows


def test_problems_that_are_trained_on_are_no_new_problems():
  check_disjoint([record('a')], [record('b')])
  with pytest.raises(ValueError, match=r"^f:a: problem 'a' is in --data and in"):
    check_disjoint([record('a')], [record('b'), record('a')])


LONG = (
  record('short'),  # 5 tokens
  record('cut', response_ids=(6, 7, 8, 6, 7, 2), switch=2),  # 8 tokens, from the fourth
  record('lost', response_ids=(6, 7, 8, 6, 7, 2), switch=4),
)


def encode(overlong):
  return encode_values(LONG, Labels(), vocab_size=9, max_length=6, overlong=overlong)[0]


def test_long_records_by_policy(caplog):
  with pytest.raises(ValueError, match=r'^f:cut: 8 tokens, .*=6; .* --overlong=drop'):
    encode('error')
  with caplog.at_level(logging.INFO):
    (short,), (cut,) = encode('truncate')
    assert len(encode('drop')) == 1
  assert short.loss_mask.sum() == 3
  assert cut.loss_mask.tolist() == [False] * 4 + [True] * 2
  assert caplog.messages[0].endswith('1 truncated and 1 dropped at max_length=6')
  assert caplog.messages[1].endswith('0 truncated and 2 dropped at max_length=6')


def test_other_errors():
  with pytest.raises(ValueError, match='value data are empty'):
    encode_values([], Labels(), vocab_size=9, max_length=9)
  with pytest.raises(ValueError, match='overlong='):
    encode('cut')
  with pytest.raises(ValueError, match=r'^f:p: token 7, but the model has 7 embedd'):
    encode_values([record()], Labels(), vocab_size=7, max_length=9)
  with pytest.raises(ValueError, match='all 1 value records are longer'):
    encode_values([record()], Labels(), vocab_size=9, max_length=2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'problem_id': 7}, "'problem_id' is 7"),
    ({'prompt_ids': []}, "'prompt_ids' must be a list of token ids, not empty"),
    ({'response_ids': '12'}, "'response_ids' must be a list"),
    ({'response_ids': [1, -3]}, "'response_ids' holds -3"),
    ({'prompt_ids': [1.0]}, "'prompt_ids' holds 1.0"),
    ({'switch': 7}, "'switch' is 7, but the response has 7 tokens"),
    ({'switch': -1}, "'switch' holds -1"),
    ({'reward': 'good'}, "'reward' is 'good'"),
    ({'reward': math.nan}, 'NaN|nan'),
    ({'round': None}, 'round'),
  ],
)
def test_bad_records_are_named(tmp_path, changes, message):
  path = write(tmp_path / 'r.jsonl', ROW, ROW | changes)
  with pytest.raises(DataError, match=message) as error:
    load_values(path)
  assert str(error.value).startswith(f'{path}:2: ')
