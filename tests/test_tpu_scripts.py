"""The TPU scripts hand on what they are given, word by word, to every host."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / 'tpu_scripts'
# Stands in for gcloud: notes its arguments, puts the file that is sent into the home of
# the one host, and runs there what the host would run.
FAKE_GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" >> "$HOME/calls"
case "$4" in
  scp) cp "$5" "$HOME/mrjax.tar.gz" ;;
  ssh) last=${!#}; cd && bash -c "${last#--command=}" ;;
esac
"""


@pytest.fixture
def host(tmp_path):
  """A folder that is home of the one host and holds the tools it finds."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  write_tool(tools / 'gcloud', FAKE_GCLOUD)
  return tmp_path


def write_tool(path: Path, text: str) -> None:
  path.write_text(text)
  path.chmod(0o755)


def run_script(host: Path, name: str, *args: str) -> subprocess.CompletedProcess:
  environment = os.environ | {
    'HOME': str(host),
    'PATH': f'{host / "tools"}:{os.environ["PATH"]}',
  }
  return subprocess.run(
    [SCRIPTS / name, *args],
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def test_run_passes_every_word_unchanged(host):
  activate = host / 'mrjax' / '.venv' / 'bin' / 'activate'
  activate.parent.mkdir(parents=True)
  activate.write_text('export IN_ENVIRONMENT=yes\n')
  write_tool(
    host / 'tools' / 'show', '#!/bin/sh\necho $IN_ENVIRONMENT; printf "%s\\n" "$@"'
  )
  words = ['--data=arithmetic:train?size=5&seed=1', '--stop=it\'s "$HOME"; *', '']
  result = run_script(host, 'run.sh', 'my-tpu', 'zone-a', 'show', *words)
  assert result.returncode == 0, result.stderr
  assert result.stdout.split('\n') == ['yes', *words, '']
  calls = (host / 'calls').read_text().split('\n')
  assert calls[:7] == [
    *('compute', 'tpus', 'tpu-vm', 'ssh', 'my-tpu', '--zone=zone-a', '--worker=all')
  ]


def test_run_fails_as_its_command_does(host):
  (host / 'mrjax' / '.venv' / 'bin').mkdir(parents=True)
  (host / 'mrjax' / '.venv' / 'bin' / 'activate').touch()
  assert run_script(host, 'run.sh', 'my-tpu', 'zone-a', 'false').returncode == 1


def test_setup_sends_the_checkout_and_installs_it(host):
  write_tool(host / 'tools' / 'sudo', '#!/bin/sh\n')  # apt-get
  write_tool(host / 'tools' / 'make', '#!/bin/sh\npwd; echo make "$@"')
  result = run_script(host, 'setup.sh', 'my-tpu', 'zone-a')
  if 'not a git repository' in result.stderr:
    pytest.skip('needs a git checkout')
  assert result.returncode == 0, result.stderr
  assert 'my-tpu:mrjax.tar.gz' in (host / 'calls').read_text().split('\n')
  assert (host / 'mrjax' / 'pyproject.toml').is_file()
  assert result.stdout.split('\n')[-3:-1] == [
    str(host / 'mrjax'),
    'make PYTHON=python3 .venv/installed.tpu',
  ]


@pytest.mark.parametrize('name', ['setup.sh', 'run.sh'])
def test_missing_arguments_give_the_usage(host, name):
  result = run_script(host, name, 'my-tpu')
  assert result.returncode == 2
  assert f'usage: tpu_scripts/{name} NAME ZONE' in result.stderr
  assert not (host / 'calls').exists()
