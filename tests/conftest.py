"""Every test sees eight emulated CPU devices."""

import concurrent.futures
import importlib.util
import multiprocessing
import os
from pathlib import Path

import jax
import pytest
from tpu_slices import prepare_compiler

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


# One process for all compilations. libtpu is never loaded into a test process: it
# takes over signals, and a fault in it ends the process.
@pytest.fixture(scope='module')
def tpu_compiler():
  """Calls a function in a process that compiles for TPUs."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip(
      'needs the TPU compiler: make tpu-compile, or '
      "pip install -c constraints.txt -e '.[tpu-compile]'"
    )
  with concurrent.futures.ProcessPoolExecutor(
    max_workers=1,
    mp_context=multiprocessing.get_context('spawn'),
    initializer=prepare_compiler,
  ) as pool:
    yield lambda fn, *args: pool.submit(fn, *args).result()
