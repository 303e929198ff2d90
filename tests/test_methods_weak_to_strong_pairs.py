"""Weak-to-strong, stage II: votes and pairs by hand, and against the published loop."""

import random
from collections import Counter

import pytest

from mrjax.data.preference import parse_preference
from mrjax.methods import weak_to_strong_pairs as stage2
from mrjax.methods.weak_to_strong_data import Response
from mrjax.methods.weak_to_strong_pairs import PairRules
from mrjax.records import Problem


def responses(*answers, gold=None, texts=None):
  """Samples with these answers, of different texts unless given."""
  texts = texts or [f'way {i} #### {answer}' for i, answer in enumerate(answers)]
  return tuple(
    Response(text, answer, i, None if gold is None else answer == gold)
    for i, (answer, text) in enumerate(zip(answers, texts, strict=True))
  )


def indices(samples):
  return [s.sample_index for s in samples]


@pytest.mark.parametrize(
  ('answers', 'majority', 'confidence', 'positives', 'negatives'),
  [
    (['3', '4', '4', '3', '3'], '3', 0.6, [0, 3, 4], [1, 2]),
    (['4', '3', '3', '4'], '4', 0.5, [0, 3], [1, 2]),  # a tie: the first seen
    (['', '7', '', '', '7'], '', 0.6, [0, 2, 3], [1, 4]),  # no answer votes too
    (['18', '18.0', '18.0'], '18.0', 2 / 3, [1, 2], [0]),  # strings, not numbers
    (['5'], '5', 1.0, [0], []),
  ],
)
def test_votes(answers, majority, confidence, positives, negatives):
  vote = stage2.count_votes(responses(*answers))
  assert (vote.answer, vote.confidence) == (majority, confidence)
  assert indices(vote.positives) == positives
  assert indices(vote.negatives) == negatives


def test_no_votes():
  with pytest.raises(ValueError, match='no samples to vote'):
    stage2.count_votes([])


RULES = PairRules()


def outcome(weak, answers, rules=RULES, texts=None):
  vote = stage2.count_votes(responses(*answers, texts=texts))
  name, pairs = stage2.pair_responses(
    Response(f'weak #### {weak}', weak), vote, rules, random.Random(5)
  )
  return name, pairs


@pytest.mark.parametrize('mode', stage2.MODES)
@pytest.mark.parametrize(
  ('weak', 'answers', 'expected'),
  [
    ('1', '1111122222', 'low_confidence'),
    ('2', '1111122222', 'low_confidence'),  # a tie: 1 came first, and 5 of 10 is low
    ('1', '1111112222', 'weak_chosen'),  # 6 of 10 is enough to choose it
    ('2', '1111112222', 'unsure'),  # and not to reject it
    ('2', '1111111222', 'unsure'),
    ('2', '1111111122', 'weak_rejected'),  # 8 of 10
    ('', '1111111122', 'weak_rejected'),  # no answer is no agreement
    ('1', '1111111112', 'weak_chosen'),
    ('1', '1111111111', 'too_easy'),
    ('2', '1111111111', 'weak_rejected'),
    ('', '------1234', 'no_answer'),  # - is none; agreeing on it makes no pair
    ('1', '----------', 'no_answer'),
    ('', '----123456', 'low_confidence'),  # looked at first
  ],
)
def test_what_becomes_of_a_question(mode, weak, answers, expected):
  name, pairs = outcome(
    weak, ['' if a == '-' else a for a in answers], PairRules(mode=mode)
  )
  assert name == expected
  assert bool(pairs) == (expected in ('weak_chosen', 'weak_rejected'))
  for chosen, rejected in pairs:
    sides = {'weak_chosen': chosen, 'weak_rejected': rejected}
    assert sides[name].text == f'weak #### {weak}'
    assert chosen.answer == '1' != rejected.answer
    assert (chosen.text.startswith('way'), rejected.text.startswith('way')) == (
      name == 'weak_rejected',
      name == 'weak_chosen',
    )


def test_one_pair_in_mode_gsm8k():
  for weak, answers in (('1', '1111112222'), ('2', '1111111122')):
    assert len(outcome(weak, answers)[1]) == 1


def test_up_to_three_rejected_in_mode_math():
  rules = PairRules(mode='math')
  # All of up to three, in order, equal texts included.
  texts = [f'way {i}' for i in range(7)] + ['same', 'same', 'same']
  _, pairs = outcome('1', '1111111234', rules, texts)
  assert [rejected.sample_index for _, rejected in pairs] == [7, 8, 9]
  _, pairs = outcome('1', '1111111112', rules)
  assert [rejected.sample_index for _, rejected in pairs] == [9]
  # Three of more.
  _, pairs = outcome('1', '1111112345', rules)
  drawn = {rejected.sample_index for _, rejected in pairs}
  assert len(drawn) == 3 and drawn < {6, 7, 8, 9}
  _, pairs = outcome('1', '1111112345', PairRules(mode='math', max_pairs=4))
  assert [rejected.sample_index for _, rejected in pairs] == [6, 7, 8, 9]


def test_up_to_three_chosen_in_mode_math():
  rules = PairRules(mode='math')
  # One drawn, then in order those whose text is not its; they may equal each other.
  _, pairs = outcome('9', '1' * 10, rules, [*'abbb', *'cccccc'])
  texts = [chosen.text for chosen, _ in pairs]
  first = texts[0]
  assert texts[1:] == {'a': ['b', 'b'], 'b': ['a', 'c'], 'c': ['a', 'b']}[first]
  seen = set()
  for seed in range(40):
    vote = stage2.count_votes(responses(*'1' * 10, texts=[*'abbb', *'cccccc']))
    _, pairs = stage2.pair_responses(
      Response('w', '9'), vote, rules, random.Random(seed)
    )
    texts = ''.join(chosen.text for chosen, _ in pairs)
    seen.add(texts)
  assert seen == {'abb', 'bac', 'cab'}
  # Nothing but one text: one pair.
  _, pairs = outcome('9', '1' * 10, rules, ['same'] * 10)
  assert len(pairs) == 1
  _, pairs = outcome('9', '1' * 10, PairRules(mode='math', max_pairs=2))
  assert len(pairs) == 2


def make_case(num, seed, num_samples=10):
  rng = random.Random(seed)
  problems = [Problem(f'p{i}', f'Question number {i}?', '1') for i in range(num)]
  weak, samples = {}, {}
  for problem in problems:
    draw = lambda: rng.choice(['1', '1', '1', '2', '3', ''])
    answer = draw()
    weak[problem.id] = Response(f'weak {answer}', answer, 0, answer == '1')
    share = rng.random()
    answers = [rng.choice('1123') if rng.random() > share else '1' for _ in range(10)]
    answers = [draw() if rng.random() < 0.1 else a for a in answers][:num_samples]
    texts = [f'{rng.choice("abc")} {answer}' for answer in answers]
    samples[problem.id] = responses(*answers, gold='1', texts=texts)
  return problems, weak, samples


def published(problems, weak, samples, mode):
  """The loop as the method's description has it, with the global generator."""
  random.seed(42)
  pairs = []
  for problem in problems:
    w, group = weak[problem.id], samples[problem.id]
    a, votes = Counter(s.answer for s in group).most_common(1)[0]
    pos = [s.text for s in group if s.answer == a]
    neg = [s.text for s in group if s.answer != a]
    confidence = votes / 10
    if confidence < 0.6 or a == '':
      continue
    if w.answer == a:
      if not neg:
        continue
      if mode == 'gsm8k':
        rejected = random.sample(neg, 1)
      else:
        rejected = neg if len(neg) <= 3 else random.sample(neg, 3)
      pairs += [(problem.id, w.text, text) for text in rejected]
    elif confidence >= 0.8:
      p = random.sample(pos, 1)[0]
      chosen = [p]
      if mode == 'math':
        for text in pos:
          if text != p and len(chosen) < 3:
            chosen.append(text)
      pairs += [(problem.id, text, w.text) for text in chosen]
  return pairs


@pytest.mark.parametrize('mode', stage2.MODES)
@pytest.mark.parametrize('seed', range(5))
def test_the_published_loop(mode, seed):
  case = make_case(61, seed)
  records, statistics = stage2.build_pairs(*case, PairRules(mode=mode, draw='file'))
  assert [
    (r['problem_id'], r['chosen'][1:], r['rejected'][1:]) for r in records
  ] == published(*case, mode)
  # Other draws make other pairs, and as many of the same questions.
  other, same = stage2.build_pairs(*case, PairRules(mode=mode))
  assert other != records
  assert same['questions'] == statistics['questions']


@pytest.mark.parametrize('mode', stage2.MODES)
def test_pairs_depend_on_no_other_question(mode):
  problems, weak, samples = make_case(53, 7)
  rules = PairRules(mode=mode)
  records, statistics = stage2.build_pairs(problems, weak, samples, rules)
  backwards, same = stage2.build_pairs(problems[::-1], weak, samples, rules)
  by_problem = lambda records: sorted(records, key=lambda r: r['problem_id'])
  assert by_problem(backwards) == by_problem(records)
  assert same == statistics
  few, _ = stage2.build_pairs(problems[20:31], weak, samples, rules)
  keys = {p.id for p in problems[20:31]}
  assert few == [r for r in records if r['problem_id'] in keys]
  again, _ = stage2.build_pairs(problems, weak, samples, PairRules(mode=mode, seed=43))
  assert again != records


@pytest.mark.parametrize('mode', stage2.MODES)
@pytest.mark.parametrize('seed', range(5))
def test_counts_add_up(mode, seed):
  problems, weak, samples = make_case(70, seed + 20)
  rules = PairRules(mode=mode)
  records, statistics = stage2.build_pairs(problems, weak, samples, rules)
  questions, pairs = statistics['questions'], statistics['pairs']
  assert sum(questions.values()) == statistics['num_questions'] == 70
  assert sum(pairs.values()) == statistics['num_pairs'] == len(records)
  for side in ('chosen', 'rejected'):
    mine = [r for r in records if r['weak_side'] == side]
    assert len(mine) == pairs[f'weak_{side}']
    assert len({r['problem_id'] for r in mine}) == questions[f'weak_{side}']
    for record in mine:
      assert record[side] == ' ' + weak[record['problem_id']].text
      assert record['confidence'] >= (0.6 if side == 'chosen' else 0.8)
    if mode == 'gsm8k':
      assert len(mine) == questions[f'weak_{side}']


def test_records_and_accuracies_by_hand():
  problems = [
    Problem('a', 'One?', '1'),
    Problem('b', 'Two?', '2'),
    Problem('c', 'x', '3'),
  ]
  weak = {
    'a': Response('w a', '1', 0, True),
    'b': Response('', '', 0, False),
    'c': Response('w c', '9', 0, False),
  }
  samples = {
    'a': responses(*'11117', gold='1'),  # 4 of 5: weak chosen over the one sample
    'b': responses(*'55555', gold='2', texts=['t'] * 5),  # surely wrong
    'c': responses(*'33377', gold='3'),  # 3 of 5: unsure
  }
  records, statistics = stage2.build_pairs(problems, weak, samples)
  assert records[0] == {
    'prompt': 'Question: One?\nAnswer:',
    'chosen': ' w a',
    'rejected': ' way 4 #### 7',
    'problem_id': 'a',
    'sample_index': 4,
    'weak_side': 'chosen',
    'confidence': 0.8,
  }
  assert (records[1]['chosen'], records[1]['rejected']) == (' t', ' ')
  assert records[1]['weak_side'] == 'rejected' and records[1]['confidence'] == 1.0
  assert statistics == {
    'num_questions': 3,
    'num_pairs': 2,
    'questions': dict.fromkeys(stage2.OUTCOMES, 0)
    | {'weak_chosen': 1, 'weak_rejected': 1, 'unsure': 1},
    'pairs': {'weak_chosen': 1, 'weak_rejected': 1},
    'majority_accuracy': 2 / 3,
    'chosen_accuracy': 0.5,
    'rejected_accuracy': 0.0,
  }
  for record in records:
    assert parse_preference(record, where='here').prompt == record['prompt']


def test_without_golds_nothing_is_judged():
  records, statistics = stage2.build_pairs(
    [Problem('a', 'One?')], {'a': Response('w', '1')}, {'a': responses(*'1112')}
  )
  assert len(records) == 1
  assert not [name for name in statistics if name.endswith('accuracy')]


def test_thresholds_are_met_when_equal():
  # 9 of 15 and 12 of 15 are 0.6 and 0.8 in floating point too.
  assert outcome('1', '1' * 9 + '2' * 6)[0] == 'weak_chosen'
  assert outcome('2', '1' * 12 + '2' * 3)[0] == 'weak_rejected'
  rules = PairRules(min_confidence=0.25, weak_reject_confidence=0.5)
  assert outcome('2', '1122', rules)[0] == 'weak_rejected'
  assert outcome('2', '1123', rules)[0] == 'weak_rejected'
  assert outcome('4', '1234', rules)[0] == 'unsure'


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'mode': 'olympic'}, "unknown mode 'olympic'; one of gsm8k, math"),
    ({'draw': 'order'}, "unknown draw 'order'; one of problem, file"),
    ({'max_pairs': 0}, 'max_pairs is 0'),
    ({'min_confidence': 0.9}, 'min_confidence=0.9 and weak_reject_confidence=0.8'),
    ({'weak_reject_confidence': 1.1}, 'want 0 <= the first'),
    ({'min_confidence': -0.1}, 'want 0 <= the first'),
    ({'min_confidence': float('nan')}, 'want 0 <= the first'),
  ],
)
def test_bad_rules(fields, message):
  with pytest.raises(ValueError, match=message):
    PairRules(**fields)


def test_missing_responses():
  problems, weak, samples = make_case(3, 0)
  with pytest.raises(ValueError, match=r"weak responses: 1 problem.* first 'p2'"):
    stage2.build_pairs(problems, {k: weak[k] for k in ('p0', 'p1')}, samples)
  with pytest.raises(ValueError, match=r'samples: 3 problem'):
    stage2.build_pairs(problems, weak, {})
