"""Every test sees eight emulated CPU devices."""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from tpu_slices import prepare_compiler

os.environ['JAX_PLATFORMS'] = 'cpu'  # for the commands that tests start
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# What one test has compiled, others and the commands they start need not compile:
# half the time of the suite. The first process makes the folder and removes it.
_OWN_CACHE = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _OWN_CACHE = tempfile.mkdtemp(prefix='mrjax-tests-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _OWN_CACHE
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def pytest_unconfigure():
  if _OWN_CACHE:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)


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
