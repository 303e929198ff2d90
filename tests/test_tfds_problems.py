"""The TFDS data set of problems: built, read back equal, and without TensorFlow."""

import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from mrjax.data import tfds_problems
from mrjax.data.arithmetic import generate_problems
from mrjax.data.problems import load_problems
from mrjax.records import Problem, write_jsonl
from mrjax.runs import build_tfds

SPLITS = {
  'train': generate_problems('train', size=23, form='choice'),
  'dev': [
    Problem(id='é', question='漢字?\n🙂', answer='\\frac{1}{2}', level='Level 2'),
    Problem(id='b', question='q', solution='s', source='x', level=3),
    Problem(id='a', question='q', options=('A)1', 'B)')),
  ],
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  tfds_problems.build(SPLITS, name='mine', data_dir=folder)
  return folder


def test_problems_come_back_equal_and_in_order(data_dir):
  for split, problems in SPLITS.items():
    assert (
      load_problems(f'tfds:mrjax_problems/mine:{split}', data_root=data_dir) == problems
    )
  part = load_problems('tfds:mrjax_problems/mine:train[5:9]', data_root=data_dir)
  assert part == SPLITS['train'][5:9]


def test_any_tfds_reader_reads_it(data_dir):
  builder = tfds.builder('mrjax_problems/mine', data_dir=data_dir)
  assert builder.info.splits['train'].num_examples == 23
  first = builder.as_data_source('dev')[0]
  assert first['question'].decode() == '漢字?\n🙂'
  assert first['solution'] == b'' and json.loads(first['level']) == 'Level 2'


def test_tensorflow_is_not_imported(data_dir):
  """Where TensorFlow is not installed, every test here shows that it is not needed."""
  program = (
    'import sys\n'
    'from mrjax.data.problems import load_problems\n'
    'problems = load_problems(sys.argv[1], data_root=sys.argv[2])\n'
    'print(len(problems), "tensorflow" in sys.modules)'
  )
  spec = 'tfds:mrjax_problems/mine:train'
  output = subprocess.check_output([sys.executable, '-c', program, spec, str(data_dir)])
  assert output.split() == [b'23', b'False']


def test_an_existing_set_is_kept_unless_told(tmp_path):
  one, two = SPLITS['train'][:1], SPLITS['train'][:2]
  read = lambda: load_problems('tfds:mrjax_problems/x:train', data_root=tmp_path)
  tfds_problems.build({'train': one}, name='x', data_dir=tmp_path)
  with pytest.raises(FileExistsError, match='give another name, or overwrite'):
    tfds_problems.build({'train': two}, name='x', data_dir=tmp_path)
  assert read() == one
  tfds_problems.build({'train': two}, name='x', data_dir=tmp_path, overwrite=True)
  assert read() == two


@pytest.mark.parametrize(
  ('splits', 'name', 'message'),
  [
    ({'train': SPLITS['dev']}, 'Bad-name', 'lower-case'),
    ({}, 'x', 'no split'),
    ({'train': []}, 'x', "split 'train' holds no problem"),
    ({'train': SPLITS['dev'] * 2}, 'x', '6 problems share 3 ids'),
  ],
)
def test_bad_builds(tmp_path, splits, name, message):
  with pytest.raises(ValueError, match=message):
    tfds_problems.build(splits, name=name, data_dir=tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_missing_sets_and_splits(data_dir):
  with pytest.raises(FileNotFoundError, match='build it with python -m'):
    load_problems('tfds:mrjax_problems/nope:train', data_root=data_dir)
  with pytest.raises(ValueError, match="Unknown split 'test'"):
    load_problems('tfds:mrjax_problems/mine:test', data_root=data_dir)


def test_the_run_builds_from_any_source(tmp_path):
  problems = SPLITS['dev']
  path = tmp_path / 'own.jsonl'
  write_jsonl(path, [p.to_record() for p in problems])
  summary = build_tfds.run(
    build_tfds.Config(
      data=('arithmetic:test?size=4&seed=2', f'own=jsonl:{path}'),
      name='both',
      output_dir=str(tmp_path / 'sets'),
      limit=2,
    )
  )
  assert summary['splits'] == {'test': 2, 'own': 2}
  for spec, expected in zip(
    summary['data'],
    (generate_problems('test', size=2, seed=2), problems[:2]),
    strict=True,
  ):
    assert load_problems(spec, data_root=tmp_path / 'sets') == expected


def test_names_of_splits():
  assert build_tfds.split_and_spec('arithmetic:train?size=3') == (
    'train',
    'arithmetic:train?size=3',
  )
  assert build_tfds.split_and_spec('a=jsonl:b=c') == ('a', 'jsonl:b=c')
  for bad in ('jsonl:x', 'hf:a/b:train[:9]'):
    with pytest.raises(ValueError, match='name the split'):
      build_tfds.split_and_spec(bad)
  config = build_tfds.Config(
    data=('arithmetic:dev?size=1',) * 2, name='x', output_dir='nowhere'
  )
  with pytest.raises(ValueError, match="split 'dev' is given twice"):
    build_tfds.run(config)
  with pytest.raises(ValueError, match='--data is missing'):
    build_tfds.Config(data=(), name='x', output_dir='nowhere')
