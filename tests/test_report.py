"""The report page: its numbers, what it escapes, how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mrjax.data.problems import load_problems
from mrjax.grading.tally import Tally
from mrjax.records import DataError
from mrjax.runs import report
from mrjax.runs.common import OutputError
from mrjax.runs.report_data import bar_edges, embed_json, length_bars, thin

_WHEN = 1_700_000_000  # 2023-11-14 22:13 UTC
_HOSTILE = [
  '</script><script>alert(1)</script>',
  '<img src=x onerror=alert(2)>',
  '<!-- <script> -->',
  '\u2028 \u2029 \ud800 \x00 &lt;',
]


class _Page(HTMLParser):
  """Elements of a page in order, tables as lists of rows, and the embedded data."""

  def __init__(self, path: Path):
    super().__init__()
    self.text = path.read_text(encoding='utf-8')
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.tables: list[list[list[str]]] = []
    self._in_data = False
    self._cell = False
    self._json = ''
    self.feed(self.text)
    self.data = json.loads(self._json)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._in_data = tag == 'script' and dict(attrs).get('id') == 'data'
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    elif tag in ('th', 'td'):
      self.tables[-1][-1].append('')
      self._cell = True
    elif tag == 'small' and self._cell:
      self.tables[-1][-1][-1] += ' '

  def handle_endtag(self, tag):
    if tag in ('th', 'td'):
      self._cell = False

  def handle_data(self, data):
    if self._in_data:
      self._json += data
    if self._cell:
      self.tables[-1][-1][-1] += data.strip()


def _sample(problem: int, index: int, **fields) -> dict:
  correct = (problem + index) % 3 == 0
  record = {
    'problem_id': f'p-{problem}',
    'sample_index': index,
    'text': f'So the answer is {problem + index}.\n#### {problem + index}',
    'token_ids': [1, 2, 3],
    'finish_reason': 'length' if index == 3 else 'stop',
    'logprob_sum': -1.25 * index,
    'num_tokens': 10 + 7 * problem + index,
    'seed': 0,
    'question': f'What is question {problem}?',
    'gold': str(problem),
    'extracted': str(problem) if correct else None,
    'correct': correct,
  }
  return record | fields


def _write_run(directory: Path, *, graded=(), losses=(), metrics=None, config=None):
  directory.mkdir(parents=True)
  if graded:
    lines = [json.dumps(record) for record in graded]
    (directory / 'graded.jsonl').write_text('\n'.join(lines) + '\n')
  if losses:
    lines = [json.dumps({'step': step, 'loss': loss}) for step, loss in losses]
    (directory / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  if metrics is not None:
    (directory / 'metrics.json').write_text(json.dumps(metrics))
  if config is not None:
    command = ['evaluate', '--model=a b']
    value = {'config': config, 'command': command, 'git_commit': 'abc'}
    (directory / 'config.json').write_text(json.dumps(value))
  for path in directory.iterdir():
    os.utime(path, (_WHEN, _WHEN))
  return directory


def _summary(records) -> dict:
  tally = Tally('string_first', is_equal=str.__eq__)
  for record in records:
    tally.add(record)
  return tally.summary(levels={'p-0': 1, 'p-1': 2})


@pytest.fixture
def runs(tmp_path) -> str:
  """An evaluation with everything, another without metrics.json, a training run."""
  first = [_sample(p, i) for p in range(5) for i in range(4)]
  second = [_sample(p, i + 1, sample_index=i) for p in range(5) for i in range(4)]
  config = {'model': 'tiny', 'data': 'gsm8k:test', 'seed': 0}
  _write_run(tmp_path / 'a', graded=first, metrics=_summary(first), config=config)
  _write_run(tmp_path / 'b', graded=second)
  losses = [(step, 1 / step) for step in range(1, 20)]
  _write_run(tmp_path / 'c', losses=losses, config=config | {'seed': 1})
  return ','.join(f'{name}={tmp_path / name}' for name in 'abc')


def _make(runs: str, tmp_path: Path, **fields) -> _Page:
  output = tmp_path / 'out' / 'report.html'
  summary = report.run(report.Config(runs=runs, output=str(output), **fields))
  assert summary['num_bytes'] == output.stat().st_size
  return _Page(output)


def test_table_numbers_are_those_of_the_metrics(runs, tmp_path):
  page = _make(runs, tmp_path)
  metrics = json.loads((tmp_path / 'a' / 'metrics.json').read_text())
  head, row_a, row_b = page.tables[0]
  names = ['pass@1', 'maj@4', 'pass@4']
  assert [name for name in head if '@' in name] == names
  row = dict(zip(head, row_a))
  for name in names:
    entry = metrics[name]
    low, high = 100 * entry['low'], 100 * entry['high']
    assert row[name] == f'{entry["value"]:.1%} [{low:.1f}, {high:.1f}]'
  assert row['Run'] == 'a tiny, gsm8k:test'
  assert (row['Questions'], row['Samples']) == ('5', '20')
  assert row['Mean length'] == f'{metrics["mean_length"]:.1f}'
  assert row['Cut short'] == '25.0%'
  assert row['No answer'] == f'{metrics["num_unanswered"] / 20:.1%}'
  # Without metrics.json the same summary is made of the graded samples.
  text = (tmp_path / 'b' / 'graded.jsonl').read_text()
  made_here = _summary(json.loads(line) for line in text.splitlines())
  assert dict(zip(head, row_b))['pass@1'].startswith(
    f'{made_here["pass@1"]["value"]:.1%}'
  )
  assert 'b: no metrics.json; the numbers were computed here' in page.text
  curve = page.data['runs'][0]['accuracy']['pass']
  assert curve == [[k, *metrics[f'pass@{k}'].values()] for k in (1, 2, 4)]
  levels = page.tables[2]
  assert [row[0] for row in levels[1:]] == ['Level 1', 'Level 2']


def test_embedded_samples_are_the_records(runs, tmp_path):
  data = _make(runs, tmp_path).data
  columns, questions = data['runs'][1]['samples'], data['questions']
  lines = (tmp_path / 'b' / 'graded.jsonl').read_text().splitlines()
  start = 0
  rebuilt = []
  for question, count in zip(columns['question'], columns['count']):
    for i in range(start, start + count):
      answer = columns['answer'][i]
      rebuilt.append(
        {
          'problem_id': questions['id'][question],
          'question': questions['text'][question],
          'gold': questions['gold'][question],
          'sample_index': columns['index'][i],
          'text': data['texts'][columns['text'][i]],
          'extracted': None if answer < 0 else data['answers'][answer],
          'correct': columns['mark'][i] == 'r',
          'num_tokens': columns['tokens'][i],
          'logprob_sum': columns['logprob'][i],
          'finish_reason': data['reasons'][columns['reason'][i]],
        }
      )
    start += count
  dropped = ('token_ids', 'seed')
  wanted = [json.loads(line) for line in lines]
  assert rebuilt == [{k: v for k, v in r.items() if k not in dropped} for r in wanted]
  assert len(data['questions']['id']) == 5  # shared by both runs
  assert data['runs'][2]['losses'][:2] == [[1, 1.0], [2, 0.5]]
  assert data['runs'][2]['samples'] == {}


def test_says_what_was_run_and_when_the_data_were_made(runs, tmp_path):
  page = _make(runs, tmp_path, title='A < B')
  assert '<title>A &lt; B</title>' in page.text
  assert '<time>2023-11-14 22:13 UTC</time>' in page.text
  assert 'evaluate &#39;--model=a b&#39;' in page.text
  flags = {row[0]: row[1:] for row in page.tables[-1][1:]}
  assert flags['seed'] == ['0', '–', '1']


def test_hostile_text_stays_text(tmp_path):
  graded = [
    _sample(p, 0, text=text, extracted=text, gold=text, question=text, problem_id=text)
    for p, text in enumerate(_HOSTILE)
  ]
  config = {'model': _HOSTILE[0], 'data': _HOSTILE[1], _HOSTILE[2]: _HOSTILE[3]}
  metrics = _summary(graded) | {'by_level': {_HOSTILE[0]: {'pass@1': 0.5}}}
  directory = _write_run(
    tmp_path / '<b>&"', graded=graded, metrics=metrics, config=config
  )
  page = _make(f'<script>alert(3)</script>={directory}', tmp_path, title=_HOSTILE[0])
  assert [tag for tag, _ in page.tags].count('script') == 3  # data, charts, browser
  assert 'img' not in {tag for tag, _ in page.tags}
  assert sorted(page.data['texts']) == sorted(_HOSTILE)
  assert (
    page.data['questions']['text'] == page.data['questions']['id'] == sorted(_HOSTILE)
  )
  assert page.data['runs'][0]['name'] == '<script>alert(3)</script>'


def test_embedded_json_cannot_end_its_element():
  value = {'<!--': [*_HOSTILE, None, 0.5, 'ünï']}
  text = embed_json(value)
  assert not re.search('[<>&\u2028\u2029\ud800-\udfff]', text)
  assert json.loads(text) == value


def test_page_loads_nothing(runs, tmp_path):
  page = _make(runs, tmp_path)
  for tag, attrs in page.tags:
    assert not attrs.keys() & {'src', 'href', 'srcset', 'action', 'style'}, (tag, attrs)
    assert not any(name.startswith('on') for name in attrs)
    assert tag not in ('link', 'iframe', 'object', 'embed', 'base')
  css = (Path(report.__file__).parent / 'report.css').read_text()
  assert 'url(' not in css and '@import' not in css
  # The only address is the name of the SVG namespace, which is never fetched.
  assert set(re.findall(r'https?://[\w./]+', page.text)) <= {
    'http://www.w3.org/2000/svg'
  }
  policy = next(a['content'] for _, a in page.tags if 'http-equiv' in a)
  assert policy.startswith("default-src 'none'") and 'unsafe' not in policy


def test_scripts_never_make_markup_of_data():
  for name in ('report_charts.js', 'report_browser.js'):
    script = (Path(report.__file__).parent / name).read_text()
    banned = r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\('
    assert not re.search(banned, script)
    assert '</script' not in script and '<!--' not in script


def test_same_input_same_bytes_without_jax(runs, tmp_path):
  pages = []
  for seed in ('1', '2'):
    output = tmp_path / f'{seed}.html'
    code = (
      'import sys; from mrjax.runs import report; '
      f'report.run(report.Config(runs={runs!r}, output={str(output)!r})); '
      "assert 'jax' not in sys.modules, 'the text wing imported jax'"
    )
    environment = os.environ | {'PYTHONHASHSEED': seed}
    subprocess.run([sys.executable, '-c', code], check=True, env=environment)
    pages.append(output.read_bytes())
  assert pages[0] == pages[1]


def test_page_stores_each_text_once(tmp_path):
  text = 'x' * 1000
  graded = [_sample(p, i, text=text) for p in range(50) for i in range(16)]
  page = _make(str(_write_run(tmp_path / 'a', graded=graded)), tmp_path)
  assert page.text.count(text) == 1
  empty = _make(str(_write_run(tmp_path / 'b', graded=graded[:1])), tmp_path)
  assert len(page.text) - len(empty.text) < 50 * 16 * 40  # bytes a sample
  assert len(empty.text) < 80_000


def test_missing_pieces_leave_their_section_out(runs, tmp_path):
  only_loss = _make(f'c={tmp_path / "c"}', tmp_path)
  assert 'id="browser"' not in only_loss.text and 'id="lengths"' not in only_loss.text
  assert 'no accuracies' in only_loss.text and 'no browser' in only_loss.text
  assert 'id="chart-losses"' in only_loss.text
  ungraded = [
    {
      k: v
      for k, v in _sample(p, 0).items()
      if k not in ('extracted', 'correct', 'gold')
    }
    for p in range(3)
  ]
  directory = _write_run(tmp_path / 'd')
  lines = ''.join(json.dumps(record) + '\n' for record in ungraded)
  (directory / 'samples-00000-of-00001.jsonl').write_text(lines)
  page = _make(str(directory), tmp_path)
  assert 'd: the samples are not graded' in page.text
  assert 'no loss curve' in page.text and 'chart-losses"' not in page.text
  assert page.data['runs'][0]['samples']['mark'] == 'uuu'
  assert sum(page.data['runs'][0]['lengths']['ungraded']) == 3


def test_browser_limit_keeps_whole_questions_and_all_numbers(runs, tmp_path):
  page = _make(f'a={tmp_path / "a"}', tmp_path, max_samples=5)
  assert page.data['runs'][0]['samples']['count'] == [4, 4]
  assert 'the browser holds 2 of 5 questions' in page.text
  assert sum(page.data['runs'][0]['lengths']['cut']) == 5


def test_same_id_with_another_question_is_another_question(tmp_path):
  _write_run(tmp_path / 'a', graded=[_sample(0, 0)])
  _write_run(tmp_path / 'b', graded=[_sample(0, 0, question='Other?', gold='7')])
  _write_run(tmp_path / 'c', graded=[_sample(0, 0, question=None)])
  page = _make(','.join(str(tmp_path / name) for name in 'abc'), tmp_path)
  places = [run['samples']['question'] for run in page.data['runs']]
  assert places == [[0], [1], [0]]


def test_problems_beside_the_samples_tell_the_questions(tmp_path):
  graded = [_sample(0, 0, question=None, prompt='Q: 1+1\nA:')]
  directory = _write_run(tmp_path / 'a', graded=graded)
  assert _make(str(directory), tmp_path).data['questions']['text'] == ['Q: 1+1\nA:']
  problem = {'id': 'p-0', 'question': '1+1?', 'options': ['A)1', 'B)2']}
  (directory / 'problems.jsonl').write_text(json.dumps(problem) + '\n')
  questions = _make(str(directory), tmp_path).data['questions']
  assert questions['text'] == ['1+1?'] and questions['options'] == [['A)1', 'B)2']]


def test_flags_of_the_run_tell_the_questions(tmp_path):
  config = {'data': 'arithmetic:test?size=3', 'data_root': '', 'limit': 2}
  problems = load_problems('arithmetic:test?size=3')
  graded = [
    _sample(0, 0, question=None, problem_id=problem.id, gold=None)
    for problem in problems
  ]
  page = _make(str(_write_run(tmp_path / 'a', graded=graded, config=config)), tmp_path)
  questions = page.data['questions']
  assert questions['text'] == [problems[0].question, problems[1].question, None]
  assert questions['gold'] == [problems[0].answer, problems[1].answer, None]
  config['data'] = 'jsonl:nowhere.jsonl'
  page = _make(str(_write_run(tmp_path / 'b', graded=graded, config=config)), tmp_path)
  assert 'b: the questions are not shown: ' in page.text


def test_questions_are_in_the_order_of_their_numbers(tmp_path):
  graded = [_sample(p, i) for p in (10, 9, 2) for i in (1, 0)]
  page = _make(str(_write_run(tmp_path / 'a', graded=graded)), tmp_path)
  columns = page.data['runs'][0]['samples']
  ids = [page.data['questions']['id'][place] for place in columns['question']]
  assert ids == ['p-2', 'p-9', 'p-10']
  assert columns['index'] == [0, 1] * 3
  assert columns['tokens'] == [10 + 7 * p + i for p in (2, 9, 10) for i in (0, 1)]


def test_losses_of_a_resumed_run_and_long_curves(tmp_path):
  losses = [(1, 3.0), (2, 2.0), (3, 9.0), (3, 1.0), (4, float('nan'))]
  page = _make(str(_write_run(tmp_path / 'a', losses=losses)), tmp_path)
  assert page.data['runs'][0]['losses'] == [[1, 3.0], [2, 2.0], [3, 1.0], [4, None]]
  points = thin([(step, float(step)) for step in range(2500)])
  assert len(points) <= 1000 and points[0] == (2, 1.0) and points[-1][0] == 2499


def test_length_bars_hold_every_sample_once():
  lengths = [(0, True, False), (9, False, False), (399, None, True), (400, False, True)]
  edges = bar_edges([length for length, _, _ in lengths])
  assert edges[:3] == [0, 20, 40] and edges[-2] <= 400 < edges[-1]
  bars = length_bars(lengths, edges)
  assert bars['right'][0] == bars['wrong'][0] == 1
  assert bars['ungraded'][19] == bars['wrong'][20] == 1
  assert sum(bars['cut']) == 2 and bars['mean'] == 202.0
  assert bar_edges([0]) == [0, 1]


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('', 'is empty'),
    (' , ', 'is not NAME=DIR'),
    ('a=', 'is not NAME=DIR'),
    ('=x', 'is not NAME=DIR'),
    ('a=x,a=y', "two runs are named 'a'"),
    ('x/run,y/run', "two runs are named 'run'"),
  ],
)
def test_bad_runs_flag(spec, message):
  with pytest.raises(ValueError, match=message):
    report.Config(runs=spec)


def test_runs_are_named_by_their_directories(tmp_path):
  odd = tmp_path / 'lr=1e-3'
  odd.mkdir()
  assert report.parse_runs(f'{odd},b={tmp_path}/x/') == {
    'lr=1e-3': odd,
    'b': tmp_path / 'x',
  }


def test_bad_directories(tmp_path):
  with pytest.raises(FileNotFoundError, match='does not exist'):
    _make(str(tmp_path / 'none'), tmp_path)
  (tmp_path / 'file').write_text('')
  with pytest.raises(FileNotFoundError, match='is a file'):
    _make(str(tmp_path / 'file'), tmp_path)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='holds nothing to report'):
    _make(str(tmp_path / 'empty'), tmp_path)
  run = _write_run(tmp_path / 'a', losses=[(1, 1.0)])
  with pytest.raises(OutputError, match='is a directory'):
    report.run(report.Config(runs=str(run), output=str(tmp_path)))
  _make(str(run), tmp_path)
  _make(str(run), tmp_path)  # replaces its own page
  page = tmp_path / 'out' / 'report.html'
  page.write_text('<!doctype html><title>Another</title>')
  with pytest.raises(OutputError, match='is no report of mrjax'):
    _make(str(run), tmp_path)
  assert 'Another' in page.read_text()


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('config.json', '{\n"config": ', r'config\.json:2: not valid JSON'),
    ('config.json', '[]', r'config\.json:1: want a JSON object'),
    ('config.json', '{"config": 3}', r"config\.json:1: field 'config'"),
    ('metrics.json', '{"pass@1": "high"}', r"metrics\.json:1: 'pass@1'"),
    ('metrics.json', '{"pass@x": 0.5}', r"metrics\.json:1: 'pass@x'"),
    ('metrics.json', '{"pass@1": 42.0}', r'metrics\.json:1: .*in \[0, 1\]'),
    ('metrics.json', '{"pass@1": NaN}', r"metrics\.json:1: 'pass@1'"),
    ('metrics.json', '{"by_level": {"1": 3}}', r"metrics\.json:1: 'by_level'"),
    ('metrics.jsonl', '{"step": 1, "loss": 1}\n{"st', r'metrics\.jsonl:2: not valid'),
    ('metrics.jsonl', '{"step": "1", "loss": 1}', r'metrics\.jsonl:1: want numbers'),
    ('graded.jsonl', '{"problem_id": "a"}', r'graded\.jsonl:1: missing field'),
    (
      'graded.jsonl',
      '{"text": "", "correct": true}',
      r"graded\.jsonl:1: .*'extracted'",
    ),
    ('graded.jsonl', '{"text": "", "num_tokens": -1}', r'graded\.jsonl:1: num_tokens'),
    ('graded.jsonl', '{"text": 3}', r"graded\.jsonl:1: field 'text'"),
    (
      'graded.jsonl',
      '{"text": "", "correct": "yes"}',
      r"graded\.jsonl:1: field 'correct'",
    ),
    (
      'graded.jsonl',
      '{"text": "", "problem_id": "a"}\n' * 2
      + '{"text": "", "problem_id": "a", "sample_index": 0}\n',
      r'graded\.jsonl:3: .*a second time',
    ),
    ('problems.jsonl', '{"id": "a"}', r'problems\.jsonl:1: '),
  ],
)
def test_damaged_files_are_named_with_their_line(tmp_path, name, text, message):
  directory = _write_run(tmp_path / 'a', graded=[_sample(0, 0, question=None)])
  (directory / name).write_text(text)
  with pytest.raises(DataError, match=message):
    _make(str(directory), tmp_path)
  assert not (tmp_path / 'out').exists()


def test_command_line(runs, tmp_path):
  command = [sys.executable, '-m', 'experiments.report']
  output = tmp_path / 'page.html'
  done = subprocess.run(
    [*command, f'--runs={runs}', f'--output={output}'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert '3 runs, 40 samples' in done.stdout and output.is_file()
  failed = subprocess.run(
    [*command, '--runs=nowhere'], capture_output=True, text=True, cwd=_ROOT
  )
  assert failed.returncode == 1
  assert failed.stderr.startswith("error: run 'nowhere': nowhere does not exist")
  assert 'Traceback' not in failed.stderr


_ROOT = Path(__file__).resolve().parents[1]


def _dump_dom(page: Path, address: str, scratch: Path) -> str:
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('needs a browser: no chromium or google-chrome on the path')
  flags = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
    '--disable-background-networking --disable-component-update --disable-sync '
    f'--user-data-dir={scratch / "profile"} --virtual-time-budget=2000 '
    '--enable-logging=stderr --dump-dom'
  )
  done = subprocess.run(
    [browser, *flags.split(), f'{page.as_uri()}#{address}'],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert 'CONSOLE' not in done.stderr, done.stderr  # script errors, refused loads
  return done.stdout


def test_in_a_browser(tmp_path):
  graded = [_sample(p, i) for p in range(5) for i in range(4)]
  graded[6]['text'] = f'needle {_HOSTILE[0]} {_HOSTILE[1]}'
  losses = [(step, 1 / step) for step in range(1, 20)]
  _write_run(tmp_path / 'a', graded=graded, losses=losses)
  page = _make(f'a={tmp_path / "a"},b={tmp_path / "a"}', tmp_path)
  output = tmp_path / 'out' / 'report.html'
  dom = _dump_dom(output, 'run=b&show=mixed&find=NEEDLE', tmp_path)
  assert len(re.findall('class="row"', dom)) == 1
  assert '<mark>needle</mark>' in dom and '>Sample 2<' in dom
  assert '&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;' in dom
  assert '<img' not in dom
  for chart in ('pass', 'maj', 'losses', 'lengths'):
    assert re.search(f'id="chart-{chart}".*?<svg.*?<path', dom, re.DOTALL), chart
  assert len(page.data['runs']) == 2
