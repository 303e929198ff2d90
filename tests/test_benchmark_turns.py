"""Contenders of a benchmark: who works when, and what happens to those who fail."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import turns
from experiments.benchmarks.turns import Contender, ContenderFailed, take_turns

# Notes its name in a file, then answers with how often it was asked.
NOTING = """
import json, sys
for number, _ in enumerate(sys.stdin):
  open(sys.argv[1], 'a').write(sys.argv[2])
  print('a word of its own')
  print(json.dumps({'number': number}), flush=True)
"""
# Never rests: a thread of it spins whether it was asked or not.
SPINNING = """
import json, sys, threading, time
def spin():
  while True:
    pass
threading.Thread(target=spin, daemon=True).start()
for _ in sys.stdin:
  time.sleep(0.5)
  print(json.dumps({}), flush=True)
"""
FAILING = """
import sys
sys.stdin.readline()
print('{}', flush=True)
sys.stdin.readline()
print('Traceback', file=sys.stderr)
print('some.LibraryError: the reason', file=sys.stderr)
sys.exit('a last word')
"""


def python(code: str, *args: object) -> list[str]:
  return [sys.executable, '-c', code, *map(str, args)]


def cpu_seconds(pid: int) -> float:
  fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')


def test_contenders_take_turns_after_one_that_does_not_count(tmp_path):
  notes = tmp_path / 'notes'
  commands = {name: python(NOTING, notes, name) for name in 'ab'}
  environs = dict.fromkeys(commands, os.environ)
  answers, failures = take_turns(commands, environs, rounds=3, logs=tmp_path)
  assert not failures
  assert notes.read_text() == 'ab' + 'ababab'
  numbers = {name: [turn['number'] for turn in answers[name]] for name in answers}
  assert numbers == {'a': [1, 2, 3], 'b': [1, 2, 3]}


def test_the_others_go_on_when_one_fails_at_its_start_or_later(tmp_path):
  commands = {
    'absent': [str(tmp_path / 'no_such_program')],
    'broken': python('import no_such_module'),
    'failing': python(FAILING),
    'good': python(NOTING, tmp_path / 'notes', 'g'),
  }
  environs = dict.fromkeys(commands, os.environ)
  answers, failures = take_turns(commands, environs, rounds=2, logs=tmp_path)
  assert [turn['number'] for turn in answers.pop('good')] == [1, 2]
  assert not answers
  assert 'No such file' in failures.pop('absent')
  assert failures == {
    'broken': "ModuleNotFoundError: No module named 'no_such_module'",
    'failing': 'some.LibraryError: the reason',
  }


@pytest.mark.skipif(not Path('/proc/stat').exists(), reason='needs Linux')
def test_a_contender_without_the_turn_uses_no_cpu(tmp_path):
  contender = Contender(python(SPINNING), os.environ, tmp_path / 'log')
  try:
    contender.ask()
    pid = contender._process.pid
    time.sleep(0.1)
    before = cpu_seconds(pid)
    assert before > 0
    time.sleep(0.5)
    assert cpu_seconds(pid) == before
    contender.ask()
    assert cpu_seconds(pid) > before
  finally:
    contender.close()


@pytest.mark.skipif(not Path('/proc/stat').exists(), reason='needs Linux')
def test_the_work_of_others_is_that_of_the_machine_without_its_own(tmp_path):
  idle = Contender(python(NOTING, tmp_path / 'notes', 'i'), os.environ, tmp_path / 'a')
  busy = Contender(python(SPINNING), os.environ, tmp_path / 'b')
  try:
    assert idle.ask()['other_cores'] >= 0
    busy.ask()
    pids = idle._process.pid, busy._process.pid  # both stopped
    own = [cpu_seconds(pid) for pid in pids]
    others = [turns._others_cpu_seconds(pid) for pid in pids]
    assert own[1] - own[0] > 0.1
    np.testing.assert_allclose(others[0] - others[1], own[1] - own[0], atol=0.05)
  finally:
    idle.close()
    busy.close()


def test_a_contender_that_ends_without_a_word_has_failed(tmp_path):
  contender = Contender(python('pass'), os.environ, tmp_path / 'log')
  try:
    with pytest.raises(ContenderFailed, match='ended without a word'):
      contender.ask()
  finally:
    contender.close()
