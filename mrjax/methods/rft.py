"""Rejection-sampling fine-tuning: which of a model's own solutions to train on.

Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large
Language Models", arXiv 2308.01825: of the samples with the right answer and true
annotations, one per distinct list of equations is kept.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mrjax.grading.calculator import equations

DEDUPS = ('farthest', 'first', 'none')


def path_key(text: str) -> str:
  """Returns what makes two solutions the same path: their equations, in order.

  Order and number format matter (`1.0` is not `1`), spaces do not. A text without
  annotations has the empty key.
  """
  return '|'.join(equations(text)).replace(' ', '')


def select_paths(texts: Sequence[str], *, dedup: str = 'farthest') -> list[int]:
  """Returns the indices of the samples to keep, in the order of the training file.

  Args:
    texts: Solutions of one question that passed the filters, in the order of sampling;
      the result depends on it.
    dedup: 'farthest' keeps one text per path, and in its place a later one whose summed
      edit distance to the other kept texts is strictly larger; 'first' keeps the first
      text of a path; 'none' keeps all.

  Raises:
    ValueError: No such dedup.
  """
  if dedup not in DEDUPS:
    raise ValueError(f'unknown dedup {dedup!r}; one of {", ".join(DEDUPS)}')
  if dedup == 'none':
    return list(range(len(texts)))
  kept = _KeptPaths()
  for index, text in enumerate(texts):
    slot = kept.slots.setdefault(path_key(text), len(kept.indices))
    if slot == len(kept.indices):
      kept.append(index, text)
    elif dedup == 'farthest':
      kept.challenge(slot, index, text)
  return kept.indices


class _KeptPaths:
  """The kept texts of one question and their distances (characters, unit costs).

  Distances between kept texts and their sums are carried along, so that a newcomer
  costs one distance per kept text.
  """

  def __init__(self) -> None:
    self.slots: dict[str, int] = {}  # place of a path among the kept
    self.indices: list[int] = []
    self._texts: list[str] = []
    self._distances: list[list[int]] = []
    self._sums: list[int] = []
    self._lost: dict[str, int] = {}  # texts refused, and by which state
    self._state = 0

  def append(self, index: int, text: str) -> None:
    row = self._distances_to(text)
    for slot, distance in enumerate(row):
      self._distances[slot].append(distance)
      self._sums[slot] += distance
    self.indices.append(index)
    self._texts.append(text)
    self._distances.append([*row, 0])
    self._sums.append(sum(row))
    self._state += 1

  def challenge(self, slot: int, index: int, text: str) -> None:
    """Puts a text in the place of the one in `slot` when it is farther from the rest.

    The rest has other texts than the incumbent, because it has other equations.
    """
    if text == self._texts[slot] or self._lost.get(text) == self._state:
      return
    row = self._distances_to(text)
    row[slot] = 0
    total = sum(row)
    if total <= self._sums[slot]:
      self._lost[text] = self._state
      return
    for other, (new, old) in enumerate(zip(row, self._distances[slot], strict=True)):
      self._distances[other][slot] = new
      self._sums[other] += new - old
    self._distances[slot] = row
    self._sums[slot] = total
    self._texts[slot], self.indices[slot] = text, index
    self._state += 1

  def _distances_to(self, text: str) -> list[int]:
    from rapidfuzz.distance import Levenshtein

    return [Levenshtein.distance(text, kept) for kept in self._texts]


class Sample(NamedTuple):
  """One sample of a question; a seed is its (set_number, sample_index)."""

  set_number: int
  sample_index: int
  correct: bool
  text: str | None  # None when it is wrong, or an annotation is


class Statistics:
  """What the paper reports of a selection, added up question by question.

  Args:
    seeds: Every (set number, sample index) there is, in the order of looking at them.
    set_names: Names of the sample sets, by number.
  """

  def __init__(self, seeds: Sequence[tuple[int, int]], set_names: Sequence[str]):
    self._ranks = {seed: rank for rank, seed in enumerate(seeds)}
    self._sets = [dict.fromkeys(_SET_FIELDS, 0) for _ in set_names]
    self._set_names = set_names
    self._solved_first = [0] * len(
      seeds
    )  # questions that a seed was the first to solve
    self._paths_first = [0] * len(seeds)  # paths that a seed was the first to find
    self._questions_by_correct: Counter[int] = Counter()
    self._counts: Counter[str] = Counter()

  def add(self, samples: Sequence[Sample], *, num_kept: int) -> None:
    """Counts the samples of one question, in the order of their seeds."""
    num_correct = sum(sample.correct for sample in samples)
    self._questions_by_correct[num_correct] += 1
    self._counts['num_questions'] += 1
    self._counts['num_questions_without_samples'] += not samples
    self._counts['num_kept'] += num_kept
    solved = False
    sets_of: dict[str, set[int]] = {}  # by path
    for sample in samples:
      rank = self._ranks[sample.set_number, sample.sample_index]
      totals = self._sets[sample.set_number]
      totals['num_samples'] += 1
      totals['num_correct'] += sample.correct
      if sample.correct and not solved:
        self._solved_first[rank] += 1
        solved = True
      if sample.text is None:
        self._counts['num_false_annotations'] += sample.correct
        continue
      key = path_key(sample.text)
      if key not in sets_of:
        self._paths_first[rank] += 1
      sets_of.setdefault(key, set()).add(sample.set_number)
    for sets in sets_of.values():
      if len(sets) == 1:
        self._sets[min(sets)]['exclusive_paths'] += 1

  def summary(self) -> dict[str, Any]:
    """Returns the statistics.

    `num_samples`, `num_correct`, `num_false_annotations` (correct samples refused by
    the calculator), `num_questions`, `num_questions_unsolved` (no correct sample, those
    without any sample included), `num_questions_without_samples`, `num_kept`,
    `correct_per_question`, `kept_per_question`, `paths_per_question` (distinct ones),
    `correct_histogram` (questions by number of correct samples, the paper's bins),
    and by the number of seeds looked at `solved_at` (questions with a correct sample)
    and `paths_at` (distinct paths a question). `sets` has for every sample set its
    samples, correct ones and exclusive paths: those that no other set found.
    """
    num_questions = self._counts['num_questions']
    num_paths = sum(self._paths_first)
    num_correct = sum(totals['num_correct'] for totals in self._sets)
    return {
      'num_samples': sum(totals['num_samples'] for totals in self._sets),
      'num_correct': num_correct,
      'num_false_annotations': self._counts['num_false_annotations'],
      'num_questions': num_questions,
      'num_questions_unsolved': self._questions_by_correct[0],
      'num_questions_without_samples': self._counts['num_questions_without_samples'],
      'num_kept': self._counts['num_kept'],
      'correct_per_question': num_correct / num_questions,
      'kept_per_question': self._counts['num_kept'] / num_questions,
      'paths_per_question': num_paths / num_questions,
      'correct_histogram': correct_histogram(
        self._questions_by_correct, num_seeds=len(self._ranks)
      ),
      'solved_at': list(itertools.accumulate(self._solved_first)),
      'paths_at': [
        count / num_questions for count in itertools.accumulate(self._paths_first)
      ],
      'sets': {
        name: totals
        | {'exclusive_share': totals['exclusive_paths'] / max(num_paths, 1)}
        for name, totals in zip(self._set_names, self._sets, strict=True)
      },
    }


_SET_FIELDS = ('num_samples', 'num_correct', 'exclusive_paths')


def correct_histogram(
  questions_by_correct: Mapping[int, int], *, num_seeds: int
) -> dict[str, int]:
  """Returns the number of questions by their number of correct samples, in bins.

  The bins are none, fifths of the seeds, and all: 0, 1-20, 21-40, 41-60, 61-80, 81-99
  and 100 for 100 seeds, as in the paper (whose own code merges equal counts).
  """
  edges = [0, *(num_seeds * fifth // 5 for fifth in range(1, 5)), num_seeds - 1]
  bins = [(0, 0), *((low + 1, high) for low, high in itertools.pairwise(edges))]
  if num_seeds:
    bins.append((num_seeds, num_seeds))
  return {
    str(low) if low == high else f'{low}-{high}': sum(
      questions
      for count, questions in questions_by_correct.items()
      if low <= count <= high
    )
    for low, high in bins
    if low <= high
  }
