"""MuggleMath: what is asked, what is read from the answers, what is kept; counts."""

import random

import pytest

from mrjax.grading.rules import get_rule
from mrjax.methods import mugglemath, mugglemath_prompts, mugglemath_responses
from mrjax.methods.mugglemath_prompts import QUERY_TYPES
from mrjax.records import Problem

TYPES = tuple(QUERY_TYPES)
LIST = """Here are five new questions:

1. **Change specific numbers**: Tom has 7 pears. How many are left?
2. **Introduce fractions or percentages**: Tom eats 1/2 of 8 pears. How many are left?

3. **Combine multiple concepts:** Tom buys pears at $2. What is his speed?
4. **Include a conditional statement** : If Tom has 3 pears, how many?
5. **Increase the complexity**: Tom has 3 pears: 2 are green. How many are not?

I hope these help!"""
QUESTIONS = {
  'numbers': 'Tom has 7 pears. How many are left?',
  'fractions': 'Tom eats 1/2 of 8 pears. How many are left?',
  'concepts': 'Tom buys pears at $2. What is his speed?',
  'condition': 'If Tom has 3 pears, how many?',
  'complexity': 'Tom has 3 pears: 2 are green. How many are not?',
}
OLD = Problem('p-0', 'Tom has 5 pears. How many are left?', answer='5', source='gsm8k')


def questions(parsed):
  return {name: question for name, (question, _) in parsed.queries.items()}


# What is asked ----------------------------------------------------------------


def test_the_request_shows_an_example_of_every_type_that_the_parser_reads():
  *shown, asked = mugglemath_prompts.query_messages('How many?')
  assert [m['role'] for m in shown] == ['system', 'user', 'assistant']
  assert asked == {'role': 'user', 'content': 'How many?'}
  assert all(kind.label in shown[0]['content'] for kind in QUERY_TYPES.values())
  parsed = mugglemath.parse_queries(shown[2]['content'])
  assert questions(parsed) == {n: kind.example for n, kind in QUERY_TYPES.items()}
  assert (parsed.dropped, parsed.num_extra) == ({}, 0)


def test_some_types_alone():
  types = ('complexity', 'numbers')
  system, _, example, _ = mugglemath_prompts.query_messages('Q', types=types)
  assert 'write 2 new' in system['content']
  assert 'fractions' not in system['content'] + example['content']
  parsed = mugglemath.parse_queries(example['content'], types=types)
  assert list(parsed.queries) == ['complexity', 'numbers']
  assert questions(parsed)['numbers'] == QUERY_TYPES['numbers'].example


def test_the_math_request_shows_the_form_that_the_parser_reads():
  system, asked = mugglemath_prompts.math_query_messages('What is {x}?')
  assert asked['content'] == 'What is {x}?'
  assert 'write 5 new problems' in system['content']
  parsed = mugglemath.parse_math_queries(system['content'])
  assert list(parsed.queries) == ['numbers']
  assert parsed.queries['numbers'][1].endswith(r'\boxed{9}$.')


@pytest.mark.parametrize('types', [(), ('numbers', 'numbers'), ('numbers', 'colour')])
def test_bad_types(types):
  for function in (
    mugglemath_prompts.query_messages,
    mugglemath_prompts.math_query_messages,
    mugglemath.parse_queries,
    mugglemath.parse_math_queries,
  ):
    with pytest.raises(ValueError, match='want one or more of numbers, fractions'):
      function('text', types=types)


# What is read -----------------------------------------------------------------


def test_the_rest_of_the_line_is_the_question():
  parsed = mugglemath.parse_queries(LIST)
  assert questions(parsed) == QUESTIONS
  assert (parsed.dropped, parsed.num_extra) == ({}, 0)


@pytest.mark.parametrize(
  ('old', 'new', 'reason'),
  [
    ('4. **', '4) **', 'missing'),
    ('4. **', '4. ', 'missing'),
    ('statement** :', 'statement**', 'missing'),
    ('If Tom has 3 pears, how many?', '', 'empty'),
    ('Include a conditional statement', 'increase  the complexity', 'wrong_label'),
    ('Include a conditional statement', 'Add a condition', None),
    ('3 pears, how many?', '3 pears,\nhow many?', 'continued'),
  ],
)
def test_malformed_items(old, new, reason):
  text = LIST.replace(old, new)
  assert text != LIST
  parsed = mugglemath.parse_queries(text)
  assert parsed.dropped == ({'condition': reason} if reason else {})
  left = {n: q for n, q in QUESTIONS.items() if n != 'condition' or not reason}
  assert questions(parsed) == left


def test_a_response_cut_short_loses_its_last_item():
  head = LIST[: LIST.index(' green')]
  assert 'complexity' in mugglemath.parse_queries(head).queries
  parsed = mugglemath.parse_queries(head, cut=True)
  assert parsed.dropped == {'complexity': 'cut'}
  assert len(parsed.queries) == 4


def test_items_of_no_type_and_of_one_that_came():
  more = '\n'.join([LIST, '6. **More**: x?', '0. **None**: y?', '1. **Again**: z?'])
  more += '\n' + '9' * 5000 + '. **Many digits**: v?'
  parsed = mugglemath.parse_queries(more)
  assert questions(parsed) == QUESTIONS
  assert parsed.num_extra == 4


def test_no_list_at_all():
  parsed = mugglemath.parse_queries('I cannot help with that.')
  assert parsed == ({}, dict.fromkeys(TYPES, 'missing'), 0)


def item(number, question, solution, *, end=None):
  end = number if end is None else end
  return (
    f'[Problem {number}: Some way]\n{question}\n[Solution {number}]\n{solution}\n'
    f'[End {end}]\n'
  )


def test_math_items():
  text = 'Of course.\n' + ''.join(
    [
      item(1, 'What is $2+2$?\nThink.', 'It is\n\\boxed{4}.'),
      item(2, 'What is $3+3$?', 'It is six.'),
      item(3, 'What is $4+4$?', r'\boxed{8}', end=4),
      item(5, ' ', r'\boxed{8}'),
    ]
  )
  parsed = mugglemath.parse_math_queries(text)
  assert parsed.queries == {'numbers': ('What is $2+2$?\nThink.', 'It is\n\\boxed{4}.')}
  assert parsed.dropped == {
    'fractions': 'no_box',
    'concepts': 'unended',
    'condition': 'missing',
    'complexity': 'empty',
  }


def test_math_items_without_solution_and_cut_short():
  text = '[Problem 1]\nWhat?\n[End 1]\n[Problem 2]\nWhat?\n[Solution 2]\n\\boxed{'
  parsed = mugglemath.parse_math_queries(text, cut=True)
  assert parsed.queries == {}
  assert parsed.dropped['numbers'] == 'no_solution'
  assert parsed.dropped['fractions'] == 'unended'
  twice = item(1, 'A?', r'\boxed{1}') + item(1, 'B?', r'\boxed{2}')
  parsed = mugglemath.parse_math_queries(twice + item(6, 'C?', r'\boxed{3}'))
  assert questions(parsed) == {'numbers': 'A?'} and parsed.num_extra == 2


# New problems -----------------------------------------------------------------


def sample(text, *, problem_id='p-0', index=0, reason='stop'):
  return {
    'problem_id': problem_id,
    'sample_index': index,
    'text': text,
    'finish_reason': reason,
  }


def test_new_problems_and_their_ids():
  new, counts = mugglemath.augment_queries(
    [OLD], [sample(LIST, index=3)], query_set='D1'
  )
  assert [problem.id for problem in new] == [f'p-0-D1-3-{name}' for name in TYPES]
  assert [problem.question for problem in new] == list(QUESTIONS.values())
  assert {problem.answer for problem in new} == {None}
  assert new[4].source == 'gsm8k/complexity'
  assert counts == {
    'num_problems': 1,
    'num_without_samples': 0,
    'num_samples': 1,
    'num_queries': 5,
    'by_type': dict.fromkeys(TYPES, 1),
    'num_extra': 0,
    'dropped': {},
  }


def test_repeated_questions_are_dropped():
  other = Problem('p-1', 'If tom has 3 pears,  how many?')
  text = LIST.replace(QUESTIONS['numbers'], OLD.question.upper())
  new, counts = mugglemath.augment_queries(
    [OLD, other],
    [sample(LIST, problem_id='p-1', index=1), sample(text)],
    query_set='D2',
  )
  # p-0 first: its numbers repeat an old question, its condition one of another problem.
  assert [problem.id.rpartition('-')[2] for problem in new] == [
    'fractions',
    'concepts',
    'complexity',
    'numbers',
  ]
  assert new[3].id == 'p-1-D2-1-numbers'
  assert counts['dropped'] == {'as_old': 3, 'repeated': 3}


def test_math_problems_have_answers():
  text = item(2, 'What is $2+2$?', r'It is \boxed{4}.')
  (new,), counts = mugglemath.augment_queries(
    [Problem('m', 'Old?')], [sample(text, problem_id='m')], query_set='M', math=True
  )
  assert new == Problem(
    'm-M-0-fractions',
    'What is $2+2$?',
    answer='4',
    solution=r'It is \boxed{4}.',
    source='mugglemath/fractions',
  )
  assert counts['dropped'] == {'missing': 4}


@pytest.mark.parametrize('seed', range(10))
def test_every_type_of_every_sample_is_kept_or_counted_in_any_order(seed):
  rng = random.Random(seed)
  problems = [Problem(f'p-{i}', f'Old {i}?') for i in range(4)]
  samples = []
  for problem in problems[:3]:
    for index in range(rng.randrange(4)):
      lines = [
        f'{rng.randrange(8)}. **{rng.choice(["A", "Increase the complexity"])}**: '
        + rng.choice(['', 'Old 1?', f'New {rng.randrange(30)}?'])
        for _ in range(rng.randrange(9))
      ]
      reason = rng.choice(['stop', 'length'])
      text = '\n'.join(lines)
      samples.append(sample(text, problem_id=problem.id, index=index, reason=reason))
  new, counts = mugglemath.augment_queries(problems, samples, query_set='D')
  rng.shuffle(samples)
  assert (new, counts) == mugglemath.augment_queries(problems, samples, query_set='D')
  slots = counts['num_queries'] + sum(counts['dropped'].values())
  assert slots == 5 * len(samples) == 5 * counts['num_samples']
  assert len({p.id for p in new}) == len({p.question for p in new}) == len(new)
  assert sum(counts['by_type'].values()) == len(new) == counts['num_queries']
  assert counts['num_without_samples'] >= 1


def test_bad_samples():
  with pytest.raises(ValueError, match="problem_id 'q', which is not among the 1"):
    mugglemath.augment_queries([OLD], [sample('', problem_id='q')], query_set='D')
  row = sample('')
  with pytest.raises(ValueError, match="sample 0 of problem 'p-0' comes twice"):
    mugglemath.augment_queries([OLD], [row, row], query_set='D')


# Responses --------------------------------------------------------------------

POOL = [Problem(f'p-{i}', f'Q{i}?', solution=f'S{i}\n#### {i}') for i in range(6)]


def shot_ids(problem_id, n=3, **changes):
  arguments = {'seed': 0, 'problem_id': problem_id} | changes
  return [p.id for p in mugglemath_responses.choose_shots(POOL, n, **arguments)]


def test_shots_are_others_and_depend_on_seed_problem_and_sample():
  for problem in POOL:
    found = shot_ids(problem.id, 5)
    assert sorted([*found, problem.id]) == [p.id for p in POOL]
  assert shot_ids('new') == shot_ids('new')
  draws = {tuple(shot_ids('new', sample_index=i)) for i in range(20)}
  assert len(draws) > 5
  assert len({tuple(shot_ids('new', seed=i)) for i in range(20)}) > 5
  assert len({tuple(shot_ids(f'new{i}')) for i in range(20)}) > 5
  assert shot_ids('new', 0) == []


def test_bad_shots():
  with pytest.raises(ValueError, match='num_shots=6 of a pool of 6'):
    shot_ids('new', 6)
  with pytest.raises(ValueError, match="'b' has no solution"):
    mugglemath_responses.choose_shots(
      [Problem('a', 'A?'), Problem('b', 'B?')], 1, seed=0, problem_id='a'
    )


def test_response_messages_and_prompt():
  messages = mugglemath_responses.response_messages(OLD, POOL[:2])
  assert [m['role'] for m in messages] == ['system', *['user', 'assistant'] * 2, 'user']
  assert [m['content'] for m in messages[1:]] == [
    'Q0?',
    'S0\n#### 0',
    'Q1?',
    'S1\n#### 1',
    OLD.question,
  ]
  assert '####' in messages[0]['content']
  math = mugglemath_responses.response_messages(OLD, form='math')
  assert r'\boxed{}' in math[0]['content'] and len(math) == 2
  with pytest.raises(ValueError, match="unknown form 'aqua'; one of gsm8k, math"):
    mugglemath_responses.response_messages(OLD, form='aqua')
  prompt = mugglemath_responses.response_prompt(OLD, POOL[:1])
  assert prompt.text == (
    'Question: Q0?\nAnswer: S0\n#### 0\n\n'
    'Question: Tom has 5 pears. How many are left?\nAnswer:'
  )
  with pytest.raises(ValueError, match='take response_messages'):
    mugglemath_responses.response_prompt(OLD, template='chat')


RESPONSES = [
  sample('a <<1+1=2>> #### 2', index=4),
  sample('b <<1+1=3>> #### 2.0', index=0),
  sample('c #### 3', index=1),
  sample('c #### 2', index=2, reason='length'),
  sample('', index=3),
  sample('d The answer is 2', index=5),
  sample(' a <<1+1=2>> #### 2\n', index=6),
  sample('e #### 2', index=7, reason='error'),
  sample('f #### 2', index=8),
]


@pytest.mark.parametrize(
  ('options', 'kept', 'dropped'),
  [
    ({}, [0, 1, 4, 8], {'repeated': 1}),
    ({'calculator_check': True}, [1, 4, 8], {'repeated': 1, 'false_annotation': 1}),
    # 0, 4, 6 and 8 agree: 4 of 5.
    ({'vote_share': 0.5}, [0, 4, 8], {'repeated': 1, 'minority': 1}),
    ({'vote_share': 0.8}, [], {'no_majority': 5}),
    ({'max_responses': 2}, [0, 1], {'repeated': 0, 'surplus': 3}),
    ({'max_responses': 3}, [0, 1, 4], {'repeated': 1, 'surplus': 1}),
  ],
)
def test_responses_that_stay(options, kept, dropped):
  malformed = {'error': 1, 'cut': 1, 'empty': 1, 'no_answer': 1}
  found, counts = mugglemath_responses.filter_responses(
    RESPONSES, rule=get_rule('gsm8k'), **options
  )
  assert [row['sample_index'] for row in found] == kept
  assert counts == malformed | {k: n for k, n in dropped.items() if n}
  assert len(kept) + sum(counts.values()) == len(RESPONSES)


def test_half_the_votes_are_no_majority():
  rows = [sample('a #### 1', index=0), sample('b #### 2', index=1)]
  rule = get_rule('gsm8k')
  kept, counts = mugglemath_responses.filter_responses(rows, rule=rule, vote_share=0.5)
  assert (kept, counts) == ([], {'no_majority': 2})
  kept, counts = mugglemath_responses.filter_responses([], rule=rule, vote_share=0.5)
  assert (kept, counts) == ([], {})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'vote_share': 0.4}, 'vote_share=0.4; want 0.5 <= share < 1'),
    ({'vote_share': 1}, 'vote_share=1; want'),
    ({'max_responses': 0}, 'max_responses=0; want at least 1'),
  ],
)
def test_bad_filters(options, message):
  with pytest.raises(ValueError, match=message):
    mugglemath_responses.filter_responses([], rule=get_rule('gsm8k'), **options)
  row = sample('x #### 1')
  with pytest.raises(ValueError, match="problem 'p-0' comes twice"):
    mugglemath_responses.filter_responses([row, row], rule=get_rule('gsm8k'))


def test_response_records():
  new = Problem('p-0-D1-0-numbers', 'How many?')
  rows = [sample(' 2 pears.\n#### 2\n', index=5)]
  (record,) = mugglemath_responses.response_records(new, rows)
  assert record['prompt'].endswith('### Instruction:\nHow many?\n\n### Response:')
  assert record | {'prompt': ''} == {
    'prompt': '',
    'completion': '2 pears.\n#### 2',
    'problem_id': 'p-0-D1-0-numbers',
    'sample_index': 5,
  }
