"""LEMA by the cases of its paper: paths, corrections, prompts and training records."""

import json
import re

import pytest

from mrjax.grading.rules import get_rule
from mrjax.methods.lema import (
  WrongPath,
  is_right,
  select_wrong_paths,
  split_steps,
)
from mrjax.methods.lema_corrections import (
  REASONS,
  TASK_RULES,
  Correction,
  Rejected,
  parse_correction,
)
from mrjax.methods.lema_examples import EXAMPLES
from mrjax.methods.lema_pairs import Pair, make_pair, make_pairs
from mrjax.methods.lema_prompts import (
  correction_completion,
  correction_prompt,
  corrector_prompt,
  parse_query,
)
from mrjax.records import Problem

PEARS = Problem(
  id='7',
  question='Ann has 2 boxes of 5 pears and eats 3. How many are left?',
  answer='7',
)
PATH = WrongPath(
  PEARS, 'gsm8k', ('2*5=10.', '10-3=6.', 'The answer is 6.'), sample_index=4
)
CORRECTION = Correction(2, 'Three from ten is seven.', ('10-3=7.', 'The answer is 7.'))
COMPLETION = (
  ' Step 2.\nExplanation: Three from ten is seven.\nCorrect Solution:\n{\n...\n'
  'Step 2: 10-3=7.\nStep 3: The answer is 7.\n}'
)


def sample(text, *, problem_id='7', correct=False, extracted=None, index=0, **more):
  return {
    'problem_id': problem_id,
    'sample_index': index,
    'text': text,
    'correct': correct,
    'extracted': extracted,
  } | more


@pytest.mark.parametrize(
  ('text', 'answer', 'steps'),
  [
    ('2*5=10\n\n10-3=6\n#### 6', None, ['2*5=10', '10-3=6', 'The answer is 6.']),
    ('2*5=10\nA: 1,006.', None, ['2*5=10', 'The answer is 1,006.']),
    (
      'She has 2.5 pears. Mr. Tan has 3. The answer is 6.',
      None,
      ['She has 2.5 pears.', 'Mr. Tan has 3.', 'The answer is 6.'],
    ),
    (
      'Step 1: a = 2\nStep 2. b\nStep 3: The answer is: 6. Bye.\nMore',
      None,
      ['a = 2', 'b', 'The answer is 6. Bye.'],
    ),
    (
      'So \\boxed{\\frac{1}{2}}.',
      None,
      ['So \\boxed{\\frac{1}{2}}.', 'The answer is \\frac{1}{2}.'],
    ),
    ('x\n$\\boxed{6}$.', None, ['x', 'The answer is 6.']),
    ('no marker\nat all', '6', ['no marker', 'at all', 'The answer is 6.']),
    ('no marker\nat all', None, ['no marker', 'at all']),
    ('x\nThe answer is 6.\n\nQuestion: y\n#### 9', None, ['x', 'The answer is 6.']),
    (
      'Let\n\\[\n  a\n= b\n\\]\nbe.\n$$\nc\n$$',
      '1',
      ['Let', '\\[\n  a\n= b\n\\]', 'be.', '$$\nc\n$$', 'The answer is 1.'],
    ),
    ('a\n\\[\nb', '1', ['a', '\\[', 'b', 'The answer is 1.']),  # never closed
    ('#### ', None, []),
    ('', None, []),
  ],
)
def test_split_steps(text, answer, steps):
  assert split_steps(text, answer=answer) == steps


def test_fates_of_samples_are_counted():
  zero = Problem(id='0', question='1-1?', answer='0')
  samples = [
    sample('2*5=10\n#### 6', extracted='6', index=0),
    sample('10-3=7\n#### 7', correct=True, extracted='7', index=1),
    sample('2*5=10\n#### 6 ', extracted='6', index=2),  # the steps of the first
    sample('10-3=7\nThe answer is 7.', index=3),  # graded by a rule that wants ####
    sample('10-3 and', index=4),
    sample('so 8', extracted='8', index=5),
    sample('so 9', extracted='9', index=6),
    sample('#### 3', extracted='3', index=0, problem_id='0'),
  ]
  paths, counts = select_wrong_paths([PEARS, zero], samples, task='gsm8k')
  assert counts == {
    'samples': 8,
    'right': 1,
    'right_by_rule': 1,
    'unusable_reference': 1,
    'unanswered': 1,
    'duplicate': 1,
    'over_limit': 0,
    'kept': 3,
    'problems': 1,
  }
  assert [path.sample_index for path in paths] == [0, 5, 6]
  assert paths[0].body == 'Step 1: 2*5=10\nStep 2: The answer is 6.'
  assert paths[1].steps == ('so 8', 'The answer is 8.')
  more, counts = select_wrong_paths(
    [PEARS], samples[:7], task='gsm8k', distinct=False, keep_unanswered=True
  )
  assert [path.sample_index for path in more] == [0, 2, 4, 5, 6]
  assert more[2].body == 'Step 1: 10-3 and'
  assert (counts['kept'], counts['unanswered'], counts['duplicate']) == (5, 0, 0)


def test_limit_draws_by_seed_not_by_order():
  samples = [sample(f'so {i}\n#### {10 + i}', index=i) for i in range(9)]

  def drawn(order, seed):
    paths, counts = select_wrong_paths(
      [PEARS], order, task='gsm8k', max_per_problem=4, seed=seed
    )
    assert (counts['kept'], counts['over_limit']) == (4, 5)
    return [path.sample_index for path in paths]

  first = drawn(samples, 0)
  assert drawn(samples[::-1], 0) == first[::-1]
  assert len({tuple(drawn(samples, seed)) for seed in range(8)}) > 4


def test_annotations_stay_or_go():
  samples = [sample('2*5=<<2*5=10>>10\n#### 6')]
  for keep, step in ((True, '2*5=<<2*5=10>>10'), (False, '2*5=10')):
    paths, _ = select_wrong_paths([PEARS], samples, task='gsm8k', keep_annotations=keep)
    assert paths[0].steps[0] == step


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (sample('x', problem_id='8'), "problem '8', which is not among"),
    ({'problem_id': '7', 'text': 'x'}, 'run experiments.grade first'),
    (sample(None), 'want a graded sample'),
  ],
)
def test_bad_samples(bad, message):
  with pytest.raises(ValueError, match=message):
    select_wrong_paths([PEARS], [bad], task='gsm8k')


def test_unknown_task_and_limit():
  with pytest.raises(ValueError, match='one of gsm8k, math, csqa'):
    select_wrong_paths([], [], task='aqua')
  with pytest.raises(ValueError, match='max_per_problem=0'):
    select_wrong_paths([], [], task='math', max_per_problem=0)


@pytest.mark.parametrize('task', TASK_RULES)
def test_examples_are_pairs_and_read_back(task):
  pairs = EXAMPLES[task]
  steps = {'gsm8k': [2, 2, 1, 3], 'math': [3, 3, 5, 1], 'csqa': [None] * 4}[task]
  assert [pair.correction.step for pair in pairs] == steps
  rule = get_rule(TASK_RULES[task])
  for pair in pairs:
    problem = pair.path.problem
    assert pair.path.task == task
    assert not rule.grade(pair.path.body, problem.answer, problem.options)[1]
    text = '\n'.join(pair.corrected_steps)
    assert rule.grade(text, problem.answer, problem.options)[1]
    assert make_pair(pair.path, correction_completion(pair.correction)) == pair
    if task == 'csqa':
      for lines in (pair.path.steps, pair.correction.solution):
        assert [line.partition(':')[0] for line in lines[:5]] == list(problem.options)
        assert lines[5] == 'Reasons and Final Answer:'
    else:
      # The step named is the first that the correction changes.
      place = pair.correction.step - 1
      assert pair.path.steps[place] != pair.correction.solution[0]
      assert pair.corrected_steps[:place] == pair.path.steps[:place]
    if task == 'math':
      assert 'boxed' in pair.correction.solution[-2]
      assert re.fullmatch(r'The answer is -?\d+\.', pair.correction.solution[-1])


def test_explanations_are_of_their_own_examples():
  texts = [p.correction.explanation for task in EXAMPLES for p in EXAMPLES[task]]
  assert len(set(texts)) == 12


def test_corrector_prompt_layout():
  prompt = corrector_prompt(PATH)
  blocks = prompt.split('\n\n')
  assert len(blocks) == 6  # instruction, four examples, query
  assert blocks[-1] == (
    f'Question: {PEARS.question}\nOriginal Solution:\n{{\nStep 1: 2*5=10.\n'
    'Step 2: 10-3=6.\nStep 3: The answer is 6.\n}\nIncorrect Step:'
  )
  assert blocks[3] == (
    'Question: A tank for 240 liters is one third full. How many liters have to be '
    'added until it is three quarters full?\nOriginal Solution:\n{\n'
    'Step 1: One third of the tank is 240 / 4 = 60 liters.\n'
    'Step 2: Three quarters of the tank are 240 * 3 / 4 = 180 liters.\n'
    'Step 3: So 180 - 60 = 120 liters have to be added.\nStep 4: The answer is 120.\n'
    '}\nIncorrect Step: Step 1.\nExplanation: A third is found by dividing by 3, but '
    'the step divides by 4.\nCorrect Solution:\n{\n'
    'Step 1: One third of the tank is 240 / 3 = 80 liters.\n'
    'Step 2: Three quarters of the tank are 240 * 3 / 4 = 180 liters.\n'
    'Step 3: So 180 - 80 = 100 liters have to be added.\nStep 4: The answer is 100.\n}'
  )
  assert [block.count('{\n...\nStep') for block in blocks] == [0, 1, 1, 0, 1, 0]
  assert parse_query(prompt) == (PEARS.question, PATH.steps)
  assert parse_query(correction_prompt(PATH)) == (PEARS.question, PATH.steps)
  assert corrector_prompt(PATH, shots=0).count('Question:') == 1
  with pytest.raises(ValueError, match='shots=5; want 0 to 4'):
    corrector_prompt(PATH, shots=5)
  with pytest.raises(ValueError, match='Original Solution'):
    parse_query('Question: 1+1?')


def test_csqa_layout_has_no_steps():
  path = EXAMPLES['csqa'][1].path
  prompt = corrector_prompt(path, shots=1)
  assert 'Step' not in prompt
  assert prompt.endswith('The answer is garage.\n}\nMistakes:')
  assert (
    'Candidate Answers: garage, trunk, roof, field, seat.\nOriginal Answer:\n{\n'
    in (prompt)
  )
  assert '\nMistakes: The answer thinks of' in prompt
  assert '\nCorrected Answer:\n{\nclap them: ' in prompt


def test_training_record_of_a_pair():
  assert correction_prompt(PATH) == (
    'The following solution is incorrect. Name its first incorrect step, explain what '
    'is wrong with it and give the correct solution from the incorrect step on.\n\n'
    f'Question: {PEARS.question}\nOriginal Solution:\n{{\nStep 1: 2*5=10.\n'
    'Step 2: 10-3=6.\nStep 3: The answer is 6.\n}\nIncorrect Step:'
  )
  assert correction_completion(CORRECTION) == COMPLETION
  from_first = Correction(1, 'e', ('a', 'The answer is 7.'))
  assert '...' not in correction_completion(from_first)
  assert Pair(PATH, CORRECTION).corrected_steps == (
    '2*5=10.',
    '10-3=7.',
    'The answer is 7.',
  )


@pytest.mark.parametrize(
  ('ablate', 'heading', 'completion'),
  [
    ('step', 'Explanation:', COMPLETION.partition('Explanation:')[2]),
    (
      'explanation',
      'Incorrect Step:',
      ' Step 2.\nCorrect' + COMPLETION.partition('\nCorrect')[2],
    ),
    ('solution', 'Incorrect Step:', COMPLETION.partition('\nCorrect')[0]),
  ],
)
def test_ablations(ablate, heading, completion):
  prompt = correction_prompt(PATH, ablate=ablate)
  assert prompt.endswith('}\n' + heading)
  assert correction_completion(CORRECTION, ablate=ablate) == completion
  instruction = prompt.partition('\n\n')[0]
  words = {'step': 'Name', 'explanation': 'xplain', 'solution': 'give'}
  assert {part for part, word in words.items() if word not in instruction} == {ablate}


def test_ablations_of_csqa():
  pair = EXAMPLES['csqa'][0]
  prompt = correction_prompt(pair.path, ablate='explanation')
  assert prompt.endswith('}\nCorrected Answer:')
  completion = correction_completion(pair.correction, ablate='explanation')
  assert completion.startswith('\n{\nclap them: ')
  with pytest.raises(ValueError, match='csqa has no steps'):
    correction_prompt(pair.path, ablate='step')
  with pytest.raises(ValueError, match='csqa has no steps'):
    correction_completion(pair.correction, ablate='step')
  with pytest.raises(ValueError, match="unknown ablation 'dots'"):
    correction_prompt(PATH, ablate='dots')


@pytest.mark.parametrize(
  'text',
  [
    COMPLETION,
    COMPLETION + '\n\nQuestion: next\nOriginal Solution:\n{\n}',
    'Incorrect Step:' + COMPLETION,
    COMPLETION.replace('...\n', ''),
    COMPLETION.replace('...', '…').replace('Step 2.', 'Step 2: 10-3=6.'),
    COMPLETION.replace('Step 3: The', 'The'),
    COMPLETION.replace('\nStep 2: ', '\n\n  Step 2. '),
  ],
)
def test_corrections_that_are_read(text):
  assert parse_correction(text, task='gsm8k', num_steps=3) == CORRECTION


MALFORMED = [
  ('no_incorrect_step', ' All steps are right.'),
  ('no_incorrect_step', ''),
  ('step_out_of_range', COMPLETION.replace('Step 2.', 'Step 4.')),
  ('step_out_of_range', COMPLETION.replace('Step 2.', 'Step 0.')),
  ('no_explanation', COMPLETION.replace('Explanation: Three', 'Three')),
  ('no_explanation', COMPLETION.replace('Three from ten is seven.', '')),
  ('no_explanation', ' Step 2.\n\nQuestion: next' + COMPLETION),
  ('no_correct_solution', COMPLETION.partition('\nCorrect')[0]),
  ('no_correct_solution', COMPLETION.replace('Correct Solution', 'Solution')),
  ('no_braces', COMPLETION.replace('{', '')),
  ('unclosed_solution', COMPLETION.removesuffix('}')),
  ('empty_solution', COMPLETION.partition('...')[0] + '...\n}'),
  ('starts_at_other_step', COMPLETION.replace('Step 2: ', 'Step 1: ')),
  ('misnumbered_steps', COMPLETION.replace('Step 3: ', 'Step 4: ')),
  ('no_final_answer', COMPLETION.replace('The answer is', 'So it is')),
]


@pytest.mark.parametrize(('reason', 'text'), MALFORMED)
def test_malformed_corrections(reason, text):
  with pytest.raises(Rejected) as error:
    parse_correction(text, task='gsm8k', num_steps=3)
  assert error.value.reason == reason


def test_every_reason_is_tried_here():
  assert {reason for reason, _ in MALFORMED} == set(REASONS)


@pytest.mark.parametrize(
  ('reason', 'text'),
  [
    ('no_explanation', '\nCorrected Answer:\n{\nThe answer is a.\n}'),
    ('no_correct_solution', ' It is b.'),
    ('no_braces', ' It is b.\nCorrected Answer: b'),
    ('unclosed_solution', ' It is b.\nCorrected Answer:\n{\nThe answer is b.'),
    ('empty_solution', ' It is b.\nCorrected Answer:\n{\n\n}'),
    ('no_final_answer', ' It is b.\nCorrected Answer:\n{\nb\n}'),
  ],
)
def test_malformed_csqa_corrections(reason, text):
  with pytest.raises(Rejected) as error:
    parse_correction(text, task='csqa')
  assert error.value.reason == reason


def test_pairs_are_filtered_and_counted():
  right = WrongPath(PEARS, 'gsm8k', ('10-3=7', 'The answer is 7.'))
  no_gold = WrongPath(Problem(id='x', question='q'), 'gsm8k', ('The answer is 7.',))
  pairs, counts = make_pairs(
    [
      (PATH, COMPLETION),
      (PATH, COMPLETION),
      (PATH, COMPLETION.replace('is 7.', 'is 8.')),
      (PATH, COMPLETION.removesuffix('}')),
      (right, COMPLETION),
    ]
  )
  assert pairs == [Pair(PATH, CORRECTION)]
  assert counts == {
    'corrections': 5,
    'kept': 1,
    'duplicate': 1,
    'wrong_answer': 1,
    'unclosed_solution': 1,
    'path_is_right': 1,
  }
  with pytest.raises(ValueError, match="problem 'x' has no answer"):
    make_pair(no_gold, COMPLETION)


@pytest.mark.parametrize('task', TASK_RULES)
def test_records_round_trip(task):
  for pair in EXAMPLES[task]:
    record = json.loads(json.dumps(pair.to_record()))
    assert Pair.from_record(record) == pair
    assert WrongPath.from_record(record) == pair.path
  with pytest.raises(ValueError, match="field 'correction' of a pair"):
    Pair.from_record(pair.path.to_record())
  with pytest.raises(ValueError, match="field 'steps' of a wrong path is None"):
    WrongPath.from_record({'problem': {}, 'task': task})


MODELS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')


def test_real_wrong_paths(shared):
  """The four models of OpenAI's GSM8K release: 4 x 1,319 - 2,001 wrong paths."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  rows = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  problems = [
    Problem(
      id=str(i), question=row['question'], answer=row['ground_truth'].split('A: ')[-1]
    )
    for i, row in enumerate(rows)
  ]
  samples = [
    sample(
      row[model]['solution'],
      problem_id=str(i),
      correct=row[model]['is_correct'],
      index=index,
    )
    for i, row in enumerate(rows)
    for index, model in enumerate(MODELS)
  ]
  paths, counts = select_wrong_paths(
    problems, samples, task='gsm8k', distinct=False, keep_unanswered=True
  )
  assert (counts['samples'], counts['right'], counts['kept']) == (5276, 2001, 3275)
  corrected = [
    Correction(1, 'Anew.', tuple(split_steps(rows[int(p.problem.id)]['ground_truth'])))
    for p in paths
  ]
  texts = list(map(correction_completion, corrected))
  pairs, counts = make_pairs(zip(paths, texts, strict=True))
  assert counts['corrections'] == 3275
  assert counts['kept'] + counts.get('duplicate', 0) == 3275
  for pair in pairs:
    assert not is_right(pair.path.problem, 'gsm8k', pair.path.steps)
    assert is_right(pair.path.problem, 'gsm8k', pair.correction.solution)
    assert parse_query(corrector_prompt(pair.path))[1] == pair.path.steps
  # A corrector that repeats the mistake makes no pair.
  repeated = [
    correction_completion(Correction(1, 'No.', (*p.steps, 'The answer is -77.')))
    for p in paths
  ]
  assert make_pairs(zip(paths, repeated, strict=True))[1]['wrong_answer'] == 3275
