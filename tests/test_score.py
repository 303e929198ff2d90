"""Scoring runs: log-probabilities of given completions as transformers has them."""

import dataclasses
from pathlib import Path

import pytest

from mrjax.data.tokenization import load_tokenizer
from mrjax.records import DataError, read_jsonl, write_jsonl
from mrjax.runs import score
from mrjax.runs.common import OutputError

RECORDS = (
  {'prompt': 'Once upon a time', 'completion': ', there was a cat.', 'note': 7},
  {'prompt': 'Tom', 'completion': ' ran.'},
  {'prompt': 'The dog was', 'completion': ' very very sad because it had no ball.'},
)


@pytest.fixture
def config(shared, tmp_path) -> score.Config:
  write_jsonl(tmp_path / 'in.jsonl', [dict(record) for record in RECORDS])
  return score.Config(
    model=str(shared / 'models' / 'stories260K'),
    input=str(tmp_path / 'in.jsonl'),
    output=str(tmp_path / 'out.jsonl'),
    mesh='data:2,fsdp:2,tensor:2',
  )


def test_scores_are_those_of_transformers(config):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM

  summary = score.run(config)
  rows = list(read_jsonl(config.output))
  tokenizer = load_tokenizer(config.model)
  model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
  assert [row['prompt'] for row in rows] == [record['prompt'] for record in RECORDS]
  assert rows[0]['note'] == 7  # other fields pass through
  for row in rows:
    ids, loss_mask = tokenizer.encode_pair(row['prompt'], row['completion'])
    with torch.no_grad():
      logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logps[t - 1, ids[t]].item() for t in range(len(ids)) if loss_mask[t]]
    assert row['token_ids'] == [i for i, keep in zip(ids, loss_mask) if keep]
    assert row['token_ids'][-1] == tokenizer.eos_id
    assert row['logprobs'] == pytest.approx(expected, abs=1e-4)
    assert row['logprob_sum'] == pytest.approx(sum(expected), abs=1e-3)
    assert row['num_tokens'] == len(expected)
  assert summary['num_records'] == 3
  assert summary['num_tokens'] == sum(row['num_tokens'] for row in rows)


def test_an_output_that_exists_is_refused(config):
  Path(config.output).write_text('{}\n')
  with pytest.raises(OutputError, match='exists'):
    score.run(config)
  assert Path(config.output).read_text() == '{}\n'


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'prompt': 'a'}, r'in\.jsonl:2: missing field.*completion'),
    ({'prompt': 'a', 'completion': 5}, r"in\.jsonl:2: field 'completion' is no string"),
    ({'prompt': 'a', 'completion': 'so ' * 600}, r'in\.jsonl:2: \d+ tokens, but'),
  ],
)
def test_a_bad_record_is_named_by_line_and_nothing_is_written(config, record, message):
  write_jsonl(config.input, [dict(RECORDS[0]), record])
  with pytest.raises(DataError, match=message):
    score.run(config)
  assert not Path(config.output).exists()


def test_a_file_without_records_is_refused(config):
  Path(config.input).write_text('')
  with pytest.raises(ValueError, match='no record'):
    score.run(config)


def test_bad_flags_are_refused_at_once(config):
  with pytest.raises(ValueError, match='--input is empty'):
    dataclasses.replace(config, input='')
  with pytest.raises(ValueError, match='--max_batch=0'):
    dataclasses.replace(config, max_batch=0)
