"""Imports point downwards only: the two wings, the rows of each, and start-up cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ('mrjax', 'experiments', 'checkpoints_conversion')
PATHS = sorted(path for top in TOP for path in (ROOT / top).rglob('*.py'))

# What each package may import from the others. Text wing, array wing, and who joins.
ALLOWED = {
  'records': set(),
  'data': {'records'},
  'grading': {'data', 'records'},
  'methods': {'grading', 'data', 'records'},
  'trees': set(),
  'sharding': {'trees'},
  'losses': {'sharding'},
  'models': {'sharding', 'trees'},
  'lora': {'models', 'sharding', 'trees'},
  'checkpoint': {'lora', 'models', 'sharding', 'trees'},
  'training': {'checkpoint', 'lora', 'models', 'losses', 'sharding', 'trees'},
  'sampling': {'checkpoint', 'lora', 'models', 'losses', 'sharding', 'trees'},
}
TEXT_WING = ('records', 'data', 'grading', 'methods')
RUNS = 'runs'
ARRAY_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')
# Seconds to import, so not at the head of a module that `grade` or `collect` reads.
SLOW_LIBRARIES = ('transformers', 'datasets', 'tensorflow_datasets', 'math_verify')
# Cross-checks and benchmarks alone may need torch; the base install has none.
TORCH_LIBRARIES = ('torch', 'peft', 'trl', 'accelerate', 'vllm')
MAY_IMPORT_TORCH = ('checkpoints_conversion/comparison.py', 'experiments/benchmarks/')


def name_of(path: Path) -> str:
  return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
  """The part of mrjax that a file belongs to: `data`, `trees`, ..."""
  part = path.relative_to(ROOT / 'mrjax').parts[0]
  return part.removesuffix('.py')


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
  """Every node that runs when the module is imported: not the bodies of functions."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      defaults = (*child.args.defaults, *child.args.kw_defaults)
      for outside in filter(None, (*child.decorator_list, *defaults)):
        yield from ast.walk(outside)
    elif not isinstance(child, ast.Lambda):
      yield child
      yield from run_on_import(child)


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
  """Dotted names a file imports; `from a import b` counts as `a.b`."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  names = set()
  for node in run_on_import(tree) if at_import else ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{name_of(path)}:{node.lineno}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def libraries(names: set[str]) -> set[str]:
  return {name.split('.')[0] for name in names}


def siblings(names: set[str]) -> set[str]:
  """The parts of mrjax among dotted names."""
  return {name.split('.')[1] for name in names if name.startswith('mrjax.')}


LIBRARY = [
  path
  for path in PATHS
  if path.is_relative_to(ROOT / 'mrjax') and path.parent != ROOT / 'mrjax' / RUNS
]
MODULES = [path for path in LIBRARY if path != ROOT / 'mrjax' / '__init__.py']


def test_every_package_has_its_row():
  assert {package_of(path) for path in MODULES} == set(ALLOWED)
  for package, below in ALLOWED.items():
    assert all(package not in ALLOWED[other] for other in below), package
    wing = [name in TEXT_WING for name in (package, *below)]
    assert all(wing) or not any(wing), package


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_a_library_module_imports_only_what_lies_below(path):
  package = package_of(path)
  seen = siblings(imports_of(path)) - {package}
  assert seen <= ALLOWED[package], f'{package} may import {sorted(ALLOWED[package])}'


@pytest.mark.parametrize(
  'path', [p for p in MODULES if package_of(p) in TEXT_WING], ids=name_of
)
def test_the_text_wing_knows_no_arrays_on_devices_and_loads_nothing_slow(path):
  assert not libraries(imports_of(path)) & set(ARRAY_LIBRARIES)
  # The worker process of the symbolic rules is math-verify, and imports it at once.
  if name_of(path) != 'mrjax/grading/symbolic_worker.py':
    assert not libraries(imports_of(path, at_import=True)) & set(SLOW_LIBRARIES)


@pytest.mark.parametrize(
  'path', [p for p in MODULES if package_of(p) not in TEXT_WING], ids=name_of
)
def test_the_array_wing_never_sees_text(path):
  text_libraries = {'transformers', 'tokenizers', 'sentencepiece', 'datasets', 'jinja2'}
  assert not libraries(imports_of(path)) & text_libraries


def test_nothing_in_mrjax_imports_a_binary():
  for path in PATHS:
    if path.is_relative_to(ROOT / 'mrjax'):
      assert not libraries(imports_of(path)) & set(TOP[1:]), name_of(path)


def test_torch_stays_in_cross_checks_and_benchmarks():
  for path in PATHS:
    if not name_of(path).startswith(MAY_IMPORT_TORCH):
      assert not libraries(imports_of(path)) & set(TORCH_LIBRARIES), name_of(path)


def test_flags_live_in_binaries():
  for path in PATHS:
    if path.is_relative_to(ROOT / 'mrjax'):
      assert 'absl.flags' not in imports_of(path), name_of(path)


@pytest.mark.parametrize('path', PATHS, ids=name_of)
def test_importing_reads_neither_the_environment_nor_the_devices(path):
  tree = ast.parse(path.read_text(encoding='utf-8'))
  forbidden = {
    'os.environ',
    'os.getenv',
    'jax.devices',
    'jax.local_devices',
    'jax.device_count',
    'jax.local_device_count',
    'jax.process_index',
    'jax.process_count',
    'jax.default_backend',
  }
  used = {
    ast.unparse(node) for node in run_on_import(tree) if isinstance(node, ast.Attribute)
  }
  assert not used & forbidden


@pytest.mark.parametrize(
  'module', ['mrjax.grading.rules', 'experiments.grade', 'experiments.rft.collect']
)
def test_text_only_commands_start_without_the_heavy_libraries(module):
  heavy = (*ARRAY_LIBRARIES, *SLOW_LIBRARIES, *TORCH_LIBRARIES, 'pandas', 'matplotlib')
  script = f'import sys, {module}; print(*sorted({set(heavy)!r} & set(sys.modules)))'
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert result.stdout.split() == []
