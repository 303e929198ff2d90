"""How every binary starts and how it fails: one clear line, no traceback."""

import logging
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

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
    try:
      main(argv)
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
      if absl_logging.get_verbosity() >= absl_logging.DEBUG:
        raise
      text = error.args[0] if isinstance(error, KeyError) and error.args else error
      notes = getattr(error, '__notes__', [])
      print(' '.join(['error:', str(text), *notes]), file=sys.stderr)
      sys.exit(1)

  app.run(guarded)
