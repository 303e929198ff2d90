"""The chat messages of a mixture of agents: questions, references, reviews.

The mixture of agents of Wang et al. 2024 (arXiv 2406.04692) as the baseline of Mixture
of Opinions (arXiv 2502.19622), and where the references stand in either. What separates
the parts is theirs, the sentences are ours and can be changed. Their messages for MoO
serve GSM8K alone, and on MATH fail at once; here every task has its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mrjax.methods.moo import prompt_ori_of
from mrjax.records import Problem

Message = dict[str, str]
Messages = tuple[Message, ...]

PLACEMENTS = ('user', 'system')

SYNTHESIS = (
  'Several models have answered the latest question; their answers are listed below. '
  'Write one answer that is better than any of them. Weigh them critically: some may '
  'be biased, and some may be wrong. Do not hand one on as it stands, but give an '
  'answer of your own that is corrected, complete and in good order.\n\n'
  'Answers of the models:'
)
REVIEW = (
  'Review this answer in at most 200 words. Name each mistake and say how to mend it; '
  'if there is none, say that the answer is correct.'
)
_DASHES = '-' * 20


class Task(NamedTuple):
  """What a kind of problem needs: system text, reminder behind references, rule."""

  system: str
  reminder: str
  rule: str


_NUMBER = 'Reason step by step, then write #### and behind it the final answer.'
_LETTER = 'Reason step by step, then write #### and behind it the right letter.'
_BOXED = 'Reason step by step, then write the simplified final answer in \\boxed{}.'
TASKS: dict[str, Task] = {
  'gsm8k': Task(f'You solve word problems of school. {_NUMBER}', _NUMBER, 'moo_gsm8k'),
  'aqua': Task(f'You solve questions of algebra. {_LETTER}', _LETTER, 'moo_gsm8k'),
  'math': Task(f'You solve problems of mathematics. {_BOXED}', _BOXED, 'moo_math'),
}


def conversation(
  problem: Problem, *, system: str = '', shots: Sequence[Problem] = ()
) -> Messages:
  """Returns the conversation that asks a problem; its last turn is the question.

  Args:
    problem: Its options, if any, are listed behind the question.
    system: The system text; '' for none.
    shots: Solved problems, as turns of user and assistant; see `moo.draw_shots`.

  Raises:
    ValueError: An example has no solution.
  """
  messages = [_message('system', system)] if system else []
  for shot in shots:
    if shot.solution is None:
      raise ValueError(f'problem {shot.id!r} has no solution to be an example')
    messages.append(_message('user', _asked(shot)))
    messages.append(_message('assistant', shot.solution))
  return (*messages, _message('user', _asked(problem)))


def with_references(
  messages: Messages,
  references: Sequence[str],
  *,
  placement: str = 'user',
  synthesis: str = SYNTHESIS,
  reminder: str = '',
) -> Messages:
  """Returns a conversation that shows answers of others; without any, as it is.

  Args:
    messages: Not empty.
    references: Numbered from 1.
    placement: 'user' lists them in a user turn at the end, as MoO's code does; 'system'
      in the system text, behind what stands there, as Together's code does.
    synthesis: What to do with them, and a heading.
    reminder: Another user turn at the very end, with 'user' alone; '' for none.

  Raises:
    ValueError: No such placement.
  """
  if placement not in PLACEMENTS:
    raise ValueError(f'unknown placement {placement!r}; one of {", ".join(PLACEMENTS)}')
  if not references:
    return messages
  numbered = list(enumerate(references, start=1))
  if placement == 'user':
    listed = [f'response from agent #{n}: {text}\n{_DASHES}' for n, text in numbered]
    reminders = [_message('user', reminder)] if reminder else []
    return (*messages, _message('user', '\n'.join([synthesis, *listed])), *reminders)
  text = '\n'.join([synthesis, *(f'{n}. {text}' for n, text in numbered)])
  if messages[0]['role'] != 'system':
    return (_message('system', text), *messages)
  return (_message('system', f'{messages[0]["content"]}\n\n{text}'), *messages[1:])


def review_messages(
  messages: Messages, answer: str, *, instruction: str = REVIEW
) -> Messages:
  """Returns what asks for a review of an answer to the last turn of a conversation."""
  question = messages[-1]['content']
  text = f'Question:\n{question}\n\nAnswer:\n{answer}\n\n{instruction}'
  return (_message('user', text),)


def with_reviews(answer: str, reviews: Sequence[str]) -> str:
  """Returns an answer and below it its reviews, numbered from 1."""
  numbered = enumerate(reviews, start=1)
  return '\n'.join([answer, *(f'review by agent #{n}: {text}' for n, text in numbered)])


def alternating(messages: Messages, *, fold_system: bool = False) -> Messages:
  """Returns the conversation with neighbours of one role joined by a blank line.

  The chat templates of Mistral and Gemma refuse turns that do not alternate, such as
  references in a user turn of their own; Gemma's and older ones also a system text.

  Args:
    messages: A conversation.
    fold_system: The system text goes to the front of the first user turn.
  """
  turns: list[Message] = []
  for message in messages:
    role, content = message['role'], message['content']
    if fold_system and role == 'system':
      role = 'user'
    if turns and turns[-1]['role'] == role:
      content = f'{turns.pop()["content"]}\n\n{content}'
    turns.append(_message(role, content))
  return tuple(turns)


def _message(role: str, content: str) -> Message:
  return {'role': role, 'content': content}


def _asked(problem: Problem) -> str:
  return prompt_ori_of(problem).removesuffix('\n')
