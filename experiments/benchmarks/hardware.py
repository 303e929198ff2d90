"""What a measurement ran on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any


def describe_hardware() -> dict[str, Any]:
  """CPU model, cores, memory in GiB and, where jax is loaded, its device kind."""
  cpu = platform.processor() or platform.machine()
  info = Path('/proc/cpuinfo')
  if info.is_file():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        cpu = line.partition(':')[2].strip()
        break
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
  facts = {'cpu': cpu, 'cores': os.cpu_count(), 'memory_gib': round(memory, 1)}
  if 'jax' in sys.modules:
    import jax

    facts['device'] = jax.devices()[0].device_kind
    facts['device_count'] = jax.device_count()
  return facts
