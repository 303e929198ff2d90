"""Contenders of a benchmark: a process each, all loaded, one of them awake at a time.

A contender reads lines from its input and answers each with one line of JSON, an
object; what else it prints is skipped.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ContenderFailed(Exception):
  """Why a contender could not go on, in one line."""


class Contender:
  """One process, stopped by the system whenever it has nothing to do.

  Waiting for input alone would not do: threads that spin between two pieces of work
  take the cores away from whoever has the turn.
  """

  def __init__(self, command: list[str], environ: Mapping[str, str], log: Path):
    """Starts it; `log` takes what it writes as errors.

    Raises:
      ContenderFailed: There is no such program.
    """
    self._log = log
    with log.open('w', encoding='utf-8') as file:
      try:
        self._process = subprocess.Popen(
          command,
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=file,
          text=True,
          env=environ,
        )
      except OSError as error:
        raise ContenderFailed(f'{error}') from error

  def ask(self) -> dict[str, Any]:
    """Wakes it, hands it one line and returns its answer.

    On Linux `other_cores` is added to it: how many cores worked for anybody else in
    the meantime, on average.

    Raises:
      ContenderFailed: It ended instead.
    """
    assert self._process.stdin is not None and self._process.stdout is not None
    start, before = time.perf_counter(), _others_cpu_seconds(self._process.pid)
    self._process.send_signal(signal.SIGCONT)
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write('run\n')
      self._process.stdin.flush()
    for line in self._process.stdout:
      if line.startswith('{'):
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        after = _others_cpu_seconds(self._process.pid)
        if before is not None and after is not None:
          answer['other_cores'] = (after - before) / (time.perf_counter() - start)
        return answer
    raise ContenderFailed(_reason(self._log.read_text(encoding='utf-8')))

  def close(self) -> None:
    """Ends it, at work or not."""
    self._process.kill()
    self._process.wait()


def take_turns(
  commands: Mapping[str, list[str]],
  environs: Mapping[str, Mapping[str, str]],
  *,
  rounds: int,
  logs: Path,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
  """Answers of all contenders, which are asked one after the other in every round.

  Each is asked once before the first round, which does not count: it loads, compiles
  and warms up there.

  Args:
    commands: By the contender's name.
    environs: Its environment, by its name.
    rounds: Answers of each.
    logs: A directory for what they write as errors.

  Returns:
    The answers of those that gave all of them, and why the others did not.
  """
  answers: dict[str, list[dict[str, Any]]] = {}
  failures: dict[str, str] = {}
  with contextlib.ExitStack() as stack:
    contenders = {}
    for name, command in commands.items():
      try:
        contender = Contender(command, environs[name], logs / f'{name}.log')
        stack.callback(contender.close)
        contender.ask()
      except ContenderFailed as failure:
        failures[name] = str(failure)
      else:
        contenders[name], answers[name] = contender, []
    for _ in range(rounds):
      for name in list(answers):
        try:
          answers[name].append(contenders[name].ask())
        except ContenderFailed as failure:
          failures[name] = str(failure)
          del answers[name]
  return answers, failures


def _others_cpu_seconds(pid: int) -> float | None:
  """CPU seconds of the machine so far, less those of one process; None off Linux."""
  try:
    machine = Path('/proc/stat').read_text(encoding='utf-8').split('\n', 1)[0].split()
    own = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2]
  except OSError:
    return None
  user, nice, system, _, _, irq, softirq, steal = map(int, machine[1:9])
  ticks = user + nice + system + irq + softirq + steal
  ticks -= sum(map(int, own.split()[11:13]))  # in user and in system mode
  return ticks / os.sysconf('SC_CLK_TCK')


def _reason(errors: str) -> str:
  """The line that names an error, of all that a program said before it ended."""
  lines = [line.strip() for line in errors.splitlines() if line.strip()]
  named = [line for line in lines if re.match(r'(\w+\.)*\w*(Error|Exception)\b', line)]
  return (named or lines or ['it ended without a word'])[-1].removeprefix('error: ')
