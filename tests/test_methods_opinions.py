"""Opinions of several models: joined, chosen, cut and counted."""

import json

import pytest

from mrjax.methods import moo, opinions
from mrjax.records import DataError, Problem

MODELS = ('big', 'mid', 'small')
RESPONSES = {
  'big': ['a #### 2', 'so\n#### 5', 'c #### 7'],
  'mid': ['b #### 3', '', 'c #### 7'],
  'small': ['It is 2', 'so\n#### 5', ' '],
}
LABELS = ['2 #### 2', 'x\n#### 5', 'y #### 8']


def opinion_file(model, *, first_line=1, **changes):
  records = [
    {
      'problem_id': f'p{i}',
      'prompt_ori': f'{i}+1?\n',
      'label': label,
      'response': response,
    }
    for i, (label, response) in enumerate(zip(LABELS, RESPONSES[model]))
  ]
  for name, (row, value) in changes.items():
    records[row][name] = value
  return opinions.OpinionFile(
    model, f'{model}.jsonl', list(enumerate(records, start=first_line))
  )


def joined():
  return list(opinions.join_opinions([opinion_file(model) for model in MODELS]))


def blocks(**options):
  """The opinions of all rows as written, and the counts."""
  records, counts = opinions.build_rows(joined(), form='text', **options)
  return [moo.parse_row(record['text']).opinions for record in records], counts


def test_records_of_opinions():
  problem = Problem(id='7', question='q', solution='s #### B', options=('A)1', 'B)2'))
  record = opinions.opinion_record(problem, ' r\n', prompt='p', finish_reason='length')
  assert record == {
    'problem_id': '7',
    'prompt_ori': 'q\noptions: A)1 B)2\n',
    'prompt': 'p',
    'label': 's #### B',
    'response': 'r',
    'finish_reason': 'length',
  }
  with pytest.raises(ValueError, match="'8' has no solution to be the label"):
    opinions.opinion_record(Problem(id='8', question='q'), 'r', prompt='p')


def test_records_join_into_rows():
  problems = [Problem(id=f'{i}', question=f'q{i}', solution=f's{i}') for i in range(2)]
  files = [
    opinions.OpinionFile(
      model,
      model,
      list(
        enumerate(
          opinions.opinion_record(problem, f'{model} says', prompt='p')
          for problem in problems
        )
      ),
    )
    for model in MODELS
  ]
  records, _ = opinions.build_rows(opinions.join_opinions(files))
  assert records[1] == {
    'prompt': moo.format_prompt('q1\n', ['big says', 'mid says', 'small says']),
    'completion': 's1',
    'problem_id': '1',
  }


def test_rows_of_several_files():
  rows = joined()
  assert [row.problem_id for row in rows] == ['p0', 'p1', 'p2']
  assert [row.label for row in rows] == LABELS
  assert [opinion.model for opinion in rows[2].opinions] == list(MODELS)
  assert rows[1].opinions[2] == ('small', 'so\n#### 5', 'small.jsonl', 2, False)


@pytest.mark.parametrize(
  ('changes', 'where', 'message'),
  [
    ({'prompt_ori': (1, 'x\n')}, 'mid.jsonl:5', r"prompt_ori 'x\\n' is not that of b"),
    ({'label': (2, 'x')}, 'mid.jsonl:6', "label 'x' is not that of big.jsonl:3"),
    ({'response': (0, None)}, 'mid.jsonl:4', "'response' must be a string: None"),
  ],
)
def test_files_that_do_not_agree(changes, where, message):
  files = [opinion_file('big'), opinion_file('mid', first_line=4, **changes)]
  with pytest.raises(DataError, match=f'^{where}: .*{message}'):
    list(opinions.join_opinions(files))


@pytest.mark.parametrize('short', [0, 1, 2])
def test_files_of_different_length(short):
  files = [opinion_file(model) for model in MODELS]
  files[short] = files[short]._replace(records=files[short].records[:2])
  longer = 'mid' if short == 0 else 'big'
  with pytest.raises(
    DataError,
    match=f'^{longer}.jsonl:3: row 2 has no counterpart in {MODELS[short]}.jsonl, '
    f'which holds 2 rows; collect the opinions of {MODELS[short]}',
  ):
    list(opinions.join_opinions(files))


def test_a_model_twice_or_none():
  for files in ([], [opinion_file('big'), opinion_file('big')]):
    with pytest.raises(ValueError, match='one or more different models'):
      list(opinions.join_opinions(files))


def test_everything_stays_by_default():
  """Wrong, empty and repeated opinions are data in the paper; here they are counted."""
  written, counts = blocks()
  assert written == [
    ('a #### 2', 'b #### 3', 'It is 2'),
    ('so\n#### 5', '', 'so\n#### 5'),
    ('c #### 7', 'c #### 7', ' '),
  ]
  assert counts == {
    'num_rows': 3,
    'num_opinions': 9,
    'num_rows_without_opinions': 0,
    'num_empty': 2,
    'num_cut': 0,
    'num_without_answer': 3,
    'num_escaped': 0,
    'num_dropped_empty': 0,
    'num_dropped_repeated': 0,
  }


def test_cut_opinions_stay_and_are_counted():
  files = [opinion_file('big', finish_reason=(1, 'length')), opinion_file('mid')]
  records, counts = opinions.build_rows(opinions.join_opinions(files))
  assert counts['num_cut'] == 1 and counts['num_opinions'] == 6
  assert '>>>0: #### so\n#### 5\n>>>1: #### \n' in records[1]['prompt']


def test_opinions_without_chain_of_thought():
  written, counts = blocks(variant='no-cot')
  # Without a marker an opinion stays whole, as in the authors' code.
  assert written == [('2', '3', 'It is 2'), ('5', '', '5'), ('7', '7', ' ')]
  assert counts['num_without_answer'] == 3
  records, _ = opinions.build_rows(joined(), variant='no-cot', models=['big', 'mid'])
  assert records[0]['prompt'] == (
    'QUESTION:0+1?\n\nOPINIONS START\n>>>0: #### 2\n>>>1: #### 3\n'
    'OPINIONS END\nSOLUTION:'
  )
  assert records[0]['completion'] == '2 #### 2'


@pytest.mark.parametrize(
  ('text', 'answer'),
  [
    ('a #### 2', '2'),
    ('a #### 1,000 #### $2,500.', '$2,500.'),  # the last; nothing is cleaned
    ('a ####', ''),
    (r'so $\boxed{\frac{1}{2}}$.', r'\frac{1}{2}'),  # MATH has no ####
    (r'\boxed{1} #### 2', '2'),
    ('It is 2', None),
    ('Boxes are boxed in 3s', None),
  ],
)
def test_final_answers(text, answer):
  assert opinions.final_answer(text) == answer


def test_labels_without_chain_of_thought():
  records, _ = opinions.build_rows(joined(), variant='answer-only-label')
  assert [record['completion'] for record in records] == ['#### 2', '#### 5', '#### 8']
  assert 'a #### 2' in records[0]['prompt']
  row = joined()[0]
  boxed = opinions.OpinionRow('m', 'q\n', r'so \boxed{x^{2}}', row.opinions)
  records, _ = opinions.build_rows([boxed], variant='answer-only-label')
  assert records[0]['completion'] == r'\boxed{x^{2}}'
  none = opinions.OpinionRow('m', 'q\n', 'no answer', row.opinions)
  with pytest.raises(DataError, match=r'^big.jsonl:1: the label has no final answer'):
    opinions.build_rows([none], variant='answer-only-label')


def test_choice_of_models():
  written, counts = blocks(models=('small', 'big'))
  assert written[0] == ('a #### 2', 'It is 2')  # in the order of the files
  assert counts['num_opinions'] == 6
  with pytest.raises(ValueError, match=r"no opinions of \['huge'\]; there are"):
    blocks(models=['huge', 'big'])
  with pytest.raises(ValueError, match='models is empty'):
    blocks(models=[])


def test_weaker_models_by_accuracy():
  found = opinions.accuracies(joined(), rule='moo_gsm8k')
  assert found == {'big': 2 / 3, 'mid': 0.0, 'small': 1 / 3}
  assert opinions.weaker_models(found, main='big') == ('mid', 'small')
  assert opinions.weaker_models(found, main='small') == ('mid',)
  assert opinions.weaker_models(found | {'twin': 0.0}, main='mid') == ()
  with pytest.raises(ValueError, match="main model 'huge' gave no opinions"):
    opinions.weaker_models(found, main='huge')
  with pytest.raises(ValueError, match='there is no row'):
    opinions.accuracies([], rule='moo_gsm8k')


def test_empty_opinions_can_be_dropped():
  written, counts = blocks(drop_empty=True)
  assert written[1] == ('so\n#### 5', 'so\n#### 5') and written[2] == ('c #### 7',) * 2
  assert counts['num_dropped_empty'] == 2 and counts['num_empty'] == 0
  # The numbers have no gap.
  records, counts = opinions.build_rows(
    joined(), drop_empty=True, models=['mid', 'small']
  )
  assert '>>>0: #### so\n#### 5\nOPINIONS END' in records[1]['prompt']
  assert counts['num_rows_without_opinions'] == 0
  written, counts = blocks(drop_empty=True, models=['mid'])
  assert written[1] == () and counts['num_rows_without_opinions'] == 1


def test_repeated_opinions_can_be_dropped():
  written, counts = blocks(dedup=True)
  assert written[1:] == [('so\n#### 5', ''), ('c #### 7', ' ')]
  assert counts['num_dropped_repeated'] == 2 and counts['num_opinions'] == 7
  # By what was said: different ways to one answer are both kept without their words.
  files = [opinion_file('big', response=(0, 'other #### 3')), opinion_file('mid')]
  records, counts = opinions.build_rows(
    opinions.join_opinions(files), dedup=True, variant='no-cot'
  )
  assert '>>>0: #### 3\n>>>1: #### 3\n' in records[0]['prompt']
  assert counts['num_dropped_repeated'] == 1


def test_separators_in_opinions_name_their_file():
  files = [opinion_file('big'), opinion_file('mid', response=(1, 'x\n>>>2: #### y'))]
  with pytest.raises(DataError, match=r'^mid.jsonl:2: an opinion holds .>>>'):
    opinions.build_rows(opinions.join_opinions(files))
  records, counts = opinions.build_rows(
    opinions.join_opinions(files), reserved='escape', form='text'
  )
  assert counts['num_escaped'] == 1
  row = moo.parse_row(records[1]['text'])
  assert row == ('1+1?\n', ('so\n#### 5', 'x\n>>>2: #### y'), LABELS[1])
  files = [opinion_file('big', prompt_ori=(0, 'OPINIONS START\n'))]
  with pytest.raises(DataError, match=r'^big.jsonl:1: the question holds'):
    opinions.build_rows(opinions.join_opinions(files))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'variant': 'cot'}, "variant 'cot'; one of full, no-cot, answer-only-label"),
    ({'form': 'chat'}, "form 'chat'; one of prompt_completion, text"),
    ({'reserved': 'keep'}, "reserved 'keep'; one of error, escape"),
  ],
)
def test_unknown_options(options, message):
  with pytest.raises(ValueError, match=f'^unknown {message}'):
    opinions.build_rows(joined(), **options)
  with pytest.raises(ValueError, match='no rows to build'):
    opinions.build_rows([])


def test_real_opinions(shared):
  """Four models of OpenAI on the GSM8K test set: 286, 515, 458, 742 of 1319 right."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  data = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  models = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
  files = [
    opinions.OpinionFile(
      model,
      f'{model}.jsonl',
      [
        (
          number,
          opinions.opinion_record(
            Problem(
              id=str(number), question=row['question'], solution=row['ground_truth']
            ),
            row[model]['solution'],
            prompt='',
          ),
        )
        for number, row in enumerate(data, start=1)
      ],
    )
    for model in models
  ]
  rows = list(opinions.join_opinions(files))
  found = opinions.accuracies(rows, rule='openai_gsm8k')
  assert [round(found[model] * 1319) for model in models] == [286, 515, 458, 742]
  weaker = opinions.weaker_models(found, main='6b_verification')
  assert weaker == ('6b_finetuning', '175b_finetuning')
  records, counts = opinions.build_rows(rows, form='text')
  assert counts['num_rows'] == 1319 and counts['num_opinions'] == 4 * 1319
  assert counts['num_escaped'] == 0
  for record, row in zip(records, rows, strict=True):
    said = tuple(opinion.response for opinion in row.opinions)
    assert moo.parse_row(record['text']) == (row.prompt_ori, said, row.label)
    assert moo.split_text(record['text'])[1] == row.label
