"""Problem sources: what a `--data` specification stands for.

    gsm8k:test    math:test    aqua:test    csqa:dev     a local copy, else the hub
    arithmetic:train?size=2000&seed=0                    generated, offline
    jsonl:PATH                                           problem records
    hf:ORG/NAME:SPLIT    tfds:NAME:SPLIT                 columns named by ?question=...

Every source takes `?limit=N`, which keeps the first N problems.
"""

import dataclasses
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mrjax.data import arithmetic
from mrjax.data.hub import load_hub
from mrjax.data.public_sets import PUBLIC_SETS, PublicSet
from mrjax.records import DataError, Problem, Record, read_numbered

__all__ = ['DataSpec', 'Problem', 'load_problems', 'parse_spec']

_ARITHMETIC_KEYS = ('size', 'seed', 'steps', 'form')
_COLUMN_KEYS = ('id', 'question', 'answer', 'solution', 'source', 'options', 'level')
_KEYS: dict[str, tuple[str, ...]] = {
  **{name: () for name in PUBLIC_SETS},
  'arithmetic': _ARITHMETIC_KEYS,
  'jsonl': (),
  'hf': ('config', *_COLUMN_KEYS),
  'tfds': _COLUMN_KEYS,
}
SOURCES: tuple[str, ...] = tuple(_KEYS)


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """A `--data` specification in parts.

  `name` is empty for sources without one, `split` for `jsonl`, whose `name` is a path.
  """

  source: str
  name: str
  split: str
  options: Mapping[str, str]


def parse_spec(spec: str) -> DataSpec:
  """Returns the parts of `SOURCE[:NAME]:SPLIT[?key=value&...]`.

  Raises:
    ValueError: An unknown source or key, a key twice or without a value, or a part that
      is missing. The message lists what there is.
  """
  source, colon, rest = spec.partition(':')
  if source not in _KEYS:
    raise ValueError(
      f'--data={spec!r}: no source {source!r}; want one of {", ".join(SOURCES)}, '
      'e.g. gsm8k:test or jsonl:PATH'
    )
  if (
    source == 'jsonl' and rest and Path(rest).exists()
  ):  # a path may hold a question mark
    return DataSpec('jsonl', rest, '', {})
  rest, _, query = rest.partition('?')
  if not colon or not rest:
    wanted = {
      'jsonl': 'jsonl:PATH',
      'hf': 'hf:ORG/NAME:SPLIT',
      'tfds': 'tfds:NAME:SPLIT',
    }
    raise ValueError(
      f'--data={spec!r}: want {wanted.get(source, source + ":SPLIT")}, '
      'with ?key=value&... behind it where needed'
    )
  name, split = '', rest
  if source == 'jsonl':
    name, split = rest, ''
  elif source in ('hf', 'tfds'):
    name, colon, split = rest.partition(':')
    if not name or not split:
      raise ValueError(f'--data={spec!r}: want {source}:NAME:SPLIT')
  return DataSpec(source, name, split, _parse_options(spec, source, query))


def _parse_options(spec: str, source: str, query: str) -> dict[str, str]:
  allowed = (*_KEYS[source], 'limit')
  options: dict[str, str] = {}
  for part in query.split('&') if query else []:
    key, equals, value = part.partition('=')
    if key not in allowed:
      raise ValueError(
        f'--data={spec!r}: {source} has no key {key!r}, only {", ".join(allowed)}'
      )
    if not equals or not value or key in options:
      raise ValueError(f'--data={spec!r}: want {key}=VALUE, once')
    options[key] = urllib.parse.unquote(value)
  return options


_MAX_GENERATED = 1_000_000  # problems of one specification


def load_problems(
  spec: str, *, data_root: str | Path | None = None, limit: int | None = None
) -> list[Problem]:
  """Returns the problems a `--data` specification stands for, in their own order.

  Args:
    spec: See the module.
    data_root: Folder with local copies of the public sets and with `tfds` data sets.
    limit: Keeps the first so many; None keeps all.

  Raises:
    ValueError: A bad specification, bad records, an id twice, or no problem at all.
    FileNotFoundError: A set that is neither in `data_root` nor to be had from the hub.
  """
  parsed = parse_spec(spec)
  limits = [limit, _int_option(spec, parsed, 'limit', None)]
  bounds = [bound for bound in limits if bound is not None]
  if bounds and min(bounds) < 1:
    raise ValueError(f'limit={min(bounds)} problems; want at least 1')
  root = Path(data_root) if data_root else None
  if root is not None and not root.is_dir():
    raise FileNotFoundError(f'--data_root={root} is no folder')
  bound = min(bounds, default=None)
  problems = _load(spec, parsed, root, bound)
  if not problems:
    raise ValueError(f'--data={spec!r} holds no problem')
  return problems[:bound]


def _load(
  spec: str, parsed: DataSpec, root: Path | None, bound: int | None
) -> list[Problem]:
  if parsed.source == 'arithmetic':
    return _load_arithmetic(spec, parsed, bound)
  if parsed.source == 'jsonl':
    return list(_read_jsonl(parsed.name))
  if parsed.source in PUBLIC_SETS:
    return _load_public(parsed, PUBLIC_SETS[parsed.source], root)
  rows: Iterable[Record]
  if parsed.source == 'hf':
    try:
      rows = load_hub(parsed.name, parsed.options.get('config'), parsed.split)
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f'--data={spec!r}: {error}, or read a local copy with jsonl:PATH'
      ) from None
  else:
    from mrjax.data.tfds_problems import read_rows

    rows = read_rows(parsed.name, parsed.split, data_dir=root)
  prefix = f'{parsed.name}-{parsed.split}'.replace('/', '-')
  return _from_columns(spec, rows, parsed.options, prefix)


def _load_arithmetic(spec: str, parsed: DataSpec, bound: int | None) -> list[Problem]:
  size = _int_option(spec, parsed, 'size', None)
  seed = _int_option(spec, parsed, 'seed', 0)
  steps = parsed.options.get('steps')
  if steps and not re.fullmatch(r'\d+([+,]\d+)*', steps):
    raise ValueError(f'--data={spec!r}: steps={steps!r}; want numbers, as in steps=1+2')
  if size is not None and size > _MAX_GENERATED:
    raise ValueError(
      f'--data={spec!r}: size={size}; want at most {_MAX_GENERATED}, all of which '
      'are held in memory'
    )
  if bound is not None:  # a smaller size is the beginning of a larger one
    default = arithmetic.DEFAULT_SIZES.get(parsed.split)
    size = min(n for n in (size or default, bound) if n is not None)
  try:
    return arithmetic.generate_problems(
      parsed.split,
      size=size,
      seed=seed or 0,
      form=parsed.options.get('form', 'open'),
      steps=[int(n) for n in re.split('[+,]', steps)] if steps else None,
    )
  except ValueError as error:
    raise ValueError(f'--data={spec!r}: {error}') from None


def _int_option(
  spec: str, parsed: DataSpec, key: str, default: int | None
) -> int | None:
  value = parsed.options.get(key)
  if value is None:
    return default
  try:
    return int(value)
  except ValueError:
    raise ValueError(f'--data={spec!r}: {key}={value!r} is no whole number') from None


def _read_jsonl(path: str) -> Iterator[Problem]:
  lines: dict[str, int] = {}
  for line, record in read_numbered(path, required=('id', 'question')):
    try:
      problem = Problem.from_record(record)
    except ValueError as error:
      raise DataError(path, line, str(error)) from None
    if problem.id in lines:
      raise DataError(
        path, line, f'id {problem.id!r} is already that of line {lines[problem.id]}'
      )
    lines[problem.id] = line
    yield problem


def _load_public(parsed: DataSpec, kind: PublicSet, root: Path | None) -> list[Problem]:
  source, split = parsed.source, parsed.split
  if split not in kind.files:
    raise ValueError(f'{source} has no split {split!r}, only {", ".join(kind.files)}')
  files = kind.files[split]
  local = [root / name for name in files if (root / name).is_file()] if root else []
  if local:
    numbered: Iterable[tuple[int, Record]] = read_numbered(local[0])
    where: Callable[[int], str] = lambda line: f'{local[0]}:{line}'
  else:
    repository, configs, hub_split = kind.hub[split]
    try:
      rows = [r for c in configs for r in load_hub(repository, c, hub_split)]
    except FileNotFoundError as error:
      looked = (
        f'no {" or ".join(files)} in --data_root={root}'
        if root
        else 'no --data_root was given'
      )
      raise FileNotFoundError(
        f'{source}:{split}: {looked}, and {error}, or pass --data_root=FOLDER '
        f'with a local copy, FOLDER/{files[0]}'
      ) from None
    numbered = enumerate(rows, start=1)
    where = lambda line: f'{repository}:{hub_split} row {line - 1}'
  problems: list[Problem] = []
  for line, row in numbered:
    try:
      problem = kind.convert(row)
    except (KeyError, ValueError, TypeError) as error:
      what = f'missing field {error}' if isinstance(error, KeyError) else error
      raise ValueError(f'{where(line)}: not a {source} record: {what}') from None
    problems.append(
      dataclasses.replace(problem, id=f'{source}-{split}-{len(problems)}')
    )
  return problems


def _from_columns(
  spec: str, rows: Iterable[Record], columns: Mapping[str, str], prefix: str
) -> list[Problem]:
  """Returns problems from rows whose columns are named as the fields, or by options."""
  problems: list[Problem] = []
  seen: dict[str, int] = {}
  for number, row in enumerate(rows):
    values = {name: row.get(columns.get(name, name)) for name in _COLUMN_KEYS}
    named = {columns[name] for name in _COLUMN_KEYS if name in columns}
    missing = sorted(named - set(row)) or (
      [] if values['question'] is not None else [columns.get('question', 'question')]
    )
    if missing:
      raise ValueError(
        f'--data={spec!r} row {number}: no column {missing}, only {sorted(row)}; name '
        'them, e.g. ?question=problem'
      )
    if values['id'] is None:
      values['id'] = f'{prefix}-{number}'
    try:
      problem = Problem.from_record(values)
    except ValueError as error:
      raise ValueError(f'--data={spec!r} row {number}: {error}') from None
    if problem.id in seen:
      raise ValueError(
        f'--data={spec!r} row {number}: id {problem.id!r} is already that of row '
        f'{seen[problem.id]}'
      )
    seen[problem.id] = number
    problems.append(problem)
  return problems
