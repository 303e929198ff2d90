"""LEMA's training data: CoT records, correction records, and how they are mixed.

An et al. 2023, arXiv 2310.20689, sections 3 and 4. A mix is a concatenation; the
trainer shuffles. Records are SFT records with `problem_id`, `sample_index` (-1 for a
human solution) and `kind`: 'cot', 'correction' or 'corrected' (the corrected solution
cut out of a pair and told as CoT).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mrjax.data.prompts import render_completion, render_prompt
from mrjax.grading.rules import GoldError
from mrjax.methods.lema import (
  Counts,
  is_answered,
  is_right,
  lottery,
  split_steps,
  strip_annotations,
)
from mrjax.methods.lema_corrections import check_task
from mrjax.methods.lema_pairs import Pair
from mrjax.methods.lema_prompts import correction_completion, correction_prompt
from mrjax.records import Problem, Record

MODES = ('lema', 'cot-only', 'cot-plus-corrected', 'matched-size', 'matched-tokens')

_HUMAN = -1  # the sample index of a reference solution


@dataclasses.dataclass(frozen=True)
class CotStyle:
  """How a solution is written as CoT.

  The defaults are upstream's for GSM8K, where `<<...>>` go and line ends become spaces.
  """

  keep_annotations: bool = False
  one_line: bool = True

  def write(self, steps: Sequence[str]) -> str:
    """Returns the steps as one text, without numbers."""
    text = (' ' if self.one_line else '\n').join(steps)
    text = ' '.join(text.split()) if self.one_line else text
    return text if self.keep_annotations else strip_annotations(text)


UPSTREAM = CotStyle()


def cot_records(
  problems: Iterable[Problem],
  samples: Iterable[Record] = (),
  *,
  task: str,
  style: CotStyle = UPSTREAM,
  include_human: bool = True,
  distinct: bool = True,
) -> tuple[list[Record], Counts]:
  """Returns the CoT data: human solutions first, then right samples, and counts.

  The prompt is the layout 'lema'; every completion ends `The answer is X.`.

  Args:
    problems: Those of the samples.
    samples: Sample records; each is judged here by the task's rule.
    task: 'gsm8k', 'math' or 'csqa'.
    style: How solutions are written.
    include_human: Take the reference solutions; problems without one are counted (CSQA
      has none at all).
    distinct: Drop a text that the problem has already. The paper does not say.

  Returns:
    The records and counts: `problems` is the sum of `human`, `without_solution` and
    `wrong_reference` (a reference that its own rule calls wrong, or cannot use);
    `samples` of `sampled`, `wrong`, `unanswered`, `unusable_reference`, `duplicate`.

  Raises:
    ValueError: An unknown task, or a sample without text or of no problem.
  """
  check_task(task)
  by_id = {problem.id: problem for problem in problems}
  counts = Counter(dict.fromkeys(_COT_COUNTS, 0))
  records: list[Record] = []
  seen = set()

  def add(problem: Problem, text: str, sample: Record) -> str:
    """Adds a record and returns what it is counted under."""
    human = sample['sample_index'] == _HUMAN
    answer = problem.answer if human else sample.get('extracted')
    steps = split_steps(text, answer=None if answer is None else str(answer))
    if not is_answered(steps):
      return 'unanswered'
    try:
      if not is_right(problem, task, steps):
        return 'wrong'
    except GoldError:
      return 'unusable_reference'
    solution = style.write(steps)
    if distinct and (problem.id, solution) in seen:
      return 'duplicate'
    seen.add((problem.id, solution))
    records.append(_cot(problem, solution, 'cot', sample))
    return 'human' if human else 'sampled'

  if include_human:
    for problem in by_id.values():
      counts['problems'] += 1
      if problem.solution is None:
        counts['without_solution'] += 1
        continue
      fate = add(problem, problem.solution, {'sample_index': _HUMAN})
      counts['human' if fate == 'human' else 'wrong_reference'] += 1
  for sample in samples:
    counts['samples'] += 1
    key, text = sample.get('problem_id'), sample.get('text')
    if not isinstance(key, str) or key not in by_id or not isinstance(text, str):
      raise ValueError(
        f'sample of problem {key!r:.80} with text {text!r:.40}; want the text of a '
        'sample of one of the problems given'
      )
    place = {'sample_index': 0} | {
      name: sample[name]
      for name in ('sample_index', 'sample_set', 'extracted')
      if name in sample
    }
    counts[add(by_id[key], text, place)] += 1
  return records, dict(counts)


_COT_COUNTS = (
  'problems',
  'human',
  'without_solution',
  'wrong_reference',
  'samples',
  'sampled',
  'wrong',
  'unanswered',
  'unusable_reference',
  'duplicate',
)


def correction_records(
  pairs: Iterable[Pair], *, ablate: str | None = None
) -> list[Record]:
  """Returns the correction records of pairs; see `lema_prompts` for `ablate`."""
  return [
    {
      'prompt': correction_prompt(pair.path, ablate=ablate),
      'completion': correction_completion(pair.correction, ablate=ablate),
    }
    | _place(pair.path.problem, 'correction', _origin(pair))
    for pair in pairs
  ]


def corrected_records(
  pairs: Iterable[Pair], *, style: CotStyle = UPSTREAM
) -> list[Record]:
  """Returns the corrected solutions of pairs, from their first step, as CoT records."""
  return [
    _cot(
      pair.path.problem,
      style.write(pair.corrected_steps),
      'corrected',
      _origin(pair),
    )
    for pair in pairs
  ]


def build_mix(
  cot: Sequence[Record],
  pairs: Sequence[Pair],
  *,
  mode: str = 'lema',
  ablate: str | None = None,
  style: CotStyle = UPSTREAM,
  extra_cot: Sequence[Record] = (),
  count_tokens: Callable[[Record], int] | None = None,
  target_tokens: int | None = None,
  seed: int = 0,
) -> tuple[list[Record], dict[str, Any]]:
  """Returns the records of a training set, and its counts by kind.

  Args:
    cot: CoT records.
    pairs: Of which the corrections are made.
    mode: 'lema': `cot` and the corrections. 'cot-only': `cot`. 'cot-plus-corrected':
      `cot` and the corrected solutions of the pairs as CoT (the paper's CoT-45K).
      'matched-size': the corrections and so many of `cot` that there are as many
      records as in `cot` (LEMA-32K). 'matched-tokens': CoT alone with as many tokens as
      'lema' has (CoT-5.8M): `cot`, then `extra_cot` until the next would be too much.
    ablate: Part of the corrections to leave out.
    style: How corrected solutions are written as CoT.
    extra_cot: More CoT records, used by 'matched-tokens' alone.
    count_tokens: Tokens of a record, for 'matched-tokens'. What the paper counts, whole
      texts or completions, it does not say.
    target_tokens: For 'matched-tokens', in place of the tokens of 'lema'; may be less
      than those of `cot`.
    seed: Draws the CoT records that 'matched-size' and 'matched-tokens' take.

  Returns:
    The records, and counts: `records`, `cot`, `correction` and `corrected`,
    `cot_left_out`; with a token counter also `tokens` and `target_tokens`.

  Raises:
    ValueError: An unknown mode or ablation; more corrections than CoT records for
      'matched-size'; no token counter, or too few CoT records, for 'matched-tokens'.
  """
  if mode not in MODES:
    raise ValueError(f'unknown mode {mode!r}; want one of {", ".join(MODES)}')
  corrections = correction_records(pairs, ablate=ablate)
  pool, chosen = list(cot), list(cot)
  others: list[Record] = []
  counts: dict[str, Any] = {}
  if mode == 'lema':
    others = corrections
  elif mode == 'cot-plus-corrected':
    others = corrected_records(pairs, style=style)
  elif mode == 'matched-size':
    others = corrections
    chosen = _draw(pool, len(cot) - len(corrections), seed)
  elif mode == 'matched-tokens':
    if count_tokens is None:
      raise ValueError('mode matched-tokens wants count_tokens, a counter of tokens')
    if target_tokens is None:
      target_tokens = sum(map(count_tokens, [*cot, *corrections]))
    pool += extra_cot
    chosen = _fill(cot, extra_cot, target_tokens, count_tokens, seed)
    counts['target_tokens'] = target_tokens
  records = [*chosen, *others]
  kinds = Counter(record.get('kind', 'cot') for record in records)
  counts |= {'records': len(records), 'cot_left_out': len(pool) - len(chosen)}
  counts |= {kind: kinds[kind] for kind in ('cot', 'correction', 'corrected')}
  if count_tokens is not None:
    counts['tokens'] = sum(map(count_tokens, records))
  return records, counts


def _draw(records: Sequence[Record], count: int, seed: int) -> list[Record]:
  """Returns `count` records drawn by the seed, in the order given."""
  if count < 0:
    raise ValueError(
      f'mode matched-size has {-count} more corrections than CoT records to replace; '
      'give fewer pairs or more CoT records'
    )
  drawn = set(_by_lot(records, seed)[:count])
  return [record for i, record in enumerate(records) if i in drawn]


def _fill(
  cot: Sequence[Record],
  extra_cot: Sequence[Record],
  target: int,
  count_tokens: Callable[[Record], int],
  seed: int,
) -> list[Record]:
  """Returns records of `cot`, then of `extra_cot`, up to the target, drawn by lot."""
  chosen: list[Record] = []
  total = 0
  for records in (cot, extra_cot):
    for place in _by_lot(records, seed):
      tokens = count_tokens(records[place])
      if total + tokens > target:
        return chosen
      chosen.append(records[place])
      total += tokens
  if total < target:
    raise ValueError(
      f'mode matched-tokens wants {target} tokens of CoT, but {len(chosen)} records '
      f'have {total}; sample more solutions for extra_cot, or set target_tokens'
    )
  return chosen


def _by_lot(records: Sequence[Record], seed: int) -> list[int]:
  """Returns the places of the records in the order of their lots."""

  def lot(place: int) -> bytes:
    record = records[place]
    names = ('kind', 'problem_id', 'sample_set', 'sample_index', 'prompt', 'completion')
    return lottery(seed, *[record.get(name) for name in names])

  return sorted(range(len(records)), key=lot)


def _origin(pair: Pair) -> Record:
  return {
    'sample_index': pair.path.sample_index,
    'sample_set': pair.path.sample_set,
  }


def _cot(problem: Problem, solution: str, kind: str, sample: Record) -> Record:
  solved = dataclasses.replace(problem, solution=solution)
  return {
    'prompt': render_prompt('lema', problem).text,
    'completion': render_completion('lema', solved),
  } | _place(problem, kind, sample)


def _place(problem: Problem, kind: str, sample: Record) -> Record:
  place = {'problem_id': problem.id, 'sample_index': sample['sample_index']}
  if sample.get('sample_set'):
    place['sample_set'] = sample['sample_set']
  return place | {'kind': kind}
