"""What weak-to-strong works on: the responses of models, and its records and prompts.

Yang et al. 2024, "Weak-to-Strong Reasoning", arXiv 2407.13647. Prompts are the layout
'w2s'; a demonstration is a problem whose solution is what the weak model wrote.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mrjax.data.prompts import render_completion, render_prompt
from mrjax.grading.rules import Rule
from mrjax.records import Problem, Record

TEMPLATE = 'w2s'
ANSWER_KEYS = {'w2s_gsm8k': '####', 'w2s_math': 'The answer is:'}
"""What stands before the answer of a solution, by grading rule."""
DEMONSTRATION_FILTERS = ('has_key', 'correct')

_ANNOTATION = re.compile(r'<<[^>]*>>')


def gold_records(problems: Iterable[Problem], *, answer_key: str) -> list[Record]:
  """Returns the SFT records that make the weak model (and the ceiling) of solutions.

  Calculator annotations go; a solution without the answer key gets one space, the key,
  one space and the answer. So GSM8K ends as it does and MATH as the paper has it.

  Raises:
    ValueError: A problem without a solution, or without the answer that it needs.
  """
  records = []
  for problem in problems:
    if problem.solution is None:
      raise ValueError(f'problem {problem.id!r} has no solution to train on')
    solution = _ANNOTATION.sub('', problem.solution)
    if answer_key not in solution:
      if problem.answer is None:
        raise ValueError(
          f'problem {problem.id!r} has no answer to put after {answer_key!r}, which '
          'its solution lacks; take a data set with answers or another answer key'
        )
      solution = f'{solution} {answer_key} {problem.answer}'
    records.append(sft_record(problem, solution) | {'origin': 'gold'})
  return records


def sft_record(problem: Problem, text: str) -> Record:
  """Returns an SFT record of a problem and one solution of it."""
  return {
    'prompt': prompt_of(problem),
    'completion': render_completion(
      TEMPLATE, dataclasses.replace(problem, solution=text)
    ),
    'problem_id': problem.id,
  }


class Response(NamedTuple):
  """What a model wrote about a question; `answer` is '' where it gave none."""

  text: str
  answer: str
  sample_index: int = 0
  correct: bool | None = None  # None where the problem has no gold


def clean_text(text: str) -> str:
  """Returns a response as the paper stores it: no spaces and then no dots at its ends.

  The dot that ends a sentence goes too: `#### 18.` answers `18`.
  """
  return text.strip().strip('.')


def read_responses(
  samples: Iterable[Record],
  problems: Sequence[Problem],
  *,
  rule: Rule,
  num_samples: int,
  name: str = 'samples',
) -> dict[str, tuple[Response, ...]]:
  """Returns the responses by problem, in the order of the problems and sample indices.

  Answers are extracted, and judged where a problem has a gold, by `rule`, whatever a
  graded sample says. The order of the samples does not matter.

  Texts stay whole. The paper samples with the stop strings `Question` and `Answer`; a
  text that runs on would be trained on so, though its answer stands before `Question`.

  Args:
    samples: `problem_id`, `sample_index` and `text`; other fields are ignored.
    problems: The questions that were asked.
    rule: 'w2s_gsm8k' or 'w2s_math' in the paper.
    num_samples: Of every problem: 1 greedy or, for the vote, 10.
    name: Of the samples, for messages.

  Raises:
    ValueError: A malformed sample, one that comes twice or belongs to no problem, or a
      problem with more or fewer samples (the paper's code asserts the same).
  """
  if num_samples < 1:
    raise ValueError(f'num_samples is {num_samples}, want at least 1')
  places = {problem.id: place for place, problem in enumerate(problems)}
  found: list[dict[int, str]] = [{} for _ in problems]
  strangers = []
  for number, record in enumerate(samples, start=1):
    key, index, text = (record.get(n) for n in ('problem_id', 'sample_index', 'text'))
    if not isinstance(key, str) or type(index) is not int or not isinstance(text, str):
      raise ValueError(
        f'{name}: record {number} has problem_id {key!r:.40}, sample_index '
        f'{index!r:.40} and text {text!r:.40}; want a string, a whole number and a '
        'string'
      )
    if key not in places:
      strangers.append(key)
    elif index in found[places[key]]:
      raise ValueError(
        f'{name}: sample {index} of problem {key!r} comes twice; samples of one '
        'problem need different indices'
      )
    else:
      found[places[key]][index] = text
  if strangers:
    raise ValueError(
      f'{name}: {len(strangers)} samples belong to none of the {len(problems)} '
      f'problems, first to {strangers[0]!r}; give the samples of these problems alone'
    )
  uneven = [p.id for p, texts in zip(problems, found) if len(texts) != num_samples]
  if uneven:
    raise ValueError(
      f'{name}: {len(uneven)} of {len(problems)} problems do not have {num_samples} '
      f'sample(s), first {uneven[0]!r} with {len(found[places[uneven[0]]])}; finish '
      'the sampling run or correct the number'
    )
  return {
    problem.id: tuple(
      _respond(problem, index, texts[index], rule) for index in sorted(texts)
    )
    for problem, texts in zip(problems, found)
  }


def read_greedy(
  samples: Iterable[Record], problems: Sequence[Problem], *, rule: Rule, name: str
) -> dict[str, Response]:
  """Returns the one response of each problem; see `read_responses`."""
  responses = read_responses(samples, problems, rule=rule, num_samples=1, name=name)
  return {key: response for key, (response,) in responses.items()}


def _respond(problem: Problem, index: int, text: str, rule: Rule) -> Response:
  text = clean_text(text)
  gold = problem.solution if problem.answer is None else problem.answer
  if gold is None:
    return Response(text, rule.extract(text, problem.options) or '', index)
  try:
    answer, correct = rule.grade(text, gold, problem.options)
  except ValueError as error:
    raise ValueError(f'problem {problem.id!r}: {error}') from None
  return Response(text, answer or '', index, correct)


def check_covered(
  problems: Iterable[Problem], responses: Mapping[str, Any], name: str
) -> None:
  """Raises ValueError where a problem has no responses."""
  missing = [problem.id for problem in problems if problem.id not in responses]
  if missing:
    raise ValueError(
      f'{name}: {len(missing)} problem(s) have no response, first {missing[0]!r}; '
      'every model answers every question'
    )


def pick_demonstrations(
  problems: Sequence[Problem],
  weak: Mapping[str, Response],
  *,
  answer_key: str,
  num_shots: int = 4,
  seed: int = 42,
  only: str = 'has_key',
) -> list[Problem]:
  """Returns solved problems for the few-shot prompt, solved by the weak model.

  All responses are shuffled once, in the order of the problems, and the first that
  qualify are taken, as in the authors' code (there with seed 42). As there, a
  demonstration's own question is asked later too, with its weak solution in view.

  Args:
    problems: The questions of `train_2`.
    weak: The weak model's response to each.
    answer_key: What a demonstration must hold to qualify.
    num_shots: 4 for every data set of the paper.
    seed: Of the shuffle.
    only: 'has_key', or 'correct' (an ablation of the paper, which needs golds).

  Raises:
    ValueError: Too few responses qualify, or no such filter.
  """
  if num_shots < 0:
    raise ValueError(f'num_shots is {num_shots}, want at least 0')
  if only not in DEMONSTRATION_FILTERS:
    raise ValueError(
      f'unknown demonstration filter {only!r}; one of '
      f'{", ".join(DEMONSTRATION_FILTERS)}'
    )
  check_covered(problems, weak, 'weak responses')
  shuffled = list(problems)
  random.Random(seed).shuffle(shuffled)
  fit = [
    dataclasses.replace(problem, solution=response.text)
    for problem in shuffled
    for response in [weak[problem.id]]
    if (response.correct if only == 'correct' else answer_key in response.text)
  ]
  if len(fit) < num_shots:
    what = 'are correct' if only == 'correct' else f'hold {answer_key!r}'
    raise ValueError(
      f'{len(fit)} of {len(problems)} weak responses {what}, want {num_shots} '
      'demonstrations; train the weak model longer or ask for fewer shots'
    )
  return fit[:num_shots]


def prompt_of(problem: Problem, demonstrations: Iterable[Problem] = ()) -> str:
  """Returns the zero-shot prompt, or with demonstrations the few-shot one.

  Each demonstration, its solution included, is followed by a blank line.
  """
  return (
    ''.join(
      render_prompt(TEMPLATE, solved).text
      + render_completion(TEMPLATE, solved)
      + '\n\n'
      for solved in demonstrations
    )
    + render_prompt(TEMPLATE, problem).text
  )
