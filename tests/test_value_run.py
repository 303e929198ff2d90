"""Value runs: they recover known values, can be read again, and fail clearly."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.source import resolve_model
from mrjax.losses.value import ValueHead, expected_rewards
from mrjax.models.decoder import Decoder
from mrjax.records import write_jsonl
from mrjax.runs import value
from mrjax.runs.value_model import resolve_value_model
from mrjax.sharding.mesh import make_mesh

BOS, LEFT, RIGHT = 1, 40, 50


def rows(token, rewards, *, prompt=(BOS,), name='p'):
  return [
    {
      'problem_id': f'{name}{i}',
      'prompt_ids': list(prompt),
      'response_ids': [token],
      'switch': 0,
      'reward': reward,
      'round': 1,
    }
    for i, reward in enumerate(rewards)
  ]


@pytest.fixture
def make_config(tmp_path):
  """Left pays 0.1 surely, right pays 1 in one of twenty."""
  data = tmp_path / 'round1.jsonl'
  lucky = [1.0 if i % 20 == 3 else 0.0 for i in range(80)]
  write_jsonl(data, rows(LEFT, [0.1] * 80) + rows(RIGHT, lucky, name='q'))

  def make(name='run', **changes) -> value.Config:
    fields = {
      'model': 'tiny-0.2m',
      'data': str(data),
      'output_dir': str(tmp_path / name),
      'mesh': 'data:2,fsdp:2,tensor:2',
      'batch_size': 32,
      'num_steps': 60,
      'learning_rate': 1e-2,
      'schedule': 'cosine',
      'max_length': 12,
      'id_eval_ratio': 0.0,
      'log_every': 20,
      'tensorboard': False,
    }
    return value.Config(**(fields | changes))

  return make


def values_of(model: str, *texts):
  """Outputs at the last token of each text, by the model as it is read from disk."""
  source = resolve_value_model(model)
  params = source.load_params(make_mesh('data:1', jax.devices()[:1]), jnp.float32)
  decoder = Decoder(
    source.config,
    num_value_outputs=source.head.num_outputs(source.config.vocab_size),
  )
  return source.head, decoder.apply({'params': params}, jnp.array(texts))[:, -1]


def test_a_trained_model_knows_the_values_of_a_small_tree(make_config):
  """Sec. 4.1 of the paper: what maximises the mean and what maximises Q* differ."""
  config = make_config()
  summary = value.run(config)
  assert summary['steps'] == 60
  head, outputs = values_of(config.output_dir, (BOS, LEFT), (BOS, RIGHT))
  assert head == config.head == ValueHead('V', 'mle', 11, 0.0, 1.0)
  probabilities = np.asarray(jax.nn.softmax(outputs), np.float64)
  assert probabilities[0, 1] > 0.98  # the atom 0.1
  assert probabilities[1, 0] == pytest.approx(0.95, abs=0.02)
  assert probabilities[1, 10] == pytest.approx(0.05, abs=0.02)
  left, right = expected_rewards(outputs, head).tolist()
  assert left == pytest.approx(0.1, abs=0.02) and right == pytest.approx(0.05, abs=0.02)
  q_left, q_right = np.log(probabilities @ np.exp(10 * head.atoms())) / 10
  assert q_left == pytest.approx(0.1, abs=0.05)
  assert q_right == pytest.approx(0.700513, abs=0.05)


@pytest.fixture(scope='module')
def q_run(tmp_path_factory):
  """A Q head on prompts that decide which of two answers is the right one."""
  folder = tmp_path_factory.mktemp('q')

  def records(name, prompts):
    made = []
    for i, first in enumerate(prompts):
      prompt = (BOS, first, 60 + i % 7)
      right = LEFT if first == 30 else RIGHT
      for token in (LEFT, RIGHT):
        made += rows(token, [float(token == right)], prompt=prompt, name=f'{name}{i}')
    return made

  write_jsonl(folder / 'train.jsonl', records('a', [30, 31] * 20))
  write_jsonl(folder / 'other.jsonl', records('b', [31, 30] * 4))
  config = value.Config(
    model='tiny-0.2m',
    data=str(folder / 'train.jsonl'),
    eval_data=str(folder / 'other.jsonl'),
    output_dir=str(folder / 'run'),
    mesh='data:2,fsdp:2,tensor:2',
    classifier_type='Q',
    loss_type='bce',
    init_mode='zero',
    drop_no_variation=False,
    id_eval_ratio=0.2,
    batch_size=16,
    num_steps=25,
    eval_every=25,
    learning_rate=1e-2,
    max_length=16,
    log_every=1,
    tensorboard=False,
  )
  summary = value.run(config)
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  return config, summary, [json.loads(line) for line in lines]


def test_a_q_head_learns_and_is_evaluated_on_held_out_and_new_problems(q_run):
  config, summary, lines = q_run
  training = [line for line in lines if 'loss' in line]
  assert training[0]['loss'] == pytest.approx(math.log(2), abs=1e-5)  # a zero head
  assert training[0]['prediction'] == pytest.approx(0.5, abs=1e-5)
  assert 16 <= training[0]['texts'] <= 64  # packed: four texts a row
  (end,) = [line for line in lines if 'eval_loss' in line]
  for data in ('id', 'ood'):
    assert end[f'eval_{data}_accuracy'] > 0.9
    assert end[f'eval_{data}_auc'] > 0.95
    assert end[f'eval_{data}_r2'] > 0.5
    assert end[f'eval_{data}_explained_variance'] >= end[f'eval_{data}_r2'] - 1e-6
    assert 0 <= end[f'eval_{data}_prediction_min'] < end[f'eval_{data}_prediction_max']
  assert end['eval_loss'] == end['eval_id_loss']
  assert summary['best']['loss'] == pytest.approx(end['eval_loss'])
  head, outputs = values_of(config.output_dir, (BOS, 30, 60), (BOS, 31, 60))
  assert head.classifier_type == 'Q'
  predicted = jax.nn.sigmoid(outputs[:, [LEFT, RIGHT]])
  assert (predicted[0, 0] > 0.8) and (predicted[0, 1] < 0.2)
  assert (predicted[1, 0] < 0.2) and (predicted[1, 1] > 0.8)


def test_warmstart_goes_on_from_a_value_model(q_run, tmp_path):
  config, _, lines = q_run
  warm = dataclasses.replace(
    config,
    model=config.output_dir,
    output_dir=str(tmp_path / 'warm'),
    init_mode='warmstart',
    num_steps=1,
  )
  value.run(warm)
  first = json.loads((tmp_path / 'warm' / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['loss'] < 0.3 < lines[0]['loss']
  with pytest.raises(ValueError, match='another one: pass --loss_type=bce as it has'):
    value.run(
      dataclasses.replace(warm, loss_type='mse', output_dir=str(tmp_path / 'x'))
    )
  with pytest.raises(ValueError, match=r'tiny-0\.2m has no value head'):
    value.run(
      dataclasses.replace(warm, model='tiny-0.2m', output_dir=str(tmp_path / 'x'))
    )
  with pytest.raises(ValueError, match='reuse takes the rows of a language-model head'):
    value.run(
      dataclasses.replace(warm, init_mode='reuse', output_dir=str(tmp_path / 'x'))
    )
  assert not (tmp_path / 'x').exists()


def test_a_value_model_is_no_language_model_and_the_other_way_round(q_run):
  config, _, _ = q_run
  with pytest.raises(CheckpointError, match=r"'tiny-0\.2m' is no value model"):
    resolve_value_model('tiny-0.2m')
  mesh = make_mesh('data:1', jax.devices()[:1])
  with pytest.raises(CheckpointError, match='is a value model: it predicts rewards'):
    resolve_model(config.output_dir).load_params(mesh)
  head_file = Path(config.output_dir) / 'value_head.json'
  text = head_file.read_text()
  try:
    head_file.write_text(text.replace('"Q"', '"R"'))
    with pytest.raises(
      CheckpointError, match=r'value_head\.json is damaged: --classif'
    ):
      resolve_value_model(config.output_dir)
  finally:
    head_file.write_text(text)


def test_problems_to_test_on_must_be_new(make_config):
  config = make_config()
  with pytest.raises(ValueError, match=r"problem 'p0' is in --data and in --eval_data"):
    value.run(dataclasses.replace(config, eval_data=config.data))
  with pytest.raises(ValueError, match='--drop_no_variation leaves none of'):
    value.run(dataclasses.replace(config, drop_no_variation=True))
  with pytest.raises(
    ValueError, match=r'reward 0.1 gives the label -0.9, which is not'
  ):
    value.run(dataclasses.replace(config, shift_reward=1.0))
  assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'classifier_type': 'A'}, '--classifier_type=A'),
    ({'loss_type': 'bce', 'v_max': 2.0}, 'predicts a probability'),
    ({'init_mode': 'cold'}, '--init_mode=cold: want one of random'),
    ({'inference_mode': 'greedy'}, '--inference_mode=greedy'),
    ({'lora_rank': 4}, 'train all their weights'),
    ({'trainable': 'head'}, 'train all their weights'),
    ({'adapter': 'outputs/sft'}, 'train all their weights'),
    ({'id_eval_ratio': 1.0}, '--id_eval_ratio=1.0'),
    ({'eval_max_size': 0}, '--eval_max_size=0'),
    ({'eval_every': 5}, '--eval_every=5 needs'),
    ({'eta': 0.0}, '--eta=0.0: want a positive number'),
    ({'shift_reward': math.inf}, '--shift_reward=inf: want a finite number'),
    ({'scale_reward': 0.0}, '--scale_reward=0.0: want a finite number other than 0'),
    ({'scale_reward': math.nan}, '--scale_reward=nan'),
    ({'v_max': math.inf}, '--v_max=inf: want a finite number'),
    ({'id_eval_ratio': math.nan}, '--id_eval_ratio=nan'),
  ],
)
def test_contradictory_flags_are_refused_at_once(make_config, changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


def test_clipping_is_that_of_the_type_unless_it_is_given(make_config):
  assert make_config().clip_norm == 5.0
  assert make_config(classifier_type='Q').clip_norm == 0.0
  assert make_config(classifier_type='Q', clip_norm=2.0).clip_norm == 2.0
  assert make_config(clip_norm=0.0).clip_norm == 0.0


def test_what_cannot_run_is_refused_before_anything_is_written(make_config):
  config = make_config(attention_backend='splash')
  with pytest.raises(ValueError, match='splash'):
    value.run(config)
  assert not Path(config.output_dir).exists()


def test_labels_by_inference_mode(make_config):
  expectation = make_config(inference_mode='expectation', eta=2.0, shift_reward=1.0)
  assert (expectation.labels.eta, expectation.labels.shift_reward) == (2.0, 1.0)
  baseline = dataclasses.replace(expectation, cd_baseline=True)
  assert baseline.labels.eta is None
  assert make_config(v_min=-1.0).labels.low == -1.0
