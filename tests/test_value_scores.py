"""Values of finished texts are those of plain forward passes over every prefix."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.data.problems import load_problems
from mrjax.data.prompts import render_prompt
from mrjax.data.tokenization import load_tokenizer
from mrjax.losses.value import expected_rewards
from mrjax.models.decoder import Decoder
from mrjax.records import DataError, read_jsonl, write_jsonl
from mrjax.runs import evaluate, sample, score, value
from mrjax.runs.value_model import resolve_value_model
from mrjax.sharding.mesh import make_mesh

DATA = 'arithmetic:test?size=3&steps=1'
PAIRS = (
  {'prompt': 'Tom has 3 apples.', 'completion': ' So he eats 2 of them.\n#### 1'},
  {'prompt': 'Q', 'completion': ''},
  {'prompt': 'How many? ' * 9, 'completion': '#### 5', 'note': 7},
)


def make_value_model(folder: Path, **changes) -> str:
  """A value model of random weights, but for two steps of training."""
  rows = [
    {
      'problem_id': f'p{i}',
      'prompt_ids': [1, 9 + i],
      'response_ids': [40 + i, 50],
      'switch': 0,
      'reward': float(i % 2),
      'round': 1,
    }
    for i in range(8)
  ]
  write_jsonl(folder / 'records.jsonl', rows)
  fields = {
    'model': 'tiny-0.2m',
    'data': str(folder / 'records.jsonl'),
    'output_dir': str(folder / 'run'),
    'mesh': 'data:2,fsdp:2,tensor:2',
    'batch_size': 4,
    'num_steps': 2,
    'learning_rate': 1e-2,
    'max_length': 12,
    'id_eval_ratio': 0.0,
    'tensorboard': False,
  }
  value.run(value.Config(**(fields | changes)))
  return str(folder / 'run')


@pytest.fixture(scope='module')
def v_model(tmp_path_factory) -> str:
  return make_value_model(tmp_path_factory.mktemp('v'), num_atoms=5, v_max=2.0)


@pytest.fixture(scope='module')
def q_model(tmp_path_factory) -> str:
  return make_value_model(
    tmp_path_factory.mktemp('q'), classifier_type='Q', num_atoms=3
  )


def naive_values(model: str, ids: list[int], num_completion: int) -> list[float]:
  """The value after each of the last tokens, a forward pass each."""
  source = resolve_value_model(model)
  head, vocab_size = source.head, source.config.vocab_size
  params = source.load_params(make_mesh('data:1', jax.devices()[:1]), jnp.float32)
  decoder = Decoder(source.config, num_value_outputs=head.num_outputs(vocab_size))
  # One shape for all prefixes; a causal model does not see what comes later.
  whole = jnp.array([[*ids, *[0] * (-len(ids) % 64)]])
  outputs_TO = decoder.apply({'params': params}, whole)[0]
  found = []
  for t in range(len(ids) - num_completion, len(ids)):
    if head.classifier_type == 'V':
      outputs = outputs_TO[t]
    else:
      outputs = outputs_TO[t - 1].reshape(vocab_size, head.width)[ids[t]]
    found.append(float(expected_rewards(outputs, head)))
  return found


@pytest.mark.parametrize('kind', ['V', 'Q'])
def test_values_after_every_token_and_at_the_eos(kind, v_model, q_model, tmp_path):
  model = v_model if kind == 'V' else q_model
  write_jsonl(tmp_path / 'in.jsonl', PAIRS)
  config = score.Config(
    value_model=model,
    values=True,
    input=str(tmp_path / 'in.jsonl'),
    output=str(tmp_path / 'out.jsonl'),
    mesh='data:2,fsdp:2,tensor:2',
  )
  summary = score.run(config)
  rows = list(read_jsonl(config.output))
  tokenizer = load_tokenizer(resolve_value_model(model).hf_dir)
  expected = []
  for pair, row in zip(PAIRS, rows, strict=True):
    ids, mask = tokenizer.encode_pair(pair['prompt'], pair['completion'])
    assert row['token_ids'] == ids[-sum(mask) :] and ids[-1] == tokenizer.eos_id
    expected.append(naive_values(model, ids, sum(mask)))
    assert row['values'] == pytest.approx(expected[-1], abs=1e-5)
    assert row['value'] == row['values'][-1]
    assert set(row) == {*pair, 'token_ids', 'value', 'values'}
  assert len({round(v, 3) for values in expected for v in values}) > 5  # they differ
  last = [values[-1] for values in expected]
  assert summary['mean_value'] == pytest.approx(sum(last) / 3, abs=1e-5)
  assert summary['num_records'] == 3
  assert summary['num_tokens'] == sum(map(len, expected))


@pytest.fixture(scope='module')
def samples(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('samples') / 'run'
  config = sample.Config(
    model='tiny-0.2m',
    data=DATA,
    prompt_template='qa',
    output_dir=str(folder),
    num_samples=2,
    max_new_tokens=9,
    stop=('zzz',),
  )
  sample.run(config)
  return folder


def score_samples(v_model, folder: Path, output: Path, **changes) -> score.Config:
  fields = {'value_model': v_model, 'input': str(folder), 'output': str(output)}
  return score.Config(**(fields | changes))


def test_the_prompts_of_samples_are_made_again(v_model, samples, tmp_path):
  config = score_samples(v_model, samples, tmp_path / 'out.jsonl')
  assert score.run(config)['num_records'] == 6
  tokenizer = load_tokenizer(resolve_value_model(v_model).hf_dir)
  prompts = {}
  for problem in load_problems(DATA):
    prompt = render_prompt('qa', problem, tokenizer=tokenizer)
    prompts[problem.id] = tokenizer.encode_prompt(prompt.text, add_bos=prompt.add_bos)
  before = list(read_jsonl(samples / 'samples-00000-of-00001.jsonl'))
  after = list(read_jsonl(config.output))
  for old, new in zip(before, after, strict=True):
    ids = prompts[old['problem_id']] + old['token_ids']
    (*_, last) = naive_values(v_model, ids, old['num_tokens'])
    assert new == old | {'value': pytest.approx(last, abs=1e-5)}

  # The same from records that carry their prompts, wherever they lie; and a completion
  # without tokens has no value.
  carried = [old | {'prompt_ids': prompts[old['problem_id']]} for old in before]
  carried.append(carried[0] | {'token_ids': []})
  write_jsonl(tmp_path / 'carried.jsonl', carried)
  again = score_samples(v_model, tmp_path / 'carried.jsonl', tmp_path / 'again.jsonl')
  summary = score.run(again)
  *rows, empty = read_jsonl(again.output)
  assert [row['value'] for row in rows] == [row['value'] for row in after]
  assert empty['value'] is None
  mean = sum(row['value'] for row in rows) / 6
  assert summary['mean_value'] == pytest.approx(mean, abs=1e-6)


def test_samples_get_log_probabilities_too(samples, tmp_path):
  """Those of the model they were drawn from: the ones it drew them with."""
  config = score.Config(
    model='tiny-0.2m', input=str(samples), output=str(tmp_path / 'out.jsonl')
  )
  score.run(config)
  before = list(read_jsonl(samples / 'samples-00000-of-00001.jsonl'))
  for old, new in zip(before, read_jsonl(config.output), strict=True):
    assert new['logprob_sum'] == pytest.approx(old['logprob_sum'], abs=1e-3)
    assert new['token_ids'] == old['token_ids'] and new['text'] == old['text']


def move(samples: Path, folder: Path, **changes) -> Path:
  """The samples in another place, with other settings beside them."""
  name = 'samples-00000-of-00001.jsonl'
  folder.mkdir()
  (folder / name).write_bytes((samples / name).read_bytes())
  saved = json.loads((samples / 'config.json').read_text())
  saved['config'] |= changes
  (folder / 'config.json').write_text(json.dumps(saved))
  return folder


def test_what_cannot_be_scored_is_named(v_model, samples, shared, tmp_path):
  cases = {
    'stories': (
      {'model': str(shared / 'models' / 'stories260K')},
      r'the model .*run has another tokenizer: id \d+ is',
    ),
    'gone': ({'model': str(tmp_path / 'gone')}, r'cannot be made again.*gone'),
    'fewer': (
      {'data': 'arithmetic:test?size=1&steps=1'},
      r"jsonl:\d: problem_id '.*' is none of the problems",
    ),
    'nothing': ({'data': ''}, r'are not known: they follow from config\.json'),
  }
  for name, (changes, message) in cases.items():
    folder = move(samples, tmp_path / name, **changes)
    with pytest.raises(ValueError, match=message):
      score.run(score_samples(v_model, folder, tmp_path / 'out.jsonl'))
  (folder / 'config.json').unlink()
  with pytest.raises(ValueError, match='give records that carry prompt_ids'):
    score.run(score_samples(v_model, folder, tmp_path / 'out.jsonl'))
  assert not (tmp_path / 'out.jsonl').exists()


def test_an_evaluation_with_a_value_model(v_model, shared, tmp_path):
  config = evaluate.Config(
    model='tiny-0.2m',
    data=DATA,
    prompt_template='qa',
    output_dir=str(tmp_path / 'run'),
    num_samples=4,
    temperature=0.7,
    max_new_tokens=48,
    value_model=v_model,
  )
  summary = evaluate.run(config)
  valued = score_samples(v_model, tmp_path / 'run' / 'samples', tmp_path / 'out.jsonl')
  score.run(valued)
  rows = {(r['problem_id'], r['sample_index']): r for r in read_jsonl(valued.output)}
  graded = list(read_jsonl(tmp_path / 'run' / 'graded.jsonl'))
  assert len(graded) == len(rows) == 12
  best: dict = {}
  for row in graded:
    value_ = rows[row['problem_id'], row['sample_index']]['value']
    assert row['value'] == pytest.approx(value_, abs=1e-6)
    if row['extracted'] is not None:
      best.setdefault(row['problem_id'], []).append((row['value'], row['correct']))
  wins = sum(max(found)[1] for found in best.values())
  assert summary['best_of@4']['value'] == pytest.approx(wins / 3)
  assert {'best_of@2', 'weighted_maj@2', 'maj@4'} < set(summary)
  # The graded samples lie in the directory of a run too.
  again = score_samples(
    v_model, tmp_path / 'run' / 'graded.jsonl', tmp_path / 'again.jsonl'
  )
  score.run(again)
  for old, new in zip(graded, read_jsonl(again.output), strict=True):
    assert new['value'] == pytest.approx(old['value'], abs=1e-6)

  stories = str(shared / 'models' / 'stories260K')
  other = dataclasses.replace(config, model=stories, output_dir=str(tmp_path / 'other'))
  with pytest.raises(ValueError, match=r'--value_model=.* has another tokenizer'):
    evaluate.run(other)
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'token_ids': [3]}, 'are not known'),
    ({'token_ids': [3], 'prompt_ids': []}, 'first token has nothing before it'),
    ({'token_ids': [3, 600], 'prompt_ids': [1]}, r"'token_ids' is \[3, 600\], want a"),
    ({'token_ids': [3, True], 'prompt_ids': [1]}, "'token_ids' is"),
    ({'token_ids': [3], 'prompt_ids': 'a'}, "'prompt_ids' is 'a', want a list"),
    ({'token_ids': [3] * 5000, 'prompt_ids': [1]}, '5001 tokens, but'),
    ({'text': 'a'}, r'missing field.*prompt.*or the token_ids of a sample'),
  ],
)
def test_a_bad_record_is_named(v_model, tmp_path, record, message):
  write_jsonl(tmp_path / 'in.jsonl', [dict(PAIRS[0]), record])
  config = score_samples(v_model, tmp_path / 'in.jsonl', tmp_path / 'out.jsonl')
  with pytest.raises(ValueError, match=message) as error:
    score.run(config)
  assert isinstance(error.value, DataError) == ('not known' not in message)
  assert not (tmp_path / 'out.jsonl').exists()


def test_numbers_that_are_not_finite_are_an_error(v_model, tmp_path, monkeypatch):
  values = lambda self, texts: [np.full(len(text), np.nan) for text in texts]
  monkeypatch.setattr(score.ValueScorer, 'values', values)
  write_jsonl(tmp_path / 'in.jsonl', PAIRS)
  config = score_samples(v_model, tmp_path / 'in.jsonl', tmp_path / 'out.jsonl')
  with pytest.raises(ValueError, match=r'run gives numbers that are not finite'):
    score.run(config)
  assert not (tmp_path / 'out.jsonl').exists()


def test_prompts_that_were_cut_are_cut_again(v_model, samples, tmp_path):
  from mrjax.runs.sampled_prompts import load_sampled_prompts

  whole = load_sampled_prompts(samples).ids
  config = resolve_value_model(v_model).config
  room = config.max_positions - 5
  folder = move(samples, tmp_path / 'cut', max_new_tokens=room, truncate_prompts=True)
  cut = load_sampled_prompts(folder).ids
  assert cut == {name: ids[-5:] for name, ids in whole.items()}
  assert all(len(ids) > 5 for ids in whole.values())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model': 'm'}, 'either --model, for'),
    ({'value_model': ''}, 'either --model, for'),
    ({'adapter': 'a'}, '--adapter goes on --model'),
    ({'value_model': '', 'model': 'm', 'values': True}, '--values wants'),
  ],
)
def test_flags_that_contradict(changes, message):
  config = score.Config(value_model='v', input='i', output='o')
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(config, **changes)
