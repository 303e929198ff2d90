r"""Every grading rule against the hand-checked cases of its paper's method."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrjax.grading.rules import RULES, GoldError, get_rule, w2s_rule


def correct(rule: str, text: str, gold: str, options=None) -> bool:
  return RULES[rule].grade(text, gold, options)[1]


def test_names():
  assert set(RULES) == {
    *('gsm8k', 'gsm8k_exact', 'openai_gsm8k', 'boxed_strict', 'boxed_symbolic'),
    *('hendrycks_math', 'lema_gsm8k', 'lema_math', 'lema_csqa', 'w2s_gsm8k'),
    *('w2s_math', 'moo_gsm8k', 'moo_math', 'choice'),
  }
  assert all(RULES[name].name == name for name in RULES)
  with pytest.raises(ValueError, match="unknown grading rule 'gsm'; one of gsm8k"):
    get_rule('gsm')


def test_the_readme_says_what_every_rule_accepts():
  readme = (Path(__file__).resolve().parents[1] / 'README.md').read_text('utf-8')
  table = readme.partition('| rule |')[2].partition('\n\n')[0]
  assert re.findall(r'^\| `(\w+)` \|', table, re.MULTILINE) == list(RULES)


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('a\n#### 18', '18'),
    ('#### 1,234', '1234'),
    ('#### -5.5', '-5.5'),
    ('#### 18. Bye', '18.'),
    ('#### 18%', '18'),
    ('#### 5/6', '5'),
    ('#### 1e5', '1'),
    ('#### 3\n#### 4', '3'),  # the first
    ('#### x #### 4', '4'),  # the first that has a number
    ('#### 1.2.3', None),
    ('#### .', None),
    ('#### ,', None),
    ('#### 18.5.', None),
    ('#### $18', None),
    ('#### - 18', None),
    ('####18', None),
    ('####  18', None),
    ('#### ١٨', None),
    ('18', None),
    ('', None),
    ('a\0#### 18', None),  # NUL ends the text
    ('#### 18\0#### 19', '18'),
  ],
)
@pytest.mark.parametrize('rule', ['gsm8k', 'gsm8k_exact'])
def test_gsm8k_extraction(rule, text, extracted):
  assert RULES[rule].extract(text) == extracted


def test_gsm8k_equality():
  assert correct('gsm8k', '#### 18.00009', '18')
  assert not correct('gsm8k', '#### 18.00011', '18')
  assert not correct('gsm8k_exact', '#### 18.00009', '18')
  assert correct('gsm8k_exact', '#### 18.00', '18')
  assert correct('gsm8k', '#### 70000', 'Sum.\n#### 70,000')
  assert correct('gsm8k', '#### 70,000', '70,000')


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('x\nA: 18', '18'),
    ('x\nA: 1,800 cats', '1800'),
    ('#### 18', '18'),
    ('Job A: $15 at A: 3\nA: 25400', '25400'),  # only at the start of a line
    ('x A: 18', None),
    ('A: seven', None),
  ],
)
def test_openai_extraction(text, extracted):
  assert RULES['openai_gsm8k'].extract(text) == extracted


def test_openai_compares_digits():
  assert correct('openai_gsm8k', 'A: 1,800', 'x\n#### 1800')
  assert correct('openai_gsm8k', '#### 1800', 'x\nA: 1,800')
  assert not correct('openai_gsm8k', 'A: 18.0', '18')


BOXED_CASES = [
  ('18.0', '18', True),
  (r'\$18', '18', True),
  ('70,000', '70000', True),
  (r'18\text{ dollars}', '18', True),
  ('18 eggs', '18', False),
  ('0.5', r'\frac{1}{2}', True),
  (r'\frac12', r'\frac{1}{2}', True),
  ('90', r'90^\circ', True),
  ('x=5', '5', True),
  ('-q+p', 'p - q', True),
  (r'(3, \pi/2)', r'\left( 3, \frac{\pi}{2} \right)', True),
  (r'3\sqrt{13}', r'\sqrt{117}', True),
  ('-2,1', '1,-2', True),
  ('Evelyn', r'\text{Evelyn}', True),
  (r'50\%', '0.5', True),
  ('50%', '50', False),
  ('(0,1)', '[0,1]', False),
  ('0.333', r'\frac{1}{3}', False),
  ('2^{10}', '1024', True),
  ('', '18', False),
]


@pytest.mark.parametrize(('predicted', 'gold', 'equal'), BOXED_CASES)
def test_boxed_symbolic(predicted, gold, equal):
  assert correct('boxed_symbolic', rf'So \boxed{{{predicted}}}.', gold) is equal
  assert correct('boxed_symbolic', rf'\boxed{{{predicted}}}', rf'\boxed{{{gold}}}') is (
    equal
  )


def test_boxed_strict():
  assert correct('boxed_strict', r'$\boxed{ 18 }$', '18')
  assert correct('boxed_strict', r'\boxed{1} then \boxed{2}', r'so \boxed{2}')
  assert not correct('boxed_strict', r'\boxed{18.0}', '18')
  assert RULES['boxed_strict'].extract(r'\boxed{1} \boxed{2') is None
  assert RULES['boxed_strict'].extract('18') is None
  assert RULES['boxed_strict'].extract(r'\boxed{ }') is None


def test_gsm8k_reference_is_gold_under_every_rule():
  solution = 'It is <<5*20=100>>100.\n#### 70,000'
  assert correct('boxed_strict', r'\boxed{70000}', solution)
  assert correct('lema_gsm8k', 'The answer is 70,000.', solution)
  assert correct('moo_math', r'\boxed{70000}', solution)
  assert correct('lema_math', 'The answer is 7.', r'so \boxed{7}')
  assert correct('w2s_math', 'The answer is: 7', r'so \boxed{7}')


@pytest.mark.parametrize(
  ('predicted', 'gold', 'equal'),
  [
    (r'\dfrac{3}{4}', r'\tfrac34', True),
    ('0.5', r'\frac{1}{2}', True),
    ('x=5', '5', True),
    (r'\sqrt', r'\sqrt', True),  # without a normal form: as strings
    (r'\sqrt', r'\sqrt{2}', False),
    (r'\text{Evelyn}', 'Evelyn', False),
  ],
)
def test_hendrycks_math(predicted, gold, equal):
  assert correct('hendrycks_math', rf'\boxed{{{predicted}}}', gold) is equal


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('The answer is 18.', '18'),
    ('The answer is: 18', '18'),
    ('The answer is 3. The answer is 4.', '4'),
    ('The answer is 18.\n\nQ: more? The answer is 7.', '18'),
    ('The answer is 18.\n\nQuestion: more? The answer is 7.', '18'),
    ('The answer is 1,800', '1800'),
    ('The answer is $18.50.', '18.5'),
    ('The answer is £18..', '18'),
    ('The answer is 18€.', '18'),
    ('The answer is x = 3 + 4 = 7', '7'),
    ('The answer is <<3+4=7>>7', '7'),
    ('The answer is <<3+4>>8', '8'),
    ('The answer is 1e5', '15'),
    ('The answer is 3 apples and 4 pears', '34'),
    ('The answer is 4 1/2', '20.5'),
    ('The answer is 10:30', '10'),
    ('The answer is 18%', '18'),
    ('The answer is 18% .', '18'),  # the dot goes, then the spaces
    ('The answer is 18% of it', '18'),  # letters and end spaces go first
    ('The answer is 18%5', None),
    ('The answer is 18/', '18'),
    ('The answer is 3 + 4 * 2', '11'),
    ('The answer is -5', '-5'),
    ('The answer is 1/0', None),
    ('The answer is "7"', '7'),
    ('The answer is 2(3+1)', None),
    ('The answer is ', None),
    ('The answer is .', None),
    ('The answer is many', None),
    ('#### 18', None),
    ('Answer 18', None),
  ],
)
def test_lema_gsm8k_extraction(text, extracted):
  assert RULES['lema_gsm8k'].extract(text) == extracted


def test_lema_gsm8k_equality():
  assert correct('lema_gsm8k', 'The answer is 18.0.', '18')
  assert not correct('lema_gsm8k', 'The answer is 18.00001.', '18')
  assert not correct('lema_gsm8k', 'no answer', '18')
  with pytest.raises(GoldError, match='other than 0'):
    correct('lema_gsm8k', 'The answer is 0.', '0')


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    (r'The answer is $\frac12$.', r'\frac{1}{2}'),
    (r'The answer is: \boxed{\dfrac{1}{2}}.', r'\frac{1}{2}'),
    ('The answer is 0.5', r'\frac{1}{2}'),
    (r'so \boxed{x=5}', '5'),
    (r'so \fbox{5}', None),
    (r'\boxed{5', None),
    ('The answer is 5. Q: next The answer is 6.', '5'),
    ('The answer is 5. Question: next The answer is 6.', '5'),
    ('The answer is $5.$', '5.'),  # kept: only the very last dot goes
    (r'The answer is \sqrt', None),  # no normal form
    ('5', None),
  ],
)
def test_lema_math_extraction(text, extracted):
  assert RULES['lema_math'].extract(text) == extracted


def test_lema_math_equality():
  assert correct('lema_math', r'The answer is \tfrac34.', r'Hence \boxed{\frac{3}{4}}.')
  assert not correct('lema_math', 'no idea', '5')


CANDIDATES = ['ignore', 'enforce', 'authoritarian', 'yell at', 'avoid']


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('bla\nThe answer is enforce.', 'enforce'),
    ('The answer is: avoids.', 'avoid'),
    ('The answer is Ignore', 'ignore'),
    ('The answer is ...yell.', 'yell at'),
    ('avoid', 'avoid'),  # no marker: the whole text
    ('The answer is avoid.\n\nQuestion: x The answer is ignore.', 'avoid'),
  ],
)
def test_lema_csqa(text, extracted):
  labelled = [f'{letter}) {text}' for letter, text in zip('ABCDE', CANDIDATES)]
  for options in (CANDIDATES, labelled):
    assert RULES['lema_csqa'].extract(text, options) == extracted
    letter = 'ABCDE'[CANDIDATES.index(extracted)]
    assert correct('lema_csqa', text, extracted, options)
    assert correct('lema_csqa', text, letter, options)
    wrong = 'B' if letter == 'A' else 'A'
    assert not correct('lema_csqa', text, wrong, options)


def test_lema_csqa_details():
  rule = RULES['lema_csqa']
  assert rule.extract('The answer is ab', ['aa', 'bb', 'ba']) == 'aa'  # first of equals
  assert rule.extract('The answer is Cat', ['bat', 'CAT']) == 'bat'  # case counts
  with pytest.raises(ValueError, match="needs a field 'options'"):
    rule.extract('The answer is x', None)


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('It is so.\n#### 18', '18'),
    ('#### 7\nmore', None),  # the last line only
    ('####7', None),
    ('#### 1 #### 2', '1####2'),  # everything after the first
    ('#### 3\n#### 4', '4'),
    ('x\n#### 18\nQuestion: y\n#### 19', '18'),
    ('  #### 18  \n', '18'),
    ('#### 1,800 dollars', '1800'),
    ('#### 18.', '18.'),
    ('#### x = 18', '18'),
    ('#### 18</s>', '18'),
    ('#### 18</s> ab', '18</s'),  # four characters go, wherever the stop token is
    ('#### 50%', '50'),
    ('#### 18.0', '18'),
    ('The answer is 1,800.5 or 7.', '1800.5'),  # the fallback: its first number
    ('The answer is 18.', '18'),
    ('The answer is: 18', None),  # the fallback phrase has no colon
    ('The answer is 5\nBye', None),
    ('The answer is about -3', '-3'),
    ('18', None),
    ('', None),
  ],
)
def test_w2s_gsm8k_extraction(text, extracted):
  assert RULES['w2s_gsm8k'].extract(text) == extracted


def test_w2s_math():
  assert correct('w2s_math', 'So. The answer is: \\frac12', r'\frac{1}{2}')
  assert correct('w2s_math', 'The answer is: 0.5', 'x The answer is: 0.5')
  assert not correct('w2s_math', 'The answer is: 0.5', r'\frac{1}{2}')
  assert not correct('w2s_math', r'The answer is: \dfrac12', r'\frac{1}{2}')
  assert correct('w2s_gsm8k', '#### 18', 'x\n#### 18')


@pytest.mark.parametrize(
  ('text', 'gold', 'equal'),
  [
    ('#### 18', '18', True),
    ('#### $18', '18', False),
    ('#### 1,000', '1000', True),
    ('#### 18.', '18', False),
    ('The answer is 18', '18', False),
    ('18', '18', True),  # no marker: the whole output
    ('#### 5\n\nQ', '5', False),
    ('#### 57,500', '57,500', False),  # commas go from the prediction only
    ('#### B', 'B', True),
    ('#### B', 'rationale #### B', True),
    ('#### (B)', 'B', False),
  ],
)
def test_moo_gsm8k(text, gold, equal):
  assert correct('moo_gsm8k', text, gold) is equal


@pytest.mark.parametrize(
  ('text', 'gold', 'equal'),
  [
    (r'\boxed{\frac12}', r'\boxed{\frac{1}{2}}', True),
    ('the answer is 0.5', r'\boxed{\frac{1}{2}}', False),
    (r'\boxed{1/2}', r'\boxed{\frac{1}{2}}', True),
    (r'\boxed{x=5}', r'\boxed{5}', True),
    ('12 apples and 7 pears', r'\boxed{7}', True),
    (r'\boxed{90^\circ}', r'\boxed{90}', True),
    (r'\boxed{10\text{ cm}}', r'\boxed{10}', True),
    (r'\boxed{50\%}', r'\boxed{50}', True),
    (r'\boxed{.5}', r'\boxed{0.5}', True),
    (r'\boxed{\dfrac{3}{4}}', r'\boxed{\tfrac34}', True),
    ('no number here', r'\boxed{7}', False),
    (r'\boxed{3\sqrt13}', r'\boxed{3\sqrt{13}}', False),
    (r'\boxed{1{,}000}', r'\boxed{1000}', False),
    (r'\boxed{-2,1}', r'\boxed{1,-2}', False),
    (r'\boxed{\text{Evelyn}}', r'\boxed{Evelyn}', False),
    (r'$\boxed 7$ pears', r'\boxed{7}', True),
    ('it costs 1,000 in all', r'\boxed{1000}', True),
  ],
)
def test_moo_math(text, gold, equal):
  assert correct('moo_math', text, gold) is equal


AQUA = ['A)125', 'B)150', 'C)225', 'D)250', 'E)275']


@pytest.mark.parametrize(
  ('text', 'extracted'),
  [
    ('#### B', 'B'),
    ('#### (B)', 'B'),
    ('#### b', 'B'),
    ('The answer is C.', 'C'),
    ('The answer is: (c)', 'C'),
    ('The correct answer is option D because', 'D'),
    ('**Answer:** E', 'E'),
    ('Answer: B)150', 'B'),
    (r'so $\boxed{\text{(D)}}$', 'D'),
    (r'so \boxed{B}. The answer is C', 'C'),
    ('The answer is C, so \\boxed{B}', 'B'),
    ('The answer is 225.', 'C'),
    ('The answer is $250', 'D'),
    ('reasoning\n(E)', 'E'),
    ('B', 'B'),
    ('The answer is F', None),
    ('The answer is 999', None),
    ('The answer is Because', None),
    ('I think so', None),
    ('', None),
  ],
)
def test_choice(text, extracted):
  assert RULES['choice'].extract(text, AQUA) == extracted
  if extracted:
    assert correct('choice', text, extracted, AQUA)
    assert correct('choice', text, AQUA['ABCDE'.index(extracted)], AQUA)
    assert correct('choice', text, f'Since so. #### {extracted}', AQUA)
    assert not correct('choice', text, 'A', AQUA)


def test_choice_without_options():
  assert correct('choice', 'The answer is (B).', 'B')


@pytest.mark.parametrize(
  ('rule', 'gold'),
  [
    ('gsm8k', 'no number'),
    ('gsm8k', '#### x'),
    ('gsm8k_exact', 'nan'),
    ('openai_gsm8k', ''),
    ('boxed_strict', ' '),
    ('boxed_symbolic', r'\boxed{}'),
    ('lema_gsm8k', 'many'),
    ('lema_math', ''),
    ('w2s_math', ''),
    ('moo_gsm8k', '#### '),
    ('choice', 'Z'),
  ],
)
def test_gold_without_answer_is_refused(rule, gold):
  with pytest.raises(GoldError, match=f'holds no answer for rule {rule!r}'):
    RULES[rule].grade('text', gold, AQUA)


FRAGMENTS = (
  *('The answer is ', 'The answer is: ', '#### ', '####', 'A: ', r'\boxed{', '}', '{'),
  *('$', '\n', '\n\nQ: ', 'Question: ', '</s>', '%', '=', '>>', '<<', '.', ',', ':'),
  *(r'\frac', r'\sqrt', r'\text{ ', r'\text{', '(', ')', 'B', 'b)', '1', '23', '0.5'),
  *('+', '-', '*', '/', ' ', 'x', '\0', '²', '£', '😀', 'boxed', r'\fbox{', '\\'),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(''.join))
def test_no_text_breaks_a_rule(text):
  for rule in RULES.values():
    extracted = rule.extract(text, AQUA)
    assert extracted is None or (isinstance(extracted, str) and extracted)
    if rule.name != 'boxed_symbolic':  # its workers are slow, and tested elsewhere
      assert (
        rule.grade(text, '7' if rule.name != 'choice' else 'B', AQUA)[0] == extracted
      )


@pytest.mark.parametrize(
  'text', ['$' * 50_000, '{' * 50_000, '1,' * 25_000, '#### ' * 9_999]
)
def test_long_text_is_graded_quickly(text):
  start = time.perf_counter()
  for name, rule in RULES.items():
    rule.extract(f'The answer is {text} \\boxed{{{text}', AQUA)
    assert time.perf_counter() - start < 5, name


MODELS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
CORRECT = (286, 515, 458, 742)


def lema_form(solution: str) -> str:
  *steps, last = solution.split('\n')
  if last.startswith('A: '):
    last = f'The answer is {last.removeprefix("A: ")}.'
  return ' '.join([*steps, last])


def hash_form(solution: str) -> str:
  *steps, last = solution.split('\n')
  if last.startswith('A: '):
    last = f'#### {last.removeprefix("A: ")}'
  return '\n'.join([*steps, last])


@pytest.mark.parametrize(
  ('rule', 'form'),
  [
    (RULES['openai_gsm8k'], str),
    (RULES['gsm8k'], hash_form),
    (RULES['gsm8k_exact'], hash_form),
    (RULES['lema_gsm8k'], lema_form),
    (w2s_rule('w2s', 'A:'), str),
  ],
  ids=lambda value: getattr(value, 'name', None),
)
def test_agrees_with_openai(shared, rule, form):
  """Four models on the GSM8K test set, graded by OpenAI: 286, 515, 458, 742."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  rows = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  totals = dict.fromkeys(MODELS, 0)
  for row in rows:
    gold = form(row['ground_truth'])
    for model in MODELS:
      is_correct = rule.grade(form(row[model]['solution']), gold)[1]
      assert is_correct == row[model]['is_correct'], row[model]['solution']
      totals[model] += is_correct
  assert len(rows) == 1319
  assert tuple(totals.values()) == CORRECT


@pytest.mark.parametrize(
  ('rule', 'expected'),
  [('gsm8k', 1319), ('gsm8k_exact', 1319), ('openai_gsm8k', 1319), ('moo_gsm8k', 1305)],
)
def test_gsm8k_references(shared, rule, expected):
  """MoO's one-sided commas make 14 golds unreachable."""
  path = shared / 'data' / 'gsm8k_test.jsonl'
  answers = [
    json.loads(line)['answer'] for line in path.read_text('utf-8').splitlines()
  ]
  assert sum(correct(rule, answer, answer) for answer in answers) == expected


def test_gsm8k_answers_of_qsharp(shared):
  path = shared / 'data' / 'gsm8k_test.jsonl'
  rule = RULES['boxed_strict']
  golds = [
    rule.extract_gold(json.loads(line)['answer'])
    for line in path.read_text('utf-8').splitlines()
  ]
  assert ' '.join(golds[:10]) == '18 3 70000 540 20 64 260 160 45 460'
  for name in ('boxed_strict', 'boxed_symbolic'):
    assert all(correct(name, rf'\boxed{{{gold}}}', gold) for gold in golds)


@pytest.mark.parametrize(
  'rule', ['boxed_strict', 'boxed_symbolic', 'hendrycks_math', 'lema_math', 'moo_math']
)
def test_math500_references(shared, rule):
  path = shared / 'data' / 'math500_test.jsonl'
  rows = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  found = [RULES['boxed_strict'].extract(row['solution']) for row in rows]
  assert found[:3] == [r'\left( 3, \frac{\pi}{2} \right)', 'p - q', r'\frac{14}{3}']
  assert found[3:10] == (
    ['9', r'\text{Evelyn}', '42', '27', r'90^\circ', r'3\sqrt{13}', '4']
  )
  for gold in ('solution', 'answer'):
    assert sum(correct(rule, row['solution'], row[gold]) for row in rows) == 500
