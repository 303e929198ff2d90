"""Each layout, letter by letter, as the papers' code writes it."""

import pytest

from mrjax.data.prompts import TEMPLATES, render_completion, render_prompt
from mrjax.data.tokenization import load_tokenizer, train_bpe_tokenizer
from mrjax.records import Problem

OPEN = Problem(id='1', question='1+1?', answer='2', solution='1+1=2.\n#### 2')
CHOICE = Problem(
  id='2',
  question='2+2?',
  answer='B',
  solution='It is 4. #### B',
  options=('A)3', 'B)4', 'C)5'),
)

# (template, what the model is asked, what it is taught to say)
OPEN_TEXTS = [
  ('raw', '1+1?', '1+1=2.\n#### 2'),
  ('qa', 'Question: 1+1?\nAnswer:', ' 1+1=2.\n#### 2'),
  (
    'alpaca',
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n### Instruction:\n1+1?\n\n### Response:',
    '1+1=2.\n#### 2',
  ),
  (
    'qsharp',
    'Problem:\n\n1+1? Write your answer inside \\boxed{}.\n\nSolution:',
    ' 1+1=2.\n#### 2',
  ),
  ('moo', 'QUESTION:1+1?\nSOLUTION:', '1+1=2.\n#### 2\n'),
  ('w2s', 'Question: 1+1?\nAnswer:', ' 1+1=2.\n#### 2'),
  (
    'lema',
    'Please solve the following math problem.\nQuestion: 1+1?\n'
    "Answer: Let's think step by step.\n",
    '1+1=2.\n#### 2',
  ),
]


@pytest.mark.parametrize(('template', 'prompt', 'completion'), OPEN_TEXTS)
def test_open_questions(template, prompt, completion):
  rendered = render_prompt(template, OPEN)
  assert (rendered.text, rendered.add_bos) == (prompt, True)
  assert render_prompt(template, '1+1?') == rendered
  assert render_completion(template, OPEN) == completion


@pytest.mark.parametrize(
  ('template', 'prompt'),
  [
    ('raw', '2+2?'),
    ('qa', 'Question: 2+2?\nOptions: A)3 B)4 C)5\nAnswer:'),
    ('w2s', 'Question: 2+2?\nOptions: A)3 B)4 C)5\nAnswer:'),
    ('moo', 'QUESTION:2+2?\noptions: A)3 B)4 C)5\nSOLUTION:'),
    (
      'lema',
      'Please explain each candidate answer of the following question, then choose one '
      'of them and give the reasons.\nQuestion: 2+2?\nCandidate Answers: 3, 4, 5.\n'
      "Answer: Let's think step by step.\n",
    ),
  ],
)
def test_choices_are_listed(template, prompt):
  assert render_prompt(template, CHOICE).text == prompt


def test_every_template_is_tried_here():
  assert {t for t, _, _ in OPEN_TEXTS} | {'chat'} == set(TEMPLATES)


@pytest.mark.parametrize('template', [t for t in TEMPLATES if t != 'chat'])
def test_braces_in_questions_are_text(template):
  question = 'Is \\frac{a}{b} = {question} = {0}?'
  assert question in render_prompt(template, question).text
  problem = Problem(id='1', question='q', solution='\\boxed{{solution}}')
  assert '\\boxed{{solution}}' in render_completion(template, problem)


def test_lema_labels_of_other_styles():
  problem = Problem(id='1', question='q', options=('A) x', '(B) y', 'C. z', 'A plain'))
  assert 'Candidate Answers: x, y, z, A plain.' in render_prompt('lema', problem).text


@pytest.fixture(scope='module')
def chat_tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  train_bpe_tokenizer(['a user asks'], vocab_size=262, output_dir=folder)
  (folder / 'chat_template.jinja').write_text(
    '{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}'
    '{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}(assistant) {% endif %}'
  )
  return load_tokenizer(folder)


def test_chat_goes_through_the_template_of_the_tokenizer(chat_tokenizer):
  prompt = render_prompt('chat', CHOICE, tokenizer=chat_tokenizer)
  assert prompt.text == ('<s>(user) 2+2?\nOptions: A)3 B)4 C)5</s>\n(assistant) ')
  completion = render_completion('chat', CHOICE, tokenizer=chat_tokenizer)
  assert completion == 'It is 4. #### B</s>'
  ids, mask = chat_tokenizer.encode_pair(
    prompt.text, completion, add_bos=prompt.add_bos
  )
  assert ids.count(chat_tokenizer.bos_id) == 1 and ids.count(2) == 2
  supervised = [i for i, keep in zip(ids, mask, strict=True) if keep]
  assert supervised[-1] == 2
  assert chat_tokenizer.decode(supervised) == 'It is 4. #### B'


def test_training_and_sampling_meet_token_for_token(chat_tokenizer):
  for template in ('qa', 'qsharp', 'w2s', 'lema', 'alpaca', 'moo'):
    prompt = render_prompt(template, OPEN).text
    ids, mask = chat_tokenizer.encode_pair(prompt, render_completion(template, OPEN))
    assert ids[: mask.index(True)] == chat_tokenizer.encode_prompt(prompt)


def test_errors(chat_tokenizer):
  with pytest.raises(ValueError, match='want one of raw, chat, qa'):
    render_prompt('gsm', OPEN)
  with pytest.raises(ValueError, match='needs a tokenizer'):
    render_prompt('chat', OPEN)
  with pytest.raises(ValueError, match=r"'3' has no solution"):
    render_completion('qa', Problem(id='3', question='q'))
