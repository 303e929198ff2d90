"""The public problem sets: their files, their place on the hub, and their records."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mrjax.records import Problem, Record


@dataclasses.dataclass(frozen=True)
class PublicSet:
  """Where a set is found and how a record of it becomes a problem.

  `files` has the names looked for in `--data_root`, first found first; `hub` has
  (repository, configurations, split there). Ids are given by who reads the records.
  """

  files: Mapping[str, tuple[str, ...]]
  hub: Mapping[str, tuple[str, tuple[str | None, ...], str]]
  convert: Callable[[Record], Problem]


def _text(row: Record, name: str) -> str:
  value = row[name]
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'field {name!r} must be a string with something in it: {value!r}')
  return value


def _gsm8k(row: Record) -> Problem:
  """{question, answer}; the answer's last line is `#### 1,234`."""
  solution = _text(row, 'answer')
  _, marker, answer = solution.rpartition('####')
  if not marker or not answer.strip():
    raise ValueError(f'no "#### number" at the end of the answer: {solution[-60:]!r}')
  return Problem(
    id='',
    question=_text(row, 'question'),
    answer=answer.strip().replace(',', ''),
    solution=solution,
    source='gsm8k',
  )


def _math(row: Record) -> Problem:
  """{problem, solution, level, subject or type}; MATH-500 also {answer, unique_id}."""
  solution = _text(row, 'solution')
  subject = row.get('subject') or row.get('type')
  return Problem(
    id='',
    question=_text(row, 'problem'),
    answer=row.get('answer') or _last_boxed(solution),
    solution=solution,
    source=f'math/{subject}' if subject else 'math',
    level=row.get('level'),
  )


def _last_boxed(solution: str) -> str:
  start = solution.rfind('\\boxed{')
  depth = 0
  for i in range(start, len(solution)) if start >= 0 else ():
    depth += {'{': 1, '}': -1}.get(solution[i], 0)
    if depth == 0 and solution[i] == '}':
      return solution[start + len('\\boxed{') : i]
  raise ValueError(f'no answer, and no \\boxed{{}} in the solution: {solution[-60:]!r}')


def _aqua(row: Record) -> Problem:
  """{question, options ('A)12' ...), rationale, correct}."""
  options, correct = row['options'], row['correct']
  _check_choice(options, [str(option)[:1] for option in options], correct)
  return Problem(
    id='',
    question=_text(row, 'question'),
    answer=correct,
    # The form of Mixture of Opinions, https://arxiv.org/abs/2502.19622.
    solution=f'{row["rationale"]} #### {correct}',
    source='aqua',
    options=tuple(options),
  )


def _csqa(row: Record) -> Problem:
  """The official form {question: {stem, choices: [{label, text}]}, answerKey}.

  The hub's form has a string question and choices {label: [], text: []}. The test split
  has no answers.
  """
  question: Any = row['question']
  if isinstance(question, str):
    stem, choices = question, row['choices']
    pairs = list(zip(choices['label'], choices['text'], strict=True))
  else:
    stem = question['stem']
    pairs = [(choice['label'], choice['text']) for choice in question['choices']]
  options = tuple(f'{label}){text}' for label, text in pairs)
  answer = row.get('answerKey') or None
  if answer is not None:
    _check_choice(options, [label for label, _ in pairs], answer)
  return Problem(
    id='',
    question=_text({'stem': stem}, 'stem'),
    answer=answer,
    source='csqa',
    options=options,
  )


def _check_choice(options: Any, labels: list[str], correct: Any) -> None:
  if len(options) < 2 or correct not in labels:
    raise ValueError(f'the right choice {correct!r} is not among {labels}')


_MATH_SUBJECTS = (
  'algebra',
  'counting_and_probability',
  'geometry',
  'intermediate_algebra',
  'number_theory',
  'prealgebra',
  'precalculus',
)

PUBLIC_SETS: dict[str, PublicSet] = {
  'gsm8k': PublicSet(
    {
      split: (f'gsm8k_{split}.jsonl', f'gsm8k/{split}.jsonl')
      for split in ('train', 'test')
    },
    {split: ('openai/gsm8k', ('main',), split) for split in ('train', 'test')},
    _gsm8k,
  ),
  # The test split is the 500 problems that evaluation has settled on.
  'math': PublicSet(
    {
      'train': ('math_train.jsonl', 'math/train.jsonl'),
      'test': ('math500_test.jsonl', 'math_test.jsonl', 'math/test.jsonl'),
    },
    {
      'train': ('EleutherAI/hendrycks_math', _MATH_SUBJECTS, 'train'),
      'test': ('HuggingFaceH4/MATH-500', (None,), 'test'),
    },
    _math,
  ),
  'aqua': PublicSet(
    {
      split: (f'aqua_{split}.jsonl', f'aqua/{split}.jsonl', f'AQuA/{split}.json')
      for split in ('train', 'dev', 'test')
    },
    {
      split: ('deepmind/aqua_rat', ('raw',), hub)
      for split, hub in (('train', 'train'), ('dev', 'validation'), ('test', 'test'))
    },
    _aqua,
  ),
  'csqa': PublicSet(
    {
      'train': ('csqa_train.jsonl', 'csqa/train.jsonl', 'train_rand_split.jsonl'),
      'dev': ('csqa_dev.jsonl', 'csqa/dev.jsonl', 'dev_rand_split.jsonl'),
      'test': (
        'csqa_test.jsonl',
        'csqa/test.jsonl',
        'test_rand_split_no_answers.jsonl',
      ),
    },
    {
      split: ('tau/commonsense_qa', (None,), hub)
      for split, hub in (('train', 'train'), ('dev', 'validation'), ('test', 'test'))
    },
    _csqa,
  ),
}
