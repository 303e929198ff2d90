"""The named prompt layouts, each written once for training and sampling alike.

A layout gives the text before a solution and the text of the solution itself, so that
`render_prompt(...).text + render_completion(...)` is what a model is trained on and the
first half is what it is asked with.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from mrjax.data.tokenization import Tokenizer
from mrjax.records import Problem


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A rendered prompt; `add_bos` is for `Tokenizer.encode_prompt`."""

  text: str
  add_bos: bool


@dataclasses.dataclass(frozen=True)
class _Layout:
  prompt: str  # '{question}' stands for the question and its options
  completion: str = '{solution}'
  options: Callable[[Sequence[str]], str] = lambda options: ''
  choice_prompt: str | None = None  # where a multiple-choice question has its own


def _options_line(options: Sequence[str]) -> str:
  return '\nOptions: ' + ' '.join(options)


def _moo_options(options: Sequence[str]) -> str:
  return '\noptions: ' + ' '.join(options)


def list_candidates(options: Sequence[str]) -> str:
  """Returns the line of candidates, without letters, with the newline before it."""
  texts = [re.sub(r'^\(?[A-Z][).:]\s*', '', option) for option in options]
  return '\nCandidate Answers: ' + ', '.join(texts) + '.'


_LEMA_END = "\nAnswer: Let's think step by step.\n"

_LAYOUTS = {
  # The question as it is; options are not listed, a separator is not added.
  'raw': _Layout('{question}'),
  'qa': _Layout('Question: {question}\nAnswer:', ' {solution}', _options_line),
  # Alpaca without input, as RFT and MuggleMath use it: the response follows the colon
  # directly. https://arxiv.org/abs/2308.01825
  'alpaca': _Layout(
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n### Instruction:\n{question}\n\n'
    '### Response:',
    options=_options_line,
  ),
  # https://arxiv.org/abs/2502.20548. The paper trains no policy on it; the space before
  # the solution is ours, and keeps the last token of the prompt as it is.
  'qsharp': _Layout(
    'Problem:\n\n{question} Write your answer inside \\boxed{{}}.\n\nSolution:',
    ' {solution}',
    _options_line,
  ),
  # https://arxiv.org/abs/2502.19622, the base template of its training rows.
  'moo': _Layout('QUESTION:{question}\nSOLUTION:', '{solution}\n', _moo_options),
  # https://arxiv.org/abs/2407.13647. No space after the colon in the prompt, one in
  # front of the answer (as in its few-shot demonstrations).
  'w2s': _Layout('Question: {question}\nAnswer:', ' {solution}', _options_line),
  # https://arxiv.org/abs/2310.20689. For choices (CSQA there) every candidate is to be
  # explained; the candidates are listed without letters.
  'lema': _Layout(
    'Please solve the following math problem.\nQuestion: {question}' + _LEMA_END,
    options=list_candidates,
    choice_prompt=(
      'Please explain each candidate answer of the following question, then choose one '
      'of them and give the reasons.\nQuestion: {question}' + _LEMA_END
    ),
  ),
}
TEMPLATES: tuple[str, ...] = (
  'raw',
  'chat',
  *[name for name in _LAYOUTS if name != 'raw'],
)


def check_template(template: str, tokenizer: Tokenizer | None = None) -> None:
  """Raises ValueError for an unknown name, or 'chat' without a chat template."""
  if template not in TEMPLATES:
    raise ValueError(
      f'--prompt_template={template!r} is not known; want one of {", ".join(TEMPLATES)}'
    )
  if template == 'chat' and tokenizer is None:
    raise ValueError('--prompt_template=chat needs a tokenizer with a chat template')


def render_prompt(
  template: str, problem: Problem | str, *, tokenizer: Tokenizer | None = None
) -> Prompt:
  """Returns the prompt of a problem, or of a bare question.

  Args:
    template: A name of `TEMPLATES`.
    problem: Its options, if any, are listed (not by 'raw').
    tokenizer: Needed by 'chat' alone.

  Raises:
    ValueError: An unknown template, or 'chat' without a chat template.
  """
  check_template(template, tokenizer)
  if isinstance(problem, str):
    question, options = problem, None
  else:
    question, options = problem.question, problem.options
  if template == 'chat':
    assert tokenizer is not None
    message = {'role': 'user', 'content': question + _listed(options)}
    text = tokenizer.render_chat([message], add_generation_prompt=True)
    return Prompt(text, add_bos=False)
  layout = _LAYOUTS[template]
  form = layout.prompt
  if options:
    question += layout.options(options)
    form = layout.choice_prompt or form
  return Prompt(form.format(question=question), add_bos=True)


def render_completion(
  template: str, problem: Problem, *, tokenizer: Tokenizer | None = None
) -> str:
  """Returns the text that follows the prompt in training, EOS excluded.

  For 'chat' it is what the chat template writes for the assistant's turn, the end of
  the turn included.

  Raises:
    ValueError: As `render_prompt`, or the problem has no solution.
  """
  check_template(template, tokenizer)
  if problem.solution is None:
    raise ValueError(f'problem {problem.id!r} has no solution to train on')
  if template != 'chat':
    return _LAYOUTS[template].completion.format(solution=problem.solution)
  assert tokenizer is not None
  prompt = render_prompt(template, problem, tokenizer=tokenizer)
  text = tokenizer.render_chat(
    [
      {'role': 'user', 'content': problem.question + _listed(problem.options)},
      {'role': 'assistant', 'content': problem.solution},
    ]
  )
  if not text.startswith(prompt.text):
    raise ValueError(
      'the chat template does not begin an answered conversation with the prompt it '
      f'asks with; give records with messages. It asks {prompt.text[-60:]!r}'
    )
  # What follows the end of the turn (a newline) is never sampled.
  return text[len(prompt.text) :].rstrip('\n')


def _listed(options: Sequence[str] | None) -> str:
  return _options_line(options) if options else ''
