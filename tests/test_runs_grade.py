"""Grading as a command: streaming, joins, votes, bad input, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrjax.grading import symbolic
from mrjax.grading.tally import Tally, format_summary
from mrjax.records import DataError, write_jsonl
from mrjax.runs import grade
from mrjax.runs.common import OutputError

REPOSITORY = Path(__file__).resolve().parents[1]


def run(tmp_path, records, **kwargs):
  path = tmp_path / 'in.jsonl'
  if not path.exists():
    write_jsonl(path, records)
  config = {'rule': 'gsm8k', 'input': str(path), 'output': str(tmp_path / 'out.jsonl')}
  summary = grade.run(grade.Config(**(config | kwargs)))
  return summary, [json.loads(line) for line in open(tmp_path / 'out.jsonl')]


def test_adds_what_was_found(tmp_path):
  records = [
    {'text': '#### 18', 'gold': 'So.\n#### 18', 'mine': [1]},
    {'text': '#### 19', 'gold': 18},
    {'text': 'no', 'gold': '18'},
  ]
  summary, graded = run(tmp_path, records)
  assert graded == [
    records[0] | {'extracted': '18', 'correct': True},
    {'text': '#### 19', 'gold': '18', 'extracted': '19', 'correct': False},
    records[2] | {'extracted': None, 'correct': False},
  ]
  assert summary['rule'] == 'gsm8k'
  assert (summary['num_problems'], summary['num_correct']) == (3, 1)
  assert summary['num_unanswered'] == 1
  assert summary['pass@1']['value'] == summary['accuracy'] == 1 / 3


def test_escaped_characters_are_kept(tmp_path):
  line = r'{"text": "\ud83d\ude00 \ud800 #### 1", "gold": "1"}'  # half a pair is legal
  (tmp_path / 'in.jsonl').write_text(line)
  assert run(tmp_path, None)[1][0]['text'] == '😀 \ud800 #### 1'


def sample(problem, index, answer, gold='1', **kwargs):
  text = f'#### {answer}'
  return {'problem_id': problem, 'sample_index': index, 'text': text, 'gold': gold} | (
    kwargs
  )


def test_votes_follow_the_sample_index(tmp_path):
  # 'a' has the tie 1, 2; 'b' is out of order in the file.
  records = [
    sample('a', 0, 1),
    sample('b', 1, 1),
    sample('a', 1, 2),
    sample('b', 0, 2),
  ]
  metrics = tmp_path / 'deep' / 'metrics.json'
  summary, _ = run(tmp_path, records, vote='string_first', metrics=str(metrics))
  assert summary['maj@2']['value'] == 0.5
  assert summary['pass@1']['value'] == 0.5
  assert summary['pass@2']['value'] == 1.0
  assert json.loads(metrics.read_text()) == summary


def test_equivalence_vote_is_seeded(tmp_path):
  records = [sample('a', 0, 2), sample('a', 1, '1.0'), sample('a', 2, '1')]
  summary, _ = run(tmp_path, records, vote='equivalence')
  assert summary['maj@3']['value'] == 1.0
  assert 'maj@1' not in summary


def test_order_of_ties_on_real_samples(tmp_path, shared):
  """The four models of GSM8K's example solutions: 584 in one order, 744 reversed."""
  path = shared / 'data' / 'gsm8k_example_model_solutions.jsonl'
  names = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
  rows = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  for order, wins in ((names, 584), (names[::-1], 744)):
    records = [
      {
        'problem_id': f'gsm8k-test-{number}',
        'sample_index': index,
        'text': row[name]['solution'],
        'gold': row['ground_truth'],
      }
      for index, name in enumerate(order)
      for number, row in enumerate(rows)
    ]
    (tmp_path / 'in.jsonl').unlink(missing_ok=True)
    summary, graded = run(
      tmp_path, records, rule='openai_gsm8k', vote='string_first', overwrite=True
    )
    assert summary['num_correct'] == 2001
    assert round(summary['maj@4']['value'] * 1319) == wins
    assert [
      sum(r['correct'] for r in graded[i * 1319 : (i + 1) * 1319]) for i in (0, 1)
    ]


def test_joins_golds_by_problem(tmp_path):
  write_jsonl(
    tmp_path / 'problems.jsonl',
    [
      {'id': 'p', 'question': '?', 'answer': '18', 'level': 2},
      {'id': 'q', 'question': '?', 'solution': 'x\n#### 5', 'level': 1},
    ],
  )
  problems = f'jsonl:{tmp_path / "problems.jsonl"}'
  records = [{'problem_id': 'p', 'text': '#### 18'}, {'problem_id': 'q', 'text': 'no'}]
  summary, graded = run(tmp_path, records, problems=problems)
  assert [record['gold'] for record in graded] == ['18', 'x\n#### 5']
  assert [record['correct'] for record in graded] == [True, False]
  assert list(summary['by_level']) == ['1', '2']
  assert summary['by_level']['2']['pass@1']['value'] == 1.0
  assert 'level 2    100.00%   [100.00%, 100.00%]   pass@1 of 1 problems' in (
    format_summary(summary)
  )


def test_joins_options(tmp_path):
  options = ['A)10', 'B)20', 'C)30', 'D)40', 'E)50']
  write_jsonl(
    tmp_path / 'problems.jsonl',
    [{'id': 'p', 'question': '?', 'answer': 'B', 'options': options}],
  )
  problems = f'jsonl:{tmp_path / "problems.jsonl"}'
  records = [{'problem_id': 'p', 'text': 'The answer is 20.'}]
  _, graded = run(tmp_path, records, rule='choice', problems=problems)
  assert graded[0]['extracted'] == 'B' and graded[0]['correct']


def test_symbolic_grading_keeps_the_order_and_counts_timeouts(tmp_path, monkeypatch):
  verifier = symbolic.Verifier(cpu_seconds=1.0)
  monkeypatch.setattr(symbolic, 'default_verifier', lambda: verifier)
  records = [
    {'text': rf'\boxed{{\frac{{{2 * n}}}{{2}}}}', 'gold': str(n + n % 2)}
    for n in range(1, 50)
  ]
  records.insert(7, {'text': r'\boxed{10^{10^{10}}}', 'gold': '7'})
  summary, graded = run(tmp_path, records, rule='boxed_symbolic')
  assert [record['text'] for record in graded] == [record['text'] for record in records]
  assert summary['num_timeouts'] == 1
  assert summary['num_correct'] == 24
  assert 'num_timeouts 1' in format_summary(summary)
  verifier.close()


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (['{"text": "a"}'], r"in.jsonl:2: missing field\(s\) \['gold'\]"),
    (['{"gold": "1"}'], r"in.jsonl:2: missing field\(s\) \['text'\]"),
    (['{"text": "a", "gold": "1"'], 'in.jsonl:2: not valid JSON'),
    (['[1]'], 'in.jsonl:2: want a JSON object'),
    (['{"text": 5, "gold": "1"}'], "in.jsonl:2: field 'text' is int 5, want str"),
    (['{"text": "a", "gold": [1]}'], "in.jsonl:2: field 'gold' is list"),
    (['{"text": "a", "gold": true}'], "in.jsonl:2: field 'gold' is bool"),
    (['{"text": "a", "gold": "none"}'], 'in.jsonl:2: gold .none. holds no answer'),
    (
      ['{"text": "a", "gold": "1", "sample_index": "x"}'],
      "in.jsonl:2: field 'sample_index' is str 'x', want int",
    ),
    (
      ['', '{"text": "a", "gold": "1", "options": [1]}'],
      "in.jsonl:3: field 'options' must hold strings",
    ),
  ],
)
def test_bad_record_names_file_and_line(tmp_path, lines, message):
  path = tmp_path / 'in.jsonl'
  path.write_text('\n'.join(['{"text": "#### 1", "gold": "1"}', *lines]) + '\n')
  with pytest.raises(DataError, match=message):
    run(tmp_path, None)
  assert os.listdir(tmp_path) == ['in.jsonl']  # nothing half-written stays


def test_bad_input(tmp_path):
  records = [sample('p', 0, 1)]
  with pytest.raises(ValueError, match="unknown grading rule 'x'"):
    run(tmp_path, records, rule='x')
  with pytest.raises(ValueError, match='--vote=x: want one of string_first'):
    run(tmp_path, records, vote='x')
  with pytest.raises(FileNotFoundError, match='no file, directory'):
    run(tmp_path, records, input=str(tmp_path / 'none'))
  with pytest.raises(OutputError, match='is a directory'):
    run(tmp_path, records, output=str(tmp_path))
  run(tmp_path, records)
  with pytest.raises(OutputError, match=r'out.jsonl exists; .*--overwrite'):
    run(tmp_path, records)
  run(tmp_path, records, overwrite=True)


def test_choice_without_options_in_csqa(tmp_path):
  with pytest.raises(DataError, match=r"in.jsonl:1: the rule needs a field 'options'"):
    run(tmp_path, [{'text': 'a', 'gold': 'b'}], rule='lema_csqa')


def test_empty_input(tmp_path):
  (tmp_path / 'in.jsonl').write_text('')
  with pytest.raises(DataError, match=r'in.jsonl: the file holds no record'):
    run(tmp_path, None)


def test_unknown_problem(tmp_path):
  write_jsonl(tmp_path / 'p.jsonl', [{'id': 'p', 'question': '?', 'answer': '1'}])
  with pytest.raises(DataError, match=r"in.jsonl:1: problem_id 'z' is not in --prob"):
    run(
      tmp_path,
      [{'problem_id': 'z', 'text': 'a'}],
      problems=f'jsonl:{tmp_path / "p.jsonl"}',
    )


def test_problem_without_answer(tmp_path):
  write_jsonl(tmp_path / 'p.jsonl', [{'id': 'p', 'question': '?'}])
  with pytest.raises(ValueError, match='neither answer nor solution'):
    run(
      tmp_path,
      [{'problem_id': 'p', 'text': 'a'}],
      problems=f'jsonl:{tmp_path / "p.jsonl"}',
    )


def test_lengths_and_ends():
  tally = Tally(is_equal=str.__eq__)
  for length, reason in ((10, 'stop'), (30, 'length')):
    tally.add(
      {
        'extracted': None,
        'correct': False,
        'num_tokens': length,
        'finish_reason': reason,
      }
    )
  summary = tally.summary()
  assert summary['mean_length'] == 20.0
  assert summary['truncation_rate'] == 0.5
  assert 'cut at the length limit 50.00%' in format_summary(summary)
  with pytest.raises(ValueError, match='no graded sample'):
    Tally(is_equal=str.__eq__).summary()


def test_problems_with_different_numbers_of_samples():
  tally = Tally('string_first', is_equal=str.__eq__)
  for problem, corrects in {'a': [1, 0, 0, 0], 'b': [1, 1]}.items():
    for correct in corrects:
      tally.add(
        {'problem_id': problem, 'extracted': str(correct), 'correct': bool(correct)}
      )
  summary = tally.summary()
  assert summary['pass@1']['value'] == (0.25 + 1) / 2
  assert summary['pass@2']['value'] == (0.5 + 1) / 2
  assert 'pass@4' not in summary


def command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.grade', *args],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )


def test_command(tmp_path):
  write_jsonl(tmp_path / 'in.jsonl', [sample('a', 0, 1), sample('a', 1, 2)])
  args = [f'--input={tmp_path / "in.jsonl"}', f'--output={tmp_path / "out.jsonl"}']
  done = command('--rule=gsm8k', *args)
  assert done.returncode == 0, done.stderr
  assert 'gsm8k: 1 of 2 samples correct, 1 problems' in done.stdout
  assert 'pass@1     50.00%' in done.stdout
  again = command('--rule=gsm8k', *args)
  assert again.returncode == 1
  assert again.stderr.startswith('error: ') and again.stderr.count('\n') == 1
  unknown = command('--rule=gsm8k', *args, '--sed=1')
  assert unknown.returncode != 0 and 'sed' in unknown.stderr


def test_starts_without_heavy_imports():
  code = (
    'import sys, experiments.grade, mrjax.runs.grade; '
    "print([m for m in ('jax', 'numpy', 'transformers', 'datasets', 'sympy', "
    "'rapidfuzz') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert done.stdout.strip() == '[]', done.stderr


def test_a_sample_that_comes_twice_is_named(tmp_path):
  rows = [sample('a', 0, '1'), sample('a', 1, '1'), sample('b', 0, '1')]
  with pytest.raises(DataError, match=r"in.jsonl:4: sample 1 of problem 'a' is there"):
    run(tmp_path, [*rows, sample('a', 1, '2')])
  assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'metrics': 'out.jsonl'}, 'out.jsonl is another output too'),
    ({'output': 'in.jsonl'}, 'in.jsonl is the input too'),
    ({'metrics': './in.jsonl'}, 'in.jsonl is the input too'),
  ],
)
def test_no_file_is_written_over(tmp_path, monkeypatch, changes, message):
  monkeypatch.chdir(tmp_path)
  write_jsonl('in.jsonl', [sample('a', 0, '1')])
  before = Path('in.jsonl').read_bytes()
  fields = {'rule': 'gsm8k', 'input': 'in.jsonl', 'output': 'out.jsonl'}
  with pytest.raises(OutputError, match=message):
    grade.run(grade.Config(**(fields | changes), overwrite=True))
  assert Path('in.jsonl').read_bytes() == before
