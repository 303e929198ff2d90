"""The halves of weak-to-strong's training set (arXiv 2407.13647), by a file of indices.

The weak model learns from the solutions of `train_1`. Of `train_2` the strong model may
see only the questions; golds there serve nothing but statistics.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mrjax.records import Problem, Record

HALVES = ('train_1', 'train_2')


@dataclasses.dataclass(frozen=True)
class Split:
  """The halves of a training set, each in the order of the split file.

  `unknown` are the ids of problems that the split file does not know, `absent` the
  entries of it that are no problem here, by half, and `not_included` how many rows of a
  half the file counts without listing them (the augmented ones of the paper).
  """

  train_1: tuple[Problem, ...]
  train_2: tuple[Problem, ...]
  unknown: tuple[str, ...]
  absent: Mapping[str, tuple[int | str, ...]]
  not_included: Mapping[str, int]

  def summary(self) -> dict[str, Any]:
    """Returns the counts: of problems by half, unknown, absent and not included."""
    return {
      'num_problems': {half: len(getattr(self, half)) for half in HALVES},
      'num_unknown': len(self.unknown),
      'num_absent': {half: len(entries) for half, entries in self.absent.items()},
      'num_not_included': dict(self.not_included),
    }


def split_problems(problems: Sequence[Problem], index: Record) -> Split:
  """Returns the two halves that a split file makes of a training set.

  Args:
    problems: The whole training set in the order of its file.
    index: `train_1` and `train_2`, each a list of places in `problems` (from 0) or of
      problem ids, or an object with such a list as `gsm8k_train_indices`. Other fields
      are ignored.

  Raises:
    ValueError: A half is missing, malformed or without a single problem, or a problem
      is listed twice, which would leak solutions from one half into the other.
  """
  known: dict[int | str, Problem] = {problem.id: problem for problem in problems}
  known.update(enumerate(problems))
  halves: dict[str, list[Problem]] = {half: [] for half in HALVES}
  absent: dict[str, list[int | str]] = {half: [] for half in HALVES}
  not_included = {}
  homes: dict[str, str] = {}  # half of a problem, by id
  for half in HALVES:
    entries, not_included[half] = _read_half(index, half)
    for entry in entries:
      problem = known.get(entry)
      if problem is None:
        absent[half].append(entry)
        continue
      if problem.id in homes:
        raise ValueError(
          f'the split lists problem {problem.id!r} in {homes[problem.id]} and again in '
          f'{half}; a problem belongs to one half, once'
        )
      homes[problem.id] = half
      halves[half].append(problem)
    if not halves[half]:
      raise ValueError(
        f'none of the {len(entries)} entries of {half} is one of the '
        f'{len(problems)} problems; is it the split of another data set?'
      )
  return Split(
    train_1=tuple(halves['train_1']),
    train_2=tuple(halves['train_2']),
    unknown=tuple(problem.id for problem in problems if problem.id not in homes),
    absent={half: tuple(entries) for half, entries in absent.items()},
    not_included=not_included,
  )


def _read_half(index: Record, half: str) -> tuple[list[int | str], int]:
  """The entries of a half, and the number of its rows that are not listed."""
  listed = index.get(half)
  total = None
  if isinstance(listed, dict):
    total = listed.get('total_rows_in_project')
    listed = listed.get('gsm8k_train_indices')
  if not isinstance(listed, list) or not all(type(x) in (int, str) for x in listed):
    raise ValueError(
      f'the split has no list {half!r} of whole numbers or problem ids; it has '
      f'{sorted(index)}'
    )
  return listed, total - len(listed) if type(total) is int else 0
