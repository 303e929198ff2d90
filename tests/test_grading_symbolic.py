"""The worker pool survives what model text can do to a computer algebra system."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mrjax.grading import symbolic, symbolic_worker


@pytest.fixture(scope='module')
def verifier():
  with symbolic.Verifier(num_workers=2, cpu_seconds=1.0) as verifier:
    yield verifier


def worker_processes(verifier):
  workers = list(verifier._idle.queue)
  return [worker._process for worker in workers if worker is not None]


@pytest.mark.parametrize('hang', ['10^{10^{10}}', '9^{9^{9^{9}}}', '1000000!'])
def test_hang_is_unequal_and_counted(verifier, hang):
  before = verifier.counts['timeout']
  start = time.perf_counter()
  assert not verifier.is_equal(hang, '2')
  assert not verifier.is_equal(hang, '2')  # remembered, and counted again
  assert time.perf_counter() - start < 30
  assert verifier.counts['timeout'] == before + 2
  assert verifier.is_equal('2.0', '2')  # a fresh worker serves the next


def test_many_threads_lose_nothing(verifier):
  pairs = [(rf'\frac{{{2 * n}}}{{2}}', str(n + n % 3)) for n in range(60)]
  pairs.insert(20, ('10^{10^{11}}', '5'))
  with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda pair: verifier.is_equal(*pair), pairs))
  assert results.pop(20) is False
  assert results == [n % 3 == 0 for n in range(60)]


def test_killed_worker_is_replaced(verifier):
  assert verifier.is_equal('3.0', '3')
  for process in worker_processes(verifier):
    process.send_signal(signal.SIGKILL)
    process.wait()
  before = verifier.counts['crash']
  assert verifier.is_equal('4.0', '4')
  assert verifier.counts['crash'] == before


def test_memory_blow_up_is_unequal():
  with symbolic.Verifier(
    num_workers=1, cpu_seconds=20, memory_bytes=400 << 20
  ) as verifier:
    assert not verifier.is_equal('2^{30000000000}', '2')
    assert verifier.is_equal('2.0', '2')


def test_long_answers_are_not_compared(verifier):
  assert not verifier.is_equal('1+' * 10_000 + '1', '10001')


def test_close_ends_the_workers():
  verifier = symbolic.Verifier(num_workers=2)
  with ThreadPoolExecutor(2) as pool:
    list(pool.map(verifier.is_equal, ['1.0', '2.0', '3.0'], ['1', '2', '3']))
  processes = worker_processes(verifier)
  assert processes and all(process.poll() is None for process in processes)
  verifier.close()
  assert all(process.poll() is not None for process in processes)


def test_worker_ends_with_a_killed_parent():
  code = textwrap.dedent("""
    import sys
    from mrjax.grading import symbolic
    verifier = symbolic.Verifier(num_workers=1)
    verifier.is_equal('1.0', '1')
    print(verifier._idle.queue[0]._process.pid, flush=True)
    sys.stdin.read()
  """)
  parent = subprocess.Popen(
    [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  assert parent.stdout is not None
  pid = int(parent.stdout.readline())
  parent.kill()
  parent.wait()
  for _ in range(100):
    try:
      os.kill(pid, 0)
      with open(f'/proc/{pid}/stat') as file:
        if file.read().split()[2] == 'Z':  # ended, only not yet collected
          return
    except (ProcessLookupError, FileNotFoundError):
      return
    time.sleep(0.1)
  pytest.fail('the worker outlived its parent')


@pytest.mark.parametrize(
  ('gold', 'predicted', 'expected'),
  [
    ('50', '50%', ('50', r'\frac{50}{100}')),
    (r'12.5\%', '0.125', (r'\frac{12.5}{100}', '0.125')),
    (r'50\%', '50%', (r'50\%', '50%')),  # both: left to math-verify
    ('x%', '50', ('x%', '50')),
  ],
)
def test_percent(gold, predicted, expected):
  assert symbolic_worker.without_percent(gold, predicted) == expected
