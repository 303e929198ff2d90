"""Best-of-n and weighted votes of a value model, by hand; mean divergence."""

import random

import pytest

from mrjax.grading.tally import Tally, format_summary
from mrjax.records import DataError, write_jsonl
from mrjax.runs import grade

# Gold, answers and values by problem.
SAMPLES = {
  'a': ('1', ('1', '2', '2', None), (0.5, 0.3, 0.3, 0.9)),
  'b': ('5', ('3', '5', '5.0', '3'), (0.7, 0.2, 0.6, None)),
  'c': ('7', (None, None, None, None), (0.8, 0.8, 0.8, 0.8)),
  'd': ('2', ('4', '2', '4', '4'), (0.1, 0.4, 0.5, 0.2)),
}


def records():
  rows = [
    {
      'problem_id': name,
      'sample_index': index,
      'text': 'no idea' if answer is None else f'#### {answer}',
      'gold': gold,
      'value': value,
    }
    for name, (gold, answers, values) in SAMPLES.items()
    for index, (answer, value) in enumerate(zip(answers, values, strict=True))
  ]
  random.Random(0).shuffle(
    rows
  )  # their place is their index, not the order of the file
  return rows


def run(tmp_path, rows, **changes):
  write_jsonl(tmp_path / 'in.jsonl', rows)
  fields = {'rule': 'gsm8k', 'input': str(tmp_path / 'in.jsonl'), 'overwrite': True}
  fields['output'] = str(tmp_path / 'out.jsonl')
  return grade.run(grade.Config(**(fields | changes)))


@pytest.mark.parametrize(
  ('vote', 'weighted'),
  [
    # At 4, a: 0.5 for 1 and 0.6 for 2; b: 0.7 for 3, and 0.8 for 5 where 5.0 is 5;
    # d: 0.8 for 4 and 0.4 for 2.
    ('string_first', {2: 2 / 4, 4: 0 / 4}),
    ('equivalence', {2: 2 / 4, 4: 1 / 4}),
  ],
)
def test_best_of_n_and_weighted_votes(tmp_path, vote, weighted):
  summary = run(tmp_path, records(), vote=vote)
  value = lambda name: summary[name]['value']
  # The sample of the highest value that has an answer: a0, b0, none, d1; at 4 d2.
  assert (value('best_of@2'), value('best_of@4')) == (2 / 4, 1 / 4)
  assert {k: value(f'weighted_maj@{k}') for k in (2, 4)} == weighted
  if vote == 'string_first':
    assert (value('maj@2'), value('maj@4')) == (1 / 4, 0 / 4)
  assert value('pass@1') == (1 + 2 + 0 + 1) / 16
  assert 'best_of@1' not in summary and 'weighted_maj@1' not in summary
  interval = summary['best_of@2']
  assert 0 <= interval['low'] < 0.5 < interval['high'] <= 1
  assert '  weighted_maj@2 50.00%   [' in format_summary(summary)
  assert 'num_without_value' not in summary


def test_without_a_vote_there_is_best_of_n_alone(tmp_path):
  summary = run(tmp_path, records())
  assert summary['best_of@4']['value'] == 1 / 4
  assert not any('maj' in name for name in summary)


def test_a_tie_of_values_goes_to_the_first(tmp_path):
  rows = [row | {'value': 0.5} for row in records() if row['problem_id'] == 'd']
  summary = run(tmp_path, rows)
  assert summary['best_of@4']['value'] == 0.0
  rows = [row | {'value': -1.5 if row['sample_index'] == 1 else -2} for row in rows]
  summary = run(tmp_path, rows, vote='string_first')
  assert summary['best_of@4']['value'] == 1.0
  # Below 0 all weigh nothing: the first answer has it.
  assert summary['weighted_maj@4']['value'] == 0.0


def test_values_of_some_samples_alone_give_no_best_of_n(tmp_path):
  rows = records()
  for row in rows[:3]:
    del row['value']
  summary = run(tmp_path, rows, vote='string_first')
  assert summary['num_without_value'] == 3
  assert not any(name.startswith(('best_of', 'weighted')) for name in summary)
  assert '3 samples carry no value' in format_summary(summary)
  plain = run(
    tmp_path, [{k: v for k, v in row.items() if k != 'value'} for row in rows]
  )
  assert 'num_without_value' not in plain and 'best_of@4' not in plain


def test_levels_have_their_own(tmp_path):
  problems = [
    {'id': name, 'question': '?', 'answer': gold, 'level': 1 + (name == 'd')}
    for name, (gold, *_) in SAMPLES.items()
  ]
  write_jsonl(tmp_path / 'problems.jsonl', problems)
  source = f'jsonl:{tmp_path / "problems.jsonl"}'
  by_level = run(tmp_path, records(), problems=source)['by_level']
  assert by_level['1']['best_of@2']['value'] == 1 / 3
  assert by_level['2']['best_of@2']['value'] == 1.0


@pytest.mark.parametrize(
  ('field', 'bad', 'message'),
  [
    ('value', '0.5', r"field 'value' is str '0.5', want int \| float"),
    ('value', [0.5], "field 'value' is list"),
    ('kl_sum', '1', "field 'kl_sum' is str '1'"),
  ],
)
def test_bad_fields_are_named(tmp_path, field, bad, message):
  rows = records()
  rows[1][field] = bad
  with pytest.raises(DataError, match=rf'in\.jsonl:2: {message}'):
    run(tmp_path, rows)


def test_numbers_that_are_not_finite_never_win():
  rows = records()
  for row in rows:
    if (row['problem_id'], row['sample_index']) in (('a', 1), ('d', 0)):
      row['value'] = float('inf') if row['problem_id'] == 'a' else float('nan')
  tally = Tally('string_first', is_equal=str.__eq__)
  for row in rows:
    gold, answers, _ = SAMPLES[row['problem_id']]
    answer = answers[row['sample_index']]
    tally.add(row | {'extracted': answer, 'correct': answer == gold})
  summary = tally.summary()
  assert summary['best_of@2']['value'] == 2 / 4
  assert summary['weighted_maj@2']['value'] == 2 / 4


def test_mean_divergence_from_the_reference():
  tally = Tally(is_equal=str.__eq__)
  for kl in (0.5, 2.25, None):
    tally.add({'extracted': '1', 'correct': True, 'kl_sum': kl})
  summary = tally.summary()
  assert summary['mean_kl'] == 1.375
  assert 'mean KL to the reference 1.375 nats' in format_summary(summary)
