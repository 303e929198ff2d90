"""Every test sees eight emulated CPU devices."""

import os
from pathlib import Path

import jax
import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'  # for the commands that tests start
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='session')
def shared() -> Path:
  """The sibling folder with public data sets; tests that need it skip without it."""
  folder = Path(__file__).resolve().parents[1] / '..' / 'shared'
  if not folder.is_dir():
    pytest.skip(f'needs the public data sets in {folder.resolve()}')
  return folder.resolve()
