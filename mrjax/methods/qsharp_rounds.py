"""Q#'s rounds of value records put together, and problems held out of training.

Zhou et al. 2025, arXiv 2502.20548: every round trains from scratch on the records of
all rounds so far.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mrjax.data.values import drop_no_variation, parse_value
from mrjax.records import Record


def combine_rounds(
  records: Iterable[tuple[str, Record]],
  problem_ids: Sequence[str],
  *,
  drop_constant: bool = False,
  allow_missing: bool = False,
) -> tuple[list[Record], dict[str, Any]]:
  """Returns the value records of all rounds by problem, round and sample; and counts.

  Args:
    records: (where it stands, record) of any rounds and parts of rounds, in any order.
    problem_ids: All that were asked, in the order wanted.
    drop_constant: Leave out problems whose rewards are equal over all rounds. For
      training data; the original does not do it to evaluation data.
    allow_missing: Whether a problem may be without records.

  Returns:
    The records, and `num_records`, `num_problems` (with records left), `by_round`
    (records before dropping), `mean_reward_by_round`, `num_missing`,
    `num_constant_problems` and `num_constant_records` (dropped).

  Raises:
    ValueError: A bad record, one of a problem not asked, a sample twice in a round, a
      problem without records, or nothing left. Names the record.
  """
  order = {key: place for place, key in enumerate(problem_ids)}
  if len(order) < len(problem_ids):
    raise ValueError(f'{len(problem_ids)} problem ids are not all different')
  places: dict[tuple[int, int, int], tuple[str, Record]] = {}
  for where, record in records:
    try:
      value = parse_value(record, where=where)
    except KeyError as error:
      raise ValueError(f'{where}: missing field {error}') from None
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
    index = record.get('sample_index')
    if type(index) is not int:
      raise ValueError(
        f"{where}: field 'sample_index' is {index!r:.40}, want an integer: it tells "
        'samples of a problem apart'
      )
    if value.problem_id not in order:
      raise ValueError(
        f'{where}: problem {value.problem_id!r} is not among the {len(order)} asked; '
        'give the problems that were sampled'
      )
    key = (order[value.problem_id], value.round, index)
    if key in places:
      raise ValueError(
        f'{where}: sample {index} of problem {value.problem_id!r} in round '
        f'{value.round} is already at {places[key][0]}; give a file once, and every '
        'round its own number'
      )
    places[key] = where, record
  missing = sorted(set(order.values()) - {place for place, _, _ in places})
  if missing and not allow_missing:
    names = ', '.join(repr(problem_ids[place]) for place in missing[:5])
    raise ValueError(
      f'{len(missing)} of {len(order)} problems have no value record: {names}'
      f'{", ..." if len(missing) > 5 else ""}; collect them too, or allow missing ones'
    )
  if not places:
    raise ValueError('there is no value record to combine')
  combined = [places[key] for key in sorted(places)]
  kept = combined
  if drop_constant:
    values = [parse_value(r, where=str(i)) for i, (_, r) in enumerate(combined)]
    kept = [combined[int(value.where)] for value in drop_no_variation(values)]
  by_round = Counter(record['round'] for _, record in combined)
  totals = {
    number: math.fsum(r['reward'] for _, r in combined if r['round'] == number)
    for number in by_round
  }
  asked, left = (
    {record['problem_id'] for _, record in rows} for rows in (combined, kept)
  )
  return [record for _, record in kept], {
    'num_records': len(kept),
    'num_problems': len(left),
    'by_round': {str(number): by_round[number] for number in sorted(by_round)},
    'mean_reward_by_round': {
      str(number): totals[number] / by_round[number] for number in sorted(by_round)
    },
    'num_missing': len(missing),
    'num_constant_problems': len(asked - left),
    'num_constant_records': len(combined) - len(kept),
  }


def split_problems(
  problem_ids: Sequence[str], *, ratio: float, seed: int
) -> tuple[list[str], list[str]]:
  """Returns the problems to train on, and a share of `ratio` held out, in their order.

  Held out are those with the lowest number that seed and id decide, so no order
  matters; ratio 0.1 holds out 747 of GSM8K's 7,473 and 750 of MATH's 7,500, as many
  as the original does (whose own draw is not known).

  Raises:
    ValueError: A ratio outside [0, 1), an id twice, or nothing to train on.
  """
  if not 0 <= ratio < 1:
    raise ValueError(f'ratio={ratio}; want 0 <= ratio < 1')
  if len(set(problem_ids)) < len(problem_ids):
    raise ValueError(f'{len(problem_ids)} problem ids are not all different')
  ranked = sorted(
    problem_ids, key=lambda key: (random.Random(f'{seed}/{key}/eval').random(), key)
  )
  held_out = set(ranked[: round(ratio * len(problem_ids))])
  if len(held_out) == len(problem_ids):
    raise ValueError(
      f'ratio={ratio} of {len(problem_ids)} problems leaves none to train on; take a '
      'lower one, or more problems'
    )
  return (
    [key for key in problem_ids if key not in held_out],
    [key for key in problem_ids if key in held_out],
  )
