"""Weak-to-strong: the split, the responses, the prompts and stage I, by hand."""

import json
import random

import pytest

from mrjax.data.problems import load_problems
from mrjax.data.sft import parse_sft
from mrjax.grading.rules import RULES, w2s_rule
from mrjax.methods import weak_to_strong as stage1
from mrjax.methods import weak_to_strong_data as data
from mrjax.methods import weak_to_strong_release as release
from mrjax.methods.weak_to_strong_data import Response
from mrjax.methods.weak_to_strong_split import split_problems
from mrjax.records import Problem, read_jsonl

RULE = RULES['w2s_gsm8k']


def make_problems(num, **fields):
  return [Problem(f'p{i}', f'How many is {i}?', str(i), **fields) for i in range(num)]


def sample(key, text, index=0):
  return {'problem_id': key, 'sample_index': index, 'text': text, 'seed': 0}


def answered(*answers, golds=None):
  """A response for each of the problems p0, p1, ..., with these answers."""
  golds = golds or [str(i) for i in range(len(answers))]
  return {
    f'p{i}': Response(f'{answer} it is #### {answer}', answer, 0, answer == gold)
    for i, (answer, gold) in enumerate(zip(answers, golds))
  }


# The split --------------------------------------------------------------------


def test_split_by_places_and_by_ids_keeps_the_order_of_the_file():
  problems = make_problems(7)
  split = split_problems(problems, {'train_1': [5, 0], 'train_2': ['p3', 'p1', 2]})
  assert [p.id for p in split.train_1] == ['p5', 'p0']
  assert [p.id for p in split.train_2] == ['p3', 'p1', 'p2']
  assert split.unknown == ('p4', 'p6')
  assert split.summary() == {
    'num_problems': {'train_1': 2, 'train_2': 3},
    'num_unknown': 2,
    'num_absent': {'train_1': 0, 'train_2': 0},
    'num_not_included': {'train_1': 0, 'train_2': 0},
  }


def test_split_names_entries_that_are_no_problem():
  index = {
    'train_1': {'gsm8k_train_indices': [0, 9], 'total_rows_in_project': 6},
    'train_2': {'gsm8k_train_indices': [1, 2, 11, 12], 'total_rows_in_project': 5},
    'description': 'of other fields nothing is asked',
  }
  split = split_problems(make_problems(3), index)
  assert split.absent == {'train_1': (9,), 'train_2': (11, 12)}
  assert split.not_included == {'train_1': 4, 'train_2': 1}
  assert split.unknown == ()


@pytest.mark.parametrize(
  ('index', 'message'),
  [
    ({'train_1': [0]}, r"no list 'train_2' of whole numbers .*\['train_1'\]"),
    ({'train_1': [0.0], 'train_2': [1]}, "no list 'train_1'"),
    ({'train_1': [True], 'train_2': [0]}, "no list 'train_1'"),
    ({'train_1': {'rows': [0]}, 'train_2': [1]}, "no list 'train_1'"),
    ({'train_1': [0, 1], 'train_2': [2, 1]}, "'p1' in train_1 and again in train_2"),
    ({'train_1': [0, 'p0'], 'train_2': [2]}, "'p0' in train_1 and again in train_1"),
    ({'train_1': [0], 'train_2': [7, 8]}, 'none of the 2 entries of train_2'),
    ({'train_1': [0], 'train_2': []}, 'none of the 0 entries of train_2'),
  ],
)
def test_bad_splits(index, message):
  with pytest.raises(ValueError, match=message):
    split_problems(make_problems(3), index)


def test_the_split_of_gsm8k(shared):
  index = json.loads((shared / 'data' / 'w2s_gsm8k_split_indices.json').read_text())
  problems = load_problems('gsm8k:train', data_root=shared / 'data')
  split = split_problems(problems, index)
  assert split.summary() == {
    'num_problems': {'train_1': 3736, 'train_2': 3737},
    'num_unknown': 0,
    'num_absent': {'train_1': 0, 'train_2': 0},
    'num_not_included': {'train_1': 3264, 'train_2': 3263},
  }
  assert [p.id for p in split.train_2[:3]] == [
    'gsm8k-train-0',
    'gsm8k-train-1',
    'gsm8k-train-5',
  ]
  # Every solution of the half teaches the answer that grading looks for.
  for record, problem in zip(
    data.gold_records(split.train_1, answer_key='####'), split.train_1
  ):
    assert '<<' not in record['completion']
    if 'Question' not in record['completion']:
      assert RULE.grade(record['completion'], problem.answer) == (problem.answer, True)


# Records and prompts ----------------------------------------------------------


def test_gold_records():
  gsm8k = Problem('a', 'Ten and ten?', '20', '10+10=<<10+10=20>>20 it is.\n#### 20')
  math = Problem('b', 'Half?', r'\frac12', r'It is $\boxed{\frac12}$.')
  assert data.gold_records([gsm8k], answer_key='####') == [
    {
      'prompt': 'Question: Ten and ten?\nAnswer:',
      'completion': ' 10+10=20 it is.\n#### 20',
      'problem_id': 'a',
      'origin': 'gold',
    }
  ]
  (record,) = data.gold_records([math], answer_key=data.ANSWER_KEYS['w2s_math'])
  assert record['completion'] == r' It is $\boxed{\frac12}$. The answer is: \frac12'
  with pytest.raises(ValueError, match="'c' has no solution"):
    data.gold_records([Problem('c', 'q', '1')], answer_key='####')
  with pytest.raises(ValueError, match="'d' has no answer to put after '####'"):
    data.gold_records([Problem('d', 'q', solution='two')], answer_key='####')


@pytest.mark.parametrize('name', data.ANSWER_KEYS)
def test_answer_keys_are_those_of_the_rules(name):
  assert RULES[name].extract(f'So.\n{data.ANSWER_KEYS[name]} 18') == '18'


def test_prompts():
  query = Problem('q', 'How many legs?', '8')
  shots = [
    Problem('a', 'Two of four?', '8', '2*4=9\n#### 9'),
    Problem('b', 'None?', '0', '#### 0'),
  ]
  assert data.prompt_of(query) == 'Question: How many legs?\nAnswer:'
  assert data.prompt_of(query, shots) == (
    'Question: Two of four?\nAnswer: 2*4=9\n#### 9\n\n'
    'Question: None?\nAnswer: #### 0\n\n'
    'Question: How many legs?\nAnswer:'
  )


def test_demonstrations_are_the_first_of_the_shuffle_that_qualify():
  problems = make_problems(23)
  weak = {
    p.id: Response(f'#### {i}' if i % 3 else f'{i}, perhaps', '', 0, i % 5 == 0)
    for i, p in enumerate(problems)
  }
  order = list(range(23))
  random.seed(42)
  random.shuffle(order)
  shots = data.pick_demonstrations(problems, weak, answer_key='####')
  assert [s.id for s in shots] == [f'p{i}' for i in order if i % 3][:4]
  assert [s.solution for s in shots] == [f'#### {i}' for i in order if i % 3][:4]
  shots = data.pick_demonstrations(
    problems, weak, answer_key='####', only='correct', num_shots=5
  )
  assert [s.id for s in shots] == [f'p{i}' for i in order if i % 5 == 0]
  other = data.pick_demonstrations(problems, weak, answer_key='####', seed=43)
  assert {s.id for s in other} != {f'p{i}' for i in [i for i in order if i % 3][:4]}


def test_bad_demonstrations():
  problems, weak = make_problems(3), answered('0', '1', '5')
  with pytest.raises(ValueError, match=r"3 of 3 weak .* hold '####', want 4"):
    data.pick_demonstrations(problems, weak, answer_key='####')
  with pytest.raises(ValueError, match='2 of 3 weak responses are correct, want 3'):
    data.pick_demonstrations(
      problems, weak, answer_key='####', only='correct', num_shots=3
    )
  with pytest.raises(ValueError, match='num_shots is -1'):
    data.pick_demonstrations(problems, weak, answer_key='####', num_shots=-1)
  with pytest.raises(ValueError, match="filter 'best'; one of has_key, correct"):
    data.pick_demonstrations(problems, weak, answer_key='####', only='best')
  with pytest.raises(ValueError, match=r"1 problem.* no response, first 'p3'"):
    data.pick_demonstrations(make_problems(4), weak, answer_key='####')


# Responses --------------------------------------------------------------------


@pytest.mark.parametrize(
  ('text', 'stored', 'answer', 'correct'),
  [
    (' So 7.\n#### 7.\n', 'So 7.\n#### 7', '7', True),  # the dot at the end goes
    ('...#### 7', '#### 7', '7', True),
    ('#### 7 .', '#### 7 ', '7', True),  # spaces go before the dots, not after
    ('#### $7.00', '#### $7.00', '7', True),
    ('#### 7\nthat is it', '#### 7\nthat is it', '', False),
    ('####7', '####7', '', False),
    ('The answer is 6.', 'The answer is 6', '6', False),
    ('', '', '', False),
  ],
)
def test_responses_as_the_paper_stores_and_reads_them(text, stored, answer, correct):
  problems = [Problem('a', 'q', '7')]
  (response,) = data.read_greedy(
    [sample('a', text)], problems, rule=RULE, name='weak'
  ).values()
  assert response == Response(stored, answer, 0, correct)


def test_responses_come_in_the_order_of_problems_and_indices():
  problems = make_problems(5)
  samples = [
    sample(p.id, f'#### {i * j}', 2 * j)
    for i, p in enumerate(problems)
    for j in (0, 1, 2)
  ]
  read = lambda samples: data.read_responses(
    samples, problems, rule=RULE, num_samples=3
  )
  responses = read(samples)
  assert list(responses) == ['p0', 'p1', 'p2', 'p3', 'p4']
  assert [r.sample_index for r in responses['p4']] == [0, 2, 4]
  assert [r.answer for r in responses['p4']] == ['0', '4', '8']
  assert [r.correct for r in responses['p4']] == [False, True, False]
  shuffled = samples[:]
  random.Random(0).shuffle(shuffled)
  assert read(shuffled) == responses and list(read(shuffled)) == list(responses)


def test_gold_is_the_answer_else_the_solution_else_nothing_is_judged():
  problems = [
    Problem('a', 'q', '1', 's\n#### 2'),
    Problem('b', 'q', solution='s\n#### 2'),
    Problem('c', 'q'),
  ]
  samples = [sample(p.id, '#### 2') | {'correct': True} for p in problems]
  read = data.read_greedy(samples, problems, rule=RULE, name='weak')
  assert [r.correct for r in read.values()] == [False, True, None]
  assert {r.answer for r in read.values()} == {'2'}


@pytest.mark.parametrize(
  ('samples', 'message'),
  [
    (
      [sample('p0', 'x'), sample('p0', 'y'), sample('p1', '')],
      "sample 0 of problem 'p0' comes twice",
    ),
    ([sample('p0', 'x')], r"weak: 1 of 2 .* have 1 sample.* first 'p1' with 0"),
    (
      [sample('p0', 'x'), sample('p0', 'y', 1), sample('p1', '')],
      "1 of 2 .* first 'p0' with 2",
    ),
    (
      [sample(k, '') for k in ('p0', 'p1', 'p8', 'p9')],
      "2 samples belong to none of the 2 problems, first to 'p8'",
    ),
    ([sample('p0', None)], 'record 1 has .* text None'),
    ([sample(3, '')], 'record 1 has problem_id 3'),
    ([sample('p0', '', True)], 'sample_index True'),
    ([{'text': ''}], 'record 1 has problem_id None'),
  ],
)
def test_bad_samples(samples, message):
  with pytest.raises(ValueError, match=message):
    data.read_greedy(samples, make_problems(2), rule=RULE, name='weak')


def test_bad_golds_and_numbers():
  with pytest.raises(ValueError, match="problem 'a': gold ' ' holds no answer"):
    data.read_greedy([sample('a', '')], [Problem('a', 'q', ' ')], rule=RULE, name='w')
  with pytest.raises(ValueError, match='num_samples is 0'):
    data.read_responses([], [], rule=RULE, num_samples=0)


# Stage I ----------------------------------------------------------------------


def test_consistency_by_hand():
  problems = make_problems(7)
  #                0    1    2    3     4     5     6
  weak = answered('0', '1', '7', '', '4', '5', '')
  icl = answered('0', '9', '7', '3', '', '5.0', '')
  selection = stage1.select_consistent(problems, weak, icl)
  assert selection.kept == ('p0', 'p2')  # 7 is wrong and agreed; 5.0 is another string
  assert selection.padding == ()
  assert selection.statistics == {
    'num_questions': 7,
    'num_weak_unanswered': 2,
    'num_disagreeing': 3,
    'num_kept': 2,
    'num_padding': 0,
    'num_textless': 0,
    'weak_accuracy': 4 / 7,
    'icl_accuracy': 2 / 7,
    'kept_correct_share': 1 / 7,
    'precision': 1 / 2,
    'padding_precision': {'weak': None, 'icl': None},
  }


def test_latex_equivalence_keeps_more():
  problems = make_problems(3)
  weak = answered('0.5', '2', '')
  icl = answered(r'\frac{1}{2}', '3', '')
  kept = lambda equivalence: (
    stage1.select_consistent(problems, weak, icl, equivalence=equivalence).kept
  )
  assert kept('string') == ()
  assert kept('latex') == ('p0',)


def test_sets_by_hand():
  problems = make_problems(4)
  weak = {f'p{i}': Response(f'w{i} #### {i}', str(i)) for i in range(4)}
  icl = {f'p{i}': Response(f'm{i} #### {i % 3}', str(i % 3)) for i in range(4)}
  icl['p1'] = weak['p1']  # equal texts are kept twice
  selection = stage1.select_consistent(problems, weak, icl)
  assert 'precision' not in selection.statistics  # nothing was judged
  sets = stage1.build_sft_sets(problems, selection, weak, icl)
  texts = {name: [r['completion'] for r in records] for name, records in sets.items()}
  assert texts == {
    'weak': [' w0 #### 0', ' w1 #### 1', ' w2 #### 2'],
    'icl': [' m0 #### 0', ' w1 #### 1', ' m2 #### 2'],
    'hybrid': [
      *(' w0 #### 0', ' m0 #### 0', ' w1 #### 1'),
      *(' w1 #### 1', ' w2 #### 2', ' m2 #### 2'),
    ],
  }
  assert sets['hybrid'][1] == {
    'prompt': 'Question: How many is 0?\nAnswer:',
    'completion': ' m0 #### 0',
    'problem_id': 'p0',
    'origin': 'icl',
    'consistent': True,
  }
  parse_sft(sets['hybrid'][1], where='here')


def disagreeing(num, num_kept, textless=()):
  """Responses of which the first `num_kept` agree; some of the others are empty."""
  weak = answered(*map(str, range(num)))
  icl = answered(*(str(i if i < num_kept else i + 100) for i in range(num)))
  for place in textless:
    icl[f'p{place}'] = Response('', '', 0, False)
  return weak, icl


def test_padding_follows_the_consistent_block_and_depends_on_no_order():
  problems = make_problems(30)
  weak, icl = disagreeing(30, 8, textless=[9, 10])
  select = lambda problems, **kwargs: stage1.select_consistent(
    problems, weak, icl, **kwargs
  )
  selection = select(problems, pad_to=19)
  assert selection.kept == tuple(f'p{i}' for i in range(8))
  assert len(set(selection.padding)) == 11
  assert not set(selection.padding) & {*selection.kept, 'p9', 'p10'}
  assert selection.statistics['num_padding'] == 11
  assert selection.statistics['num_textless'] == 2
  assert selection.statistics['padding_precision'] == {'weak': 1.0, 'icl': 0.0}
  shuffled = problems[:]
  random.Random(1).shuffle(shuffled)
  again = select(shuffled, pad_to=19)
  assert set(again.padding) == set(selection.padding)
  assert again.statistics == selection.statistics
  assert set(select(problems, pad_to=19, pad_seed=1).padding) != set(selection.padding)
  # More padding adds to what there is.
  assert set(selection.padding) < set(select(problems, pad_to=20).padding)
  sets = stage1.build_sft_sets(problems, selection, weak, icl)
  assert [len(sets[name]) for name in stage1.SETS] == [19, 19, 38]
  flags = [record['consistent'] for record in sets['hybrid']]
  assert flags == [True] * 16 + [False] * 22
  assert [r['origin'] for r in sets['hybrid']] == ['weak', 'icl'] * 19


def test_padding_bounds():
  problems = make_problems(9)
  weak, icl = disagreeing(9, 4, textless=[6])
  select = lambda pad_to: stage1.select_consistent(problems, weak, icl, pad_to=pad_to)
  assert select(3).padding == select(4).padding == ()
  assert select(8).padding == ('p4', 'p5', 'p7', 'p8')
  with pytest.raises(ValueError, match=r'pad_to=9, but 4 .* 4 others .* at most 8'):
    select(9)


def test_every_inconsistent_question_is_as_likely_to_pad():
  problems = make_problems(6)
  weak, icl = disagreeing(6, 1)
  counts = dict.fromkeys([p.id for p in problems[1:]], 0)
  for seed in range(2000):
    selection = stage1.select_consistent(problems, weak, icl, pad_to=3, pad_seed=seed)
    for key in selection.padding:
      counts[key] += 1
  # 2 of 5 each; the standard deviation of a count is 22.
  assert all(abs(count - 800) < 110 for count in counts.values()), counts


@pytest.mark.parametrize('seed', range(8))
def test_counts_add_up(seed):
  rng = random.Random(seed)
  num = rng.randrange(20, 50)
  problems = make_problems(num)
  draw = lambda: answered(*(rng.choice([str(i), 'x', '']) for i in range(num)))
  weak, icl = draw(), draw()
  selection = stage1.select_consistent(problems, weak, icl, pad_to=num)
  stats = selection.statistics
  assert (
    stats['num_questions']
    == num
    == (stats['num_weak_unanswered'] + stats['num_disagreeing'] + stats['num_kept'])
  )
  assert len(selection.kept) == stats['num_kept']
  assert set(selection.kept) | set(selection.padding) == {p.id for p in problems}
  for key in selection.kept:
    assert weak[key].answer == icl[key].answer != ''


def test_full_weak_keeps_wrong_answers_and_counts_empty_texts():
  problems = make_problems(4)
  weak = answered('0', '9', '', '3') | {'p3': Response('', '', 0, False)}
  records, statistics = stage1.build_full_weak(problems, weak)
  assert [r['problem_id'] for r in records] == ['p0', 'p1', 'p2']
  assert {r['origin'] for r in records} == {'weak'}
  assert statistics == {'num_questions': 4, 'num_records': 3, 'num_textless': 1}


def test_bad_stage_one():
  problems, weak = make_problems(2), answered('0', '1')
  with pytest.raises(ValueError, match="equivalence 'sympy'; one of string, latex"):
    stage1.select_consistent(problems, weak, weak, equivalence='sympy')
  with pytest.raises(ValueError, match=r"in-context .* 1 problem.* first 'p1'"):
    stage1.select_consistent(problems, weak, {'p0': weak['p0']})
  with pytest.raises(ValueError, match=r'weak responses: 2 problem'):
    stage1.build_full_weak(problems, {})


def test_rounds():
  first, second, third = stage1.plan_rounds(3)
  assert first == stage1.Round(1, weak='weak', icl='strong', num_shots=4)
  assert second == stage1.Round(2, weak='weak-ft-1', icl='icl-ft-1', num_shots=0)
  assert (third.weak, third.icl) == ('weak-ft-2', 'icl-ft-2')
  assert third.trained['hybrid'] == 'hybrid-ft-3'
  assert stage1.plan_rounds(1) == [first]
  with pytest.raises(ValueError, match='num_rounds=0'):
    stage1.plan_rounds(0)


# Measures ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ('floor', 'ceiling', 'students', 'recovered'),
  [  # the paper's accuracies: full weak, M_plus, ORPO (and DPO)
    (33.81, 71.95, (42.38, 62.62, 68.16), (22.5, 75.5, 90.1)),
    (25.17, 71.95, (29.04, 56.03, 63.91, 64.52), (8.3, 66.0, 82.8, 84.1)),
    (59.51, 71.95, (61.33, 68.39, 72.18), (14.6, 71.4, 101.8)),
    (4.40, 17.80, (5.80, 14.00, 15.0), (10.4, 71.6, 79.1)),
    (11.60, 17.80, (10.00, 14.20, 16.0), (-25.8, 41.9, 71.0)),
    (13.60, 17.80, (14.40, 14.80, 17.0), (19.0, 28.6, 81.0)),
  ],
)
def test_performance_gap_recovered(floor, ceiling, students, recovered):
  for student, percent in zip(students, recovered, strict=True):
    share = stage1.performance_gap_recovered(student, floor=floor, ceiling=ceiling)
    assert round(100 * share, 1) == percent


@pytest.mark.parametrize('ceiling', [0.5, 0.4, float('nan')])
def test_no_gap_to_recover(ceiling):
  with pytest.raises(ValueError, match='no gap to recover'):
    stage1.performance_gap_recovered(0.5, floor=0.5, ceiling=ceiling)


def test_any_correct_looks_at_the_first_k():
  flags = {'a': [0, 0, 1], 'b': [0, 1, 0], 'c': [0, 0, 0], 'd': [1, 1, 1]}
  responses = {
    key: [Response('', '', i, bool(flag)) for i, flag in enumerate(row)]
    for key, row in flags.items()
  }
  assert [stage1.any_correct(responses, k) for k in (1, 2, 3)] == [0.25, 0.5, 0.75]
  for k in (0, 4):
    with pytest.raises(ValueError, match=f'pass@{k} needs 1 <= k <= .* 3'):
      stage1.any_correct(responses, k)
  with pytest.raises(ValueError, match='needs 1 <= k <= the fewest samples, 0'):
    stage1.any_correct({}, 1)
  with pytest.raises(ValueError, match='problems with answers'):
    stage1.any_correct({'a': [Response('', '')]}, 1)


def test_agreement_is_more_precise_than_either_model(shared):
  """On OpenAI's published solutions of the GSM8K test by models of two sizes."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  rows = list(read_jsonl(path))
  problems = [
    Problem(str(i), row['question'], row['ground_truth'].rpartition('A: ')[2])
    for i, row in enumerate(rows)
  ]
  right = {
    '6b_finetuning': 286,
    '6b_verification': 515,
    '175b_finetuning': 458,
    '175b_verification': 742,
  }
  responses = {}
  for model, num_correct in right.items():
    samples = [sample(str(i), row[model]['solution']) for i, row in enumerate(rows)]
    responses[model] = data.read_greedy(
      reversed(samples), problems, rule=w2s_rule('w2s', 'A:'), name=model
    )
    flags = [response.correct for response in responses[model].values()]
    assert flags == [row[model]['is_correct'] for row in rows]
    assert sum(flags) == num_correct
  weak, icl = responses['6b_finetuning'], responses['175b_finetuning']
  selection = stage1.select_consistent(problems, weak, icl)
  stats = selection.statistics
  assert stats['weak_accuracy'] == 286 / 1319 and stats['icl_accuracy'] == 458 / 1319
  assert stats['precision'] > 2 * stats['icl_accuracy']
  assert stats['kept_correct_share'] * 1319 == pytest.approx(
    stats['precision'] * stats['num_kept']
  )


# Released files ---------------------------------------------------------------


def test_released_sets_round_trip():
  released = {'id': 12, 'content': 'Question: q\nAnswer:', 'output': ' a\n#### 1'}
  record = release.from_released_sft(released)
  assert record == {
    'prompt': 'Question: q\nAnswer:',
    'completion': '  a\n#### 1',
    'problem_id': '12',
  }
  assert release.to_released_sft(record) == released
  pair = {
    'id': 'Math_3173',
    'instruction': 'Question: q\nAnswer:',
    'input': '',
    'output': ['yes', ''],
  }
  record = release.from_released_pair(pair)
  assert record == {
    'prompt': 'Question: q\nAnswer:',
    'chosen': ' yes',
    'rejected': ' ',
    'problem_id': 'Math_3173',
  }
  assert release.to_released_pair(record) == pair
  assert release.to_released_sft(
    {'prompt': 'p', 'completion': ' c', 'problem_id': '007'}
  ) == {'id': '007', 'content': 'p', 'output': 'c'}


def test_our_records_in_the_released_form():
  record = data.sft_record(Problem('gsm8k-train-5', 'Why?'), 'So.\n#### 3')
  assert release.to_released_sft(record) == {
    'id': 'gsm8k-train-5',
    'content': 'Question: Why?\nAnswer:',
    'output': 'So.\n#### 3',
  }


@pytest.mark.parametrize(
  ('convert', 'record', 'message'),
  [
    ('from_released_sft', {'id': 1, 'content': 'c'}, "'output' is None"),
    ('from_released_sft', {'content': 'c', 'output': 'o'}, "'id' is None"),
    ('from_released_sft', {'id': True, 'content': 'c', 'output': 'o'}, "'id' is True"),
    ('from_released_pair', {'instruction': 'c', 'output': ['a']}, 'two strings'),
    ('from_released_pair', {'instruction': 'c', 'output': 'ab'}, 'two strings'),
    (
      'from_released_pair',
      {'id': 1, 'instruction': 'c', 'input': 'x', 'output': ['a', 'b']},
      "'input' is 'x'",
    ),
    ('from_released_pair', {'id': 1, 'output': ['a', 'b']}, "'instruction' is None"),
    (
      'to_released_sft',
      {'prompt': 'p', 'completion': 'c', 'problem_id': 'a'},
      'does not start with a space',
    ),
    ('to_released_sft', {'prompt': 'p', 'completion': ' c'}, "'problem_id' is None"),
  ],
)
def test_bad_released_records(convert, record, message):
  with pytest.raises(ValueError, match=message):
    getattr(release, convert)(record)
