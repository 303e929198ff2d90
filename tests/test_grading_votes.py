"""Votes and best-of-n: hand-made cases, properties, order of ties on real samples."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mrjax.grading.rules import RULES
from mrjax.grading.votes import best_of, equivalence, string_first

# Classes of two strings, of one, and of none; so few that ties and repeats are common.
ANSWERS = st.sampled_from(['2', '2.0', '3', '3.0', '4', '', None])
QUARTERS = st.integers(0, 12).map(lambda quarters: quarters / 4)  # sums are exact
# Added in turn '2' has 1e16 and '3' 1e16 + 2.
TIED_BY_EXACT_SUMS = list(zip('222333', [1e16, 1, 1, 1, 1, 1e16]))


def same_number(a, b):
  return float(a) == float(b)


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


def test_equivalence_of_the_paper():
  """Case H of methods/qsharp.md: the class {2, 4/2} wins by two votes to one."""
  answers = ['2', r'\frac{4}{2}', '3', '', '']
  for order in (answers, answers[::-1]):
    assert boxed_vote(order) == next(a for a in order if a not in ('3', ''))
  assert boxed_vote(answers, weights=[1, 1, 2.5, 9, 9]) == '3'
  assert (
    boxed_vote(answers, weights=[0, 3, 2.5, 9, 9]) == '2'
  )  # the head weighs nothing
  assert boxed_vote(['', '', ''], weights=[1, 2, 3]) is None


@pytest.mark.parametrize(
  ('answers', 'weights', 'string', 'class_head'),
  [
    (['1', '2', '2'], [5, 1, 2], '1', '1'),
    (['1', '2', '2'], [2.5, 1, 2], '2', '2'),
    (['1', '2', '2.0'], [2.5, 1, 2], '1', '2'),  # two strings of one class
    (['2.0', '1', '2'], [1, 2.5, 2], '1', '2.0'),
    ([None, '1', '', '2'], [7, 1, 7, 2], '2', '2'),
    (['1', '2'], [0, 1], '2', '2'),
    ([None, ''], [1, 1], None, None),
    ([], [], None, None),
  ],
)
def test_weights(answers, weights, string, class_head):
  for given_weights in (weights, np.array(weights, np.float32)):
    assert string_first(answers, weights=given_weights) == string
    winner = equivalence(answers, same_number, seed=0, weights=given_weights)
    assert winner == class_head


def test_weighted_ties_go_as_unweighted_ones():
  answers, weights = ['1', '2', '3', '2'], [1.5, 1, 0.5, 0.5]
  assert string_first(answers, weights=weights) == '1'
  assert string_first(answers[::-1], weights=weights[::-1]) == '2'
  assert string_first(answers, weights=[0] * 4) == '1'
  draws = {'1': 0, '2': 0}  # '3' is not among the tied
  for seed in range(200):
    winner = equivalence(answers, same_number, seed=seed, weights=weights)
    assert winner == equivalence(['1', '2'], same_number, seed=seed)
    draws[winner] += 1
  assert min(draws.values()) > 60
  winners = {
    equivalence(answers, same_number, seed=seed, weights=[0] * 4) for seed in range(40)
  }
  assert winners == {'1', '2', '3'}


@given(
  st.lists(ANSWERS, max_size=9),
  st.floats(5e-324, 1e300, allow_subnormal=True),
  st.integers(0, 3),
)
@example(['2', '3', '3', '2'], 0.1, 0)
def test_equal_weights_are_the_unweighted_vote(answers, weight, seed):
  weights = [weight] * len(answers)
  assert string_first(answers, weights=weights) == string_first(answers)
  assert equivalence(answers, same_number, seed=seed, weights=weights) == equivalence(
    answers, same_number, seed=seed
  )


@given(st.lists(st.tuples(ANSWERS, QUARTERS), max_size=9))
def test_the_largest_sum_wins(samples):
  """Against sums by enumeration, in fractions."""
  answers = [answer for answer, _ in samples]
  weights = [weight for _, weight in samples]
  for winner, is_equal in (
    (string_first(answers, weights=weights), str.__eq__),
    (equivalence(answers, same_number, seed=0, weights=weights), same_number),
  ):
    totals = {
      head: sum(Fraction(w) for a, w in samples if a and is_equal(head, a))
      for head in filter(None, answers)
    }
    if not totals:
      assert winner is None
      continue
    assert totals[winner] == max(totals.values())
    # A class is named by its first member.
    assert not any(is_equal(winner, a) for a in answers[: answers.index(winner)] if a)
    if is_equal is str.__eq__:
      assert winner == next(a for a in totals if totals[a] == totals[winner])


@given(
  st.lists(st.tuples(ANSWERS, st.floats(0, 1e300)), max_size=9).flatmap(
    lambda samples: st.tuples(st.just(samples), st.permutations(samples))
  )
)
@example((TIED_BY_EXACT_SUMS, TIED_BY_EXACT_SUMS[::-1]))
def test_permuted_samples_have_the_same_winners(orders):
  """The order may choose among tied classes, but not which are tied."""
  tied_strings, tied_classes = [], []
  for samples in orders:
    answers = [answer for answer, _ in samples]
    weights = [weight for _, weight in samples]
    # Put first with weight 0, a heaviest string wins as the first of the tied.
    tied_strings.append(
      {
        answer
        for answer in set(answers)
        if answer == string_first([answer, *answers], weights=[0.0, *weights])
      }
      - {None}
    )
    winners = [
      equivalence(answers, same_number, seed=seed, weights=weights)
      for seed in range(32)
    ]
    tied_classes.append({winner and float(winner) for winner in winners})
  assert tied_strings[0] == tied_strings[1]
  assert tied_classes[0] == tied_classes[1]


def test_totals_do_not_depend_on_the_order():
  for samples in (TIED_BY_EXACT_SUMS, TIED_BY_EXACT_SUMS[::-1]):
    answers, weights = zip(*samples)
    assert string_first(answers, weights=weights) == answers[0]
    winners = {
      equivalence(answers, same_number, seed=seed, weights=weights)
      for seed in range(20)
    }
    assert winners == {'2', '3'}


@pytest.mark.parametrize(
  ('weights', 'dtype'),
  [
    ([2**24, 2**24, 1], np.float32),  # float32 drops the 1
    ([3e38, 2e38, 2e38], np.float32),  # and has no 4e38
    ([6e4, 4e4, 4e4], np.float16),
  ],
)
def test_narrow_weights_are_added_as_doubles(weights, dtype):
  assert string_first(['3', '2', '2'], weights=np.array(weights, dtype)) == '2'


@pytest.mark.parametrize(
  ('weights', 'message'),
  [
    ([1, 1], 'one weight for each of 3 answers'),
    ([1, 1, 1, 1], 'one weight for each of 3 answers'),
    ([], 'one weight for each of 3 answers'),
    ([1, 1, -1], 'finite weights >= 0'),
    ([1, 1, math.inf], 'finite weights >= 0'),
    ([1, 1, math.nan], 'finite weights >= 0'),
    ([math.nan, 1, 1], 'finite weights >= 0'),  # of a sample that does not vote
    ([1, 1e308, 1e308], 'with a finite sum'),
  ],
)
def test_bad_weights(weights, message):
  asked = []
  with pytest.raises(ValueError, match=message):
    string_first([None, '2', '3'], weights=weights)
  with pytest.raises(ValueError, match=message):
    equivalence(
      [None, '2', '3'], lambda *pair: asked.append(pair), seed=0, weights=weights
    )
  assert not asked  # a rule may be slow: the fault is told before


@pytest.mark.parametrize(
  ('answers', 'scores', 'index'),
  [
    (['1', '2', '3'], [0.25, 0.75, 0.5], 1),
    (['1', '2', '3'], [0.25, 0.75, 0.75], 1),  # a tie goes to the first
    (['1', '2', '3'], [-3, -2, -1], 2),  # logits or log-probabilities
    (['1', '1', '2'], [0.5, 0.5, 0.75], 2),  # no vote
    ([None, '', '3'], [0.9, 0.8, 0.1], 2),  # without an answer
    (['1', '2', '3'], [math.nan, 0.1, 0.2], 2),
    (['1', '2', '3'], [0.1, math.nan, 0.2], 2),
    (['1', '2', '3'], [math.inf, -5, -math.inf], 1),
    (['1', '2'], [math.nan, math.inf], None),
    (['1', None], [math.nan, 0.5], None),
    ([None, ''], [0.5, 0.5], None),
    ([], [], None),
  ],
)
def test_best_of(answers, scores, index):
  assert best_of(answers, scores) == index
  assert best_of(answers, np.array(scores, np.float32)) == index


@given(
  st.lists(st.tuples(ANSWERS, st.floats(width=32)), max_size=9).flatmap(
    lambda samples: st.tuples(st.just(samples), st.permutations(samples))
  )
)
def test_best_of_any_order(orders):
  """The winner beats all before it and none after it beats it; so in any order."""
  scores_of_winners = []
  for samples in orders:
    index = best_of([answer for answer, _ in samples], [score for _, score in samples])
    eligible = {i: s for i, (a, s) in enumerate(samples) if a and math.isfinite(s)}
    if index is None:
      assert not eligible
      scores_of_winners.append(None)
      continue
    best = eligible[index]
    assert all(s < best if i < index else s <= best for i, s in eligible.items())
    scores_of_winners.append(best)
  assert scores_of_winners[0] == scores_of_winners[1]


@pytest.mark.parametrize('scores', [[], [1.0], [1.0, 2.0, 3.0]])
def test_best_of_wants_a_score_for_each(scores):
  with pytest.raises(ValueError, match='one score for each of 2 answers'):
    best_of(['1', '2'], scores)
