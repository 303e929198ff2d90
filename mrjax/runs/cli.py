"""How every binary starts and how it fails: one clear line, no traceback."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app
from absl import logging as absl_logging


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs `main` under absl; what the user can mend ends in one line and exit code 1.

  `--verbosity=1` (debug) shows the traceback too.
  """
  # Without this, every start on a machine without a TPU says that it has none.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  # Orbax logs some thirty lines a checkpoint; only its warnings are for the user.
  absl_logging.get_absl_logger().addFilter(
    lambda record: record.levelno > logging.INFO or '/orbax/' not in record.pathname
  )

  # That there is no torch is as it should be.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

  def guarded(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1:
        raise ValueError(f'unexpected arguments {argv[1:]}; flags begin with --')
      main(argv)
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
      if absl_logging.get_verbosity() >= absl_logging.DEBUG:
        raise
      text = error.args[0] if isinstance(error, KeyError) and error.args else error
      if _disk_is_full(error):
        text = (
          f'{text}. The disk is full. Nothing half-written will be taken for whole; '
          'free some space, or choose another output, and run the command again.'
        )
      notes = getattr(error, '__notes__', [])
      print(' '.join(['error:', str(text), *notes]), file=sys.stderr)
      sys.exit(1)

  try:
    app.run(guarded, flags_parser=_parse_flags)
  except SystemExit as stop:
    # absl ends --help with 1, which make and shells take for a failure.
    asked = {arg.lstrip('-') for arg in sys.argv[1:] if arg.startswith('-')}
    if asked & {'help', 'helpshort', 'helpfull', 'h', '?'} and stop.code == 1:
      sys.exit(0)
    raise


def _disk_is_full(error: Exception) -> bool:
  if isinstance(error, OSError):
    return error.errno == errno.ENOSPC
  return 'No space left on device' in str(error)  # as the writer of Orbax says it


def _parse_flags(args: list[str]) -> list[str]:
  """absl's parser, whose errors take two lines, with errors like all others."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      return app.parse_flags_with_usage(args)
  except SystemExit:
    text = ' '.join(said.getvalue().split()).partition(' Pass --helpshort')[0]
    for prefix in ('FATAL Flags parsing error: ', 'ERROR:: '):
      text = text.removeprefix(prefix)
    text = re.sub(r'^flag (--\w+)=None: .*None\.$', r'\1 is missing.', text)
    if text:  # nothing for --help
      print(f'error: {text} (--help lists all flags)', file=sys.stderr)
    raise
