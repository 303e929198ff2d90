"""JSON Lines files and the problem record: the formats every command reads and writes.

One JSON object a line, UTF-8. Whole files are written atomically; files that grow line
by line are repaired on open, so a killed process never leaves a half line behind.
"""

import codecs
import contextlib
import dataclasses
import glob
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

Record = dict[str, Any]

_SHARD_NAME = re.compile(r'^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.jsonl$')


class DataError(ValueError):
  """A record that breaks its format; the message starts with `FILE:LINE: `.

  `line` is None where the fault is that of a whole file; then it is left out.
  """

  def __init__(self, path: str | Path, line: int | None, message: str):
    super().__init__(f'{path}{"" if line is None else f":{line}"}: {message}')
    self.path = str(path)
    self.line = line


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question, and what is known of its answer.

  `options` are the choices of a multiple-choice question as they are shown, label
  included ('A)12'); `answer` is then the letter.
  """

  id: str
  question: str
  answer: str | None = None
  solution: str | None = None
  source: str | None = None
  options: tuple[str, ...] | None = None
  level: str | int | None = None

  def to_record(self) -> Record:
    """Returns the JSON object of this problem, without the fields that are None."""
    record = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
    if self.options is not None:
      record['options'] = list(self.options)
    return record

  @classmethod
  def from_record(cls, record: Record) -> 'Problem':
    """Returns the problem of a JSON object; fields it does not know are ignored.

    Raises:
      ValueError: A field has the wrong type, or `id` or `question` is missing or empty.
    """
    values: Record = {}
    for name in ('id', 'question', 'answer', 'solution', 'source'):
      value = record.get(name)
      if name in ('id', 'answer') and isinstance(value, int | float):
        value = value if isinstance(value, bool) else str(value)  # common in the wild
      if value is not None and not isinstance(value, str):
        raise ValueError(
          f'field {name!r} is {type(value).__name__}, want a string: {value!r:.80}'
        )
      values[name] = value
    for name in ('id', 'question'):
      if not values[name] or not values[name].strip():
        raise ValueError(f'field {name!r} is missing or empty; a problem needs it')
    options = record.get('options')
    if options is not None:
      if not isinstance(options, list | tuple) or not all(
        isinstance(option, str) for option in options
      ):
        raise ValueError(f"field 'options' must be a list of strings: {options!r:.80}")
      values['options'] = tuple(options)
    level = record.get('level')
    if level is not None and (
      isinstance(level, bool) or not isinstance(level, str | int)
    ):
      raise ValueError(f"field 'level' must be a string or an integer: {level!r:.80}")
    return cls(level=level, **values)


def parse_line(
  line: bytes, *, path: str | Path, number: int, required: Sequence[str] = ()
) -> Record:
  """Returns the object on one line of a JSON Lines file.

  Raises:
    DataError: Not UTF-8, not JSON, not an object, a key twice, a required key missing.
  """

  def unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
      keys = [key for key, _ in pairs]
      twice = sorted({key for key in keys if keys.count(key) > 1})
      raise DataError(path, number, f'the object holds a key twice: {twice}')
    return record

  try:
    # With its newline, what is missing at the end would be missing on the next line.
    text = line.rstrip(b'\r\n').decode('utf-8')
    record = json.loads(text, object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise DataError(path, number, f'not UTF-8 ({error}); re-encode the file') from None
  except json.JSONDecodeError as error:
    raise DataError(
      path,
      number,
      f'not valid JSON ({error.msg} at column {error.colno}): {line[:80]!r}',
    ) from None
  except RecursionError:
    raise DataError(path, number, 'JSON nested too deeply to be a record') from None
  if not isinstance(record, dict):
    raise DataError(path, number, f'want a JSON object, found {type(record).__name__}')
  missing = [name for name in required if record.get(name) is None]
  if missing:
    raise DataError(
      path, number, f'missing field(s) {missing}; the record has {sorted(record)}'
    )
  return record


def read_numbered(
  path: str | Path, *, required: Sequence[str] = ()
) -> Iterator[tuple[int, Record]]:
  """Yields (line number, record) of a JSON Lines file; blank lines are skipped.

  So is a byte order mark, which editors on Windows put first.

  Args:
    path: The file.
    required: Fields every record must hold (null counts as missing).

  Raises:
    FileNotFoundError: No such file.
    DataError: A bad line, or a file without a single record.
  """
  path = Path(path)
  if path.is_dir():
    raise IsADirectoryError(f'{path} is a directory, want a .jsonl file')
  if not path.exists():
    raise FileNotFoundError(f'no file {path}; check the path')
  found = False
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
      if not line.strip():
        continue
      found = True
      yield number, parse_line(line, path=path, number=number, required=required)
  if not found:
    raise DataError(path, None, 'the file holds no record')


def read_jsonl(path: str | Path, *, required: Sequence[str] = ()) -> Iterator[Record]:
  """Yields the records of a JSON Lines file, as `read_numbered` does."""
  for _, record in read_numbered(path, required=required):
    yield record


def dump_line(record: Record) -> bytes:
  """Returns the record as one line of JSON, newline included; NaN is refused."""
  try:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
  except UnicodeEncodeError:  # half a surrogate pair: legal in JSON, if escaped
    line = json.dumps(record, allow_nan=False).encode()
  return line + b'\n'


def write_jsonl(path: str | Path, records: Iterable[Record]) -> int:
  """Writes records as one JSON Lines file, atomically; returns how many.

  The file appears under its name only when it is whole and on disk; on any failure
  (a full disk, a kill, an error in `records`) the old file, if any, stays as it was.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  count = 0
  with replace_atomically(path) as file:
    for record in records:
      file.write(dump_line(record))
      count += 1
  return count


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
  """A file to write that takes its name when it is whole and on disk, or never."""
  scratch = path.parent / f'.{path.name}.{uuid.uuid4().hex}.tmp'
  try:
    with open(scratch, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(scratch, path)
  except BaseException:
    scratch.unlink(missing_ok=True)
    raise


class JsonlAppender:
  """Appends whole records to a file that a killed process may leave unfinished.

  Opening drops a last line without a newline (the row a kill cut in half); `append`
  returns after the lines are on disk. Use it as a context manager.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self.path, 'a+b')  # noqa: SIM115 (closed by close)
    _drop_half_line(self._file)

  def append(self, records: Iterable[Record]) -> int:
    """Writes the records, flushes them to disk and returns how many there were."""
    lines = [dump_line(record) for record in records]
    self._file.write(b''.join(lines))
    self._file.flush()
    os.fsync(self._file.fileno())
    return len(lines)

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> 'JsonlAppender':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def _drop_half_line(file: BinaryIO, block: int = 1 << 16) -> None:
  end = file.seek(0, os.SEEK_END)
  keep = end
  while keep:
    start = max(0, keep - block)
    file.seek(start)
    newline = file.read(keep - start).rfind(b'\n')
    if newline >= 0:
      keep = start + newline + 1
      break
    keep = start
  if keep != end:
    file.truncate(keep)
  file.seek(0, os.SEEK_END)


def expand_inputs(spec: str | Path, *, pattern: str = '*.jsonl') -> list[Path]:
  """Returns the files a directory, a file or a glob stands for, sorted by name.

  A directory with `NAME-00000-of-0000N.jsonl` shards stands for these shards alone.

  Raises:
    FileNotFoundError: Nothing there.
    ValueError: Shards of a set are missing, or two sets of different N are mixed.
  """
  path = Path(spec)
  if path.is_file():
    return [path]
  if path.is_dir():
    files = sorted(path.glob(pattern))
    files = [file for file in files if file.is_file()]
    files = [file for file in files if _SHARD_NAME.match(file.name)] or files
    if not files:
      raise FileNotFoundError(f'directory {path} holds no file {pattern!r}')
  else:
    files = sorted(Path(name) for name in glob.glob(str(spec)) if Path(name).is_file())
    if not files:
      raise FileNotFoundError(
        f'{str(spec)!r} is no file, directory or matching glob; check the path'
      )
    return files
  _check_shards(path, files)
  return files


def _check_shards(directory: Path, files: Sequence[Path]) -> None:
  counts: dict[str, set[int]] = {}
  indices: dict[str, set[int]] = {}
  for file in files:
    match = _SHARD_NAME.match(file.name)
    if match:
      stem = match['stem']
      counts.setdefault(stem, set()).add(int(match['count']))
      indices.setdefault(stem, set()).add(int(match['index']))
  for stem, sizes in counts.items():
    if len(sizes) > 1:
      raise ValueError(
        f'{directory} mixes {stem!r} shards of {sorted(sizes)} files; '
        'keep one set, e.g. delete the old one'
      )
    size = sizes.pop()
    missing = sorted(set(range(size)) - indices[stem])
    if missing or len(indices[stem]) != size:
      raise ValueError(
        f'{directory} holds {len(indices[stem])} of {size} {stem!r} shards, missing '
        f'{missing[:8]}; finish or resume the run that writes them, or name files'
      )
