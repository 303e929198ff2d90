"""Sampling runs: resumable by row, ended by stop strings, clear about bad input."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.sample import parse_stops
from mrjax.checkpoint.source import resolve_model
from mrjax.data.tokenization import load_tokenizer
from mrjax.data.tokenizer_training import train_bpe_tokenizer
from mrjax.models.config import load_hf_config
from mrjax.records import DataError, read_jsonl, write_jsonl
from mrjax.runs import sample
from mrjax.runs.common import OutputError
from mrjax.runs.prompt_logprobs import PromptLogprobs
from mrjax.runs.stops import StopStrings
from mrjax.sampling.engine import Engine
from mrjax.sampling.requests import Request, RequestError
from mrjax.sharding.mesh import MeshError, make_mesh

REPO = Path(__file__).resolve().parents[1]
ONE_DEVICE = 'data:1'


@pytest.fixture(scope='module')
def model(shared_module) -> Path:
  return shared_module / 'models' / 'stories260K'


@pytest.fixture(scope='module')
def shared_module() -> Path:
  folder = REPO / '..' / 'shared'
  if not folder.is_dir():
    pytest.skip(f'needs the public models in {folder}')
  return folder


BEGINNINGS = (
  'Once upon a time',
  'Lily went to the park and',
  'The big dog was sad because his ball had rolled under the old red car, so',
  'Tom',
  'One day, a bird',
)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('prompts') / 'prompts.jsonl'
  write_jsonl(path, [{'id': f'p{i}', 'question': q} for i, q in enumerate(BEGINNINGS)])
  return path


def config(model, prompts, output_dir, **changes) -> sample.Config:
  fields = {
    'model': str(model),
    'data': f'jsonl:{prompts}',
    'output_dir': str(output_dir),
    'mesh': 'data:-1',
    'num_samples': 4,
    'temperature': 0.8,
    'top_p': 0.95,
    'max_new_tokens': 24,
    'max_batch': 8,
    'seed': 3,
  }
  return sample.Config(**(fields | changes))


def rows_of(output_dir) -> dict:
  rows = {}
  for record in read_jsonl(Path(output_dir) / 'samples-00000-of-00001.jsonl'):
    name = record['problem_id'], record['sample_index']
    assert name not in rows
    rows[name] = record
  return rows


@pytest.fixture(scope='module')
def whole(model, prompts, tmp_path_factory):
  made = config(model, prompts, tmp_path_factory.mktemp('whole') / 'run')
  return made, sample.run(made)


def test_rows_have_the_fields_of_a_sample(whole, model):
  made, summary = whole
  rows = rows_of(made.output_dir)
  assert sorted(rows) == [(f'p{i}', j) for i in range(5) for j in range(4)]
  tokenizer = load_tokenizer(str(model))
  for row in rows.values():
    assert sorted(row) == [
      *('finish_reason', 'logprob_sum', 'num_tokens', 'problem_id', 'sample_index'),
      *('seed', 'text', 'token_ids'),
    ]
    assert row['num_tokens'] == len(row['token_ids']) <= 24
    assert row['seed'] == 3
    assert row['logprob_sum'] < 0
    if row['finish_reason'] == 'stop':
      assert row['token_ids'][-1] in tokenizer.eos_ids
    prompt = BEGINNINGS[int(row['problem_id'][1])]
    ids = tokenizer.encode_prompt(prompt) + row['token_ids']
    assert tokenizer.decode(ids) == prompt + row['text']
  assert summary['num_rows'] == summary['num_new_rows'] == 20
  assert summary['num_tokens'] == sum(row['num_tokens'] for row in rows.values())
  assert 0 < summary['truncated'] <= 1
  output_dir = Path(made.output_dir)
  saved = json.loads((output_dir / 'config.json').read_text())
  assert saved['config']['top_p'] == 0.95
  assert saved['versions']['jax'] and saved['device']['platform'] == 'cpu'
  (*_, last) = read_jsonl(output_dir / 'metrics.jsonl')
  assert last['step'] == 20 and last['tokens_per_second'] > 0


def test_a_finished_run_does_nothing(whole, monkeypatch, caplog):
  made, _ = whole
  before = rows_of(made.output_dir)
  monkeypatch.setattr(sample, 'Engine', None)  # would fail if it were made
  with caplog.at_level('INFO'):
    summary = sample.run(made)
  assert summary['num_new_rows'] == 0 and summary['num_rows'] == 20
  assert 'is finished: all 20 rows are there' in caplog.text
  assert rows_of(made.output_dir) == before


def test_a_run_goes_on_row_by_row_on_another_mesh(whole, tmp_path):
  made, _ = whole
  expected = rows_of(made.output_dir)
  again = dataclasses.replace(
    made, output_dir=str(tmp_path / 'run'), mesh='data:4,tensor:2', max_batch=12
  )
  Path(again.output_dir).mkdir()
  saved = Path(made.output_dir, 'config.json').read_text()
  Path(again.output_dir, 'config.json').write_text(saved)
  # What a kill leaves: some rows of a group, and half a line.
  lines = [json.dumps(row) for name, row in expected.items() if name[1] in (1, 2)][:7]
  shard = Path(again.output_dir) / 'samples-00000-of-00001.jsonl'
  shard.write_text('\n'.join(lines) + '\n' + '{"problem_id": "p4", "sample_in')
  summary = sample.run(again)
  assert summary['num_rows'] == 20 and summary['num_new_rows'] == 13
  rows = rows_of(again.output_dir)
  assert {name: row['token_ids'] for name, row in rows.items()} == {
    name: row['token_ids'] for name, row in expected.items()
  }
  assert shard.read_text().splitlines()[:7] == lines


def test_killed_at_any_moment_it_loses_and_doubles_nothing(model, prompts, tmp_path):
  made = config(
    model, prompts, tmp_path / 'run', num_samples=40, max_batch=5, max_new_tokens=16
  )
  flags = [
    f'--{name}={getattr(made, name)}'
    for name in (
      *('model', 'data', 'output_dir', 'num_samples', 'temperature', 'top_p'),
      *('max_new_tokens', 'max_batch', 'seed'),
    )
  ]
  command = [sys.executable, '-m', 'experiments.sample', *flags]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen(
    command, cwd=REPO, env=environment, stderr=subprocess.DEVNULL
  )
  shard = tmp_path / 'run' / 'samples-00000-of-00001.jsonl'
  deadline = time.monotonic() + 300
  while not (shard.exists() and shard.read_bytes().count(b'\n') >= 15):
    assert process.poll() is None, 'it ended before it could be killed'
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  written = shard.read_bytes()
  survivors = written[: written.rfind(b'\n') + 1]
  assert 15 <= survivors.count(b'\n') < 200
  summary = sample.run(dataclasses.replace(made, mesh='data:1,fsdp:-1', max_batch=40))
  assert summary['num_rows'] == 200
  assert summary['num_new_rows'] == 200 - survivors.count(b'\n')
  assert shard.read_bytes().startswith(survivors)
  assert sorted(rows_of(made.output_dir)) == [
    (f'p{i}', j) for i in range(5) for j in range(40)
  ]


def test_greedy_rows_are_those_of_transformers(model, prompts, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM, AutoTokenizer

  flags = {'temperature': 0, 'max_new_tokens': 64, 'prompt_template': 'raw'}
  command = [sys.executable, '-m', 'experiments.sample', f'--model={model}']
  command += [f'--data=jsonl:{prompts}', f'--output_dir={tmp_path / "run"}']
  command += [f'--{name}={value}' for name, value in flags.items()]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True)
  rows = rows_of(tmp_path / 'run')
  hf_tokenizer = AutoTokenizer.from_pretrained(model)
  hf_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
  for i, beginning in enumerate(BEGINNINGS):
    ids = hf_tokenizer(beginning, return_tensors='pt')
    with torch.no_grad():
      out = hf_model.generate(**ids, max_new_tokens=64, do_sample=False)
      logits = hf_model(out).logits[0].log_softmax(-1)
    new_ids = out[0, ids['input_ids'].shape[1] :].tolist()
    row = rows[f'p{i}', 0]
    assert row['token_ids'] == new_ids
    assert hf_tokenizer.decode(out[0], skip_special_tokens=True) == (
      beginning + row['text']
    )
    chosen = logits[torch.arange(len(out[0]) - 1), out[0, 1:]][-len(new_ids) :]
    assert row['logprob_sum'] == pytest.approx(chosen.sum().item(), abs=1e-3)
  assert ' was ' in rows['p0', 0]['text']  # readable English


def test_log_probabilities_of_every_token(model, prompts, tmp_path):
  made = config(model, prompts, tmp_path / 'run', limit=2, logprobs=True, mesh='data:8')
  sample.run(made)
  rows = rows_of(made.output_dir)
  assert len(rows) == 8
  for row in rows.values():
    assert len(row['logprobs']) == len(row['sampling_logprobs']) == row['num_tokens']
    assert sum(row['logprobs']) == pytest.approx(row['logprob_sum'], abs=1e-4)


def test_log_probabilities_of_prompts(whole, model, prompts, tmp_path, monkeypatch):
  """As transformers has them, in a run that goes on too; each prompt is read once."""
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  read = []
  score = Engine.score

  def counted(self, texts):
    read.extend(set(map(tuple, texts)))
    return score(self, texts)

  monkeypatch.setattr(Engine, 'score', counted)
  made = config(model, prompts, tmp_path / 'run', prompt_logprobs=True)
  sample.run(made)
  rows = rows_of(made.output_dir)
  plain = rows_of(whole[0].output_dir)
  hf_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
  tokenizer = load_tokenizer(str(model))
  for i, beginning in enumerate(BEGINNINGS):
    ids = tokenizer.encode_prompt(beginning)
    with torch.no_grad():
      logps = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logps[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    for j in range(4):
      first, *others = rows[f'p{i}', j]['prompt_logprobs']
      assert first is None and others == pytest.approx(expected, abs=1e-4)
  strip = lambda row: row.keys() - {'prompt_logprobs'}
  assert all(strip(rows[name]) == plain[name].keys() for name in plain)
  assert len(read) == len(set(read)) == 5

  # Of p0 nothing is missing, of p1 two rows apart, of the others all.
  shard = Path(made.output_dir) / 'samples-00000-of-00001.jsonl'
  kept = [rows['p0', j] for j in range(4)] + [rows['p1', j] for j in (0, 2)]
  write_jsonl(shard, kept)
  read.clear()
  assert sample.run(made)['num_new_rows'] == 14
  again = rows_of(made.output_dir)
  assert len(read) == 4
  for name, row in rows.items():
    assert again[name]['prompt_logprobs'] == row['prompt_logprobs']


def test_prompts_are_forgotten_when_their_rows_are_done(model):
  """So that the memory does not grow with the number of problems."""
  source = resolve_model(str(model))
  mesh = make_mesh('data:2', jax.devices()[:2])
  engine = Engine(source.config, source.load_params(mesh), mesh, max_batch=6)
  requests = [  # the second request asks for more rows of the first prompt
    Request('p0', tuple(range(5, 45)), 2),
    Request('p0', tuple(range(5, 45)), 1, first_sample_index=4),
    *(Request(f'p{i}', tuple(range(9, 9 + i)), 2) for i in range(1, 30)),
  ]
  found = PromptLogprobs(engine, requests)
  (*_, last) = (found.of_row('p0') for _ in range(3))
  expected = engine.score([requests[0].prompt_ids])[0]
  assert last[0] is None and last[1:] == pytest.approx(expected[1:], abs=1e-5)
  assert not found._known
  for i in range(29, 0, -1):
    for _ in range(2):
      assert len(found.of_row(f'p{i}')) == i
    assert len(found._known) < 6
  assert not found._known and not found._batches
  with pytest.raises(KeyError):
    found.of_row('p3')


def test_stop_strings_end_rows_at_the_completing_token(whole, model, tmp_path):
  made, _ = whole
  stops = ('the', '. S', '\n')
  expected = rows_of(made.output_dir)
  stopped = dataclasses.replace(made, stop=stops, output_dir=str(tmp_path / 'run'))
  sample.run(stopped)
  rows = rows_of(stopped.output_dir)
  tokenizer = load_tokenizer(str(model))
  num_stopped = 0
  for name, row in rows.items():
    plain = expected[name]
    count = row['num_tokens']
    assert row['token_ids'] == plain['token_ids'][:count]
    places = [plain['text'].find(stop) for stop in stops]
    places = [place for place in places if place >= 0]
    if not places:
      assert row == plain
      continue
    num_stopped += 1
    assert row['finish_reason'] == 'stop'
    assert row['text'] == plain['text'][: min(places)]
    prompt_ids = tokenizer.encode_prompt(BEGINNINGS[int(name[0][1])])
    texts = [
      tokenizer.decode_continuation(prompt_ids, row['token_ids'][:n])
      for n in (count - 1, count)
    ]
    holds = [any(stop in text for stop in stops) for text in texts]
    assert holds == [False, True]
  assert num_stopped > 3


def test_stop_strings_are_found_wherever_the_engine_looks(model):
  tokenizer = load_tokenizer(str(model))
  text = ' and then they went home. The end. They were happy ever after.'
  ids = tuple(tokenizer.encode_prompt('Once' + text))
  request = Request('p', ids[:3])
  row = ids[3:]
  for stop in ('home', '. T', 'd. They were hap', 'after.', 'é'):
    stops = StopStrings([stop], tokenizer)
    found = [stops.num_tokens_to_keep(request, row[:n]) for n in range(1, len(row) + 1)]
    ends = [n for n in found if n is not None]
    assert len(set(ends)) == (0 if stop == 'é' else 1)
    if ends:
      assert found[: ends[0] - 1] == [None] * (ends[0] - 1)
      assert found[ends[0] - 1] == ends[0]  # seen as soon as it is complete


def test_stop_flags():
  assert parse_stops([]) == ()
  assert parse_stops(['Question:,Q:', r'\n\n', r'a\,b']) == (
    *('Question:', 'Q:', '\n\n'),
    'a,b',
  )
  assert parse_stops([r'\\n', ' x ']) == (r'\n', ' x ')


def test_another_configuration_is_refused(whole):
  made, _ = whole
  other = dataclasses.replace(made, temperature=0.5)
  with pytest.raises(OutputError, match=r'temperature: was 0\.8, now 0\.5'):
    sample.run(other)
  assert len(rows_of(made.output_dir)) == 20


def test_a_directory_of_something_else_is_refused(model, prompts, tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(OutputError, match=r'no config\.json'):
    sample.run(config(model, prompts, tmp_path))


def test_two_processes_never_write_one_shard(whole):
  made, _ = whole
  from mrjax.runs.sample_shard import only_writer

  shard = Path(made.output_dir) / 'samples-00000-of-00001.jsonl'
  with only_writer(shard), pytest.raises(OutputError, match='another process'):
    sample.run(made)


def test_shards_of_another_number_of_processes_are_refused(whole, tmp_path):
  made, _ = whole
  moved = dataclasses.replace(made, output_dir=str(tmp_path))
  saved = Path(made.output_dir, 'config.json').read_text()
  (tmp_path / 'config.json').write_text(saved)
  (tmp_path / 'samples-00001-of-00002.jsonl').write_text('')
  with pytest.raises(OutputError, match='another number of processes'):
    sample.run(moved)


def test_a_changed_data_set_is_refused(whole, tmp_path):
  made, _ = whole
  moved = dataclasses.replace(made, output_dir=str(tmp_path))
  for name in ('config.json', 'samples-00000-of-00001.jsonl'):
    (tmp_path / name).write_bytes(Path(made.output_dir, name).read_bytes())
  with (tmp_path / 'samples-00000-of-00001.jsonl').open('a') as file:
    row = {'problem_id': 'p9', 'sample_index': 0, 'num_tokens': 1}
    file.write(json.dumps(row | {'finish_reason': 'stop'}) + '\n')
  with pytest.raises(DataError, match=r"jsonl:21: sample 0 of 'p9'.*never asked for"):
    sample.run(moved)


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'prompt_template': 'nonsense'}, ValueError, 'nonsense'),
    ({'prompt_template': 'chat'}, ValueError, 'chat template'),
    ({'max_new_tokens': 510}, RequestError, 'limit is 512'),
    ({'mesh': 'data:3'}, MeshError, '3 places for 8 devices'),
    ({'mesh': 'tensor:8'}, MeshError, 'does not divide'),
    ({'mesh': 'data:8', 'max_batch': 4}, MeshError, 'max_batch 4 is less than 8'),
    ({'data': 'jsonl:nowhere.jsonl'}, FileNotFoundError, 'nowhere'),
    ({'model': './nowhere'}, FileNotFoundError, 'nowhere'),
  ],
)
def test_bad_input_leaves_no_directory(
  model, prompts, tmp_path, changes, error, message
):
  with pytest.raises(error, match=message):
    sample.run(dataclasses.replace(config(model, prompts, tmp_path / 'run'), **changes))
  assert not (tmp_path / 'run').exists()


def test_empty_data_is_refused(model, tmp_path):
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('')
  with pytest.raises(ValueError, match='empty'):
    sample.run(config(model, empty, tmp_path / 'run'))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model, prompts, tmp_path):
  draws = random.Random(0)
  words = [''.join(draws.choices('abcdefgh', k=5)) for _ in range(400)]
  train_bpe_tokenizer(words, vocab_size=600, output_dir=tmp_path / 'tokenizer')
  num_ids = load_tokenizer(tmp_path / 'tokenizer').vocab_size
  assert num_ids > load_hf_config(model)['vocab_size'] == 512
  made = config(model, prompts, tmp_path / 'run', tokenizer=str(tmp_path / 'tokenizer'))
  with pytest.raises(ValueError, match=rf'{num_ids - 1}.*512 embeddings'):
    sample.run(made)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model': ''}, '--model is empty'),
    ({'num_samples': 0}, 'num_samples=0'),
    ({'max_batch': -1}, 'max_batch=-1'),
    ({'limit': -1}, 'limit=-1'),
    ({'stop': ('a', '')}, 'empty string'),
    ({'top_p': 0.0}, 'top_p'),
  ],
)
def test_bad_flags_are_refused_at_once(changes, message):
  fields = {'model': 'm', 'data': 'd:s', 'output_dir': 'o'}
  with pytest.raises(ValueError, match=message):
    sample.Config(**(fields | changes))


def test_prompts_may_be_cut_where_allowed(model, tmp_path):
  path = tmp_path / 'long.jsonl'
  write_jsonl(path, [{'id': 'a', 'question': ' '.join(BEGINNINGS * 20)}])
  made = config(model, path, tmp_path / 'run', num_samples=1, mesh='data:1,fsdp:-1')
  with pytest.raises(RequestError, match="'a' has"):
    sample.run(made)
  allowed = dataclasses.replace(made, truncate_prompts=True)
  assert sample.run(allowed)['num_rows'] == 1
