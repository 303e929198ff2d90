"""Evaluation: sampling and grading joined, with a scripted sampler and a real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mrjax.data.problems import load_problems
from mrjax.records import Problem, write_jsonl
from mrjax.runs import evaluate, sample
from mrjax.runs.common import OutputError

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = 'arithmetic:test?size=12'


def config(tmp_path, **kwargs):
  values = {'model': 'tiny-0.2m', 'data': DATA, 'output_dir': str(tmp_path / 'run')}
  return evaluate.Config(**(values | {'prompt_template': 'qa'} | kwargs))


def read(path):
  return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


@pytest.fixture
def scripted(monkeypatch):
  """A sampler that solves every third problem, and whose votes hinge on the order."""
  configs = []

  def run(config):
    configs.append(config)
    problems = load_problems(config.data, limit=config.limit or None)
    records = []
    for number, problem in enumerate(problems):
      for index in range(config.num_samples):
        right = number % 3 == 0 and index > 0
        records.append(
          {
            'problem_id': problem.id,
            'sample_index': index,
            'text': problem.solution if right else '#### -1',
            'finish_reason': 'length' if index == 0 else 'stop',
            'num_tokens': 10 * (index + 1),
          }
        )
    name = 'samples-00000-of-00001.jsonl'
    write_jsonl(Path(config.output_dir) / name, reversed(records))
    return {}

  monkeypatch.setattr(sample, 'run', run)
  return configs


def test_greedy_by_default(tmp_path, scripted):
  summary = evaluate.run(config(tmp_path))
  assert (scripted[0].temperature, scripted[0].num_samples) == (0.0, 1)
  assert type(scripted[0]) is sample.Config
  assert summary['pass@1']['value'] == 0.0
  assert not any(name.startswith('maj@') for name in summary)


def test_run_directory(tmp_path, scripted):
  summary = evaluate.run(config(tmp_path, num_samples=4, temperature=0.7))
  folder = tmp_path / 'run'
  assert summary == json.loads((folder / 'metrics.json').read_text())
  assert summary['rule'] == 'gsm8k'
  assert summary['pass@1']['value'] == pytest.approx(1 / 4)
  assert summary['pass@4']['value'] == pytest.approx(1 / 3)
  assert summary['maj@4']['value'] == pytest.approx(1 / 3)
  assert summary['maj@2']['value'] == 0.0  # a tie goes to the first sample
  assert summary['mean_length'] == 25.0
  assert summary['truncation_rate'] == 0.25
  graded = read(folder / 'graded.jsonl')
  assert len(graded) == 48 and sum(record['correct'] for record in graded) == 12
  problems = read(folder / 'problems.jsonl')
  assert [problem['id'] for problem in problems] == [p.id for p in load_problems(DATA)]
  assert set(summary['by_level']) == {str(problem['level']) for problem in problems}
  config_json = json.loads((folder / 'config.json').read_text())
  assert config_json['config']['num_samples'] == 4
  # The same command again changes nothing; another one is refused.
  assert evaluate.run(config(tmp_path, num_samples=4, temperature=0.7)) == summary
  with pytest.raises(OutputError, match='another configuration'):
    evaluate.run(config(tmp_path, num_samples=2))
  assert (
    evaluate.run(config(tmp_path, num_samples=2, overwrite=True))['num_samples'] == 24
  )


def test_bad_input_leaves_nothing(tmp_path):
  write_jsonl(tmp_path / 'p.jsonl', [{'id': 'p', 'question': '?', 'answer': '1'}])
  write_jsonl(tmp_path / 'q.jsonl', [{'id': 'q', 'question': '?'}])
  with pytest.raises(ValueError, match=r'name one with --rule'):
    evaluate.run(config(tmp_path, data=f'jsonl:{tmp_path / "p.jsonl"}'))
  with pytest.raises(ValueError, match='neither answer nor solution'):
    evaluate.run(config(tmp_path, data=f'jsonl:{tmp_path / "q.jsonl"}'))
  with pytest.raises(FileNotFoundError, match=r"Model '.*nothing'"):
    evaluate.run(config(tmp_path, model=str(tmp_path / 'nothing')))
  with pytest.raises(ValueError, match="unknown grading rule 'x'"):
    config(tmp_path, rule='x')
  with pytest.raises(ValueError, match='--vote=x: want one of'):
    config(tmp_path, vote='x')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('data', 'template', 'rule'),
  [
    ('arithmetic:test?size=3', 'qa', 'gsm8k'),
    ('arithmetic:test?size=3&form=boxed', 'chat', 'boxed_symbolic'),
    ('arithmetic:test?size=3&form=choice', 'qa', 'choice'),
    ('arithmetic:test?size=3', 'qsharp', 'boxed_symbolic'),
    ('arithmetic:test?size=3', 'w2s', 'w2s_gsm8k'),
    ('arithmetic:test?size=3&form=boxed', 'lema', 'lema_math'),
    ('arithmetic:test?size=3&form=choice', 'moo', 'moo_gsm8k'),
  ],
)
def test_default_rule(data, template, rule):
  assert evaluate.default_rule(template, load_problems(data)) == rule


def test_default_rule_of_mixed_problems():
  problems = [
    Problem('a', '?', solution='#### 1'),
    Problem('b', '?', options=('1', '2')),
  ]
  with pytest.raises(ValueError, match='--rule'):
    evaluate.default_rule('qa', problems)


def test_command_samples_and_grades(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.evaluate', '--model=tiny-0.2m'),
      *('--data=arithmetic:test?size=4', '--prompt_template=qa', '--num_samples=2'),
      *('--temperature=0.7', '--max_new_tokens=8', '--vote=equivalence'),
      f'--output_dir={tmp_path / "run"}',
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'by gsm8k: ' in done.stdout and 'of 8 samples correct' in done.stdout
  graded = read(tmp_path / 'run' / 'graded.jsonl')
  assert len(graded) == 8
  assert {'text', 'token_ids', 'extracted', 'correct', 'gold'} <= set(graded[0])
