"""Q#'s collection: cuts, roll-outs, labels, rounds; by hand and as properties."""

import random
import re

import pytest

from mrjax.data.values import Labels, encode_values, parse_value
from mrjax.grading.rules import get_rule
from mrjax.methods import qsharp, qsharp_rounds
from mrjax.records import Problem


def sample(problem_id='p', index=0, ids=(1, 2, 3), reason='stop'):
  return {
    'problem_id': problem_id,
    'sample_index': index,
    'token_ids': list(ids),
    'finish_reason': reason,
  }


def roll_ins(num_problems=30, num_samples=7):
  rng = random.Random(5)
  return [
    sample(f'p{p}', i, range(100, 101 + rng.randrange(9)))
    for p in range(num_problems)
    for i in range(num_samples)
  ]


# Cuts -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('num_tokens', 'uniform', 'switch'),
  [(7, 0.5, 3), (7, 0.99, 6), (7, 0.0, 0), (1, 0.99, 0), (4, 0.25, 1), (4, 0.2499, 0)],
)
def test_switch_point(num_tokens, uniform, switch):
  assert qsharp.switch_point(num_tokens, uniform) == switch


@pytest.mark.parametrize(('num_tokens', 'uniform'), [(0, 0.5), (3, 1.0), (3, -0.1)])
def test_bad_switch_point(num_tokens, uniform):
  with pytest.raises(ValueError, match='want at least 1, and 0 <= uniform < 1'):
    qsharp.switch_point(num_tokens, uniform)


def test_prefix_and_end():
  cut = qsharp.Cut('p', 0, (5, 6, 7, 8, 9, 10, 2), 'stop', 3)
  assert cut.prefix_ids == (5, 6, 7, 8) and not cut.at_end
  assert cut._replace(switch=6).at_end
  assert cut._replace(switch=6).prefix_ids == cut.token_ids


def test_cuts_depend_on_seed_problem_and_sample_alone():
  samples = roll_ins()
  cuts, counts = qsharp.cut_roll_ins(samples, seed=3)
  assert counts['num_roll_ins'] == len(cuts) == 210
  shuffled = random.Random(0).sample(samples, len(samples))
  assert qsharp.cut_roll_ins(shuffled, seed=3)[0] == cuts
  part, _ = qsharp.cut_roll_ins(samples[40:45], seed=3)
  assert set(part) < set(cuts)
  others, _ = qsharp.cut_roll_ins(samples, seed=4)
  assert sum(a.switch != b.switch for a, b in zip(cuts, others, strict=True)) > 70


def test_switch_points_are_uniform():
  samples = [sample(f'p{i}', 0, range(5)) for i in range(2000)]
  cuts, counts = qsharp.cut_roll_ins(samples, seed=0)
  found = [sum(cut.switch == place for cut in cuts) for place in range(5)]
  # 400 each, 18 the standard deviation; the draw is fixed by its seed.
  assert all(abs(number - 400) < 72 for number in found)
  assert counts['num_at_end'] == found[4]


def test_cuts_at_the_end_are_kept_or_dropped_and_counted():
  samples = [sample(f'p{i}', 0, [7], 'length' if i < 3 else 'stop') for i in range(5)]
  samples += [sample('e0', 0, [], 'error'), sample('e1', 0, [4, 5], 'error')]
  cuts, counts = qsharp.cut_roll_ins(samples, seed=0)
  assert len(cuts) == 5 and all(cut.at_end for cut in cuts)
  assert counts == {
    'num_roll_ins': 7,
    'num_roll_in_errors': 2,
    'num_at_end': 5,
    'num_at_end_unfinished': 3,
    'num_at_end_dropped': 0,
  }
  cuts, counts = qsharp.cut_roll_ins(samples, seed=0, at_end='drop')
  assert cuts == [] and counts['num_at_end_dropped'] == 5


def test_bad_roll_ins():
  with pytest.raises(ValueError, match="unknown at_end 'redraw'; one of keep, drop"):
    qsharp.cut_roll_ins([], seed=0, at_end='redraw')
  row = sample()
  with pytest.raises(ValueError, match="roll-in 0 of problem 'p' comes twice"):
    qsharp.cut_roll_ins([row, row], seed=0)


def test_roll_outs_have_a_seed_of_their_own():
  seeds = {qsharp.rollout_seed(seed) for seed in range(100)}
  assert len(seeds) == 100 and not seeds & set(range(100))
  assert all(0 <= seed < 1 << 32 for seed in seeds)


# Roll-outs and labels ---------------------------------------------------------

PROMPT = [1, 11, 12, 13, 14]


def test_the_worked_example_from_cut_to_training_text():
  """Prompt of 5 tokens, prefix of 4, roll-out of 2 and EOS, reward 1."""
  cut = qsharp.Cut('p', 3, (21, 22, 23, 24, 25, 26, 2), 'stop', 3)
  responses, counts = qsharp.complete([cut], [sample('p', 3, [31, 32, 2])])
  assert responses[0].token_ids == (21, 22, 23, 24, 31, 32, 2)
  assert counts == {'num_roll_outs': 1, 'num_roll_out_errors': 0, 'num_unfinished': 0}
  (record,) = qsharp.value_records(responses, [1.0], prompts={'p': PROMPT}, round=2)
  assert record == {
    'problem_id': 'p',
    'prompt_ids': PROMPT,
    'response_ids': [21, 22, 23, 24, 31, 32, 2],
    'switch': 3,
    'reward': 1.0,
    'round': 2,
    'sample_index': 3,
  }
  value = parse_value(record, where='')
  for whole, targets in ((True, [24, 31, 32, 2]), (False, [24])):
    ((text,),), _ = encode_values(
      [value], Labels(), vocab_size=40, max_length=20, whole_rollout=whole
    )
    assert text.ids[text.loss_mask].tolist() == targets
    assert text.loss_mask[:8].tolist() == [False] * 8


def test_a_cut_at_the_end_is_the_roll_in_itself():
  cut = qsharp.Cut('p', 0, (21, 22, 2), 'stop', 2)
  responses, counts = qsharp.complete([cut], [])
  assert responses == [qsharp.Response('p', 0, (21, 22, 2), 'stop', 2)]
  assert counts['num_roll_outs'] == 0


def test_roll_outs_meet_their_cuts():
  cuts, _ = qsharp.cut_roll_ins(roll_ins(), seed=1)
  roll_outs = [
    sample(c.problem_id, c.sample_index, [200 + c.sample_index], 'length')
    for c in cuts
    if not c.at_end
  ]
  random.Random(1).shuffle(roll_outs)
  responses, counts = qsharp.complete(cuts, roll_outs)
  assert counts['num_unfinished'] == counts['num_roll_outs'] == len(roll_outs) > 100
  for cut, response in zip(cuts, responses, strict=True):
    assert response[:2] == cut[:2] and response.switch == cut.switch
    tail = () if cut.at_end else (200 + cut.sample_index,)
    assert response.token_ids == (*cut.prefix_ids, *tail)


def test_roll_outs_that_failed_are_left_out():
  cuts = [qsharp.Cut('p', i, (5, 6, 7), 'stop', i) for i in range(3)]
  rows = [sample('p', 0, [], 'error'), sample('p', 1, [9], 'error')]
  responses, counts = qsharp.complete(cuts, rows)
  assert [r.sample_index for r in responses] == [2]
  assert counts['num_roll_out_errors'] == 2


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], "no roll-out of sample 0 of problem 'p'; finish sampling"),
    ([sample(), sample()], "roll-out 0 of problem 'p' comes twice"),
    ([sample(), sample(index=1)], "sample 1 of problem 'p' belongs to no cut"),
  ],
)
def test_bad_roll_outs(rows, message):
  with pytest.raises(ValueError, match=message):
    qsharp.complete([qsharp.Cut('p', 0, (5, 6), 'stop', 0)], rows)


def test_labels_are_the_rules():
  rule = get_rule('boxed_strict')
  problem = Problem('p', 'Q?', answer='18')
  assert qsharp.reward_of(r'So \boxed{18}.', problem, rule) == 1.0
  assert qsharp.reward_of(r'So \boxed{18.0}.', problem, rule) == 0.0
  assert qsharp.reward_of('So 18.', problem, rule) == 0.0
  with pytest.raises(ValueError, match="'q' has no answer to label"):
    qsharp.reward_of('', Problem('q', 'Q?'), rule)


def test_bad_value_records():
  responses = [qsharp.Response('p', 0, (5,), 'stop', 0)]
  prompts = {'p': [1]}
  with pytest.raises(ValueError, match='0 rewards for 1 responses'):
    qsharp.value_records(responses, [], prompts=prompts, round=1)
  with pytest.raises(ValueError, match='round=0; rounds count from 1'):
    qsharp.value_records(responses, [1], prompts=prompts, round=0)
  with pytest.raises(ValueError, match="no prompt of problem 'p'"):
    qsharp.value_records(responses, [1], prompts={'q': [1]}, round=1)
  with pytest.raises(ValueError, match="problem 'p': field 'prompt_ids'"):
    qsharp.value_records(responses, [1], prompts={'p': []}, round=1)


# Rounds -----------------------------------------------------------------------


def rows(*keys):
  """(where, record) of (problem, round, sample, reward)."""
  return [
    (
      f'f:{line}',
      {
        'problem_id': problem,
        'prompt_ids': [1],
        'response_ids': [2, 3],
        'switch': 1,
        'reward': reward,
        'round': round,
        'sample_index': index,
      },
    )
    for line, (problem, round, index, reward) in enumerate(keys, start=1)
  ]


# The rewards of the worked example: all 1, all 0, and 1, 0, 1.
WORKED = rows(
  ('b', 2, 0, 0),
  ('c', 1, 1, 0),
  ('a', 1, 0, 1),
  ('c', 1, 0, 1),
  ('a', 2, 0, 1),
  ('b', 1, 0, 0),
  ('a', 1, 1, 1),
  ('c', 2, 0, 1),
)


def keys(records):
  return [(r['problem_id'], r['round'], r['sample_index']) for r in records]


def test_rounds_are_put_together_by_problem():
  records, counts = qsharp_rounds.combine_rounds(WORKED, ['c', 'a', 'b'])
  assert keys(records) == [
    ('c', 1, 0),
    ('c', 1, 1),
    ('c', 2, 0),
    ('a', 1, 0),
    ('a', 1, 1),
    ('a', 2, 0),
    ('b', 1, 0),
    ('b', 2, 0),
  ]
  assert counts == {
    'num_records': 8,
    'num_problems': 3,
    'by_round': {'1': 5, '2': 3},
    'mean_reward_by_round': {'1': 0.6, '2': pytest.approx(2 / 3)},
    'num_missing': 0,
    'num_constant_problems': 0,
    'num_constant_records': 0,
  }
  assert qsharp_rounds.combine_rounds(WORKED[::-1], ['c', 'a', 'b'])[0] == records


def test_problems_of_one_reward_are_dropped_over_all_rounds():
  records, counts = qsharp_rounds.combine_rounds(
    WORKED, ['a', 'b', 'c'], drop_constant=True
  )
  assert keys(records) == [('c', 1, 0), ('c', 1, 1), ('c', 2, 0)]
  assert counts['num_constant_problems'] == 2
  assert counts['num_constant_records'] == 5
  assert (counts['num_records'], counts['num_problems']) == (3, 1)
  # In round 1 alone b's rewards are equal; a second round with another keeps it.
  mixed = rows(('b', 1, 0, 0), ('b', 2, 0, 1))
  assert len(qsharp_rounds.combine_rounds(mixed, ['b'], drop_constant=True)[0]) == 2
  with pytest.raises(ValueError, match='drop_no_variation leaves none of 1'):
    qsharp_rounds.combine_rounds(mixed[:1], ['b'], drop_constant=True)


def test_missing_problems_are_named():
  ids = ['a', 'b', 'c', *(f'm{i}' for i in range(6))]
  message = "6 of 9 problems have no value record: 'm0', 'm1', 'm2', 'm3', 'm4', ...;"
  with pytest.raises(ValueError, match=re.escape(message)):
    qsharp_rounds.combine_rounds(WORKED, ids)
  _, counts = qsharp_rounds.combine_rounds(WORKED, ids, allow_missing=True)
  assert counts['num_missing'] == 6 and counts['num_problems'] == 3


@pytest.mark.parametrize(
  ('records', 'message'),
  [
    (rows(('x', 1, 0, 1)), "f:1: problem 'x' is not among the 1 asked"),
    (rows(('a', 1, 0, 1), ('a', 1, 0, 0)), 'f:2: sample 0 of .* is already at f:1'),
    (rows(('a', -1, 0, 1)), "f:1: field 'round'"),
    (rows(('a', 1, None, 1)), "f:1: field 'sample_index' is None"),
    (rows(('a', 1, True, 1)), "f:1: field 'sample_index' is True"),
    ([('f:9', {'problem_id': 'a'})], 'f:9: missing field'),
    ([], "1 of 1 problems have no value record: 'a'"),
  ],
)
def test_bad_rounds(records, message):
  with pytest.raises(ValueError, match=message):
    qsharp_rounds.combine_rounds(records, ['a'])


def test_the_same_record_twice_is_refused():
  row = rows(('a', 1, 0, 1))[0]
  with pytest.raises(ValueError, match='is already at f:1'):
    qsharp_rounds.combine_rounds([row, row], ['a'])
  with pytest.raises(ValueError, match='2 problem ids are not all different'):
    qsharp_rounds.combine_rounds([row], ['a', 'a'])


@pytest.mark.parametrize(('total', 'held_out'), [(7473, 747), (7500, 750), (3, 0)])
def test_a_tenth_is_held_out(total, held_out):
  ids = [f'p{i}' for i in range(total)]
  training, evaluation = qsharp_rounds.split_problems(ids, ratio=0.1, seed=0)
  assert len(evaluation) == held_out
  assert sorted(training + evaluation) == sorted(ids)
  assert training == [key for key in ids if key in set(training)]


def test_the_split_depends_on_no_order():
  ids = [f'p{i}' for i in range(50)]
  shuffled = random.Random(2).sample(ids, 50)
  first = qsharp_rounds.split_problems(ids, ratio=0.3, seed=0)
  second = qsharp_rounds.split_problems(shuffled, ratio=0.3, seed=0)
  assert [set(part) for part in first] == [set(part) for part in second]
  assert qsharp_rounds.split_problems(ids, ratio=0.3, seed=1) != first


def test_bad_splits():
  for ratio in (-0.1, 1.0):
    with pytest.raises(ValueError, match='want 0 <= ratio < 1'):
      qsharp_rounds.split_problems(['a'], ratio=ratio, seed=0)
  with pytest.raises(ValueError, match='of 1 problems leaves none to train on'):
    qsharp_rounds.split_problems(['a'], ratio=0.9, seed=0)
  with pytest.raises(ValueError, match='not all different'):
    qsharp_rounds.split_problems(['a', 'a'], ratio=0.1, seed=0)
