"""Problem sources: what the specifications give, and how they fail."""

import json
import re
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from mrjax.data import hub as hub_module
from mrjax.data import problems as problems_module
from mrjax.data.arithmetic import generate_problems
from mrjax.data.problems import DataSpec, Problem, load_problems, parse_spec
from mrjax.records import DataError, write_jsonl

GSM8K = {'question': 'How many?', 'answer': '1+1=<<1+1=2>>2\n#### 1,234'}
CSQA = {
  'answerKey': 'B',
  'id': '1afa02df02c908a558b4036e80242fac',
  'question': {
    'question_concept': 'door',
    'choices': [{'label': 'A', 'text': 'bank'}, {'label': 'B', 'text': 'mall'}],
    'stem': 'Where is a door?',
  },
}


@pytest.fixture
def offline(monkeypatch):
  def refuse(address, timeout):
    raise socket.gaierror(-2, 'Name or service not known')

  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(hub_module.urllib.request, 'getproxies', dict)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'https://huggingface.co')


@pytest.mark.parametrize(
  ('spec', 'parsed'),
  [
    ('gsm8k:test', ('gsm8k', '', 'test', {})),
    ('gsm8k:test?limit=3', ('gsm8k', '', 'test', {'limit': '3'})),
    (
      'arithmetic:train?size=20&seed=1',
      ('arithmetic', '', 'train', {'size': '20', 'seed': '1'}),
    ),
    ('jsonl:a/b c.jsonl', ('jsonl', 'a/b c.jsonl', '', {})),
    ('jsonl:C:x.jsonl?limit=2', ('jsonl', 'C:x.jsonl', '', {'limit': '2'})),
    ('hf:a/b:train', ('hf', 'a/b', 'train', {})),
    (
      'hf:a/b:train[:9]?question=my%26text&config=main',
      ('hf', 'a/b', 'train[:9]', {'question': 'my&text', 'config': 'main'}),
    ),
    ('tfds:mrjax_problems/x:dev', ('tfds', 'mrjax_problems/x', 'dev', {})),
  ],
)
def test_specifications(spec, parsed):
  assert parse_spec(spec) == DataSpec(*parsed)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('gsm9k:test', "no source 'gsm9k'; want one of gsm8k, math, aqua, csqa, arithm"),
    ('problems.jsonl', 'no source'),
    ('', 'no source'),
    ('gsm8k', 'want gsm8k:SPLIT'),
    ('gsm8k:', 'want gsm8k:SPLIT'),
    ('jsonl:', 'want jsonl:PATH'),
    ('hf:a/b', 'want hf:NAME:SPLIT'),
    ('tfds:a:', 'want tfds:NAME:SPLIT'),
    ('gsm8k:test?size=3', "gsm8k has no key 'size', only limit"),
    ('arithmetic:train?sizes=3', "no key 'sizes', only size, seed, steps, form, limit"),
    ('arithmetic:train?size', 'want size=VALUE, once'),
    ('arithmetic:train?size=1&size=2', 'want size=VALUE, once'),
    ('arithmetic:train?size=many', "size='many' is no whole number"),
    ('arithmetic:train?size=0', 'at least 1'),
    ('arithmetic:validation', 'no split'),
    ('arithmetic:train?form=mcq', 'no form'),
    ('arithmetic:train?steps=7', 'from 1 to 6'),
    ('arithmetic:train?steps=two', "steps='two'; want numbers, as in steps=1+2"),
    ('arithmetic:train?seed=-1', 'seed=-1; want at least 0'),
    ('arithmetic:test?limit=0', 'limit=0'),
    ('gsm8k:dev', "gsm8k has no split 'dev', only train, test"),
  ],
)
def test_bad_specifications(spec, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    load_problems(spec)


def test_a_bad_specification_is_named_once():
  for option in ('size', 'seed', 'limit'):
    spec = f'arithmetic:test?{option}=abc'
    with pytest.raises(ValueError) as error:
      load_problems(spec)
    assert str(error.value) == f"--data={spec!r}: {option}='abc' is no whole number"


def test_arithmetic():
  assert load_problems('arithmetic:test?size=7&seed=3') == generate_problems(
    'test', size=7, seed=3
  )
  spec = 'arithmetic:dev?size=9&form=choice&steps=2,3'
  assert (
    load_problems(spec, limit=5)
    == generate_problems('dev', size=9, form='choice', steps=(2, 3))[:5]
  )
  assert len(load_problems('arithmetic:dev?size=9&limit=4', limit=6)) == 4


# --- Local copies of the public sets -------------------------------------------------


def test_gsm8k(shared):
  problems = load_problems('gsm8k:test', data_root=shared / 'data')
  assert len(problems) == 1319
  # The first answers, from methods/qsharp.md.
  assert [p.answer for p in problems[:10]] == (
    ['18', '3', '70000', '540', '20', '64', '260', '160', '45', '460']
  )
  assert problems[17].id == 'gsm8k-test-17' and problems[17].source == 'gsm8k'
  assert problems[0].solution.endswith('\n#### 18') and '<<' in problems[0].solution
  assert all(re.fullmatch(r'-?\d+', p.answer) for p in problems)
  assert len(load_problems('gsm8k:train', data_root=shared / 'data')) == 7473


def test_math(shared):
  problems = load_problems('math:test', data_root=shared / 'data')
  assert len(problems) == 500
  assert [p.answer for p in problems[:5]] == [
    r'\left( 3, \frac{\pi}{2} \right)',
    'p - q',
    r'\frac{14}{3}',
    '9',
    r'\text{Evelyn}',
  ]
  levels = [p.level for p in problems]
  assert [levels.count(n) for n in range(1, 6)] == [43, 90, 105, 128, 134]
  assert problems[0].source == 'math/Precalculus'


def test_aqua(shared):
  for split in ('dev', 'test'):
    problems = load_problems(f'aqua:{split}', data_root=shared / 'data')
    assert len(problems) == 254
    assert all(len(p.options) == 5 and p.answer in 'ABCDE' for p in problems)
    assert all(p.solution.endswith(f' #### {p.answer}') for p in problems)
    assert all(p.options[i][:2] == f'{"ABCDE"[i]})' for p in problems for i in range(5))


def test_csqa(tmp_path):
  write_jsonl(tmp_path / 'dev_rand_split.jsonl', [CSQA])
  hidden = {key: value for key, value in CSQA.items() if key != 'answerKey'}
  write_jsonl(tmp_path / 'test_rand_split_no_answers.jsonl', [hidden])
  expected = Problem(
    id='csqa-dev-0',
    question='Where is a door?',
    answer='B',
    source='csqa',
    options=('A)bank', 'B)mall'),
  )
  assert load_problems('csqa:dev', data_root=tmp_path) == [expected]
  assert load_problems('csqa:test', data_root=tmp_path)[0].answer is None


def test_math_answers_come_from_the_last_box(tmp_path):
  solution = r'First \boxed{1}. So $\boxed{\frac{a}{\sqrt{b}}}$, {ok}.'
  row = {'problem': 'q', 'solution': solution, 'level': 'Level 3', 'type': 'Algebra'}
  write_jsonl(tmp_path / 'math_train.jsonl', [row])
  (problem,) = load_problems('math:train', data_root=tmp_path)
  assert problem == Problem(
    id='math-train-0',
    question='q',
    answer=r'\frac{a}{\sqrt{b}}',
    solution=solution,
    source='math/Algebra',
    level='Level 3',
  )


def test_gsm8k_answers_lose_their_commas(tmp_path):
  (tmp_path / 'gsm8k').mkdir()
  write_jsonl(tmp_path / 'gsm8k' / 'test.jsonl', [GSM8K])
  assert load_problems('gsm8k:test', data_root=tmp_path)[0].answer == '1234'


@pytest.mark.parametrize(
  ('spec', 'name', 'row', 'message'),
  [
    ('gsm8k:test', 'gsm8k_test', {'question': 'q'}, "missing field 'answer'"),
    ('gsm8k:test', 'gsm8k_test', {**GSM8K, 'answer': 'two'}, 'no "#### number"'),
    ('gsm8k:test', 'gsm8k_test', {**GSM8K, 'question': ' '}, "'question' must be"),
    ('math:test', 'math500_test', {'problem': 'q', 'solution': '2'}, 'no answer'),
    (
      'aqua:dev',
      'aqua_dev',
      {'question': 'q', 'options': ['A)1', 'B)2'], 'rationale': 'r', 'correct': 'C'},
      "'C' is not among",
    ),
    ('aqua:dev', 'aqua_dev', {'question': 'q', 'correct': 'A'}, 'options'),
    ('csqa:dev', 'csqa_dev', {**CSQA, 'answerKey': 'E'}, "'E' is not among"),
    ('csqa:dev', 'csqa_dev', {**CSQA, 'question': {'stem': 's'}}, 'choices'),
  ],
)
def test_bad_public_records_are_named(tmp_path, spec, name, row, message):
  good = {
    'gsm8k': GSM8K,
    'math': {'problem': 'q', 'solution': r'\boxed{1}'},
    'aqua': {
      'question': 'q',
      'options': ['A)1', 'B)2'],
      'rationale': 'r',
      'correct': 'B',
    },
    'csqa': CSQA,
  }[spec.split(':')[0]]
  path = tmp_path / f'{name}.jsonl'
  write_jsonl(path, [good, row])
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    load_problems(spec, data_root=tmp_path)
  assert f'{path}:2: ' in str(error.value)


def test_a_cut_public_file_is_named(tmp_path):
  path = tmp_path / 'gsm8k_test.jsonl'
  path.write_text(json.dumps(GSM8K) + '\n' + json.dumps(GSM8K)[:30])
  with pytest.raises(DataError, match='not valid JSON') as error:
    load_problems('gsm8k:test', data_root=tmp_path)
  assert str(error.value).startswith(f'{path}:2: ')


# --- JSON Lines ----------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_the_first_problem(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text('{"id": "1", "question": "q"}\n', encoding='utf-8-sig')
  assert load_problems(f'jsonl:{path}') == [Problem('1', 'q')]


def test_jsonl_round_trip(tmp_path):
  problems = generate_problems('test', size=11, form='choice')
  path = tmp_path / 'what?.jsonl'  # a question mark in a path is no query
  write_jsonl(path, [p.to_record() for p in problems])
  assert load_problems(f'jsonl:{path}') == problems
  plain = path.rename(tmp_path / 'p.jsonl')
  assert load_problems(f'jsonl:{plain}?limit=3') == problems[:3]


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'id': '2'}, r"missing field\(s\) \['question'\]"),
    ({'question': 'q'}, r"missing field\(s\) \['id'\]"),
    ({'id': '2', 'question': ''}, "'question' is missing or empty"),
    ({'id': '1', 'question': 'q'}, "id '1' is already that of line 1"),
    ({'id': 1, 'question': 'q'}, "id '1' is already that of line 1"),
    ({'id': '2', 'question': 'q', 'options': 'AB'}, "'options' must be a list"),
  ],
)
def test_bad_jsonl_problems_are_named(tmp_path, row, message):
  path = tmp_path / 'p.jsonl'
  write_jsonl(path, [{'id': '1', 'question': 'q'}, row])
  with pytest.raises(DataError, match=message) as error:
    load_problems(f'jsonl:{path}')
  assert str(error.value).startswith(f'{path}:2: ')


def test_missing_and_empty_files(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file'):
    load_problems(f'jsonl:{tmp_path}/nope.jsonl')
  (tmp_path / 'empty.jsonl').touch()
  with pytest.raises(DataError, match='holds no record'):
    load_problems(f'jsonl:{tmp_path}/empty.jsonl')
  with pytest.raises(FileNotFoundError, match='is no folder'):
    load_problems('gsm8k:test', data_root=tmp_path / 'nope')


# --- The hub -------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
  """A hub with the data sets put into the returned dict: (repository, config)."""
  sets = {}

  def load_dataset(repository, config=None, *, split):
    if split == 'nope':
      raise ValueError("Unknown split 'nope'. Should be one of ['train'].")
    return datasets.Dataset.from_list(sets[repository, config])

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  monkeypatch.setattr(hub_module, 'why_offline', lambda: '')
  return sets


def test_public_sets_come_from_the_hub_when_not_here(hub, tmp_path):
  hub['openai/gsm8k', 'main'] = [GSM8K, GSM8K]
  problems = load_problems('gsm8k:train', data_root=tmp_path)
  assert [p.id for p in problems] == ['gsm8k-train-0', 'gsm8k-train-1']
  hub['tau/commonsense_qa', None] = [
    {
      'question': 'Where is a door?',
      'choices': {'label': ['A', 'B'], 'text': ['bank', 'mall']},
      'answerKey': 'B',
    }
  ]
  assert load_problems('csqa:dev')[0].options == ('A)bank', 'B)mall')


def test_math_train_is_all_subjects(hub):
  from mrjax.data.public_sets import _MATH_SUBJECTS

  for i, subject in enumerate(_MATH_SUBJECTS):
    row = {'problem': f'q{i}', 'solution': rf'\boxed{{{i}}}', 'level': 'Level 1'}
    hub['EleutherAI/hendrycks_math', subject] = [row]
  assert [p.answer for p in load_problems('math:train')] == list('0123456')


def test_hub_columns(hub):
  hub['org/set', 'cfg'] = [
    {'problem': 'q1', 'answer': 5, 'level': 2, 'group': 2},
    {'problem': 'q2', 'answer': 6, 'level': 3, 'group': 2},
  ]
  spec = 'hf:org/set:train?question=problem&config=cfg'
  assert load_problems(spec) == [
    Problem(f'org-set-train-{i}', f'q{i + 1}', str(5 + i), level=2 + i)
    for i in range(2)
  ]
  with pytest.raises(ValueError, match=r"no column \['question'\], only .*'problem'"):
    load_problems('hf:org/set:train?config=cfg')
  with pytest.raises(ValueError, match=r"no column \['gold'\]"):
    load_problems(spec + '&answer=gold')
  with pytest.raises(ValueError, match="row 1: id '2' is already that of row 0"):
    load_problems(spec + '&id=group')
  with pytest.raises(ValueError, match="Unknown split 'nope'"):
    load_problems('hf:org/set:nope')


def test_offline_says_what_to_do(offline, tmp_path, monkeypatch):
  monkeypatch.setattr(time, 'sleep', None)  # nothing is tried again
  with pytest.raises(FileNotFoundError) as error:
    load_problems('gsm8k:test', data_root=tmp_path)
  assert f'no gsm8k_test.jsonl or gsm8k/test.jsonl in --data_root={tmp_path}' in str(
    error.value
  )
  assert 'no connection to huggingface.co: Name or service not known' in str(
    error.value
  )
  assert str(error.value).endswith(
    'or pass --data_root=FOLDER with a local copy, FOLDER/gsm8k_test.jsonl'
  )
  with pytest.raises(FileNotFoundError, match='no --data_root was given'):
    load_problems('csqa:dev')
  with pytest.raises(FileNotFoundError, match='local copy with jsonl:PATH'):
    load_problems('hf:org/name:test')
  assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_cached_set_is_read_without_a_network(offline, tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  write_jsonl(tmp_path / 'rows.jsonl', [GSM8K])
  files = {'test': str(tmp_path / 'rows.jsonl')}
  builder = datasets.load_dataset_builder('json', 'main', data_files=files)
  builder.download_and_prepare()
  # As the hub's data set would lie in the cache: OWNER___NAME/CONFIG/VERSION/HASH.
  made = Path(builder.cache_dir)
  kept = tmp_path / 'cache/openai___gsm8k/main/0.0.0/0123456789abcdef'
  kept.parent.mkdir(parents=True)
  made.rename(kept)
  for path in kept.glob('json-*'):
    path.rename(kept / path.name.replace('json-', 'gsm8k-'))
  info = json.loads((kept / 'dataset_info.json').read_text())
  info |= {'dataset_name': 'gsm8k'}
  (kept / 'dataset_info.json').write_text(json.dumps(info))
  assert load_problems('gsm8k:test')[0].answer == '1234'


def test_a_proxy_is_left_to_the_client_of_the_hub(offline, monkeypatch):
  assert hub_module.why_offline().startswith('no connection to huggingface.co: ')
  proxies = {'https': 'http://proxy:1'}
  monkeypatch.setattr(hub_module.urllib.request, 'getproxies', lambda: proxies)
  assert hub_module.why_offline() == ''


def test_a_hub_that_takes_connections_is_asked(monkeypatch):
  monkeypatch.setattr(hub_module.urllib.request, 'getproxies', dict)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
  with socket.create_server(('127.0.0.1', 0)) as server:
    endpoint = f'http://127.0.0.1:{server.getsockname()[1]}'
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', endpoint)
    assert hub_module.why_offline() == ''
  assert hub_module.why_offline().startswith('no connection to 127.0.0.1: ')


def test_an_empty_set_is_an_error(monkeypatch):
  monkeypatch.setattr(problems_module, 'load_hub', lambda *arguments: [])
  with pytest.raises(ValueError, match='holds no problem'):
    load_problems('hf:org/set:train')


def test_a_limit_bounds_what_is_generated():
  assert load_problems('arithmetic:test?size=900000', limit=3) == load_problems(
    'arithmetic:test?size=3'
  )
  with pytest.raises(ValueError, match='size=1000001; want at most 1000000'):
    load_problems('arithmetic:test?size=1000001', limit=3)
