"""The process that compares answers with math-verify; started by `symbolic.Verifier`.

Reads one JSON object {gold, predicted} a line, answers one byte: `1` equal, `0` not.
The first byte is `r` (ready) or `x` (math-verify is not installed). The kernel ends the
process when a comparison uses up its CPU time, even inside one long C call, and also
when the parent is gone. It runs as a plain script and imports nothing of mrjax.
"""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys

_NUMBER_PERCENT = re.compile(r'\s*(-?[0-9.,]+)\s*\\?%\s*')


def without_percent(gold: str, predicted: str) -> tuple[str, str]:
  r"""Writes `50%` as 50/100 where only one side is a percentage.

  From 0.8 on, math-verify also takes 50% for 50; the Q# results were graded with
  0.7.0, which does not.
  """
  forms = [_NUMBER_PERCENT.fullmatch(text) for text in (gold, predicted)]
  if (forms[0] is None) != (forms[1] is None):
    gold, predicted = (
      rf'\frac{{{form[1]}}}{{100}}' if form else text
      for form, text in zip(forms, (gold, predicted))
    )
  return gold, predicted


def main(seconds: float, num_bytes: int) -> None:
  replies = os.dup(1)
  os.dup2(2, 1)  # whatever a library prints must not look like a reply
  try:
    from math_verify import parse, verify
  except ImportError:
    os.write(replies, b'x')
    return
  logging.disable(logging.CRITICAL)
  with contextlib.suppress(ValueError, OSError):  # not every system can limit memory
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, uncatchable in C
  os.write(replies, b'r')
  for line in sys.stdin.buffer:
    request = json.loads(line)
    gold, predicted = without_percent(request['gold'], request['predicted'])
    signal.setitimer(signal.ITIMER_PROF, seconds)
    # Its own timeouts are off: they rely on Python noticing a signal.
    equal = verify(
      parse(f'${gold}$', parsing_timeout=None),
      parse(f'${predicted}$', parsing_timeout=None),
      timeout_seconds=None,
    )
    signal.setitimer(signal.ITIMER_PROF, 0)
    os.write(replies, b'1' if equal else b'0')


if __name__ == '__main__':
  main(float(sys.argv[1]), int(sys.argv[2]))
