"""Pairs of a right and a wrong path through a star graph, to learn values from.

Zhou et al. 2025, arXiv 2502.20548, its star-graph setting: the right path has the label
1, the first wrong one that the model samples the label 0. The same pairs serve the
paper's DPO and RPO baselines.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mrjax.data.values import parse_value
from mrjax.methods.star_graph import encode, is_correct
from mrjax.records import Problem, Record


class Pair(NamedTuple):
  """A problem, whose answer is the right path, and a wrong one that was sampled."""

  problem: Problem
  wrong: str
  sample_index: int


def find_pairs(
  problems: Sequence[Problem], samples: Iterable[Record], *, max_tries: int = 1000
) -> tuple[list[Pair], dict[str, int]]:
  """Returns the first wrong sample of every problem, and counts.

  Args:
    problems: In the order wanted.
    samples: `problem_id`, `sample_index` and `text`, in any order; drawn at T = 1.
    max_tries: Samples of a problem to look at, by index.

  Returns:
    The pairs, and `num_problems`, `num_pairs`, `num_without_samples`,
    `num_without_wrong` (all that was looked at is right; no pair) and `num_empty`
    (samples without text, passed over).

  Raises:
    ValueError: `max_tries` below 1, a sample of no problem here, or one twice.
  """
  if max_tries < 1:
    raise ValueError(f'max_tries={max_tries}; want at least 1')
  texts: dict[str, dict[int, str]] = {problem.id: {} for problem in problems}
  for sample in samples:
    key, index = sample['problem_id'], sample['sample_index']
    if key not in texts or index in texts[key]:
      raise ValueError(
        f'sample {index} of problem {key!r} '
        + ('comes twice' if key in texts else 'is of none of these problems')
        + '; give the samples of one run over these problems'
      )
    texts[key][index] = sample['text']
  pairs: list[Pair] = []
  counts = {'num_problems': len(problems), 'num_pairs': 0, 'num_without_samples': 0}
  counts |= {'num_without_wrong': 0, 'num_empty': 0}
  for problem in problems:
    found = texts[problem.id]
    looked = sorted(found)[:max_tries]
    counts['num_empty'] += sum(not found[i].strip() for i in looked)
    wrong = (i for i in looked if _is_wrong(problem, found[i]))
    first = next(wrong, None)
    if first is not None:
      pairs.append(Pair(problem, found[first].strip(), first))
    elif looked:
      counts['num_without_wrong'] += 1
    else:
      counts['num_without_samples'] += 1
  counts['num_pairs'] = len(pairs)
  return pairs, counts


def pair_values(
  pairs: Iterable[Pair], *, encode: Callable[[str], Sequence[int]] = encode
) -> list[Record]:
  """Returns two value records a pair: the right path with 1, the wrong one with 0.

  All tokens of both bear the label (`switch` 0). The loss over them is the mean of all
  tokens, which is that of records here since all paths of a shape are equally long.
  """
  records: list[Record] = []
  for problem, wrong, _ in pairs:
    for text, reward in ((_answer(problem), 1), (wrong, 0)):
      record: Record = {
        'problem_id': problem.id,
        'prompt_ids': list(encode(problem.question)),
        'response_ids': list(encode(text)),
        'switch': 0,
        'reward': reward,
        'round': 1,
      }
      parse_value(record, where='')
      records.append(record)
  return records


def pair_preferences(pairs: Iterable[Pair]) -> list[Record]:
  """Returns preference records for the paper's DPO and RPO baselines."""
  return [
    {
      'prompt': pair.problem.question,
      'chosen': _answer(pair.problem),
      'rejected': pair.wrong,
      'problem_id': pair.problem.id,
    }
    for pair in pairs
  ]


def _answer(problem: Problem) -> str:
  if problem.answer is None:
    raise ValueError(f'problem {problem.id!r} has no answer; want the path')
  return problem.answer


def _is_wrong(problem: Problem, text: str) -> bool:
  return bool(text.strip()) and not is_correct(problem, text)
