"""JSON Lines: what is written is read back, what is broken is named by its line."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrjax import records
from mrjax.records import (
  DataError,
  JsonlAppender,
  Problem,
  expand_inputs,
  parse_line,
  read_jsonl,
  read_numbered,
  write_jsonl,
)

# Every example writes to disk and waits for it.
on_disk = settings(deadline=None, max_examples=40)
JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**60), 2**60)
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
  ),
  max_leaves=6,
)


@on_disk
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=5))
def test_round_trip(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp('records') / 'rows.jsonl'
  assert write_jsonl(path, rows) == len(rows)
  assert list(read_jsonl(path)) == rows
  assert path.read_bytes().count(b'\n') == len(rows)  # no record spans lines


def test_unicode_is_written_as_it_is(tmp_path):
  path = tmp_path / 'rows.jsonl'
  write_jsonl(path, [{'text': 'é漢🙂\u2028'}])
  assert path.read_bytes() == '{"text": "é漢🙂\u2028"}\n'.encode()
  assert list(read_jsonl(path)) == [{'text': 'é漢🙂\u2028'}]


def test_half_a_surrogate_pair_comes_back(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"text": "\\ud800 \xc3\xa9"}\n')
  rows = list(read_jsonl(path))
  write_jsonl(path, rows)
  assert list(read_jsonl(path)) == rows == [{'text': '\ud800 é'}]


def test_blank_lines_and_crlf_are_no_records(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
  assert list(read_numbered(path)) == [(2, {'a': 1}), (4, {'a': 2})]


def test_a_byte_order_mark_is_skipped_where_a_file_begins(tmp_path):
  path = tmp_path / 'rows.jsonl'
  mark = b'\xef\xbb\xbf'
  path.write_bytes(mark + b'{"a": 1}\n{"a": 2}\n')
  assert list(read_numbered(path)) == [(1, {'a': 1}), (2, {'a': 2})]
  path.write_bytes(mark + b'\n{"a": 1}\n')
  assert list(read_numbered(path)) == [(2, {'a': 1})]
  path.write_bytes(mark)
  with pytest.raises(DataError, match='holds no record'):
    list(read_numbered(path))
  path.write_bytes(b'{"a": 1}\n' + mark + b'{"a": 2}\n')
  with pytest.raises(DataError, match=r'rows\.jsonl:2: not valid JSON'):
    list(read_numbered(path))


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"a": 1', r"not valid JSON \(Expecting ',' delimiter at column 8\)"),
    (b'{"a": 1} {"a": 2}', 'not valid JSON'),
    (b'[1, 2]', 'want a JSON object, found list'),
    (b'null', 'want a JSON object, found NoneType'),
    (b'{"a": "\xff"}', 'not UTF-8'),
    (b'{"a": 1, "b": 2, "a": 3}', r"a key twice: \['a'\]"),
    (b'{"b": 1}', r"missing field\(s\) \['a'\]; the record has \['b'\]"),
    (b'{"a": null}', r"missing field\(s\) \['a'\]"),
    (b'{"a": ' + b'[' * 200_000 + b']' * 200_000 + b'}', 'nested too deeply'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"a": 0}\n\n' + line + b'\n{"a": 9}\n')
  seen = []
  with pytest.raises(DataError, match=message) as error:
    for record in read_jsonl(path, required=['a']):
      seen.append(record)
  assert str(error.value).startswith(f'{path}:3: ')
  assert error.value.line == 3
  assert seen == [{'a': 0}]  # reading is streaming


def test_a_fault_at_the_end_of_a_line_is_on_that_line(tmp_path):
  columns = []
  for end in (b'\n', b'\r\n', b''):
    with pytest.raises(DataError, match='column') as error:
      parse_line(b'{"a": [1, 2]' + end, path='f', number=3)
    columns.append(str(error.value).partition(': b')[0])
  assert columns == ["f:3: not valid JSON (Expecting ',' delimiter at column 13)"] * 3


@pytest.mark.parametrize('content', [b'', b'\n\n  \n'])
def test_an_empty_file_is_an_error(tmp_path, content):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(content)
  with pytest.raises(DataError, match='holds no record') as error:
    list(read_jsonl(path))
  assert str(error.value) == f'{path}: the file holds no record'  # it has no line 1
  assert error.value.line is None


def test_a_missing_file_and_a_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match='nope'):
    list(read_jsonl(tmp_path / 'nope.jsonl'))
  with pytest.raises(IsADirectoryError, match='is a directory'):
    list(read_jsonl(tmp_path))


def test_a_failing_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'rows.jsonl'
  write_jsonl(path, [{'old': 1}])

  def rows():
    yield {'new': 1}
    raise RuntimeError('half way')

  with pytest.raises(RuntimeError):
    write_jsonl(path, rows())
  assert list(read_jsonl(path)) == [{'old': 1}]
  assert os.listdir(tmp_path) == ['rows.jsonl']


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'rows.jsonl'
  write_jsonl(path, [{'old': 1}])

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(records.os, 'fsync', full)
  with pytest.raises(OSError, match='No space left'):
    write_jsonl(path, [{'new': 1}])
  assert list(read_jsonl(path)) == [{'old': 1}]
  assert os.listdir(tmp_path) == ['rows.jsonl']


def test_a_killed_write_leaves_nothing_under_its_name(tmp_path):
  program = (
    'import sys, time; from mrjax.records import write_jsonl\n'
    'def rows():\n'
    '  for i in range(10**9):\n'
    '    yield {"i": i}\n'
    '    if i == 50_000: print("writing", flush=True); time.sleep(60)\n'
    'write_jsonl(sys.argv[1], rows())'
  )
  path = tmp_path / 'rows.jsonl'
  process = subprocess.Popen(
    [sys.executable, '-c', program, str(path)], stdout=subprocess.PIPE
  )
  assert process.stdout.readline() == b'writing\n'
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not path.exists()


def test_nan_is_refused(tmp_path):
  with pytest.raises(ValueError):
    write_jsonl(tmp_path / 'rows.jsonl', [{'loss': float('nan')}])


def test_files_are_readable_by_others(tmp_path):
  umask = os.umask(0o022)
  try:
    write_jsonl(tmp_path / 'rows.jsonl', [{'a': 1}])
  finally:
    os.umask(umask)
  assert (tmp_path / 'rows.jsonl').stat().st_mode & 0o777 == 0o644


@on_disk
@given(
  rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4),
  cut=st.integers(0, 10**6),
)
def test_any_cut_of_an_appended_file_is_repaired(tmp_path_factory, rows, cut):
  path = tmp_path_factory.mktemp('append') / 'rows.jsonl'
  with JsonlAppender(path) as appender:
    assert appender.append(rows) == len(rows)
  whole = path.read_bytes()
  path.write_bytes(whole[: cut % (len(whole) + 1)])
  with JsonlAppender(path) as appender:
    appender.append([{'after': 1}])
  lines = path.read_bytes().splitlines(keepends=True)
  kept = len(lines) - 1
  assert b''.join(lines[:-1]) == b''.join(whole.splitlines(keepends=True)[:kept])
  assert [json.loads(line) for line in lines] == [*rows[:kept], {'after': 1}]


def test_a_half_line_longer_than_a_block_is_dropped(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'{"a": 1}\n{"a": "' + b'x' * 200_000)
  with JsonlAppender(path) as appender:
    appender.append([{'a': 2}])
  assert list(read_jsonl(path)) == [{'a': 1}, {'a': 2}]


def test_expand_inputs(tmp_path):
  for name in ('b.jsonl', 'a.jsonl', 'config.json'):
    (tmp_path / name).write_text('{}\n')
  a, b = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  assert expand_inputs(tmp_path) == [a, b]
  assert expand_inputs(str(b)) == [b]
  assert expand_inputs(f'{tmp_path}/*.jsonl') == [a, b]
  for missing in (tmp_path / 'nope', f'{tmp_path}/x*.jsonl'):
    with pytest.raises(FileNotFoundError, match='check the path'):
      expand_inputs(missing)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='holds no file'):
    expand_inputs(tmp_path / 'empty')


def test_a_folder_of_shards(tmp_path):
  shards = [tmp_path / f'samples-{i:05d}-of-00003.jsonl' for i in range(3)]
  (tmp_path / 'metrics.jsonl').write_text('{}\n')
  for shard in (shards[2], shards[0]):
    shard.write_text('{}\n')
  with pytest.raises(ValueError, match=r"2 of 3 'samples' shards, missing \[1\]"):
    expand_inputs(tmp_path)
  shards[1].write_text('{}\n')
  assert expand_inputs(tmp_path) == shards  # and not metrics.jsonl
  (tmp_path / 'samples-00000-of-00001.jsonl').write_text('{}\n')
  with pytest.raises(ValueError, match=r'mixes .* \[1, 3\]'):
    expand_inputs(tmp_path)


TEXT = st.text(min_size=1).filter(str.strip)


@given(
  st.builds(
    Problem,
    id=TEXT,
    question=TEXT,
    answer=st.none() | st.text(),
    solution=st.none() | st.text(),
    source=st.none() | st.text(),
    options=st.none() | st.lists(st.text()).map(tuple),
    level=st.none() | st.text() | st.integers(),
  )
)
def test_problem_records_round_trip(problem):
  record = json.loads(json.dumps(problem.to_record()))
  assert Problem.from_record(record) == problem
  assert None not in record.values()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'question': ' '}, "'question' is missing or empty"),
    ({'id': None}, "'id' is missing or empty"),
    ({'question': 3}, "'question' is int"),
    ({'solution': ['a']}, "'solution' is list"),
    ({'answer': True}, "'answer' is bool"),
    ({'options': 'A'}, "'options' must be a list"),
    ({'options': [1]}, "'options' must be a list"),
    ({'level': 1.5}, "'level' must be"),
  ],
)
def test_a_bad_problem_record(change, message):
  with pytest.raises(ValueError, match=message):
    Problem.from_record({'id': '1', 'question': 'q', **change})


def test_numbers_are_fine_as_ids_and_answers():
  problem = Problem.from_record({'id': 7, 'question': 'q', 'answer': 3.5, 'more': []})
  assert problem == Problem(id='7', question='q', answer='3.5')
