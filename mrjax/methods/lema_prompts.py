"""LEMA's two prompts about a wrong solution: a corrector's, and that of training.

An et al. 2023, arXiv 2310.20689, section 2.2 and appendix, in words of our own. The
corrector sees an instruction and annotated examples; the trained model one problem, and
is told that the solution *is* wrong. Both end where the correction begins, at
`Incorrect Step:` (CSQA: `Mistakes:`), and the correction follows with a space, so that
prompt and completion are cut at the end of a token. (Upstream encodes the two apart,
and its tokenizer puts that space there.)
"""

import re

from mrjax.data.prompts import list_candidates
from mrjax.methods.lema import WrongPath
from mrjax.methods.lema_corrections import DOTS, Correction, check_task, parse_body
from mrjax.methods.lema_examples import EXAMPLES

ABLATIONS = ('step', 'explanation', 'solution')
"""What a correction can be trained without."""

_CORRECTOR = (
  'The solutions below may contain errors. For each of them name the first incorrect '
  'step, explain what is wrong with it, and give the correct solution from that step '
  'on.'
)
_CORRECTOR_CSQA = (
  'The answers below may contain errors. For each of them explain the mistakes, then '
  'give the corrected answer.'
)
_TASKS_OF_PART = {
  'step': 'name its first incorrect step',
  'explanation': 'explain what is wrong with it',
  'solution': 'give the correct solution from the incorrect step on',
}
_TASKS_OF_PART_CSQA = {
  'explanation': 'explain the mistakes in it',
  'solution': 'give the corrected answer',
}
_LAST_BLOCK = re.compile(
  r'.*^Question: (?P<question>.*?)\nOriginal Solution:\n\{\n(?P<body>.*?)\n\}\n',
  re.DOTALL | re.MULTILINE,
)


def corrector_prompt(path: WrongPath, *, shots: int = 4) -> str:
  """Returns what a corrector completes: instruction, examples, the wrong path.

  Raises:
    ValueError: An unknown task, or more shots than there are examples.
  """
  check_task(path.task)
  examples = EXAMPLES[path.task]
  if not 0 <= shots <= len(examples):
    raise ValueError(f'shots={shots}; want 0 to {len(examples)} examples')
  blocks = [_CORRECTOR_CSQA if path.task == 'csqa' else _CORRECTOR]
  for pair in examples[:shots]:
    blocks.append(_problem_block(pair.path) + _join(_parts(pair.correction)))
  blocks.append(_problem_block(path) + _headings(path.task)[0])
  return '\n\n'.join(blocks)


def correction_prompt(path: WrongPath, *, ablate: str | None = None) -> str:
  """Returns the prompt of a training record: one problem, no examples.

  `ablate` leaves a part of the correction out, and with it its part of the instruction;
  the prompt then ends at the heading of the first part that is left.

  Raises:
    ValueError: An unknown task or ablation, or 'step' for CSQA, which has none.
  """
  csqa = path.task == 'csqa'
  check_ablation(path.task, ablate)
  wanted = _TASKS_OF_PART_CSQA if csqa else _TASKS_OF_PART
  tasks = [text for part, text in wanted.items() if part != ablate]
  listing = ' and '.join(filter(None, [', '.join(tasks[:-1]), tasks[-1]]))
  instruction = (
    f'The following {"answer" if csqa else "solution"} is incorrect. '
    f'{listing[0].upper()}{listing[1:]}.'
  )
  headings = _headings(path.task, ablate)
  return f'{instruction}\n\n{_problem_block(path)}{headings[0]}'


def correction_completion(correction: Correction, *, ablate: str | None = None) -> str:
  """Returns what follows the prompt of a correction: ` Step j.`, why, the solution.

  Without 'step' the corrected steps keep their numbers and the dots, so where the
  mistake was can still be read from them; the paper says nothing else of it.

  Raises:
    ValueError: An unknown ablation, or 'step' where there are no steps.
  """
  check_ablation('csqa' if correction.step is None else 'gsm8k', ablate)
  parts = _parts(correction, ablate)
  return _join(parts).removeprefix(parts[0][0])


def check_ablation(task: str, ablate: str | None) -> None:
  """Raises ValueError for an unknown task or ablation, or one the task cannot have."""
  check_task(task)
  if ablate is not None and ablate not in ABLATIONS:
    raise ValueError(f'unknown ablation {ablate!r}; want one of {", ".join(ABLATIONS)}')
  if task == 'csqa' and ablate == 'step':
    raise ValueError("csqa has no steps, so 'step' cannot be ablated; want another")


def parse_query(prompt: str) -> tuple[str, tuple[str, ...]]:
  """Returns question and steps of the last problem in a prompt of steps (not CSQA).

  Raises:
    ValueError: No such problem in it.
  """
  match = _LAST_BLOCK.match(prompt)
  if not match:
    raise ValueError(
      'want a prompt with `Question: ...`, `Original Solution:` and steps in braces, '
      f'found {prompt[-80:]!r}'
    )
  return match['question'], parse_body(match['body'])


def _headings(task: str, ablate: str | None = None) -> list[str]:
  if task == 'csqa':
    headings = {'explanation': 'Mistakes:', 'solution': 'Corrected Answer:'}
  else:
    headings = {
      'step': 'Incorrect Step:',
      'explanation': 'Explanation:',
      'solution': 'Correct Solution:',
    }
  return [heading for part, heading in headings.items() if part != ablate]


def _problem_block(path: WrongPath) -> str:
  """Returns question and wrong path, up to where the correction's heading starts."""
  csqa = path.task == 'csqa'
  options = list_candidates(path.problem.options or ()) if csqa else ''
  return (
    f'Question: {path.problem.question}{options}\n'
    f'Original {"Answer" if csqa else "Solution"}:\n{{\n{path.body}\n}}\n'
  )


def _parts(correction: Correction, ablate: str | None = None) -> list[tuple[str, str]]:
  """Returns (heading, text) of the parts of a correction, with the space between."""
  step = correction.step
  dots = f'{DOTS}\n' if step is not None and step > 1 else ''
  texts = {
    'step': f' Step {step}.',
    'explanation': f' {correction.explanation}',
    'solution': f'\n{{\n{dots}{correction.body()}\n}}',
  }
  if step is None:
    del texts['step']
  kept = [text for part, text in texts.items() if part != ablate]
  return list(zip(_headings('csqa' if step is None else 'gsm8k', ablate), kept))


def _join(parts: list[tuple[str, str]]) -> str:
  return '\n'.join(heading + text for heading, text in parts)
