"""Sampling runs with a value model: what they write, go on with, and refuse."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.checkpoint.source import resolve_model
from mrjax.data.tokenization import load_tokenizer
from mrjax.data.tokenizer_training import train_bpe_tokenizer
from mrjax.models.decoder import Decoder
from mrjax.records import read_jsonl, write_jsonl
from mrjax.runs import sample, value
from mrjax.sharding.mesh import make_mesh


class Tree(NamedTuple):
  """A trained value model, and the two likeliest tokens after the prompt 'a'."""

  guide: str
  left: int
  right: int


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Tree:
  """Left pays 0.1 surely, right pays 1 in one of twenty; the others pay nothing."""
  root = tmp_path_factory.mktemp('guide')
  tokenizer = load_tokenizer(str(resolve_model('tiny-0.2m').hf_dir))
  prompt_ids = tokenizer.encode_prompt('a')
  source = resolve_model('tiny-0.2m')
  params = source.load_params(make_mesh('data:1', jax.devices()[:1]))
  logits_V = Decoder(source.config).apply({'params': params}, jnp.array([prompt_ids]))
  right, left = np.argsort(logits_V[0, -1])[-2:].tolist()
  rewards = {left: [0.1] * 40, right: [float(i % 20 == 3) for i in range(40)]}
  rewards |= {token: [0.0] for token in range(3, 512) if token not in rewards}
  write_jsonl(
    root / 'values.jsonl',
    (
      {
        'problem_id': f'{token}-{i}',
        'prompt_ids': prompt_ids,
        'response_ids': [token],
        'switch': 0,
        'reward': reward,
        'round': 1,
      }
      for token, of_token in rewards.items()
      for i, reward in enumerate(of_token)
    ),
  )
  value.run(
    value.Config(
      model='tiny-0.2m',
      data=str(root / 'values.jsonl'),
      output_dir=str(root / 'run'),
      mesh='data:8',
      batch_size=64,
      num_steps=150,
      learning_rate=1e-2,
      schedule='cosine',
      max_length=12,
      id_eval_ratio=0.0,
      tensorboard=False,
    )
  )
  return Tree(str(root / 'run'), left, right)


@pytest.fixture(scope='module')
def guide(tree) -> str:
  return tree.guide


def config(tmp_path, name='samples', **changes) -> sample.Config:
  data = tmp_path / 'problems.jsonl'
  if not data.exists():
    write_jsonl(data, [{'id': f'p{i}', 'question': 'ab' * (i + 1)} for i in range(5)])
  fields = {
    'model': 'tiny-0.2m',
    'data': f'jsonl:{data}',
    'output_dir': str(tmp_path / name),
    'mesh': 'data:2,fsdp:2,tensor:2',
    'num_samples': 3,
    'temperature': 1.2,
    'top_p': 0.9,
    'max_new_tokens': 7,
    'max_batch': 8,
    'logprobs': True,
  }
  return sample.Config(**(fields | changes))


def rows_of(config: sample.Config) -> dict:
  return {
    (row['problem_id'], row['sample_index']): row
    for path in sorted(map(str, Path(config.output_dir).glob('samples-*.jsonl')))
    for row in read_jsonl(path)
  }


def test_rows_carry_values_and_divergences(guide, tmp_path):
  guided = config(tmp_path, guide=guide, eta=30.0, guidance_top_k=9)
  summary = sample.run(guided)
  rows = rows_of(guided)
  assert len(rows) == summary['num_rows'] == 15
  for row in rows.values():
    assert len(row['values']) == len(row['kl']) == row['num_tokens']
    assert all(0 <= value <= 1 for value in row['values'])
    assert row['kl_sum'] == pytest.approx(sum(row['kl']))
  mean = np.mean([row['kl_sum'] for row in rows.values()])
  assert summary['mean_kl'] == pytest.approx(mean)
  # A run that was stopped goes on to the same rows.
  shard = next(Path(guided.output_dir).glob('samples-*.jsonl'))
  lines = shard.read_text().splitlines(keepends=True)
  shard.write_text(''.join(lines[:6]))
  again = sample.run(guided)
  assert again['num_new_rows'] == 9
  assert again['mean_kl'] == pytest.approx(mean)
  assert rows_of(guided) == rows


def test_eta_0_gives_the_rows_of_no_guide(guide, tmp_path):
  plain = config(tmp_path, 'plain')
  off = config(tmp_path, 'off', guide=guide)
  assert 'mean_kl' not in sample.run(plain)
  # The filters alone: -log of what they keep.
  assert sample.run(off)['mean_kl'] > 0
  expected = rows_of(plain)
  for name, row in rows_of(off).items():
    for field in ('kl', 'kl_sum', 'values'):
      row.pop(field)
    assert row == expected[name]


def test_the_tree_of_the_paper(tree, tmp_path):
  """Section 4.1: the branch that may pay 1 is better, though its mean is lower."""
  write_jsonl(tmp_path / 'problems.jsonl', [{'id': 'root', 'question': 'a'}])
  common = {
    'guide': tree.guide,
    'temperature': 0.0,
    'max_new_tokens': 1,
    'num_samples': 1,
  }
  taken = {}
  for name, changes in {
    'strong': {'eta': 10.0, 'guidance_top_k': 2},
    'weak': {'eta': 1e-3, 'guidance_top_k': 2},
  }.items():
    asked = config(tmp_path, name, **(common | changes))
    sample.run(asked)
    taken[name] = rows_of(asked)['root', 0]
  assert taken['strong']['token_ids'] == [tree.right]
  assert taken['strong']['values'] == [pytest.approx(0.05, abs=0.03)]
  assert taken['weak']['token_ids'] == [tree.left]
  assert taken['weak']['values'] == [pytest.approx(0.1, abs=0.03)]


def test_guides_that_do_not_fit_are_refused(guide, tmp_path):
  for changes, message in (
    ({'eta': 2.0}, '--eta=2.0 without a value model to guide by'),
    ({'guidance_mode': 'mle'}, '--guidance_mode=mle without a value model'),
    ({'cd_baseline': True}, '--cd_baseline=True without a value model'),
  ):
    with pytest.raises(ValueError, match=message):
      config(tmp_path, **changes)
  for changes, message in (
    ({'guide': 'tiny-0.2m'}, 'is no value model'),
    ({'guidance_mode': 'bernoulli'}, '--guidance_mode=bernoulli with a value model of'),
    ({'cd_baseline': True}, '--cd_baseline with --guidance_mode=mle'),
    ({'guidance_top_k': 0}, '--guidance_top_k=0: want at least 1'),
  ):
    with pytest.raises(ValueError, match=message):
      sample.run(config(tmp_path, **({'guide': guide, 'eta': 1.0} | changes)))
  other = tmp_path / 'tokenizer'
  train_bpe_tokenizer(['quite other words'], vocab_size=300, output_dir=other)
  asked = config(tmp_path, guide=guide, eta=1.0)
  with pytest.raises(ValueError, match='has another tokenizer: id'):
    sample.run(dataclasses.replace(asked, tokenizer=str(other)))
  assert not (tmp_path / 'samples').exists()
