"""RFT selection as a command: the paper's numbers on real samples, and bad input."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mrjax.records import DataError, write_jsonl
from mrjax.runs import collect
from mrjax.runs.common import OutputError

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')


def read(path):
  return [json.loads(line) for line in open(path, encoding='utf-8')]


def run(tmp_path, samples, **kwargs):
  config = {
    'problems': f'jsonl:{tmp_path / "problems.jsonl"}',
    'samples': ','.join(str(path) for path in samples),
    'output': str(tmp_path / 'out.jsonl'),
    'overwrite': True,
  }
  summary = collect.run(collect.Config(**(config | kwargs)))
  return summary, read(tmp_path / 'out.jsonl')


@pytest.fixture(scope='module')
def real(shared, tmp_path_factory):
  """The four models of GSM8K's example solutions, and the human, as sample sets.

  The answer's line `A: 18` is read as `#### 18`.
  """
  folder = tmp_path_factory.mktemp('real')
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  rows = [json.loads(line) for line in path.read_text('utf-8').splitlines()]

  def marked(text):
    head, newline, last = text.rpartition('\n')
    return (
      head + newline + last.replace('A: ', '#### ', 1) if last[:3] == 'A: ' else text
    )

  for name in (*MODELS, 'human'):
    texts = [
      marked(row['ground_truth'] if name == 'human' else row[name]['solution'])
      for row in rows
    ]
    records = [
      {'problem_id': f'gsm8k-test-{i}', 'sample_index': 0, 'text': text}
      for i, text in enumerate(texts)
    ]
    random.Random(0).shuffle(records)  # the order in a file does not matter
    write_jsonl(folder / f'{name}.jsonl', records)
  return folder


def run_real(real, shared, tmp_path, names, **kwargs):
  return run(
    tmp_path,
    [real / f'{name}.jsonl' for name in names],
    problems='gsm8k:test',
    data_root=str(shared / 'data'),
    **kwargs,
  )


def test_human_as_a_fifth_candidate(real, shared, tmp_path):
  summary, records = run_real(
    real, shared, tmp_path, [*MODELS, 'human'], include_human=False
  )
  assert summary['num_correct'] == 3320
  assert summary['num_kept'] == summary['num_records'] == len(records) == 2595
  counts = [totals['num_correct'] for totals in summary['sets'].values()]
  assert counts == [286, 515, 458, 742, 1319]
  assert summary['num_questions_unsolved'] == 0
  assert summary['solved_at'][-1] == 1319


def test_union_of_four(real, shared, tmp_path):
  summary, records = run_real(real, shared, tmp_path, MODELS)
  assert summary['num_correct'] == 2001
  assert summary['num_kept'] == 1457
  assert summary['num_records'] == len(records) == 1319 + 1457
  assert summary['solved_at'][0] == 286
  # Distinct paths grow with the samples, and their number is that of the kept ones.
  assert summary['paths_at'] == sorted(summary['paths_at'])
  assert summary['paths_at'][-1] * 1319 == pytest.approx(1457)
  assert sum(summary['correct_histogram'].values()) == 1319
  assert summary['correct_histogram']['0'] == 1319 - summary['solved_at'][-1]
  shares = [totals['exclusive_share'] for totals in summary['sets'].values()]
  assert all(0 < share < 1 for share in shares) and sum(shares) < 1
  human = [record for record in records if record['sample_index'] == -1]
  assert [record['problem_id'] for record in human] == (
    [f'gsm8k-test-{i}' for i in range(1319)]
  )
  assert human[0] == records[0]
  assert records[0]['prompt'].endswith('### Response:')
  assert records[0]['completion'].endswith('#### 18')


def test_first_keeps_as_many(real, shared, tmp_path):
  summary, _ = run_real(real, shared, tmp_path, MODELS, dedup='first')
  assert summary['num_kept'] == 1457


def test_no_dedup_keeps_all_correct(real, shared, tmp_path):
  summary, records = run_real(real, shared, tmp_path, MODELS, dedup='none')
  assert summary['calculator_check'] is False
  assert summary['num_kept'] == 2001
  assert len(records) == 1319 + 2001
  checked, _ = run_real(
    real, shared, tmp_path, MODELS, dedup='none', calculator_check=True
  )
  assert checked['num_kept'] + checked['num_false_annotations'] == 2001
  assert checked['num_false_annotations'] > 0


@pytest.fixture
def tiny(tmp_path):
  write_jsonl(
    tmp_path / 'problems.jsonl',
    [
      {'id': 'p', 'question': 'P?', 'answer': '2', 'solution': '<<1+1=2>>2\n#### 2'},
      {'id': 'q', 'question': 'Q?', 'answer': '3', 'solution': '<<1+2=3>>3\n#### 3'},
    ],
  )
  return tmp_path


def sample(problem, index, text, **kwargs):
  return {'problem_id': problem, 'sample_index': index, 'text': text} | kwargs


def test_records(tiny):
  write_jsonl(
    tiny / 'a.jsonl',
    [
      sample('p', 1, ' <<2=2>>\n#### 2 ', correct=False),  # judged here again
      sample('p', 0, '<<1+1=2>>\ud800\n#### 2.00'),
      sample('p', 2, '<<1+1=3>>\n#### 2'),  # false annotation
      sample('p', 3, '#### 2.00001', correct=True),  # equal to 1e-4 is not equal
    ],
  )
  summary, records = run(tiny, [tiny / 'a.jsonl'], prompt_template='qa')
  assert records == [
    {
      'prompt': 'Question: P?\nAnswer:',
      'completion': ' <<1+1=2>>2\n#### 2',
      'problem_id': 'p',
      'sample_index': -1,
    },
    {
      'prompt': 'Question: P?\nAnswer:',
      'completion': ' <<1+1=2>>\ud800\n#### 2.00',  # the human's path: stays
      'problem_id': 'p',
      'sample_index': 0,
    },
    {
      'prompt': 'Question: P?\nAnswer:',
      'completion': ' <<2=2>>\n#### 2',
      'problem_id': 'p',
      'sample_index': 1,
    },
    {
      'prompt': 'Question: Q?\nAnswer:',
      'completion': ' <<1+2=3>>3\n#### 3',
      'problem_id': 'q',
      'sample_index': -1,
    },
  ]
  assert summary['num_correct'] == 3
  assert summary['num_false_annotations'] == 1
  assert summary['num_questions_unsolved'] == 1
  assert summary['num_questions_without_samples'] == 1


def test_sets_in_the_order_given(tiny):
  write_jsonl(tiny / 'a.jsonl', [sample('p', 7, '<<2=2>> a\n#### 2')])
  write_jsonl(tiny / 'b.jsonl', [sample('p', 0, '<<2=2>> b\n#### 2')])
  stats = tiny / 'stats' / 'stats.json'
  summary, records = run(
    tiny,
    [tiny / 'b.jsonl', tiny / 'a.jsonl'],
    include_human=False,
    stats=str(stats),
  )
  assert [(r['sample_set'], r['sample_index']) for r in records] == [(0, 0)]
  assert records[0]['completion'] == '<<2=2>> b\n#### 2'
  assert summary == json.loads(stats.read_text())
  assert [s['exclusive_paths'] for s in summary['sets'].values()] == [0, 0]


def test_shards_in_any_order_give_the_same_file(tiny):
  rng = random.Random(0)
  samples = [
    sample(
      rng.choice('pq'), i, f'<<{rng.randrange(4)}=0>>{rng.randrange(10**9)}\n#### 2'
    )
    for i in range(300)
  ]
  outputs = []
  for order in range(2):
    rng.shuffle(samples)
    for shard in range(3):
      write_jsonl(
        tiny / f'set{order}' / f'samples-0000{shard}-of-00003.jsonl', samples[shard::3]
      )
    outputs.append(run(tiny, [tiny / f'set{order}'], calculator_check=False)[1])
  assert outputs[0] == outputs[1]
  assert len(outputs[0]) > 4


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'problem_id': 'z', 'sample_index': 0, 'text': ''}, "problem_id 'z' is not in"),
    ({'problem_id': 'p', 'sample_index': -1, 'text': ''}, 'sample_index -1 is not'),
    ({'problem_id': 'p', 'sample_index': 'a', 'text': ''}, "sample_index 'a' is not"),
    ({'problem_id': 'p', 'sample_index': True, 'text': ''}, 'sample_index True is not'),
    ({'problem_id': 'p', 'sample_index': 1, 'text': 3}, 'text 3 is not a string'),
    ({'problem_id': 'p', 'text': ''}, r"missing field\(s\) \['sample_index'\]"),
    ({'sample_index': 1, 'text': ''}, r"missing field\(s\) \['problem_id'\]"),
  ],
)
def test_bad_sample_names_file_and_line(tiny, record, message):
  write_jsonl(tiny / 'a.jsonl', [sample('p', 0, '#### 2'), record])
  with pytest.raises(DataError, match=rf'a\.jsonl:2: {message}'):
    run(tiny, [tiny / 'a.jsonl'])
  assert sorted(os.listdir(tiny)) == ['a.jsonl', 'problems.jsonl']


def test_bad_input(tiny):
  write_jsonl(tiny / 'a.jsonl', [sample('p', 0, '#### 2'), sample('p', 0, '#### 3')])
  with pytest.raises(ValueError, match=r"a.jsonl holds sample 0 of problem 'p' twice"):
    run(tiny, [tiny / 'a.jsonl'])
  assert sorted(os.listdir(tiny)) == ['a.jsonl', 'problems.jsonl']
  for samples in (['a', ''], ['a', 'a']):
    with pytest.raises(ValueError, match='want one or more different sample sets'):
      run(tiny, samples)
  with pytest.raises(FileNotFoundError, match='no file, directory'):
    run(tiny, [tiny / 'none'])
  with pytest.raises(ValueError, match="unknown dedup 'x'"):
    run(tiny, [tiny / 'a.jsonl'], dedup='x')
  with pytest.raises(ValueError, match="unknown grading rule 'x'"):
    run(tiny, [tiny / 'a.jsonl'], rule='x')
  with pytest.raises(ValueError, match=r"--prompt_template='x' is not known"):
    run(tiny, [tiny / 'a.jsonl'], prompt_template='x')
  with pytest.raises(ValueError, match='chat needs a tokenizer'):
    run(tiny, [tiny / 'a.jsonl'], prompt_template='chat')
  (tiny / 'out.jsonl').write_text('mine')
  with pytest.raises(OutputError, match='exists; choose another'):
    run(tiny, [tiny / 'a.jsonl'], overwrite=False)
  assert (tiny / 'out.jsonl').read_text() == 'mine'


def test_problem_without_solution(tiny):
  write_jsonl(tiny / 'problems.jsonl', [{'id': 'p', 'question': '?', 'answer': '2'}])
  write_jsonl(tiny / 'a.jsonl', [sample('p', 0, '#### 2')])
  with pytest.raises(
    ValueError, match=r"'p' .* has no solution; .*--include_human=false"
  ):
    run(tiny, [tiny / 'a.jsonl'])
  assert len(run(tiny, [tiny / 'a.jsonl'], include_human=False)[1]) == 1
  write_jsonl(tiny / 'problems.jsonl', [{'id': 'p', 'question': '?'}])
  with pytest.raises(ValueError, match='neither answer nor solution'):
    run(tiny, [tiny / 'a.jsonl'], include_human=False)


def test_command(tiny):
  write_jsonl(tiny / 'a.jsonl', [sample('p', 0, '#### 2')])
  command = [
    *(sys.executable, '-m', 'experiments.rft.collect', '--noinclude_human'),
    *(f'--problems=jsonl:{tiny / "problems.jsonl"}', f'--samples={tiny / "a.jsonl"}'),
    f'--output={tiny / "out.jsonl"}',
  ]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '1 of 1 samples correct' in done.stdout and 'wrote 1 records' in done.stdout
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.startswith('error: ')


def test_starts_without_jax():
  code = 'import sys, experiments.rft.collect as c; print("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert done.stdout.strip() == 'False', done.stderr
