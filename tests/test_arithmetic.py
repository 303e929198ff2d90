"""The generated problems, checked by an arithmetic of this file's own."""

import collections
import hashlib
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from mrjax.data.arithmetic import (
  FORMS,
  STEP_WEIGHTS,
  distinct_solutions,
  generate_problems,
  split_of,
)
from mrjax.data.stories import Draws
from mrjax.data.story_plots import make_story


def evaluate(expression: str) -> Fraction:
  """Left to right: no expression here mixes * and / with + and -."""
  numbers = re.findall(r'\d+', expression)
  operators = re.findall(r'[-+*/]', expression)
  assert (
    ''.join(itertools.chain(*itertools.zip_longest(numbers, operators, fillvalue='')))
    == expression
  )
  assert not (set(operators) & set('+-') and set(operators) & set('*/'))
  value = Fraction(numbers[0])
  for operator, number in zip(operators, numbers[1:], strict=True):
    n = Fraction(number)
    value = {
      '+': value + n,
      '-': value - n,
      '*': value * n,
      '/': value / n,
    }[operator]
  return value


def annotations(solution: str) -> list[tuple[str, str]]:
  return re.findall(r'<<([^<>=]+)=([^<>=]+)>>', solution)


def check_solution(solution: str, answer: str, last_line: str) -> None:
  lines = solution.split('\n')
  assert lines[-1] == last_line
  found = annotations(solution)
  assert len(found) == len(lines) - 1  # one a step
  for line, (expression, result) in zip(lines[:-1], found, strict=True):
    assert evaluate(expression) == int(result) > 1
    # The annotation repeats what stands before it and is followed by its result.
    assert f'{expression}=<<{expression}={result}>>{result}' in line
  assert found[-1][1] == answer


@pytest.fixture(scope='module')
def problems():
  return generate_problems('train', size=3000, seed=5)


def test_every_annotation_is_right_and_the_last_is_the_answer(problems):
  for problem in problems:
    check_solution(problem.solution, problem.answer, f'#### {problem.answer}')


def test_every_number_of_a_solution_is_in_the_question_or_computed(problems):
  known_words = {'half': '2', 'third': '3', 'quarter': '4', 'fifth': '5', 'twice': '2'}
  for problem in problems:
    known = set(re.findall(r'\d+', problem.question))
    known |= {n for word, n in known_words.items() if word in problem.question.lower()}
    known |= {'100'} if '%' in problem.question else set()
    for expression, result in annotations(problem.solution):
      assert set(re.findall(r'\d+', expression)) <= known, problem
      known.add(result)


def test_every_step_is_needed_for_the_answer():
  for number in range(800):
    story = make_story(Draws(f'needed {number}'), 1 + number % 6)
    assert len(story.steps) == 1 + number % 6
    needed = {len(story.steps) - 1}
    for i in reversed(range(len(story.steps))):
      assert i in needed
      needed |= {term.step for term in story.steps[i].terms if term.step is not None}


def test_questions_are_short_english(problems):
  words = collections.Counter()
  for problem in problems:
    text = problem.question
    assert len(text.split()) <= 50
    assert text.endswith('?') and text.count('?') == 1
    assert not re.search(r'[.?] [a-z]|[a-z,] (He|She|They)\b|  |\b1 [a-z]+s\b', text), (
      text
    )
    words.update(re.findall(r'[A-Za-z]+', text + problem.solution))
  assert 150 < len(words) < 400


def test_numbers_stay_small(problems):
  numbers = [int(n) for p in problems for n in re.findall(r'\d+', p.question)]
  assert sum(n < 100 for n in numbers) > 0.95 * len(numbers)
  results = [int(r) for p in problems for _, r in annotations(p.solution)]
  assert max(results) <= 200


def test_step_counts_follow_the_weights(problems):
  counts = collections.Counter(problem.level for problem in problems)
  for steps, weight in STEP_WEIGHTS.items():
    expected = weight / sum(STEP_WEIGHTS.values()) * len(problems)
    assert abs(counts[steps] - expected) < 5 * expected**0.5


def test_only_the_wanted_step_counts():
  problems = generate_problems('dev', size=30, steps=(2, 5))
  assert {problem.level for problem in problems} == {2, 5}
  assert all(len(annotations(p.solution)) == p.level for p in problems)


def test_many_kinds_of_problem(problems):
  shapes = {re.sub(r'\d+', '#', problem.question) for problem in problems}
  assert len(shapes) > 0.9 * len(problems)
  operators = {
    ' '.join(re.sub(r'\d', '', e) for e, _ in annotations(p.solution)) for p in problems
  }
  assert len(operators) > 250
  text = ' '.join(problem.question for problem in problems)
  for theme in ('each', 'share', 'an hour', 'half', '%', 'than', 'minutes', 'total'):
    assert theme in text or theme == 'total'


def test_splits_never_overlap_for_any_seed_size_or_form():
  seen = {}
  for split in ('train', 'dev', 'test'):
    for seed, form in itertools.product((0, 1), FORMS):
      for problem in generate_problems(
        split, size=150 + 10 * seed, seed=seed, form=form
      ):
        assert seen.setdefault(problem.question, split) == split
        assert split_of(problem.question) == split


def test_a_question_keeps_its_split_when_retyped():
  question = generate_problems('test', size=1)[0].question
  assert split_of(f'  {question.upper()} \n') == 'test'


def test_questions_and_ids_are_distinct(problems):
  assert len({p.question for p in problems}) == len({p.id for p in problems}) == 3000


def test_more_problems_begin_with_the_same_ones():
  assert generate_problems('test', size=37) == generate_problems('test', size=53)[:37]


def test_seeds_differ_and_repeat():
  a, b = (generate_problems('test', size=20, seed=seed) for seed in (1, 2))
  assert a == generate_problems('test', size=20, seed=1)
  assert not {p.question for p in a} & {p.question for p in b}


def test_default_sizes():
  assert len(generate_problems('test')) == 500
  assert len(generate_problems('dev')) == 500
  assert len(generate_problems('train')) == 2000


def test_the_problems_are_pinned():
  """Results are quoted on these very texts; another digest is a break."""
  digest = hashlib.sha256()
  for form in FORMS:
    for problem in generate_problems('test', size=100, form=form):
      digest.update(json.dumps(problem.to_record(), sort_keys=True).encode())
  assert digest.hexdigest() == PINNED


PINNED = '1cfb92db2ebf8f9e6effbce23ec24d8344335fc725e462bd300e2f1a6ba83345'


def test_hash_seeds_do_not_matter():
  program = (
    'from mrjax.data.arithmetic import generate_problems;'
    'print([p.to_record() for p in generate_problems("dev", size=25, form="choice")])'
  )
  texts = [
    subprocess.run(
      [sys.executable, '-c', program],
      env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
      capture_output=True,
      check=True,
    ).stdout
    for seed in ('1', '77')
  ]
  assert texts[0] == texts[1]


def test_forms_ask_the_same_question_and_end_their_own_way():
  forms = {
    form: generate_problems('test', size=40, seed=3, form=form) for form in FORMS
  }
  for plain, choice, boxed in zip(*forms.values(), strict=True):
    assert plain.question == choice.question == boxed.question
    assert plain.answer == boxed.answer
    assert len({plain.id, choice.id, boxed.id}) == 3
    check_solution(boxed.solution, plain.answer, f'\\boxed{{{plain.answer}}}')
    check_solution(choice.solution, plain.answer, f'#### {choice.answer}')
    values = [option.partition(')') for option in choice.options]
    assert [label for label, _, _ in values] == list('ABCDE')
    numbers = [int(value) for _, _, value in values]
    assert len(set(numbers)) == 5 and min(numbers) > 0
    assert numbers['ABCDE'.index(choice.answer)] == int(plain.answer)
    assert plain.options is None and boxed.options is None


def test_the_right_choice_is_anywhere():
  letters = collections.Counter(
    p.answer for p in generate_problems('train', size=500, form='choice')
  )
  assert set(letters) == set('ABCDE') and min(letters.values()) > 60


def test_distinct_solutions_are_valid_and_distinct(problems):
  many = 0
  for problem in problems[:300]:
    solutions = list(itertools.islice(distinct_solutions(problem), 60))
    assert len({tuple(annotations(s)) for s in solutions}) == len(solutions) >= 1
    known = set(re.findall(r'\d+', problem.question))
    for solution in solutions:
      check_solution(solution, problem.answer, f'#### {problem.answer}')
      results = set()
      for expression, result in annotations(solution):
        # What is not given was computed before.
        assert set(re.findall(r'\d+', expression)) <= known | results | set('2345') | {
          '100'
        }
        results.add(result)
    many += len(solutions) > 2
  assert many > 100


def test_orders_of_independent_steps():
  problem = next(
    p
    for p in generate_problems('train', size=400, steps=(3,))
    if re.search(r'buys .* each and .* each\. How many dollars', p.question)
  )
  solutions = list(distinct_solutions(problem))
  first_lines = {re.sub(r'<<.*', '', s.split('\n')[0])[:9] for s in solutions}
  assert len(first_lines) == 2  # either thing may be priced first
  # 2 orders; each of the three steps has its sides in 2 orders unless they are equal.
  equal = sum(
    len(set(re.split(r'[*+]', e))) == 1 for e, _ in annotations(problem.solution)
  )
  assert len(solutions) == 2 * 2 ** (3 - equal)


def test_gains_and_losses_may_trade_places():
  problem = next(
    p
    for p in generate_problems('train', size=4000, steps=(2,))
    if re.fullmatch(
      r'\w+ (has|starts with) \d+ \w+\. \w+ (finds|buys|gets) .*more .*\. '
      r'\w+ (loses|sells) \d+ .*have.*',
      p.question,
    )
  )
  start, gain, loss = map(int, re.findall(r'\d+', problem.question))
  keys = {tuple(e for e, _ in annotations(s)) for s in distinct_solutions(problem)}
  wanted = {
    (f'{start}+{gain}', f'{start + gain}-{loss}'),
    (f'{gain}+{start}', f'{start + gain}-{loss}'),
  }
  if start > loss:
    wanted |= {
      (f'{start}-{loss}', f'{start - loss}+{gain}'),
      (f'{start}-{loss}', f'{gain}+{start - loss}'),
    }
  assert keys == {k for k in wanted}


def test_the_training_solutions_vary_in_order():
  told = other = 0
  for problem in generate_problems('train', size=300, steps=(3, 4)):
    first = annotations(next(iter(distinct_solutions(problem))))
    same = [e for e, _ in annotations(problem.solution)] == [e for e, _ in first]
    told, other = told + same, other + (not same)
  assert told > 80 and other > 80


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'split': 'validation'}, 'no split'),
    ({'split': 'test', 'size': 0}, 'at least 1'),
    ({'split': 'test', 'seed': -1}, 'seed=-1; want at least 0'),
    ({'split': 'test', 'form': 'mcq'}, 'no form'),
    ({'split': 'test', 'steps': (0,)}, 'from 1 to 6'),
    ({'split': 'test', 'steps': ()}, 'from 1 to 6'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    generate_problems(**arguments)


def test_distinct_solutions_wants_a_problem_of_its_own(problems):
  import dataclasses

  with pytest.raises(ValueError, match='not the id'):
    next(distinct_solutions(dataclasses.replace(problems[0], id='gsm8k-test-1')))
  with pytest.raises(ValueError, match='does not ask'):
    next(distinct_solutions(dataclasses.replace(problems[0], question='1+1?')))
