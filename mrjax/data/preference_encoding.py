"""Preference records to training texts: pairs, or completions with a judgement."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mrjax.data.preference import JudgedRecord, PreferenceRecord, Text
from mrjax.data.prompts import check_template, render_completion, render_prompt
from mrjax.data.sft import OVERLONG_POLICIES, Example
from mrjax.data.tokenization import Tokenizer
from mrjax.records import Problem

EQUAL_POLICIES = ('error', 'drop')


def encode_preferences(
  records: Sequence[PreferenceRecord],
  tokenizer: Tokenizer,
  *,
  template: str = 'raw',
  max_length: int,
  overlong: str = 'error',
  equal: str = 'error',
) -> list[tuple[Example, Example]]:
  """The records as pairs of texts, chosen and rejected; logs one line of counts.

  Args:
    records: At least one.
    tokenizer: Decides BOS and EOS.
    template: Prompt layout (see `prompts`) around texts that are strings; messages
      always go through the tokenizer's chat template.
    max_length: Longest text in tokens: prompt, completion and EOS.
    overlong: What happens to pairs with a longer text: 'error', 'truncate' (its end is
      cut, EOS included) or 'drop'.
    equal: What happens to pairs whose texts have the same tokens: 'error' or 'drop'.

  Raises:
    ValueError: No records, an overlong or equal pair, a text without a supervised
      token, or no pair left. Names the record.
  """
  _check(records, template, tokenizer, overlong)
  if equal not in EQUAL_POLICIES:
    raise ValueError(f'equal={equal!r}; want one of {EQUAL_POLICIES}')
  counts = {'truncated': 0, 'dropped': 0, 'equal': 0}
  pairs = []
  for record in records:
    try:
      texts = [
        _encode(record.where, record.prompt, side, record.options, template, tokenizer)
        for side in (record.chosen, record.rejected)
      ]
      if not (fitted := _fit(texts, max_length, overlong, counts)):
        continue
      chosen, rejected = fitted
      if np.array_equal(chosen.ids, rejected.ids):
        if equal == 'error':
          raise ValueError(
            'chosen and rejected are the same tokens, so there is nothing to prefer; '
            'mend the record, or give --equal_pairs=drop'
          )
        counts['equal'] += 1
        continue
    except ValueError as error:
      raise ValueError(f'{record.where}: {error}') from None
    pairs.append((chosen, rejected))
  if not pairs:
    raise ValueError(
      f'no pair is left of {len(records)}: {counts["dropped"]} are longer than '
      f'max_length={max_length}, {counts["equal"]} have equal sides'
    )
  logging.info(
    'Preference data: %d of %d pairs, %s; %d truncated and %d dropped at max_length=%d,'
    ' %d dropped because chosen equals rejected',
    len(pairs),
    len(records),
    _sizes([text for pair in pairs for text in pair]),
    counts['truncated'],
    counts['dropped'],
    max_length,
    counts['equal'],
  )
  return pairs


@dataclasses.dataclass(frozen=True)
class JudgedTexts:
  """What KTO trains on.

  Attributes:
    texts: Each prompt with its own completion.
    mismatched: The same prompts, each with the completion of the next record that has
      another prompt: on these KTO measures how far the policy has gone.
    desirable: bool, one for each text.
  """

  texts: list[Example]
  mismatched: list[Example]
  desirable: np.ndarray


def encode_judged(
  records: Sequence[JudgedRecord],
  tokenizer: Tokenizer,
  *,
  template: str = 'raw',
  max_length: int,
  overlong: str = 'error',
) -> JudgedTexts:
  """The records as texts; logs one line of counts. See `encode_preferences`.

  A mismatched text that is too long is always cut.

  Raises:
    ValueError: As `encode_preferences`; or all prompts are the same.
  """
  _check(records, template, tokenizer, overlong)
  counts = {'truncated': 0, 'dropped': 0}
  kept, texts = [], []

  def encode(record: JudgedRecord, completion: Text):
    return _encode(
      record.where, record.prompt, completion, record.options, template, tokenizer
    )

  for record in records:
    try:
      text = encode(record, record.completion)
      if fitted := _fit([text], max_length, overlong, counts):
        kept.append(record)
        texts += fitted
    except ValueError as error:
      raise ValueError(f'{record.where}: {error}') from None
  if not texts:
    raise ValueError(f'all {len(records)} records are longer than {max_length=}')
  mismatched: list[Example] = []
  for record, other in zip(kept, _next_of_another_prompt(kept)):
    text = encode(record, kept[other].completion)
    mismatched += _fit([text], max_length, 'truncate', {'truncated': 0})
  desirable = np.array([record.desirable for record in kept])
  if desirable.all() or not desirable.any():
    logging.warning(
      'All %d completions are %s. KTO learns from the two kinds side by side: give '
      'records of the other one too.',
      len(kept),
      'desirable' if desirable.all() else 'undesirable',
    )
  logging.info(
    'Preference data: %d of %d completions, %d desirable, %s; %d truncated and %d '
    'dropped at max_length=%d',
    len(texts),
    len(records),
    desirable.sum(),
    _sizes(texts),
    counts['truncated'],
    counts['dropped'],
    max_length,
  )
  return JudgedTexts(texts, mismatched, desirable)


def _check(records, template: str, tokenizer: Tokenizer, overlong: str) -> None:
  check_template(template, tokenizer)
  if overlong not in OVERLONG_POLICIES:
    raise ValueError(f'overlong={overlong!r}; want one of {OVERLONG_POLICIES}')
  if not records:
    raise ValueError('the preference data are empty')


def _encode(
  where: str,
  prompt: Any,  # both strings, or both messages
  completion: Any,
  options: tuple[str, ...],
  template: str,
  tokenizer: Tokenizer,
) -> Example:
  if isinstance(prompt, str):
    problem = Problem(where, prompt, solution=completion, options=options or None)
    rendered = render_prompt(template, problem, tokenizer=tokenizer)
    before, add_bos = rendered.text, rendered.add_bos
    after = render_completion(template, problem, tokenizer=tokenizer)
  else:
    if template not in ('raw', 'chat'):
      raise ValueError(
        'a record with messages goes through the chat template: give '
        f'--prompt_template=chat (or raw), not {template!r}'
      )
    before, add_bos = tokenizer.render_chat(prompt, add_generation_prompt=True), False
    whole = tokenizer.render_chat((*prompt, *completion))
    if not whole.startswith(before):
      raise ValueError(
        'the chat template renders the prompt differently once it is answered, so the '
        f'completion cannot be told apart; it asks {before[-60:]!r}'
      )
    # What follows the end of the turn (a newline) is never sampled.
    after = whole[len(before) :].rstrip('\n')
  ids, loss_mask = tokenizer.encode_pair(before, after, add_bos=add_bos)
  return Example(np.array(ids, np.int32), np.array(loss_mask, bool), where)


def _fit(
  texts: Sequence[Example], max_length: int, overlong: str, counts: dict[str, int]
) -> list[Example]:
  """The texts, cut where they must be; none of them where the record is dropped."""
  longest = max(len(text.ids) for text in texts)
  if longest > max_length:
    if overlong == 'error':
      raise ValueError(
        f'{longest} tokens, more than max_length={max_length}; raise --max_length, or '
        'give --overlong=truncate or --overlong=drop'
      )
    counts['truncated' if overlong == 'truncate' else 'dropped'] += 1
    if overlong == 'drop':
      return []
  fitted = []
  for text in texts:
    ids, loss_mask = text.ids[:max_length], text.loss_mask[:max_length]
    # The first token of a text is never predicted.
    if not loss_mask[1:].any():
      raise ValueError(
        f'no supervised token among {len(ids)}; the completion is empty or lies behind '
        f'max_length={max_length}: raise --max_length, or give --overlong=drop'
      )
    fitted.append(Example(ids, loss_mask, text.where))
  return fitted


def _next_of_another_prompt(records: Sequence[JudgedRecord]) -> list[int]:
  count = len(records)
  following = [-1] * count
  for i in range(2 * count - 1, -1, -1):  # twice round: the first follows the last
    here, after = i % count, (i + 1) % count
    same = records[here].prompt == records[after].prompt
    following[here] = following[after] if same else after
  if -1 in following:
    raise ValueError(
      f'all {count} records have the same prompt; KTO compares completions of '
      'different prompts'
    )
  return following


def _sizes(texts: Sequence[Example]) -> str:
  tokens = sum(len(text.ids) for text in texts)
  supervised = sum(int(text.loss_mask.sum()) for text in texts)
  longest = max(len(text.ids) for text in texts)
  return f'{tokens} tokens, {supervised} supervised, longest {longest}'
