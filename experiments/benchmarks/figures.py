"""What every benchmark reports beside its figure."""

import json
import os
import platform
import resource
import sys
from typing import Any


def hardware() -> dict[str, Any]:
  """The machine in words; no device is touched."""
  model = platform.processor() or platform.machine()
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      names = [line.split(':')[1].strip() for line in file if 'model name' in line]
    model = names[0] if names else model
  except OSError:  # not Linux
    pass
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return {'cpu': model, 'cores': cores, 'system': platform.platform(terse=True)}


def peak_memory_mb() -> float:
  """Peak resident memory of this process so far, in 10^6 bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 1e6 if sys.platform == 'darwin' else peak * 1024 / 1e6


def emit(benchmark: str, output: str = '', **figures: Any) -> None:
  """Prints one JSON line, and appends it to `output` where one is named."""
  line = json.dumps({'benchmark': benchmark, **figures, 'hardware': hardware()})
  print(line, flush=True)
  if output:
    with open(output, 'a', encoding='utf-8') as file:
      file.write(line + '\n')
