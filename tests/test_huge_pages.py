"""Programs start again with huge pages once, and only where that does something."""

import os
import sys

import pytest

import experiments

COMMAND = ['python', '-X', 'utf8', '-m', 'experiments.sample', '--model=m']
OPT_IN = 'always [madvise] never\n'


@pytest.fixture
def starts(monkeypatch, tmp_path):
  """What would be started for a command line, a kernel setting and GLIBC_TUNABLES."""

  def starts(orig_argv, setting=OPT_IN, tunables=None, argv0='-m'):
    calls = []
    (tmp_path / 'enabled').write_text(setting)
    monkeypatch.setattr(experiments, '_SETTING', tmp_path / 'enabled')
    monkeypatch.setattr(sys, 'orig_argv', orig_argv)
    monkeypatch.setattr(sys, 'argv', [argv0, *orig_argv[5:]])
    monkeypatch.setattr(os, 'execv', lambda *call: calls.append(call))
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    if tunables:
      monkeypatch.setenv('GLIBC_TUNABLES', tunables)
    experiments._use_huge_pages()
    return calls

  return starts


def test_the_same_command_starts_again(starts):
  (call,) = starts(COMMAND)
  assert call == (sys.executable, [sys.executable, *COMMAND[1:]])
  assert os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'
  assert not starts(COMMAND, tunables=os.environ['GLIBC_TUNABLES'])


def test_what_the_user_set_stays(starts):
  assert starts(COMMAND, tunables='glibc.malloc.arena_max=2')
  want = 'glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1'
  assert os.environ['GLIBC_TUNABLES'] == want
  assert not starts(COMMAND, tunables='glibc.malloc.hugetlb=0')


@pytest.mark.parametrize(
  'changes',
  [
    {'setting': '[always] madvise never\n'},
    {'setting': 'always madvise [never]\n'},
    {'argv0': '/bin/pytest'},  # another program imports the package
    {'orig_argv': ['python', '-m', 'pdb', '-m', 'experiments.sample']},
    {'orig_argv': ['python', 'script.py']},
  ],
)
def test_and_nothing_else_does(starts, changes):
  assert not starts(**{'orig_argv': COMMAND} | changes)
