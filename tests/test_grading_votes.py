"""Majority votes: hand-made cases, and the order of ties on real samples."""

import json

import pytest

from mrjax.grading.rules import RULES
from mrjax.grading.votes import equivalence, string_first


@pytest.mark.parametrize(
  ('answers', 'winner'),
  [
    (['1', '2', '2'], '2'),
    (['2', '1'], '2'),  # a tie goes to the first
    (['1', '2', '2', '1'], '1'),
    (['18', '18.0', '18.0', '18', '18.0'], '18.0'),  # strings, not numbers
    ([None, None, '', '3'], '3'),
    ([None, ''], None),
    ([], None),
  ],
)
def test_string_first(answers, winner):
  assert string_first(answers) == winner


def test_string_first_on_real_samples(shared):
  """Four voters score 584 in one order and 744 in the other: methods/rft.md."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  rule = RULES['openai_gsm8k']
  names = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
  totals = [0, 0]
  for line in path.read_text('utf-8').splitlines():
    row = json.loads(line)
    gold = rule.extract_gold(row['ground_truth'])
    answers = [rule.extract(row[name]['solution']) for name in names]
    for order, votes in enumerate((answers, answers[::-1])):
      winner = string_first(votes)
      totals[order] += winner is not None and RULES['gsm8k'].is_equal(winner, gold)
  assert totals == [584, 744]


def boxed_vote(answers, **kwargs):
  return equivalence(answers, RULES['boxed_symbolic'].is_equal, seed=0, **kwargs)


def test_equivalence_merges_equal_answers():
  assert boxed_vote(['3', '2', r'\frac{4}{2}', '3.5', '', '']) == '2'
  assert boxed_vote(['', None, '']) is None


def test_equivalence_breaks_ties_by_seed():
  winners = [
    equivalence(['1', '2'], lambda a, b: a == b, seed=f'{seed}/p')
    for seed in range(200)
  ]
  assert 60 < winners.count('1') < 140
  assert winners == [
    equivalence(['1', '2'], lambda a, b: a == b, seed=f'{seed}/p')
    for seed in range(200)
  ]


def test_equivalence_asks_the_first_member_as_the_prediction():
  asked = []

  def is_equal(predicted, gold):
    asked.append((predicted, gold))
    return predicted == '2' and gold == '4/2'

  assert equivalence(['2', '4/2', '4/2', '3'], is_equal, seed=0) == '2'
  assert asked == [('2', '4/2'), ('2', '3')]  # repeated strings are asked once


def test_equivalence_weights():
  answers = ['1', '2', '2']
  same = lambda a, b: a == b
  assert equivalence(answers, same, seed=0, weights=[5, 1, 2]) == '1'
  with pytest.raises(ValueError, match='one weight >= 0 for each of 3'):
    equivalence(answers, same, seed=0, weights=[1, 1])
  with pytest.raises(ValueError, match='one weight'):
    equivalence(answers, same, seed=0, weights=[1, 1, -1])
