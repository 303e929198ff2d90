"""Mixture of Opinions: other models' solutions stand before the one to be learnt.

Chen, Pesaranghader and Sadhu 2025, arXiv 2502.19622. The layouts are those of the
authors' code, separators and spacing included; the sentences in them are ours.

As there, `#### ` stands before the whole of an opinion, which mostly ends with another
one. Not as there: few-shot examples are drawn by a seed and are never the row itself,
and an opinion that holds a separator is refused or escaped, so that every row can be
read back.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from mrjax.data.prompts import render_completion, render_prompt
from mrjax.records import Problem

RESERVED_POLICIES = ('error', 'escape')

# What ends an opinion; greedy decoding stops after 512 tokens otherwise.
STOPS = (
  *('USER:', 'ASSISTANT:', 'QUESTION:', 'SOLUTION:', '###Instruction', 'Response:'),
  *('\n\nProblem', '\nProblem', 'Problem:', '<|eot_id|>', '>>>', '<<<'),
)

NUMBER_INSTRUCTION = (
  'Work through this mathematics problem one step at a time. Finish with #### and the '
  'final answer behind it.'
)
BOXED_INSTRUCTION = (
  'Work through this mathematics problem one step at a time, and simplify the final '
  'answer as far as it goes.'
)
COMMITTEE = (
  'Others have looked at this question. Their opinions follow, each behind >>> and its '
  'number.'
)
SOLUTION_CUE = 'Your own solution comes next.'

_QUESTION, _SOLUTION = 'QUESTION:', 'SOLUTION:'
_START, _END = 'OPINIONS START', 'OPINIONS END'
_SHOTS_START, _SHOTS_END = 'Examples starts>>>', '<<<Examples ends'
_CUES = (SOLUTION_CUE, 'now start write your solution below.')  # ours, the authors'
_RESERVED = re.compile(rf'\\*(?:>>>|{_START}|{_END})')
_ESCAPED = re.compile(rf'\\(\\*(?:>>>|{_START}|{_END}))')

# Rows with opinions -----------------------------------------------------------


class Row(NamedTuple):
  """The parts of a row; `prompt_ori` is the question and a newline behind it."""

  prompt_ori: str
  opinions: tuple[str, ...]
  label: str


def prompt_ori_of(problem: Problem) -> str:
  """Returns the question with its options, and the newline before `SOLUTION:`."""
  return render_prompt('moo', problem).text[len(_QUESTION) : -len(_SOLUTION)]


def format_prompt(
  prompt_ori: str, opinions: Sequence[str], *, reserved: str = 'error'
) -> str:
  """Returns a row up to `SOLUTION:`; the label follows directly.

  Args:
    prompt_ori: As `prompt_ori_of` makes it.
    opinions: They may hold newlines.
    reserved: As in `protect`.

  Raises:
    ValueError: An opinion that `protect` refuses, or a question with `OPINIONS START`.
  """
  block = _block(prompt_ori, opinions, reserved=reserved)
  return f'{_QUESTION}{prompt_ori}\n{block}\n{_SOLUTION}'


def parse_row(text: str) -> Row:
  """Returns the parts of a row, whose `format_prompt` and label give the text again.

  Raises:
    ValueError: The text is no row with opinions.
  """
  head, start, rest = text.partition(f'\n{_START}\n')
  block, end, label = rest.partition(f'\n{_END}\n{_SOLUTION}')
  if not head.startswith(_QUESTION) or not start or not end:
    raise ValueError(
      f'no row with opinions, which has {_QUESTION}, then on lines of their own '
      f'{_START}, {_END} and {_SOLUTION}: {text[:80]!r}'
    )
  opinions: list[str] = []
  while block:
    opening = f'>>>{len(opinions)}: #### '
    if not block.startswith(opening):
      raise ValueError(f'opinions begin with {opening!r}, found {block[:40]!r}')
    opinion, following, block = block.removeprefix(opening).partition(
      f'\n>>>{len(opinions) + 1}: #### '
    )
    block = following.removeprefix('\n') + block
    opinions.append(_ESCAPED.sub(r'\1', opinion))
  return Row(head.removeprefix(_QUESTION), tuple(opinions), label)


def protect(opinion: str, *, reserved: str = 'error') -> str:
  """Returns an opinion as it may stand between separators.

  One that holds `>>>`, `OPINIONS START` or `OPINIONS END` was not collected with the
  stop strings, and a reader could not tell it from two.

  Args:
    opinion: What a model said.
    reserved: What happens to such an opinion: 'error', or 'escape': a backslash goes
      in front of each, which `parse_row` takes away.

  Raises:
    ValueError: Such an opinion, or no such policy.
  """
  if reserved not in RESERVED_POLICIES:
    raise ValueError(
      f'unknown reserved {reserved!r}; one of {", ".join(RESERVED_POLICIES)}'
    )
  found = _RESERVED.search(opinion)
  if found and reserved == 'error':
    raise ValueError(
      f'an opinion holds {found[0]!r}, which separates opinions: {opinion!r:.80}; '
      "collect it with the stop strings of MoO, or give reserved='escape'"
    )
  return _RESERVED.sub(lambda found: f'\\{found[0]}', opinion)


def _block(prompt_ori: str, opinions: Sequence[str], *, reserved: str) -> str:
  """The opinions between their headings; without any, an empty line."""
  if _START in prompt_ori:
    raise ValueError(
      f'the question holds {_START!r}, which opens the opinions: {prompt_ori!r:.80}'
    )
  lines = [
    f'>>>{number}: #### {protect(opinion, reserved=reserved)}'
    for number, opinion in enumerate(opinions)
  ]
  return '\n'.join([_START, '\n'.join(lines), _END])


# Few-shot prompts -------------------------------------------------------------


def draw_shots(
  problem: Problem, pool: Sequence[Problem], num_shots: int, *, seed: int
) -> list[Problem]:
  """Returns examples for a problem, drawn without replacement, by seed and problem id.

  The authors draw without a seed, and for a training row perhaps the row itself: here
  no example has the id or the question of the problem.

  Args:
    problem: Whose prompt the examples are for.
    pool: The training split; the draw depends on its order.
    num_shots: How many.
    seed: Of the draw.

  Raises:
    ValueError: The pool has too few other problems.
  """
  if num_shots < 0:
    raise ValueError(f'num_shots={num_shots}; want 0 or more')
  draw = random.Random(f'{seed}/{problem.id}').random  # the same in every Python
  places: dict[int, int] = {}  # of a shuffle, only where they have changed
  shots: list[Problem] = []
  for size in range(len(pool), 0, -1):
    if len(shots) == num_shots:
      break
    place = int(draw() * size)
    shot = pool[places.get(place, place)]
    places[place] = places.get(size - 1, size - 1)
    if shot.id != problem.id and shot.question != problem.question:
      shots.append(shot)
  if len(shots) < num_shots:
    raise ValueError(
      f'{len(pool)} problems hold {len(shots)} other than {problem.id!r}, want '
      f'{num_shots} examples; draw fewer, or from a larger split'
    )
  return shots


def few_shot_prompt(
  problem: Problem, shots: Sequence[Problem], *, instruction: str = NUMBER_INSTRUCTION
) -> str:
  """Returns the prompt that asks for an opinion: instruction, examples, problem.

  Without examples the problem follows the instruction with nothing between, as there.
  """
  return _examples(shots, instruction) + render_prompt('moo', problem).text


def single_layer_prompt(
  prompt_ori: str,
  opinions: Sequence[str],
  *,
  shots: Sequence[Problem] = (),
  instruction: str = NUMBER_INSTRUCTION,
  committee: str = COMMITTEE,
  reserved: str = 'error',
) -> str:
  """Returns the prompt that gives opinions to a model which was not trained on any.

  The single-layer mixture of agents that the paper compares with. Where its lines break
  is ours, as far as the parts do not say.

  Raises:
    ValueError: As `format_prompt`.
  """
  block = _block(prompt_ori, opinions, reserved=reserved)
  return (
    f'{_examples(shots, instruction)}{_QUESTION}{prompt_ori}{committee}\n{block}\n'
    f'{SOLUTION_CUE}\n{_SOLUTION}'
  )


def _examples(shots: Sequence[Problem], instruction: str) -> str:
  if not shots:
    return instruction
  blocks = [
    render_prompt('moo', shot).text + render_completion('moo', shot) for shot in shots
  ]
  return f'{instruction}\n\n{_SHOTS_START}\n{"".join(blocks)}{_SHOTS_END}\n\n'


def split_text(text: str) -> tuple[str, str]:
  """Returns (prompt, label) of a text of any of the four layouts; joined, the text.

  In the order of the authors' evaluation: after the cue to solve (theirs or ours),
  after the opinions, after the examples, or after the one `SOLUTION:` there is.

  Raises:
    ValueError: None of them.
  """
  for cue in _CUES:
    if cue in text:
      return _cut_after(text, f'{cue}\n{_SOLUTION}')
  if _START in text and _END in text:
    return _cut_after(text, f'\n{_END}\n{_SOLUTION}')
  if _SHOTS_START in text and _SHOTS_END in text:
    return _cut_after(text, _SOLUTION, text.index(_SHOTS_END))
  if text.count(_QUESTION) == text.count(_SOLUTION) == 1:
    return _cut_after(text, _SOLUTION)
  raise ValueError(
    f'want one {_QUESTION} and one {_SOLUTION} in a text without opinions or examples, '
    f'found {text.count(_QUESTION)} and {text.count(_SOLUTION)}: {text[:80]!r}'
  )


def _cut_after(text: str, marker: str, start: int = 0) -> tuple[str, str]:
  place = text.find(marker, start)
  if place < 0:
    raise ValueError(f'no {marker!r} where the prompt should end: {text[-80:]!r}')
  place += len(marker)
  return text[:place], text[place:]
