"""Q#: value records from guided beginnings that the reference policy finishes.

Zhou et al. 2025, arXiv 2502.20548, its data collection (Algorithm 1, after DAgger). Per
sample: the guided policy writes a text (the roll-in), which is cut at a random token;
the reference policy goes on from there (the roll-out), and the whole is labelled with
its reward. In round 1 there is no guide yet, and the reference policy rolls in too.

A run is: sample roll-ins; `cut_roll_ins`; sample one roll-out for each `Cut` that is
not at its end, from prompt and prefix, under the cut's problem id and sample index and
with `rollout_seed`; `complete`; grade the texts; `value_records`. Rounds are put
together by `qsharp_rounds`.

Not copied from the original code: repeats have sample indices rather than seeds of
their own (47 + 50 r); a batch that is cut at its end throughout is no failure; problems
without records are named rather than met as a KeyError in training.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mrjax.data.values import parse_value
from mrjax.grading.rule import Rule
from mrjax.records import Problem, Record

AT_END = ('keep', 'drop')

_Key = tuple[str, int]  # problem id and sample index


class Cut(NamedTuple):
  """A roll-in and its switch point.

  Attributes:
    problem_id: What was asked.
    sample_index: Of the roll-in, and of the roll-out to come.
    token_ids: The whole roll-in, EOS included.
    finish_reason: Of the roll-in.
    switch: Place of the prefix's last token.
  """

  problem_id: str
  sample_index: int
  token_ids: tuple[int, ...]
  finish_reason: str
  switch: int

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """What the roll-out goes on from, after the prompt; at least one token."""
    return self.token_ids[: self.switch + 1]

  @property
  def at_end(self) -> bool:
    """Whether the prefix is the whole roll-in, so that there is nothing to roll out."""
    return self.switch + 1 == len(self.token_ids)


class Response(NamedTuple):
  """A prefix and its roll-out, or a roll-in cut at its end, to be labelled."""

  problem_id: str
  sample_index: int
  token_ids: tuple[int, ...]
  finish_reason: str
  switch: int


def switch_point(num_tokens: int, uniform: float) -> int:
  """Returns floor(uniform * num_tokens): the place of the prefix's last token.

  Args:
    num_tokens: Of the roll-in, EOS included; at least 1.
    uniform: In [0, 1).

  Raises:
    ValueError: An argument out of its range.
  """
  if num_tokens < 1 or not 0 <= uniform < 1:
    raise ValueError(
      f'num_tokens={num_tokens}, uniform={uniform}; want at least 1, and 0 <= uniform '
      '< 1'
    )
  return math.floor(uniform * num_tokens)


def rollout_seed(seed: int) -> int:
  """Returns the seed for roll-outs of roll-ins that were drawn with `seed`.

  A sample depends on seed, problem, index and place. With the seed of its roll-in, a
  roll-out would meet the random numbers of its beginning again.
  """
  return random.Random(f'{seed}/roll-out').getrandbits(32)


def cut_roll_ins(
  samples: Iterable[Record], *, seed: int, at_end: str = 'keep'
) -> tuple[list[Cut], dict[str, int]]:
  """Returns the cuts by problem id and sample index, and counts.

  The place is drawn from the seed, the problem id and the sample index, so it depends
  on no order, and on the other samples not at all.

  Args:
    samples: Roll-ins, `problem_id`, `sample_index`, `token_ids` and `finish_reason`.
    seed: Of the draws.
    at_end: What to do where the cut is at the last token and nothing is left to roll
      out: 'keep' labels the last token alone with the reward of the roll-in itself, as
      the original does, be the text finished or cut at its length limit; 'drop' leaves
      the sample out, since the guided policy wrote all of it.

  Returns:
    The cuts, and `num_roll_ins`, `num_roll_in_errors` (rows without finite logits or
    without tokens, left out), `num_at_end`, `num_at_end_unfinished` (of those, texts
    that the length limit ended) and `num_at_end_dropped`.

  Raises:
    ValueError: No such `at_end`, or a sample comes twice.
  """
  if at_end not in AT_END:
    raise ValueError(f'unknown at_end {at_end!r}; one of {", ".join(AT_END)}')
  counts = dict.fromkeys(
    (
      'num_roll_ins',
      'num_roll_in_errors',
      'num_at_end',
      'num_at_end_unfinished',
      'num_at_end_dropped',
    ),
    0,
  )
  cuts: list[Cut] = []
  for (problem_id, index), sample in sorted(_by_key(samples, 'roll-in').items()):
    counts['num_roll_ins'] += 1
    ids, reason = tuple(sample['token_ids']), sample['finish_reason']
    if not ids or reason == 'error':
      counts['num_roll_in_errors'] += 1
      continue
    uniform = random.Random(f'{seed}/{problem_id}/{index}/switch').random()
    cut = Cut(problem_id, index, ids, reason, switch_point(len(ids), uniform))
    if cut.at_end:
      counts['num_at_end'] += 1
      counts['num_at_end_unfinished'] += reason == 'length'
      if at_end == 'drop':
        counts['num_at_end_dropped'] += 1
        continue
    cuts.append(cut)
  return cuts, counts


def complete(
  cuts: Iterable[Cut], roll_outs: Iterable[Record]
) -> tuple[list[Response], dict[str, int]]:
  """Returns prefixes with their roll-outs in the order of the cuts, and counts.

  A cut at its end is a response as it is.

  Args:
    cuts: With different problem ids and sample indices.
    roll_outs: Samples, one for each cut that is not at its end; as many new tokens were
      allowed as for a roll-in, however long the prefix.

  Returns:
    The responses, and `num_roll_outs`, `num_roll_out_errors` (left out) and
    `num_unfinished` (responses that the length limit ended).

  Raises:
    ValueError: A roll-out is missing, comes twice, or belongs to no cut.
  """
  found = _by_key(roll_outs, 'roll-out')
  counts = {'num_roll_outs': len(found), 'num_roll_out_errors': 0, 'num_unfinished': 0}
  responses: list[Response] = []
  for cut in cuts:
    ids, reason = cut.token_ids, cut.finish_reason
    if not cut.at_end:
      sample = found.pop((cut.problem_id, cut.sample_index), None)
      if sample is None:
        raise ValueError(
          f'there is no roll-out of sample {cut.sample_index} of problem '
          f'{cut.problem_id!r}; finish sampling the roll-outs'
        )
      if not sample['token_ids'] or sample['finish_reason'] == 'error':
        counts['num_roll_out_errors'] += 1
        continue
      ids, reason = (*cut.prefix_ids, *sample['token_ids']), sample['finish_reason']
    counts['num_unfinished'] += reason == 'length'
    responses.append(
      Response(cut.problem_id, cut.sample_index, ids, reason, cut.switch)
    )
  for problem_id, index in found:
    raise ValueError(
      f'the roll-out of sample {index} of problem {problem_id!r} belongs to no cut; '
      'give the roll-outs of these roll-ins and this seed'
    )
  return responses, counts


def reward_of(text: str, problem: Problem, rule: Rule) -> float:
  """Returns the label of a response from its decoded text: 1 if correct, else 0.

  Raises:
    ValueError: The problem has no answer.
  """
  if problem.answer is None:
    raise ValueError(
      f'problem {problem.id!r} has no answer to label responses by; give problems that '
      'have'
    )
  return float(rule.grade(text, problem.answer, problem.options)[1])


def value_records(
  responses: Sequence[Response],
  rewards: Sequence[float],
  *,
  prompts: Mapping[str, Sequence[int]],
  round: int,
) -> list[Record]:
  """Returns the value records of responses, with `sample_index` beside their fields.

  Args:
    responses: As `complete` gives them.
    rewards: One each.
    prompts: Token ids by problem, BOS included.
    round: Of collection, from 1.

  Raises:
    ValueError: Not one reward each, a bad round, a problem without a prompt, or a
      record that breaks its format.
  """
  if len(rewards) != len(responses):
    raise ValueError(f'{len(rewards)} rewards for {len(responses)} responses')
  if round < 1:
    raise ValueError(f'round={round}; rounds count from 1')
  records: list[Record] = []
  for response, reward in zip(responses, rewards, strict=True):
    if response.problem_id not in prompts:
      raise ValueError(
        f'there is no prompt of problem {response.problem_id!r}, only of '
        f'{len(prompts)} others; give those that were sampled from'
      )
    record: Record = {
      'problem_id': response.problem_id,
      'prompt_ids': list(prompts[response.problem_id]),
      'response_ids': list(response.token_ids),
      'switch': response.switch,
      'reward': reward,
      'round': round,
      'sample_index': response.sample_index,
    }
    try:
      parse_value(record, where='')
    except ValueError as error:
      raise ValueError(f'problem {response.problem_id!r}: {error}') from None
    records.append(record)
  return records


def _by_key(samples: Iterable[Record], what: str) -> dict[_Key, Record]:
  found: dict[_Key, Record] = {}
  for sample in samples:
    key = (sample['problem_id'], sample['sample_index'])
    if key in found:
      raise ValueError(
        f'{what} {key[1]} of problem {key[0]!r} comes twice; give the samples of one '
        'run, each once'
      )
    found[key] = sample
  return found
