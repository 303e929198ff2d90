"""LEMA's data mixes, evolution and analysis."""

import math

import pytest

from mrjax.data.prompts import render_prompt
from mrjax.methods import lema_analysis as analysis
from mrjax.methods import lema_evolution as evolution
from mrjax.methods.lema import WrongPath
from mrjax.methods.lema_corrections import Correction, Rejected
from mrjax.methods.lema_mixes import CotStyle, build_mix, cot_records
from mrjax.methods.lema_pairs import Pair
from mrjax.records import Problem

PROBLEMS = [
  Problem(
    id=str(i),
    question=f'How many are {i} and {i}?',
    answer=str(2 * i),
    solution=f'They are\n{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}',
  )
  for i in range(1, 12)
]
PAIRS = [
  Pair(
    WrongPath(p, 'gsm8k', ('They are', 'many.', 'The answer is 0.'), sample_index=k),
    Correction(
      2, 'Count.', (f'{p.id}+{p.id}={p.answer}', f'The answer is {p.answer}.')
    ),
  )
  for p, k in [(PROBLEMS[0], 0), (PROBLEMS[0], 1), (PROBLEMS[4], 0), (PROBLEMS[7], 3)]
]


def num_words(record):
  return len(record['completion'].split())


def test_cot_records():
  problems = [
    *PROBLEMS[:3],
    Problem(id='n', question='q', answer='1'),
    Problem(id='w', question='q', answer='1', solution='So\n#### 2'),
  ]
  samples = [
    {'problem_id': '2', 'sample_index': 0, 'text': '2+2\n#### 4'},
    {'problem_id': '2', 'sample_index': 1, 'text': '2+2\n#### 4'},
    {'problem_id': '2', 'sample_index': 2, 'text': '2+2\n#### 5'},
    {'problem_id': '2', 'sample_index': 3, 'text': '2+2 is'},
    {'problem_id': '3', 'sample_index': 4, 'text': 'so six', 'extracted': '6'},
  ]
  records, counts = cot_records(problems, samples, task='gsm8k')
  assert counts == {
    'problems': 5,
    'human': 3,
    'without_solution': 1,
    'wrong_reference': 1,
    'samples': 5,
    'sampled': 2,
    'wrong': 1,
    'unanswered': 1,
    'unusable_reference': 0,
    'duplicate': 1,
  }
  assert len(records) == 5
  assert records[1] == {
    'prompt': render_prompt('lema', PROBLEMS[1]).text,
    'completion': 'They are 2+2=4 The answer is 4.',
    'problem_id': '2',
    'sample_index': -1,
    'kind': 'cot',
  }
  assert [r['sample_index'] for r in records] == [-1, -1, -1, 0, 4]
  assert records[4]['completion'] == 'so six The answer is 6.'
  style = CotStyle(keep_annotations=True, one_line=False)
  records, _ = cot_records(problems[:1], task='gsm8k', style=style)
  assert records[0]['completion'] == 'They are\n1+1=<<1+1=2>>2\nThe answer is 2.'
  only, counts = cot_records(problems, samples, task='gsm8k', include_human=False)
  assert (len(only), counts['problems']) == (2, 0)
  with pytest.raises(ValueError, match="problem '9'"):
    cot_records(problems, [{'problem_id': '9', 'text': ''}], task='gsm8k')


COT = cot_records(PROBLEMS, task='gsm8k')[0]


def test_plain_mixes():
  records, counts = build_mix(COT, PAIRS)
  assert records[:11] == COT
  assert [r['kind'] for r in records[11:]] == ['correction'] * 4
  assert [(r['problem_id'], r['sample_index']) for r in records[11:]] == [
    ('1', 0),
    ('1', 1),
    ('5', 0),
    ('8', 3),
  ]
  assert all(r['completion'].startswith(' Step 2.\n') for r in records[11:])
  assert counts == {
    'records': 15,
    'cot_left_out': 0,
    'cot': 11,
    'correction': 4,
    'corrected': 0,
  }
  assert build_mix(COT, PAIRS, mode='cot-only')[0] == COT
  records, counts = build_mix(COT, PAIRS, mode='cot-plus-corrected')
  assert (counts['records'], counts['corrected'], counts['correction']) == (15, 4, 0)
  assert records[13]['completion'] == 'They are 5+5=10 The answer is 10.'
  assert records[13]['prompt'] == render_prompt('lema', PROBLEMS[4]).text


def test_ablated_mix():
  records, _ = build_mix(COT, PAIRS, ablate='solution')
  assert records[-1]['completion'] == ' Step 2.\nExplanation: Count.'


def test_matched_size():
  records, counts = build_mix(COT, PAIRS, mode='matched-size', seed=3)
  assert (len(records), counts['cot'], counts['correction']) == (11, 7, 4)
  assert counts['cot_left_out'] == 4
  kept = [r for r in records if r['kind'] == 'cot']
  turned, _ = build_mix(COT[::-1], PAIRS, mode='matched-size', seed=3)
  assert [r for r in turned if r['kind'] == 'cot'] == kept[::-1]  # not by order
  other, _ = build_mix(COT, PAIRS, mode='matched-size', seed=4)
  assert other != records
  with pytest.raises(ValueError, match='1 more corrections than CoT'):
    build_mix(COT[:3], PAIRS, mode='matched-size')


def test_matched_tokens():
  lema = sum(map(num_words, build_mix(COT, PAIRS)[0]))
  extra = [
    dict(record, completion='more ' + record['completion'], sample_index=k)
    for k in range(5)
    for record in COT
  ]
  records, counts = build_mix(
    COT, PAIRS, mode='matched-tokens', extra_cot=extra, count_tokens=num_words
  )
  assert counts['target_tokens'] == lema
  assert counts['tokens'] == sum(map(num_words, records))
  longest = max(map(num_words, extra))
  assert lema - longest < counts['tokens'] <= lema
  assert all(record in records for record in COT)
  assert counts['cot'] == counts['records'] > len(COT)
  assert counts['cot_left_out'] == 66 - len(records)
  few, counts = build_mix(
    COT, PAIRS, mode='matched-tokens', count_tokens=num_words, target_tokens=20
  )
  assert counts['tokens'] <= 20 < counts['tokens'] + num_words(COT[0])
  assert all(record in COT for record in few)
  with pytest.raises(ValueError, match=f'wants {lema} tokens of CoT'):
    build_mix(COT, PAIRS, mode='matched-tokens', count_tokens=num_words)
  with pytest.raises(ValueError, match='count_tokens'):
    build_mix(COT, PAIRS, mode='matched-tokens')
  with pytest.raises(ValueError, match="unknown mode 'all'"):
    build_mix(COT, PAIRS, mode='all')


def test_seeds_come_from_corrections():
  seeds = evolution.draw_seeds(PROBLEMS, PAIRS, n=4)
  # As many as there are pairs: each once, so the question with two pairs twice.
  assert sorted(seed.problem.id for seed in seeds) == ['1', '1', '5', '8']
  assert len({seed.id for seed in seeds}) == 4
  again = evolution.draw_seeds(PROBLEMS[::-1], PAIRS[::-1], n=4)
  assert [seed.id for seed in again] == [seed.id for seed in seeds]
  more = evolution.draw_seeds(PROBLEMS, PAIRS, n=10)
  assert more[:4] == seeds
  counts = {key: sum(s.problem.id == key for s in more) for key in '158'}
  assert 4 <= counts['1'] <= 6
  assert len({seed.id for seed in more}) == 10
  everything = evolution.draw_seeds(PROBLEMS, PAIRS, seeds='all', n=11)
  assert {s.problem.id for s in everything} == {p.id for p in PROBLEMS}
  for bad in ({'seeds': 'some'}, {'n': 0}):
    with pytest.raises(ValueError, match=next(iter(bad))):
      evolution.draw_seeds(PROBLEMS, PAIRS, **bad)
  with pytest.raises(ValueError, match='nothing to draw'):
    evolution.draw_seeds(PROBLEMS, [])


@pytest.mark.parametrize(
  ('text', 'question'),
  [
    ('What is 2+3?\n', 'What is 2+3?'),
    ('#Created Question#: What is 2+3?', 'What is 2+3?'),
    ('# created question #\nA\nB?\n\n#Given Question#:\nx', 'A\nB?'),
    ('#Given Question#: x\n#Created Question#: y?\n#Created Question#: z', 'y?'),
  ],
)
def test_created_questions(text, question):
  assert evolution.parse_created(text, given='x') == question


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('', 'no_question'),
    ('#Created Question#:\n', 'no_question'),
    ('#Given Question#: y', 'no_question'),
    ('what  IS x?', 'unchanged'),
  ],
)
def test_questions_not_created(text, reason):
  with pytest.raises(Rejected) as error:
    evolution.parse_created(text, given='What is x?')
  assert error.value.reason == reason


def test_rewriting_and_voting():
  prompt = evolution.rewrite_prompt('What is x?')
  assert prompt.endswith('#Given Question#:\nWhat is x?\n\n#Created Question#:\n')
  seeds = evolution.draw_seeds(PROBLEMS, PAIRS, n=6)
  texts = ['A?', 'B?', '', seeds[3].problem.question, 'a?', 'C?']
  created, counts = evolution.created_problems(zip(seeds, texts, strict=True))
  assert counts == {
    'seeds': 6,
    'no_question': 1,
    'unchanged': 1,
    'duplicate': 1,
    'kept': 3,
  }
  assert [p.id for p in created] == [seeds[0].id, seeds[1].id, seeds[5].id]
  ends = [('4', '5', '4.0'), ('4', '5', '6'), ('0', '0', '0')]
  answers = {
    p.id: [f'The answer is {end}.' for end in three]
    for p, three in zip(created, ends, strict=True)
  }
  voted, counts = evolution.voted_problems(created, answers, task='gsm8k')
  assert counts == {'problems': 3, 'all_differ': 1, 'unusable_answer': 1, 'kept': 1}
  assert [(p.id, p.question, p.answer) for p in voted] == [(seeds[0].id, 'A?', '4')]
  with pytest.raises(ValueError, match='has 3 solutions, want votes=4'):
    evolution.voted_problems(created, answers, task='gsm8k', votes=4)
  with pytest.raises(ValueError, match='at least 2 votes'):
    evolution.voted_problems(created, answers, task='gsm8k', votes=1)


@pytest.mark.parametrize(
  ('texts', 'answer'),
  [
    (['The answer is 3.', 'The answer is 4.', 'The answer is 4.'], '4'),
    (['The answer is 3.', 'no idea', 'none'], None),  # one vote is no majority
    (['no idea', 'none', 'nothing'], None),
  ],
)
def test_votes(texts, answer):
  assert evolution.reference_answer(texts, task='gsm8k') == answer


def test_success_by_level():
  attempts = [(3, True), (1, False), (3, False), (1, True), (3, False), (None, True)]
  table = analysis.success_by_level(attempts)
  assert list(table.items()) == [(1, (1, 2)), (3, (1, 3)), (None, (1, 1))]
  assert table[3].rate == pytest.approx(1 / 3)


def test_delta_perplexity_by_hand():
  half, fifth = math.log(0.5), math.log(0.2)
  assert analysis.perplexity([half, half, half]) == pytest.approx(2)
  assert analysis.perplexity([half, fifth]) == pytest.approx(math.sqrt(10))
  # (5 - 2 + 2 - 4) / 2
  quarter = math.log(0.25)
  delta = analysis.delta_perplexity([[fifth], [half]], [[half, half], [quarter]])
  assert delta == pytest.approx(0.5)
  with pytest.raises(ValueError, match='2 wrong and 1 corrected'):
    analysis.delta_perplexity([[half], [half]], [[half]])
  with pytest.raises(ValueError, match='at least one'):
    analysis.delta_perplexity([], [])
  with pytest.raises(ValueError, match='without tokens'):
    analysis.perplexity([])


def test_checkpoint_choice():
  dev = {300: 0.5, 100: 0.4, 200: 0.5, 400: 0.3}
  assert analysis.choose_checkpoint(dev) == 200
  best = analysis.best_on_test({100: 0.2, 200: 0.7, 300: 0.6, 400: 0.5})
  assert (best.step, best.best) == (200, 0.7)
  assert best.best_three == pytest.approx(0.6)
  assert best.mean == pytest.approx(0.5)
  with pytest.raises(ValueError, match='at least one checkpoint'):
    analysis.choose_checkpoint({})
  with pytest.raises(ValueError, match='each a number'):
    analysis.best_on_test({1: math.nan})
