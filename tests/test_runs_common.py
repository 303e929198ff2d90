"""Output directories and what is recorded of a run."""

import dataclasses
import datetime
import errno
import functools
import json
from pathlib import Path

import pytest

from mrjax.data.arithmetic import generate_problems
from mrjax.records import write_jsonl
from mrjax.runs import (
  build_tfds,
  cli,
  collect,
  common,
  convert,
  grade,
  pretrain,
  report,
  sample,
  score,
)
from mrjax.runs.common import OutputError


@dataclasses.dataclass(frozen=True)
class Config:
  rate: float = 0.5
  output_dir: str = ''


def test_a_resumed_run_keeps_the_time_of_its_start(tmp_path):
  before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
  config = Config(output_dir=str(tmp_path / 'run'))
  path = common.prepare_output_dir(config.output_dir, config, overwrite=False)
  saved = json.loads((path / 'config.json').read_text())
  started = datetime.datetime.fromisoformat(saved['started'])
  assert before <= started <= datetime.datetime.now(datetime.UTC)
  assert started.utcoffset() == datetime.timedelta(0)
  assert saved['config'] == {'rate': 0.5, 'output_dir': config.output_dir}
  earlier = json.dumps(saved | {'started': '2020-01-01T00:00:00+00:00'})
  (path / 'config.json').write_text(earlier)
  common.prepare_output_dir(path, config, overwrite=False, resume=True)
  assert (path / 'config.json').read_text() == earlier


def test_settings_that_a_kill_left_unfinished_are_none(tmp_path):
  left = tmp_path / f'.config.json.{"0a" * 16}.tmp'
  left.write_text('{"conf')
  config = Config(output_dir=str(tmp_path))
  common.prepare_output_dir(tmp_path, config, overwrite=False)
  assert json.loads((tmp_path / 'config.json').read_text())['config']['rate'] == 0.5
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'mine.txt').touch()
  with pytest.raises(OutputError, match='already holds files'):
    common.prepare_output_dir(tmp_path, config, overwrite=False)


def test_fields_that_may_change_and_fields_that_are_new(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Later(Config):
    depth: int = 3
    sizes: tuple[int, ...] = (1, 2)

  path = tmp_path / 'run'
  common.prepare_output_dir(path, Config(), overwrite=False)
  resume = functools.partial(
    common.prepare_output_dir, path, overwrite=False, resume=True
  )
  resume(Later())
  with pytest.raises(OutputError, match=r'\(depth: was 3, now 4\)'):
    resume(Later(depth=4))
  with pytest.raises(OutputError, match=r'\(rate: was 0.5, now 0.7\)'):
    resume(Later(rate=0.7), may_change={'depth'})
  resume(Later(rate=0.7), may_change={'rate'})


def test_a_run_of_another_command_is_named_and_not_its_fields(tmp_path):
  other = dataclasses.make_dataclass('Other', [('output_dir', str, '')], frozen=True)
  other.__module__ = 'mrjax.runs.other'
  path = common.prepare_output_dir(tmp_path / 'run', Config(), overwrite=False)
  saved = json.loads((path / 'config.json').read_text())
  saved['command'] = ['/somewhere/experiments/train_sft.py', '--rate=0.5']
  (path / 'config.json').write_text(json.dumps(saved))
  resume = functools.partial(
    common.prepare_output_dir, path, overwrite=False, resume=True
  )
  with pytest.raises(OutputError, match='holds a run of another command, train_sft'):
    resume(other())
  del saved['run']  # as earlier versions wrote it
  (path / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(OutputError, match=r'\(rate: was 0.5, now None\)'):
    resume(other())


def test_what_overwriting_costs_is_said_where_it_is_next_to_nothing(tmp_path):
  path = common.prepare_output_dir(tmp_path / 'run', Config(), overwrite=False)
  resume = lambda: common.prepare_output_dir(
    path, Config(rate=0.7), overwrite=False, resume=True
  )
  (path / 'metrics.jsonl').touch()
  (path / 'checkpoints' / '3.orbax-checkpoint-tmp').mkdir(parents=True)
  with pytest.raises(OutputError, match='start again; it has no result yet, so no mor'):
    resume()
  (path / 'checkpoints' / '3').mkdir()
  with pytest.raises(OutputError, match=r'start again\.$'):
    resume()
  (path / 'checkpoints' / '3').rmdir()
  (path / 'reference').mkdir()  # computed at some cost
  with pytest.raises(OutputError, match=r'start again\.$'):
    resume()


def test_settings_that_cannot_be_read_are_told_how_to_go_on(tmp_path):
  path = common.prepare_output_dir(tmp_path / 'run', Config(), overwrite=False)
  (path / 'config.json').write_text('{"config": ')
  with pytest.raises(OutputError, match=r'config\.json is damaged\. .* --overwrite'):
    common.prepare_output_dir(path, Config(), overwrite=False, resume=True)
  common.prepare_output_dir(path, Config(), overwrite=True, resume=True)
  assert json.loads((path / 'config.json').read_text())['config']['rate'] == 0.5


def output_commands(output: Path, files: Path):
  """Every run that writes, with `output` as its output."""
  where, rows = str(output), str(files / 'rows.jsonl')
  data = 'arithmetic:test?size=2'
  grading = grade.Config(rule='gsm8k', input=rows, output=where)
  return {
    'sample': lambda: sample.run(
      sample.Config(model='tiny-0.2m', data=data, output_dir=where)
    ),
    'score': lambda: score.run(
      score.Config(model='tiny-0.2m', input=rows, output=where)
    ),
    'grade': lambda: grade.run(grading),
    'grade --metrics': lambda: grade.run(
      dataclasses.replace(grading, output=str(files / 'out.jsonl'), metrics=where)
    ),
    'collect': lambda: collect.run(
      collect.Config(problems=data, samples=rows, output=where)
    ),
    'report': lambda: report.run(report.Config(runs=str(files / 'run'), output=where)),
    'hf_to_orbax': lambda: convert.import_hf(
      convert.ImportConfig(hf_dir='tiny-0.2m', output_dir=where)
    ),
    'orbax_to_hf': lambda: convert.export_hf(
      convert.ExportConfig(checkpoint='tiny-0.2m', output_dir=where)
    ),
    'pretrain_tiny': lambda: pretrain.run(
      pretrain.Config(size='tiny-0.2m', output_dir=where)
    ),
    'build_tfds': lambda: build_tfds.run(
      build_tfds.Config(data=(data,), name='x', output_dir=where)
    ),
  }


@pytest.mark.parametrize('command', output_commands(Path(), Path()))
@pytest.mark.parametrize('below', ['x', 'x/y'])
def test_an_output_below_a_file_is_refused(tmp_path, command, below):
  problem = generate_problems('test', size=1)[0]
  row = {'problem_id': problem.id, 'sample_index': 0, 'text': '#### 3', 'gold': '3'}
  row |= {'prompt': 'Q:', 'completion': ' 3'}
  write_jsonl(tmp_path / 'rows.jsonl', [row])
  write_jsonl(tmp_path / 'run' / 'samples.jsonl', [row])
  blocker = tmp_path / 'file'
  blocker.write_text('keep me')
  output = blocker / below
  with pytest.raises(OutputError) as error:
    output_commands(output, tmp_path)[command]()
  assert str(error.value) == (
    f'cannot write {output}: {blocker} is a file, and a directory is needed there. '
    'Choose another output.'
  )
  assert blocker.read_text() == 'keep me'


def test_a_file_is_no_output_directory(tmp_path):
  path = tmp_path / 'file'
  path.touch()
  with pytest.raises(OutputError, match=f'cannot write {path}: {path} is a file'):
    common.prepare_output_dir(path, Config(), overwrite=True, resume=True)


def test_json_that_meets_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(OSError, match='No space left'):
    common.write_json(tmp_path / 'config.json', {'a': 1})
  assert not list(tmp_path.iterdir())  # so that the directory can be used again


@pytest.mark.parametrize(
  'error, is_full',
  [
    (OSError(errno.ENOSPC, 'No space left on device', 'out/a'), True),
    (ValueError('RESOURCE_EXHAUSTED: No space left on device'), True),
    (ValueError('--size=0'), False),
  ],
)
def test_binaries_say_what_to_do_about_a_full_disk(error, is_full, monkeypatch, capsys):
  def main(_):
    raise error

  monkeypatch.setattr('absl.app.run', lambda guarded, **_: guarded(['name']))
  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  assert stop.value.code == 1
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and str(error) in line
  assert ('free some space' in line) == is_full
