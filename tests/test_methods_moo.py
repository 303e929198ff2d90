"""The layouts of Mixture of Opinions letter by letter, and their way back."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrjax.data.prompts import render_completion, render_prompt
from mrjax.methods import moo
from mrjax.records import Problem

ROW = (
  'QUESTION:1+1?\n\nOPINIONS START\n>>>0: #### a #### 2\n>>>1: #### b #### 3\n'
  'OPINIONS END\nSOLUTION:2 #### 2'
)
CHOICE = Problem(id='c', question='2+2?', solution='4 #### B', options=('A)3', 'B)4'))
POOL = [
  Problem(id=f'train-{i}', question=f'{i}+1?', solution=f'{i + 1} #### {i + 1}')
  for i in range(7)
]


def test_a_row_with_opinions():
  prompt = moo.format_prompt('1+1?\n', ['a #### 2', 'b #### 3'])
  assert prompt + '2 #### 2' == ROW
  assert moo.parse_row(ROW) == ('1+1?\n', ('a #### 2', 'b #### 3'), '2 #### 2')
  assert moo.split_text(ROW) == (prompt, '2 #### 2')
  assert prompt.endswith('OPINIONS END\nSOLUTION:')


def test_prompt_ori_keeps_options_and_a_newline():
  assert moo.prompt_ori_of(CHOICE) == '2+2?\noptions: A)3 B)4\n'
  assert moo.prompt_ori_of(POOL[3]) == '3+1?\n'


@pytest.mark.parametrize(
  'opinions',
  [
    [],
    [''],
    ['', '', 'x'],
    ['two\nlines', 'a <<1+1=2>>2\n#### 2', '\n', ' spaces '],
    ['QUESTION:\nSOLUTION:', 'x\n>> >0: #### y'],
    [str(i) for i in range(12)],  # indices of two digits
  ],
)
@pytest.mark.parametrize('label', ['', '#### 2\n', 'OPINIONS END\nSOLUTION:x'])
def test_rows_are_read_back(opinions, label):
  text = moo.format_prompt('q\n', opinions) + label
  assert moo.parse_row(text) == ('q\n', tuple(opinions), label)


@pytest.mark.parametrize(
  'opinion',
  ['a\n>>>1: #### b', 'see >>> here', 'x\nOPINIONS END\nSOLUTION:', 'OPINIONS START'],
)
def test_separators_in_opinions_are_refused_or_escaped(opinion):
  """The authors' rows would be read back as other opinions."""
  with pytest.raises(ValueError, match=r'which separates opinions.*or give reserved='):
    moo.format_prompt('q\n', ['fine', opinion])
  text = moo.format_prompt('q\n', ['fine', opinion, 'last'], reserved='escape') + 'l'
  assert moo.parse_row(text) == ('q\n', ('fine', opinion, 'last'), 'l')
  assert moo.split_text(text)[1] == 'l'


PIECES = ('>', '>>>', '\\', '\n', '>>>1: #### ', 'OPINIONS END', 'OPINIONS START', 'x')
TEXTS = st.lists(st.sampled_from((*PIECES, '\nSOLUTION:', '>>>0: #### '))).map(''.join)


@given(st.lists(TEXTS, max_size=4), TEXTS)
def test_every_opinion_survives_escaping(opinions, label):
  text = moo.format_prompt('q\n', opinions, reserved='escape') + label
  assert moo.parse_row(text) == ('q\n', tuple(opinions), label)


def test_a_text_without_separators_is_not_touched_by_escaping():
  plain = 'a \\frac{1}{2} <<3>2>> \\ > >> OPINIONS'
  assert moo.protect(plain, reserved='escape') == moo.protect(plain) == plain


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('QUESTION:q\nSOLUTION:s', 'no row with opinions'),
    (ROW.removeprefix('QUESTION:'), 'no row with opinions'),
    (ROW.replace('OPINIONS END', 'END'), 'no row with opinions'),
    (ROW.replace('>>>0: ', '>>>1: '), "begin with '>>>0: #### ', found '>>>1"),
    (ROW.replace('>>>0: #### ', '>>>0: '), 'opinions begin with'),
  ],
)
def test_what_is_no_row(text, message):
  with pytest.raises(ValueError, match=message):
    moo.parse_row(text)


def test_bad_questions_and_policies():
  with pytest.raises(ValueError, match="the question holds 'OPINIONS START'"):
    moo.format_prompt('OPINIONS START\n', [])
  with pytest.raises(ValueError, match="unknown reserved 'keep'; one of error, escape"):
    moo.protect('x', reserved='keep')


def test_stop_strings_keep_separators_out_of_opinions():
  for separator in ('>>>', 'QUESTION:', 'SOLUTION:', '<<<Examples ends'):
    assert any(stop in separator for stop in moo.STOPS)
  assert not any(stop in 'a <<1+1=2>>2 #### 2' for stop in moo.STOPS)
  assert len(set(moo.STOPS)) == 12


# Few-shot prompts -------------------------------------------------------------


def test_few_shot_layout():
  assert moo.few_shot_prompt(POOL[1], POOL[4:6], instruction='Do.') == (
    'Do.\n\nExamples starts>>>\n'
    'QUESTION:4+1?\nSOLUTION:5 #### 5\nQUESTION:5+1?\nSOLUTION:6 #### 6\n'
    '<<<Examples ends\n\nQUESTION:1+1?\nSOLUTION:'
  )
  # Without examples nothing stands between instruction and question, as there.
  assert moo.few_shot_prompt(CHOICE, [], instruction='Do.') == (
    'Do.QUESTION:2+2?\noptions: A)3 B)4\nSOLUTION:'
  )


def test_instructions_ask_for_the_marker_that_is_graded():
  assert '####' in moo.few_shot_prompt(POOL[0], [])
  assert '####' not in moo.BOXED_INSTRUCTION


def test_single_layer_layout():
  prompt = moo.single_layer_prompt(
    '1+1?\n', ['a', 'b'], shots=POOL[:1], instruction='Do.', committee='They said:'
  )
  assert prompt == (
    'Do.\n\nExamples starts>>>\nQUESTION:0+1?\nSOLUTION:1 #### 1\n<<<Examples ends\n\n'
    'QUESTION:1+1?\nThey said:\n'
    'OPINIONS START\n>>>0: #### a\n>>>1: #### b\nOPINIONS END\n'
    f'{moo.SOLUTION_CUE}\nSOLUTION:'
  )
  assert '>>>' in moo.single_layer_prompt('q\n', []).partition('OPINIONS START')[0]
  with pytest.raises(ValueError, match='separates opinions'):
    moo.single_layer_prompt('q\n', ['>>>'])


def base(problem):
  return render_prompt('moo', problem).text, render_completion('moo', problem)


@pytest.mark.parametrize(
  'prompt',
  [
    base(POOL[2])[0],
    moo.few_shot_prompt(POOL[2], []),
    moo.few_shot_prompt(POOL[2], POOL[3:6]),
    moo.format_prompt('2+1?\n', ['SOLUTION: x', 'y']),
    moo.single_layer_prompt('2+1?\n', ['x'], shots=POOL[3:5]),
    'QUESTION:q\nOPINIONS START\n>>>0: #### x\nOPINIONS END\n'
    'now start write your solution below.\nSOLUTION:',  # the authors' own
  ],
  ids=['base', 'no shots', 'shots', 'opinions', 'single layer', 'single layer, theirs'],
)
def test_texts_are_split_where_the_solution_begins(prompt):
  for label in ('3 #### 3\n', '', 'x\n\n#### 4'):
    assert moo.split_text(prompt + label) == (prompt, label)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('QUESTION:a\nSOLUTION:b\nSOLUTION:c', 'found 1 and 2'),
    ('no markers', 'found 0 and 0'),
    ('OPINIONS START OPINIONS END', r"no '.nOPINIONS END.nSOLUTION:' where"),
    ('QUESTION:q Examples starts>>> SOLUTION: <<<Examples ends', "no 'SOLUTION:' w"),
    (f'SOLUTION: {moo.SOLUTION_CUE}', 'where the prompt should end'),
  ],
)
def test_texts_that_cannot_be_split(text, message):
  with pytest.raises(ValueError, match=message):
    moo.split_text(text)


# Drawing examples -------------------------------------------------------------


def test_shots_are_repeatable_and_differ_by_seed_and_problem():
  drawn = {
    (seed, problem.id): tuple(s.id for s in moo.draw_shots(problem, POOL, 4, seed=seed))
    for seed, problem in itertools.product(range(3), POOL)
  }
  assert len(set(drawn.values())) > 18  # of 21
  shuffled = random.Random(0).sample(POOL, len(POOL))
  for problem in shuffled:  # no draw depends on those before it
    again = moo.draw_shots(problem, POOL, 4, seed=1)
    assert tuple(s.id for s in again) == drawn[1, problem.id]


def test_shots_never_leak_the_row_itself():
  """The authors draw for training rows from all training rows."""
  twin = Problem(id='twin', question=POOL[2].question, solution='copied')
  pool = [*POOL, twin]
  for seed in range(20):
    shots = moo.draw_shots(POOL[2], pool, 6, seed=seed)
    assert {shot.id for shot in shots} == {p.id for p in POOL} - {'train-2'}


def test_every_other_problem_is_drawn_equally_often():
  counts = dict.fromkeys((problem.id for problem in POOL), 0)
  firsts = dict(counts)
  for seed in range(3000):
    shots = moo.draw_shots(POOL[0], POOL, 2, seed=seed)
    assert len({shot.id for shot in shots}) == 2
    firsts[shots[0].id] += 1
    for shot in shots:
      counts[shot.id] += 1
  assert counts.pop('train-0') == firsts.pop('train-0') == 0
  # 1000 and 500 are expected; five standard deviations are 129 and 102.
  assert all(abs(count - 1000) < 129 for count in counts.values())
  assert all(abs(count - 500) < 102 for count in firsts.values())


def test_the_draw_does_not_change_between_versions():
  """Literals: rows that were drawn once can be drawn again."""
  ids = [shot.id for shot in moo.draw_shots(CHOICE, POOL, 5, seed=11)]
  assert ids == ['train-2', 'train-0', 'train-5', 'train-4', 'train-6']


def test_too_few_examples():
  assert moo.draw_shots(CHOICE, POOL, 0, seed=0) == []
  with pytest.raises(ValueError, match="hold 6 other than 'train-5', want 7"):
    moo.draw_shots(POOL[5], POOL, 7, seed=0)
  with pytest.raises(ValueError, match='num_shots=-1; want 0 or more'):
    moo.draw_shots(CHOICE, POOL, -1, seed=0)
