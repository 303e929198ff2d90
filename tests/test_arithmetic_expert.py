"""The scripted expert finds every perturbed step; its questions have answers."""

import dataclasses
import functools
import itertools
import random
import re

import pytest

from mrjax.data.arithmetic import (
  distinct_solutions,
  find_story,
  generate_problems,
  split_of,
)
from mrjax.grading.calculator import all_equations_hold, equations, evaluate
from mrjax.methods.arithmetic_augmenter import LABELS, ArithmeticAugmenter, augment
from mrjax.methods.arithmetic_expert import (
  NOTHING_WRONG,
  ArithmeticCorrector,
  correct_solution,
)
from mrjax.methods.lema import WrongPath, split_steps, strip_annotations
from mrjax.methods.lema_corrections import parse_correction
from mrjax.methods.lema_pairs import make_pair
from mrjax.methods.lema_prompts import correction_prompt, corrector_prompt
from mrjax.records import Problem

PROBLEMS = [
  *generate_problems('train', size=150, seed=1),
  *generate_problems('test', size=50, form='boxed', steps=[4, 5, 6]),
]
TASKS = {p.id: 'math' if '-boxed-' in p.id else 'gsm8k' for p in PROBLEMS}


@functools.cache
def solution_set(problem):
  """The equations of every valid solution, or None where there are too many."""
  texts = list(itertools.islice(distinct_solutions(problem), 3001))
  return {tuple(equations(t)) for t in texts} if len(texts) <= 3000 else None


def as_steps(problem):
  return split_steps(problem.solution)


def assert_right_from(problem, steps, number):
  """The whole way: prompt, expert, parser, filter; and the solution is a valid one."""
  path = WrongPath(problem, TASKS.get(problem.id, 'gsm8k'), tuple(steps))
  expert = ArithmeticCorrector(PROBLEMS)
  text = expert(corrector_prompt(path))
  assert text == expert(correction_prompt(path))
  pair = make_pair(path, text)
  assert pair.correction.step == number, (steps, text)
  assert all_equations_hold('\n'.join(pair.correction.solution))
  return pair


def test_a_wrong_result_at_any_step_is_found():
  """`3*5=<<3*5=16>>16`: the annotation itself does not hold."""
  for problem in PROBLEMS:
    steps = as_steps(problem)
    valid = solution_set(problem)
    for place, step in enumerate(steps[:-1]):
      left, value = equations(step)[0].split('=')
      wrong = f'{left}=<<{left}={int(value) + 1}>>{int(value) + 1}'
      bad = step.replace(f'{left}=<<{left}={value}>>{value}', wrong)
      assert bad != step
      perturbed = [*steps[:place], bad, *steps[place + 1 : -1], 'The answer is 1.']
      pair = assert_right_from(problem, perturbed, place + 1)
      if valid is not None:
        assert tuple(equations('\n'.join(pair.corrected_steps))) in valid


def carried_on(steps, place, rng):
  """The steps with one number of a step changed and the results carried on."""
  changed: dict[str, str] = {}
  lines = []
  for index, step in enumerate(steps[:-1]):
    left, value = equations(step)[0].split('=')
    new = re.sub(r'\d+', lambda m: changed.get(m[0], m[0]), left)
    if index == place:
      numbers = list(re.finditer(r'\d+', new))
      hit = rng.choice(numbers)
      other = int(hit[0]) + rng.choice([1, 2, 3])
      new = f'{new[: hit.start()]}{other}{new[hit.end() :]}'
    result = f'{evaluate(new):g}'
    if result != value:
      changed[value] = result
    old = f'{left}=<<{left}={value}>>{value}'
    lines.append(step.replace(old, f'{new}=<<{new}={result}>>{result}'))
  return [*lines, f'The answer is {result}.']


def test_a_wrong_number_at_any_step_is_found():
  """The results are carried on, so that every annotation holds."""
  rng = random.Random(5)
  checked = ambiguous = 0
  for problem in PROBLEMS:
    steps, valid = as_steps(problem), solution_set(problem)
    for place in range(len(steps) - 1):
      perturbed = carried_on(steps, place, rng)
      if perturbed[-1] == steps[-1]:
        continue  # not a wrong solution
      number = correct_solution(problem, perturbed).step
      assert_right_from(problem, perturbed, number)
      checked += 1
      if number != place + 1:
        # The changed step is, by chance, that of a valid solution in another order.
        followed = [equations(step)[0] for step in perturbed[: number - 1]]
        assert number > place + 1
        assert valid is None or same_numbers(valid, followed), (perturbed, number)
        ambiguous += 1
  assert checked > 500
  assert ambiguous <= 0.01 * checked


def same_numbers(valid, followed):
  """Says whether a valid solution has the same numbers and results, in any order."""

  def plain(equation):
    left, value = equation.split('=')
    return sorted(re.findall(r'\d+', left)), value

  steps = list(map(plain, followed))
  return any(list(map(plain, s[: len(steps)])) == steps for s in valid)


def test_every_valid_solution_is_right():
  for problem in PROBLEMS[:60]:
    for text in itertools.islice(distinct_solutions(problem), 40):
      assert correct_solution(problem, split_steps(text)) is None
      bare = [strip_annotations(step) for step in split_steps(text)]
      assert correct_solution(problem, bare) is None


SHOP = next(
  p
  for p in PROBLEMS
  if len(as_steps(p)) >= 4 and len(find_story(p).steps[0].terms) == 2
)


def test_words_tell_steps_of_the_same_numbers_apart():
  """With 2*9 in the place of the pears' 2*8 it is still the pears' line."""
  problems = generate_problems('train', size=800, seed=9)
  for problem in problems:
    lines = as_steps(problem)
    left = [equations(line)[0].split('=')[0] for line in lines[:2] if '<<' in line]
    if not all(' cost ' in line for line in lines[:2]) or left[0] == left[1]:
      continue
    other = equations(lines[1])[0]
    swapped = lines[0].replace(equations(lines[0])[0].split('=')[0], left[1])
    swapped = re.sub(r'<<.*>>\d+', f'<<{other}>>{other.split("=")[1]}', swapped)
    correction = correct_solution(problem, [swapped, *lines[1:-1], 'The answer is 1.'])
    assert correction.step == 1
    return
  raise AssertionError('no problem with two prices')


def test_other_faults():
  steps = as_steps(SHOP)
  first = equations(steps[0])[0]
  left, value = first.split('=')
  # A false last line.
  assert_right_from(SHOP, [*steps[:-1], 'The answer is 1.'], len(steps))
  # Steps left out.
  assert_right_from(SHOP, [*steps[:1], 'The answer is 1.'], 2)
  # A step told twice, and one too many.
  assert_right_from(SHOP, [steps[0], steps[0], 'The answer is 1.'], 2)
  more = [*steps[:-1], '2+3=<<2+3=5>>5', 'The answer is 5.']
  assert_right_from(SHOP, more, len(steps))
  # What is written is not what is computed.
  assert_right_from(SHOP, [f'{left}=<<1+1=2>>{value}', 'The answer is 1.'], 1)
  assert_right_from(SHOP, [f'1+1=<<{first}>>2', 'The answer is 1.'], 1)
  # A number from nowhere; and one that is a result computed in the head.
  assert_right_from(SHOP, ['There are 9999.', 'The answer is 9999.'], 1)
  assert correct_solution(SHOP, [f'It is {value}.', *steps[1:]]) is None
  # Broken off.
  assert correct_solution(SHOP, steps[:2]).step == 2
  assert correct_solution(SHOP, []) is None


def test_two_steps_in_one_line_are_right():
  problem = next(p for p in PROBLEMS if uses_first(find_story(p).steps))
  steps = split_steps(next(distinct_solutions(problem)))  # in the order told
  one, two = (equations(step)[0].split('=') for step in steps[:2])
  inner = re.sub(rf'\b{one[1]}\b', f'({one[0]})', two[0], count=1)
  merged = f'{inner}=<<{inner}={two[1]}>>{two[1]}'
  assert correct_solution(problem, [merged, *steps[2:]]) is None
  off = f'{inner}=<<{inner}={int(two[1]) + 1}>>{int(two[1]) + 1}'
  assert correct_solution(problem, [off, *steps[2:]]).step == 1
  other = inner.replace('(', '(1+')
  value = f'{evaluate(other):g}'
  off = f'{other}=<<{other}={value}>>{value}'
  assert correct_solution(problem, [off, *steps[2:]]).step == 1


def uses_first(steps):
  """Says whether the second step uses the first, and its number stands there once."""
  if len(steps) < 2 or steps[1].terms[0].step != 0:
    return False
  return [t.value for t in steps[1].terms].count(steps[0].value) == 1


def test_style_of_the_solution_is_kept():
  steps = [strip_annotations(step) for step in as_steps(SHOP)]
  correction = correct_solution(SHOP, [*steps[:-1], 'The answer is 1.'])
  assert '<<' not in ''.join(correction.solution)
  assert correction.solution == (f'The answer is {SHOP.answer}.',)
  correction = correct_solution(SHOP, ['There are 9999.', 'The answer is 1.'])
  assert '=' in correction.solution[0]
  assert '<<' not in correction.solution[0]


def test_expert_as_a_model():
  expert = ArithmeticCorrector(PROBLEMS)
  right = WrongPath(SHOP, 'gsm8k', tuple(as_steps(SHOP)))
  assert expert(corrector_prompt(right)) == NOTHING_WRONG
  with pytest.raises(ValueError, match='no_incorrect_step'):
    parse_correction(NOTHING_WRONG, task='gsm8k')
  stranger = dataclasses.replace(right, problem=Problem(id='x', question='1+1?'))
  with pytest.raises(ValueError, match=f'none of the {len(PROBLEMS)} problems'):
    expert(corrector_prompt(stranger))
  with pytest.raises(ValueError, match='Original Solution'):
    expert('1+1?')
  with pytest.raises(ValueError, match='not the id of a generated'):
    correct_solution(Problem(id='x', question='q', answer='2'), ['The answer is 1.'])


ITEM = re.compile(r'(\d+)\. \*\*([^*]+)\*\*: (\S.*)')


def test_new_questions_have_their_answers():
  missing = 0
  for problem in PROBLEMS:
    new = augment(problem)
    missing += len(LABELS) - len(new)
    assert len({p.question for p in new.values()} | {problem.question}) == len(new) + 1
    for kind, p in new.items():
      assert all_equations_hold(p.solution)
      assert p.solution.endswith(f'={p.answer}>>{p.answer}.\n#### {p.answer}') or (
        re.search(rf'={p.answer}>>{p.answer} .*\n#### {p.answer}$', p.solution)
      )
      assert 2 <= int(p.answer) <= 200
      if kind == 'numbers':
        assert split_of(p.question) == split_of(problem.question)
        masked = [re.sub(r'\d+', '#', q.question) for q in (p, problem)]
        assert masked[0] == masked[1]
        # Every number of the solution is written in the question, a result, or a word.
        assert p.level == problem.level
      else:
        assert p.question.startswith(problem.question + ' ')
        assert p.level > problem.level
  assert missing < len(PROBLEMS) * len(LABELS) * 0.02


def test_new_numbers_stand_where_the_old_stood():
  """The given numbers of the new story, put back, give the old question."""
  changed = 0
  for problem in PROBLEMS:
    new = augment(problem, seed=2).get('numbers')
    if new is None:
      continue
    old_numbers = re.findall(r'\d+', problem.question)
    new_numbers = re.findall(r'\d+', new.question)
    swaps = dict(zip(new_numbers, old_numbers, strict=True))
    moved = [(a, b) for a, b in zip(old_numbers, new_numbers) if a != b]
    assert moved
    changed += len(moved)
    # Without results in between: the numbers of each first step are given ones.
    left = equations(new.solution)[0].split('=')[0]
    if len(swaps) == len(set(old_numbers)):
      back = [swaps.get(n, n) for n in re.findall(r'\d+', left)]
      first = [t.value for t in find_story(problem).steps[0].terms]
      assert back == list(map(str, first))
  assert changed > len(PROBLEMS)


def value_of(tail, start):
  """Answers a follow-up question as a reader would, without the augmenter's code."""
  numbers = [int(n) for n in re.findall(r'\d+', tail)]
  parts = {'half': 2, 'a third': 3, 'a quarter': 4, 'a fifth': 5}
  if tail.startswith('That number is'):
    (k,) = [k for word, k in parts.items() if f'is {word} of another' in tail]
    return start * k
  if 'average' in tail:
    return (start + numbers[0]) / 2
  if tail.startswith('If'):
    limit, minus, plus = numbers
    return start - minus if start > limit else start + plus
  if tail.startswith('Take'):
    a, k, b = numbers
    return (start - a) * k + b
  if tail.startswith('Add'):
    a, k, b = numbers
    return (start + a) / k - b
  if '%' in tail:
    return start * numbers[0] / 100
  (k,) = [k for word, k in parts.items() if f'is {word} of that' in tail]
  return start / k


def test_follow_up_questions_read_as_they_are_answered():
  kinds = set()
  for problem in PROBLEMS:
    start = find_story(problem).answer
    for kind, p in augment(problem, seed=1).items():
      if kind != 'numbers':
        tail = p.question.removeprefix(problem.question + ' ')
        assert value_of(tail, start) == int(p.answer), p
        kinds.add(re.sub(r'\d+', '#', tail))
  # Parts, parts of another, percent; average; condition; two kinds of three steps.
  assert len(kinds) == 4 + 4 + 1 + 1 + 1 + 2


def test_augmenter_as_a_model():
  author = ArithmeticAugmenter(PROBLEMS, seed=1)
  problem = PROBLEMS[3]
  text = author(f'Rewrite: {PROBLEMS[5].question}\nGood.\nNow: {problem.question}\n')
  items = [ITEM.fullmatch(line) for line in text.splitlines()]
  new = augment(problem, seed=1)
  assert [(int(m[1]), m[2], m[3]) for m in items] == [
    (n, LABELS[kind], new[kind].question) for n, kind in enumerate(LABELS, 1)
  ]
  assert author(problem.question) == text
  assert ArithmeticAugmenter(PROBLEMS, seed=2)(problem.question) != text
  some = author(
    '1. Increase the complexity\n2. Change specific numbers\n\n' + problem.question
  )
  assert [ITEM.fullmatch(line)[2] for line in some.splitlines()] == [
    'Increase the complexity',
    'Change specific numbers',
  ]
  with pytest.raises(ValueError, match=f'none of the {len(PROBLEMS)} questions'):
    author('What is 1+1?')
