"""Value records: responses as token ids, each with its reward, to training texts.

A response begins with a prefix that a guided policy wrote; the reference policy wrote
the rest. `switch` is the place of the prefix's last token: from there on tokens bear
the reward of the whole response as their label.
"""

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from mrjax.data.order import epoch_permutation
from mrjax.data.sft import OVERLONG_POLICIES, Example
from mrjax.records import DataError, Record, expand_inputs, read_numbered

_FIELDS = ('problem_id', 'prompt_ids', 'response_ids', 'switch', 'reward', 'round')


@dataclasses.dataclass(frozen=True)
class ValueRecord:
  """One response.

  Attributes:
    problem_id: The problem that was asked.
    prompt_ids: Token ids of the prompt, BOS included; at least one.
    response_ids: Token ids of the response, EOS included where there is one.
    switch: Index in the response of the first supervised token.
    reward: Of the whole response.
    round: Round of data collection.
    where: Names the record in errors.
  """

  problem_id: str
  prompt_ids: tuple[int, ...]
  response_ids: tuple[int, ...]
  switch: int
  reward: float
  round: int
  where: str


@dataclasses.dataclass(frozen=True)
class Labels:
  """How rewards become labels: (reward - shift) * scale, and its exponential if asked.

  Attributes:
    shift_reward: Taken from every reward.
    scale_reward: Factor after the shift.
    eta: Labels are exp(eta * shifted and scaled reward) where it is not None: what a
      head of inference mode `expectation` learns.
    low: Lowest label there may be.
    high: Highest label there may be.
  """

  shift_reward: float = 0.0
  scale_reward: float = 1.0
  eta: float | None = None
  low: float = 0.0
  high: float = 1.0

  def label(self, record: ValueRecord) -> float:
    """The label of a record.

    Raises:
      ValueError: It is not in [low, high]; names the record.
    """
    label = (record.reward - self.shift_reward) * self.scale_reward
    if self.eta is not None:
      try:
        label = math.exp(self.eta * label)
      except OverflowError:
        label = math.inf
    if not self.low <= label <= self.high:
      raise ValueError(
        f'{record.where}: reward {record.reward} gives the label {label:.6g}, which is '
        f'not in [{self.low:g}, {self.high:g}]; choose --shift_reward, --scale_reward '
        'or the range of the atoms so that every label is'
      )
    return label


def load_values(data: str) -> list[ValueRecord]:
  """The records of files, directories or globs of JSON Lines, separated by commas.

  Raises:
    DataError: A field is missing or wrong; names the file and line.
  """
  records = []
  for spec in data.split(','):
    for path in expand_inputs(spec.removeprefix('jsonl:')):
      for line, record in read_numbered(path, required=_FIELDS):
        try:
          records.append(parse_value(record, where=f'{path}:{line}'))
        except ValueError as error:
          raise DataError(path, line, str(error)) from None
  return records


def parse_value(record: Record, *, where: str) -> ValueRecord:
  """The record in checked form.

  Raises:
    ValueError: A field of the wrong type, an empty prompt or response, or a switch that
      is not in the response.
  """
  problem_id, reward = record['problem_id'], record['reward']
  if not isinstance(problem_id, str) or not problem_id:
    raise ValueError(f"field 'problem_id' is {problem_id!r:.40}, want a string")
  prompt_ids, response_ids = (
    _ids(record[name], name) for name in ('prompt_ids', 'response_ids')
  )
  switch, number = (_integer(record[name], name) for name in ('switch', 'round'))
  if switch >= len(response_ids):
    raise ValueError(
      f"field 'switch' is {switch}, but the response has {len(response_ids)} tokens"
    )
  if not isinstance(reward, int | float) or not math.isfinite(reward):
    raise ValueError(f"field 'reward' is {reward!r:.40}, want a finite number")
  return ValueRecord(
    problem_id, prompt_ids, response_ids, switch, float(reward), number, where
  )


def drop_no_variation(records: Sequence[ValueRecord]) -> list[ValueRecord]:
  """The records of problems that have different rewards; logs what was dropped.

  Raises:
    ValueError: There are none.
  """
  rewards = defaultdict(set)
  for record in records:
    rewards[record.problem_id].add(record.reward)
  kept = [record for record in records if len(rewards[record.problem_id]) > 1]
  if not kept:
    raise ValueError(
      f'--drop_no_variation leaves none of {len(records)} value records: the rewards '
      f'of each of their {len(rewards)} problems are all equal. Leave it out, or '
      'collect more responses to a problem'
    )
  logging.info(
    'Value data: %d of %d records dropped, of %d of %d problems whose rewards are all '
    'equal',
    len(records) - len(kept),
    len(records),
    sum(len(found) == 1 for found in rewards.values()),
    len(rewards),
  )
  return kept


def split_id_eval(
  records: Sequence[ValueRecord], *, ratio: float, seed: int
) -> tuple[list[ValueRecord], list[ValueRecord]]:
  """Records to train on, and a random share of `ratio` to evaluate on ("id").

  Raises:
    ValueError: Nothing is left to train on.
  """
  order = epoch_permutation(seed, 0, len(records)) if records else np.array([], int)
  held_out = set(order[: round(ratio * len(records))].tolist())
  training = [record for i, record in enumerate(records) if i not in held_out]
  if not training:
    raise ValueError(
      f'no value record is left to train on, of {len(records)}: give more, or a lower '
      f'--id_eval_ratio than {ratio:g}'
    )
  return training, [records[i] for i in sorted(held_out)]


def check_disjoint(
  training: Sequence[ValueRecord], evaluation: Sequence[ValueRecord]
) -> None:
  """Raises ValueError where both hold records of one problem."""
  seen = {record.problem_id for record in training}
  for record in evaluation:
    if record.problem_id in seen:
      raise ValueError(
        f'{record.where}: problem {record.problem_id!r} is in --data and in '
        '--eval_data, which is for problems that are not trained on'
      )


def sample_records(
  records: Sequence[ValueRecord], *, max_size: int, seed: int
) -> list[ValueRecord]:
  """All records, or `max_size` of them chosen at random, in their order."""
  if len(records) <= max_size:
    return list(records)
  chosen = epoch_permutation(seed, 0, len(records))[:max_size]
  return [records[i] for i in sorted(chosen.tolist())]


def encode_values(
  records: Sequence[ValueRecord],
  labels: Labels,
  *,
  vocab_size: int,
  max_length: int,
  overlong: str = 'truncate',
  whole_rollout: bool = True,
) -> tuple[list[tuple[Example]], np.ndarray]:
  """The records as texts, and their labels float32 [texts, 1]; logs one line of counts.

  Args:
    records: At least one.
    labels: How rewards become labels.
    vocab_size: Of the model; no id is beyond it.
    max_length: Longest text in tokens.
    overlong: What happens to longer ones: 'error', 'drop', or 'truncate': the end is
      cut, and a text that loses all its supervised tokens is dropped.
    whole_rollout: Supervise all tokens from the switch on, rather than the first alone.

  Raises:
    ValueError: No records, an id beyond the vocabulary, a label out of range, a text
      too long, or none left. Names the record.
  """
  if overlong not in OVERLONG_POLICIES:
    raise ValueError(f'overlong={overlong!r}; want one of {OVERLONG_POLICIES}')
  if not records:
    raise ValueError('the value data are empty')
  texts, found = [], []
  truncated = 0
  for record in records:
    ids = np.array(record.prompt_ids + record.response_ids, np.int64)
    if ids.max() >= vocab_size:
      raise ValueError(
        f'{record.where}: token {ids.max()}, but the model has {vocab_size} '
        'embeddings; the records were made with another tokenizer'
      )
    label = labels.label(record)
    first = len(record.prompt_ids) + record.switch
    if len(ids) > max_length:
      if overlong == 'error':
        raise ValueError(
          f'{record.where}: {len(ids)} tokens, more than max_length={max_length}; '
          'raise --max_length, or give --overlong=truncate or --overlong=drop'
        )
      if overlong == 'drop' or first >= max_length:
        continue
      truncated += 1
      ids = ids[:max_length]
    loss_mask = np.zeros(len(ids), bool)
    loss_mask[first : None if whole_rollout else first + 1] = True
    texts.append((Example(ids.astype(np.int32), loss_mask, record.where),))
    found.append(label)
  if not texts:
    raise ValueError(
      f'all {len(records)} value records are longer than max_length={max_length}'
    )
  logging.info(
    'Value data: %d of %d records, %d tokens, %d supervised, mean label %.4f; %d '
    'truncated and %d dropped at max_length=%d',
    len(texts),
    len(records),
    sum(len(text.ids) for (text,) in texts),
    sum(int(text.loss_mask.sum()) for (text,) in texts),
    np.mean(found),
    truncated,
    len(records) - len(texts),
    max_length,
  )
  return texts, np.array(found, np.float32)[:, None]


def _ids(value: Any, name: str) -> tuple[int, ...]:
  if not isinstance(value, list) or not value:
    raise ValueError(f'field {name!r} must be a list of token ids, not empty')
  return tuple(_integer(i, name) for i in value)


def _integer(value: Any, name: str) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < 0:
    raise ValueError(f'field {name!r} holds {value!r:.40}, want integers >= 0')
  return value
