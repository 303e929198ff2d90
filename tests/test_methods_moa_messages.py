"""The messages of a mixture of agents, letter by letter."""

import jinja2
import pytest

from mrjax.data.messages import check_messages
from mrjax.grading.rules import get_rule
from mrjax.methods import moa_messages
from mrjax.records import Problem

OPEN = Problem(id='o', question='1+1?', solution='It is 2.\n#### 2')
CHOICE = Problem(
  id='c', question='2+2?', solution='It is 4. #### B', options=('A)3', 'B)4')
)
BOXED = Problem(id='b', question='3+3?', solution=r'So \boxed{6}.')


def turns(*pairs):
  return tuple({'role': role, 'content': content} for role, content in pairs)


def test_a_question_with_examples():
  messages = moa_messages.conversation(CHOICE, system='Solve.', shots=[OPEN, BOXED])
  assert messages == turns(
    ('system', 'Solve.'),
    ('user', '1+1?'),
    ('assistant', 'It is 2.\n#### 2'),
    ('user', '3+3?'),
    ('assistant', r'So \boxed{6}.'),
    ('user', '2+2?\noptions: A)3 B)4'),
  )
  assert moa_messages.conversation(OPEN) == turns(('user', '1+1?'))
  with pytest.raises(ValueError, match="'x' has no solution to be an example"):
    moa_messages.conversation(OPEN, shots=[Problem(id='x', question='q')])


@pytest.mark.parametrize(
  ('task', 'problem', 'marker'),
  [('gsm8k', OPEN, '####'), ('aqua', CHOICE, '####'), ('math', BOXED, r'\boxed')],
)
def test_every_task_has_messages_and_a_grading_rule(task, problem, marker):
  """The authors' code has them for GSM8K alone, and fails at once on MATH."""
  settings = moa_messages.TASKS[task]
  assert marker in settings.system and marker in settings.reminder
  messages = moa_messages.conversation(problem, system=settings.system)
  assert check_messages(list(messages), 'messages') == messages
  rule = get_rule(settings.rule)
  assert rule.grade(problem.solution, problem.solution) == (
    rule.extract(problem.solution),
    True,
  )
  assert not rule.grade('#### 77', problem.solution)[1]
  assert len(moa_messages.TASKS) == 3


def test_references_in_a_user_turn():
  messages = turns(('system', 'S'), ('user', 'Q'))
  shown = moa_messages.with_references(
    messages, ['a\nb', 'c'], synthesis='Combine.', reminder='Think.'
  )
  dashes = '-' * 20
  assert shown == (
    *messages,
    *turns(
      (
        'user',
        f'Combine.\nresponse from agent #1: a\nb\n{dashes}\n'
        f'response from agent #2: c\n{dashes}',
      ),
      ('user', 'Think.'),
    ),
  )
  assert moa_messages.with_references(messages, ['c'], synthesis='Combine.') == (
    *messages,
    *turns(('user', f'Combine.\nresponse from agent #1: c\n{dashes}')),
  )


def test_references_in_the_system_text():
  def shown(*pairs):
    return moa_messages.with_references(
      turns(*pairs),
      ['a', 'c'],
      placement='system',
      synthesis='Combine.',
      reminder='Think.',
    )

  assert shown(('system', 'S'), ('user', 'Q')) == turns(
    ('system', 'S\n\nCombine.\n1. a\n2. c'), ('user', 'Q')
  )
  assert shown(('user', 'Q')) == turns(
    ('system', 'Combine.\n1. a\n2. c'), ('user', 'Q')
  )


@pytest.mark.parametrize('placement', moa_messages.PLACEMENTS)
def test_without_references_nothing_is_added(placement):
  messages = turns(('system', 'S'), ('user', 'Q'))
  assert (
    moa_messages.with_references(messages, [], placement=placement, reminder='Think.')
    == messages
  )


def test_messages_are_not_changed_in_place():
  messages = turns(('system', 'S'), ('user', 'Q'))
  moa_messages.with_references(messages, ['a'], placement='system')
  moa_messages.alternating(messages, fold_system=True)
  assert messages == turns(('system', 'S'), ('user', 'Q'))


def test_unknown_placement():
  with pytest.raises(ValueError, match="unknown placement 'end'; one of user, system"):
    moa_messages.with_references((), [], placement='end')


def test_reviews():
  messages = moa_messages.conversation(OPEN, system='S', shots=[BOXED])
  (message,) = moa_messages.review_messages(messages, 'It is 3.', instruction='Judge.')
  assert message == {
    'role': 'user',
    'content': 'Question:\n1+1?\n\nAnswer:\nIt is 3.\n\nJudge.',
  }
  assert '200 words' in moa_messages.REVIEW and 'correct' in moa_messages.REVIEW
  assert moa_messages.with_reviews('It is 3.', ['No.', 'Yes.']) == (
    'It is 3.\nreview by agent #1: No.\nreview by agent #2: Yes.'
  )
  assert moa_messages.with_reviews('It is 3.', []) == 'It is 3.'


def test_turns_for_templates_that_want_them_alternating():
  messages = moa_messages.with_references(
    moa_messages.conversation(OPEN, system='S', shots=[BOXED]),
    ['a'],
    synthesis='C',
    reminder='Think.',
  )
  references = 'C\nresponse from agent #1: a\n' + '-' * 20
  merged = turns(
    ('system', 'S'),
    ('user', '3+3?'),
    ('assistant', r'So \boxed{6}.'),
    ('user', f'1+1?\n\n{references}\n\nThink.'),
  )
  assert moa_messages.alternating(messages) == merged
  folded = moa_messages.alternating(messages, fold_system=True)
  assert folded == (*turns(('user', 'S\n\n3+3?')), *merged[2:])
  assert moa_messages.alternating(folded) == folded

  # As the templates of Mistral and Gemma check it.
  template = jinja2.Template(
    '{% for m in messages %}{% if (m.role == "user") != (loop.index0 % 2 == 0) %}'
    '{{ 1 // 0 }}{% endif %}{{ m.role }} {% endfor %}'
  )
  assert template.render(messages=folded) == 'user assistant user '
  with pytest.raises(ZeroDivisionError):
    template.render(messages=messages)
