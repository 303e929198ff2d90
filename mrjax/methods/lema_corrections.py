"""LEMA's corrections as text: what a corrector writes, and how it is read.

An et al. 2023, "Learning From Mistakes Makes LLM Better Reasoner", arXiv 2310.20689,
section 2 and appendix: which step of a solution is wrong, why, and the solution anew
from that step on. A correction that cannot be read is rejected for a named reason.
"""

import dataclasses
import re
from collections.abc import Sequence

TASK_RULES = {'gsm8k': 'lema_gsm8k', 'math': 'lema_math', 'csqa': 'lema_csqa'}
"""The tasks, each with the rule that reads its answers."""

DOTS = '...'
"""Stands for the steps before the corrected one; trained on, as in the paper."""

ANSWER = 'The answer is'

REASONS = (
  'no_incorrect_step',  # does not begin with `Step j.`
  'step_out_of_range',  # names a step that the wrong solution does not have
  'no_explanation',
  'no_correct_solution',  # the heading is missing
  'no_braces',  # no `{` after the heading
  'unclosed_solution',  # no `}`: cut off
  'empty_solution',
  'starts_at_other_step',  # does not go on from step j
  'misnumbered_steps',
  'no_final_answer',
)
"""Why a text is no correction, in the order of looking."""

_STEP = re.compile(r'Step\s*(\d+)\s*[:.]\s*')
_NEXT_BLOCK = re.compile(r'^[ \t]*Question:', re.MULTILINE)
_EXPLANATION = re.compile(r'^[ \t]*Explanation:', re.MULTILINE)
_OPENING = re.compile(r'\s*\{')
_CLOSING = re.compile(r'^[ \t]*\}[ \t]*$', re.MULTILINE)
_DOTS = re.compile(r'(?:\.\s*){3,}|…')


class Rejected(ValueError):
  """A correction that is not used; `reason` is what it is counted under."""

  def __init__(self, reason: str, message: str):
    super().__init__(f'{reason}: {message}')
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Correction:
  """The first wrong step, why it is wrong, and the solution from it on.

  `step` counts from 1 and is None for CSQA, whose answers have no steps. `solution` are
  the corrected steps from `step` on, without their numbers; for CSQA its lines.
  """

  step: int | None
  explanation: str
  solution: tuple[str, ...]

  def body(self) -> str:
    """Returns what stands in the braces, the dots excluded."""
    return write_body(self.solution, first=self.step)


def check_task(task: str) -> None:
  """Raises ValueError for an unknown task."""
  if task not in TASK_RULES:
    raise ValueError(f'unknown task {task!r}; want one of {", ".join(TASK_RULES)}')


def write_body(steps: Sequence[str], *, first: int | None) -> str:
  """Returns `Step i: ...` lines that count from `first`; plain lines for None."""
  if first is None:
    return '\n'.join(steps)
  return '\n'.join(f'Step {i}: {step}' for i, step in enumerate(steps, first))


def parse_body(text: str) -> tuple[str, ...]:
  """Returns the steps of a numbered body without their numbers, in order."""
  return tuple(step for _, step in _numbered(text.splitlines()))


def parse_correction(
  text: str, *, task: str, num_steps: int | None = None
) -> Correction:
  """Returns the correction that a corrector wrote after `Incorrect Step:`.

  For CSQA after `Mistakes:`. The heading itself may be repeated; what follows the
  closing brace, or a next `Question:`, is ignored; the dots may be missing.

  Args:
    text: What the corrector wrote.
    task: 'gsm8k', 'math' or 'csqa'.
    num_steps: Steps of the wrong solution; None leaves the step unchecked.

  Raises:
    Rejected: The text is no correction; the reason is one of `REASONS`.
    ValueError: An unknown task.
  """
  check_task(task)
  following = _NEXT_BLOCK.search(text)
  text = text[: following.start()] if following else text
  if task == 'csqa':
    return _parse_csqa(text)
  head = re.match(r'\s*(?:Incorrect Step:\s*)?Step\s*(\d+)\b', text)
  if not head:
    raise Rejected('no_incorrect_step', f'want `Step j.` first, found {text!r:.60}')
  step = int(head[1])
  if step < 1 or (num_steps is not None and step > num_steps):
    raise Rejected('step_out_of_range', f'step {step} of {num_steps}')
  heading = _EXPLANATION.search(text, head.end())
  if not heading:
    raise Rejected('no_explanation', 'no line starts with `Explanation:`')
  explanation, lines = _explained(text[heading.end() :], 'Correct Solution:')
  if lines and _DOTS.fullmatch(lines[0].strip()):
    lines = lines[1:]
  steps = _numbered(lines)
  if not steps:
    raise Rejected('empty_solution', 'no step stands between the braces')
  numbers = [
    step + i if number is None else number for i, (number, _) in enumerate(steps)
  ]
  if numbers[0] != step:
    raise Rejected(
      'starts_at_other_step', f'step {step} is wrong, the solution starts at {numbers}'
    )
  if numbers != list(range(step, step + len(steps))):
    raise Rejected('misnumbered_steps', f'the steps are {numbers}')
  return _answered(Correction(step, explanation, tuple(line for _, line in steps)))


def _parse_csqa(text: str) -> Correction:
  text = re.sub(r'^\s*Mistakes:', '', text)
  explanation, lines = _explained(text, 'Corrected Answer:')
  lines = [line.strip() for line in lines if line.strip()]
  if not lines:
    raise Rejected('empty_solution', 'nothing stands between the braces')
  return _answered(Correction(None, explanation, tuple(lines)))


def _explained(text: str, heading: str) -> tuple[str, list[str]]:
  """Returns the text before a heading and the lines in the braces after it."""
  found = re.search(rf'^[ \t]*{heading}', text, re.MULTILINE)
  explanation = text[: found.start()].strip() if found else text.strip()
  if not explanation:
    raise Rejected('no_explanation', 'the explanation is empty')
  if not found:
    raise Rejected('no_correct_solution', f'no line starts with `{heading}`')
  opening = _OPENING.match(text, found.end())
  if not opening:
    raise Rejected('no_braces', f'no brace after `{heading}`')
  closing = _CLOSING.search(text, opening.end())
  if not closing:
    raise Rejected('unclosed_solution', 'no line with a closing brace')
  return explanation, text[opening.end() : closing.start()].strip().splitlines()


def _numbered(lines: Sequence[str]) -> list[tuple[int | None, str]]:
  """Returns (number, text) of every step; other lines belong to the step before.

  The final answer may stand on a line without a number: that is a step too.
  """
  steps: list[tuple[int | None, str]] = []
  for line in filter(None, map(str.strip, lines)):
    match = _STEP.match(line)
    if match:
      steps.append((int(match[1]), line[match.end() :]))
    elif not steps or line.startswith(ANSWER):
      steps.append((None, line))
    else:
      number, text = steps[-1]
      steps[-1] = number, f'{text}\n{line}'
  return steps


def _answered(correction: Correction) -> Correction:
  if ANSWER not in correction.solution[-1]:
    raise Rejected(
      'no_final_answer', f'want `{ANSWER} X.` last: {correction.solution[-1]!r:.60}'
    )
  return correction
