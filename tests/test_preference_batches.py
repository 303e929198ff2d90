"""Batches for KTO: completions, and mismatched texts in rows of their own."""

import numpy as np
import pytest

from mrjax.data.batches import TextBatches
from mrjax.data.preference_batches import MISMATCHED, JudgedBatches
from mrjax.data.sft import Example


def text(length: int, token: int) -> Example:
  return Example(np.full(length, token, np.int32), np.arange(length) > 0)


TEXTS = [(text(3 + i, 1 + i),) for i in range(9)]
OTHERS = [(text(70 + i, 101 + i),) for i in range(9)]
GOOD = np.arange(9)[:, None] % 3 == 0


def make(packing=True, others=OTHERS) -> JudgedBatches:
  options = {
    'row_length': 90,
    'batch_size': 4,
    'grad_accumulation': 2,
    'packing': packing,
  }
  return JudgedBatches(
    TEXTS,
    mismatched=TextBatches(others, **options),
    labels={'desirable': GOOD},
    **options,
  )


def tokens_of(batch, prefix='') -> set[int]:
  return set(batch[prefix + 'tokens'].reshape(-1).tolist()) - {0}


def test_each_batch_has_both_kinds_of_texts():
  batches = make()
  batch = batches(5)
  own = TextBatches(
    TEXTS, row_length=90, batch_size=4, grad_accumulation=2, labels={'desirable': GOOD}
  )(5)
  assert batch.keys() == own.keys() | {
    MISMATCHED + name for name in own if name != 'desirable'
  }
  for name, x in own.items():
    np.testing.assert_array_equal(batch[name], x)
  assert tokens_of(batch, MISMATCHED) <= set(range(101, 110))
  assert len(tokens_of(batch, MISMATCHED)) == 4  # one fits into a row


def test_an_epoch_holds_every_completion_once():
  found = [tokens_of(batch) for batch in make(packing=False).one_epoch()]
  assert sorted(token for tokens in found for token in tokens) == list(range(1, 10))
  assert len(found) == 3


@pytest.mark.parametrize('packing', [True, False])
def test_both_kinds_have_rows_of_one_length(packing):
  for batch in (make(packing)(0), make(packing).largest(), *make(packing).one_epoch()):
    shapes = {x.shape for name, x in batch.items() if name != 'desirable'}
    assert shapes == {(2, 2, 90)}
    assert not batch['loss_mask'][batch['segments'] == 0].any()


def test_a_run_notices_other_mismatched_texts():
  assert make().fingerprint() == make().fingerprint()
  assert make().fingerprint() != make(others=OTHERS[::-1]).fingerprint()
