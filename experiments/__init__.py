"""The command-line programs of mrjax."""

import os
import sys
from pathlib import Path

_TUNABLE = 'glibc.malloc.hugetlb'
_SETTING = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def _use_huge_pages() -> None:
  """Starts `python -m experiments.NAME` again with huge pages, where they are opt-in.

  XLA takes the temporary memory of a program anew for every call. On Linux the kernel
  then clears it in pages of 4 KiB, a fifth of the time of a train step on a CPU.
  glibc asks for pages of 2 MiB instead, but reads that wish at the start of a process
  alone. What the user sets in GLIBC_TUNABLES stays; `glibc.malloc.hugetlb=0` there
  turns this off.
  """
  # While `python -m` looks for a module, argv[0] is '-m'; later, and where another
  # program imports this package, it is not.
  argv, tunables = sys.orig_argv, os.environ.get('GLIBC_TUNABLES', '')
  if sys.argv[:1] != ['-m'] or not sys.executable or _TUNABLE in tunables:
    return
  if '-m' not in argv or not argv[argv.index('-m') + 1].startswith('experiments.'):
    return
  try:
    if '[madvise]' not in _SETTING.read_text():
      return
  except OSError:  # no Linux, or a kernel without huge pages
    return
  wishes = ':'.join(filter(None, [tunables, f'{_TUNABLE}=1']))
  os.environ['GLIBC_TUNABLES'] = wishes
  os.execv(sys.executable, [sys.executable, *argv[1:]])


_use_huge_pages()
