"""Gathers graded samples by problem and sums them up."""

import array
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mrjax.grading import votes


@dataclasses.dataclass
class _Problem:
  """The samples of one problem in order of arrival; small, for millions of samples."""

  indices: list[int] = dataclasses.field(default_factory=list)
  correct: bytearray = dataclasses.field(default_factory=bytearray)
  answers: list[str | None] = dataclasses.field(default_factory=list)
  values: array.array = dataclasses.field(default_factory=lambda: array.array('d'))
  """By a value model; NaN without one, and for samples without an answer."""

  def sort(self) -> None:
    """Brings the samples into the order of their index; equal ones stay as read."""
    order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
    self.indices = [self.indices[i] for i in order]
    self.correct = bytearray(self.correct[i] for i in order)
    self.values = array.array('d', (self.values[i] for i in order))
    if self.answers:
      self.answers = [self.answers[i] for i in order]


class Tally:
  """Counts of graded samples; memory grows by some bytes a sample.

  Args:
    vote: '' or the majority vote to report, one of `votes.VOTES`.
    is_equal: The rule's comparison, which the equivalence vote needs.

  Raises:
    ValueError: No such vote.
  """

  def __init__(self, vote: str = '', *, is_equal: Callable[[str, str], bool]):
    if vote and vote not in votes.VOTES:
      raise ValueError(f'unknown vote {vote!r}; one of {", ".join(votes.VOTES)}')
    self._vote = vote
    self._is_equal = is_equal
    self._problems: dict[str | int, _Problem] = {}
    self._num_samples = 0
    self._num_unanswered = 0
    self._lengths = [0, 0]  # samples with a length, their tokens
    self._ends = [0, 0]  # samples with a finish reason, those cut at the limit
    self._kls = [0, 0.0]  # samples with a KL, their sum
    self._num_valued = 0

  def add(self, record: Mapping[str, Any]) -> None:
    """Counts a graded sample: `extracted` and `correct`, and what else it carries.

    Without `problem_id` it stands for a problem of its own; without `sample_index` its
    place among the samples of its problem is the order of arrival.
    """
    key = record.get('problem_id')
    key = self._num_samples if key is None else str(key)  # a number of its own: int
    problem = self._problems.get(key) or self._problems.setdefault(key, _Problem())
    self._num_samples += 1
    extracted = record['extracted']
    self._num_unanswered += extracted is None
    index = record.get('sample_index')
    problem.indices.append(len(problem.indices) if index is None else index)
    problem.correct.append(record['correct'])
    if self._vote:
      problem.answers.append(sys.intern(extracted) if extracted else None)
    self._num_valued += 'value' in record
    value = record.get('value') if extracted else None
    problem.values.append(math.nan if value is None else value)
    if (length := record.get('num_tokens')) is not None:
      self._lengths[0] += 1
      self._lengths[1] += length
    if (reason := record.get('finish_reason')) is not None:
      self._ends[0] += 1
      self._ends[1] += reason == 'length'
    if (kl := record.get('kl_sum')) is not None:
      self._kls[0] += 1
      self._kls[1] += kl

  def summary(
    self, *, seed: int = 0, levels: Mapping[str, str | int] | None = None
  ) -> dict[str, Any]:
    """Returns counts, and means over problems with 95% intervals.

    Args:
      seed: Of the bootstrap and of ties in the equivalence vote.
      levels: Difficulty by problem id; gives `by_level`.

    Returns:
      `num_problems`, `num_samples`, `num_correct`, `num_unanswered`, `accuracy` (of all
      samples); `pass@k` and, with a vote, `maj@k`, each {value, low, high}, for
      k = 1, 2, 4, ... up to the fewest samples of a problem; `mean_length` (tokens),
      `truncation_rate` and `mean_kl` (`kl_sum`, nats a sample) where the samples tell;
      `by_level`.

      Where every sample carries `value`, the reward that a value model expects, there
      are also `best_of@k`, whether the sample of the highest value among the first k
      is right, and, with a vote, `weighted_maj@k`, in which values are weights (Q#-RM,
      arXiv 2502.20548). A sample without an answer neither wins nor votes; without a
      value (null) it cannot win and weighs nothing, as one of a value below 0 does.
      Where only some carry it, `num_without_value` says how many do not.

    Raises:
      ValueError: No sample was added.
    """
    if not self._problems:
      raise ValueError('no graded sample to sum up')
    for problem in self._problems.values():
      problem.sort()
    num_correct = sum(sum(problem.correct) for problem in self._problems.values())
    summary: dict[str, Any] = {
      'num_problems': len(self._problems),
      'num_samples': self._num_samples,
      'num_correct': num_correct,
      'num_unanswered': self._num_unanswered,
      'accuracy': num_correct / self._num_samples,
      **self._estimates(list(self._problems), seed),
    }
    if self._lengths[0]:
      summary['mean_length'] = self._lengths[1] / self._lengths[0]
    if self._ends[0]:
      summary['truncation_rate'] = self._ends[1] / self._ends[0]
    if self._kls[0]:
      summary['mean_kl'] = self._kls[1] / self._kls[0]
    if 0 < self._num_valued < self._num_samples:
      summary['num_without_value'] = self._num_samples - self._num_valued
    if levels:
      summary['by_level'] = self._by_level(levels, seed)
    return summary

  def _by_level(
    self, levels: Mapping[str, str | int], seed: int
  ) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[str | int]] = {}
    for key in self._problems:
      if key in levels:
        groups.setdefault(str(levels[str(key)]), []).append(key)
    return {
      level: {'num_problems': len(keys), **self._estimates(keys, seed)}
      for level, keys in sorted(groups.items())
    }

  def _estimates(self, keys: list[str | int], seed: int) -> dict[str, dict[str, float]]:
    import numpy as np  # only here: grading itself starts without it

    from mrjax.grading import metrics

    problems = [self._problems[key] for key in keys]
    num_samples_P = np.array([len(problem.correct) for problem in problems])
    num_correct_P = np.array([sum(problem.correct) for problem in problems])
    sizes = metrics.sample_sizes(int(num_samples_P.min()))
    values = {
      f'pass@{k}': metrics.pass_at_k(num_samples_P, num_correct_P, k) for k in sizes
    }
    of_votes = [k for k in sizes if k > 1] or sizes
    kinds: dict[str, Callable[[str | int, int], bool]] = {}
    if self._vote:
      kinds['maj'] = lambda key, k: self._vote_wins(key, k, seed)
    if self._num_valued == self._num_samples:
      kinds['best_of'] = self._best_wins
      if self._vote:
        kinds['weighted_maj'] = lambda key, k: self._vote_wins(
          key, k, seed, weighted=True
        )
    for kind, wins in kinds.items():
      for k in of_votes:
        values[f'{kind}@{k}'] = np.array([wins(key, k) for key in keys], np.float64)
    return {
      name: metrics.estimate(values_P, seed=seed).to_dict()
      for name, values_P in values.items()
    }

  def _vote_wins(
    self, key: str | int, k: int, seed: int, *, weighted: bool = False
  ) -> bool:
    problem = self._problems[key]
    answers, weights = problem.answers[:k], None
    if weighted:
      weights = [v if 0 < v < math.inf else 0.0 for v in problem.values[:k]]
    if self._vote == 'string_first':
      winner = votes.string_first(answers, weights=weights)
    else:
      draw = f'{seed}/{key}'
      winner = votes.equivalence(answers, self._is_equal, seed=draw, weights=weights)
    # A string is graded alike wherever it comes from, so its first sample tells.
    return winner is not None and bool(problem.correct[answers.index(winner)])

  def _best_wins(self, key: str | int, k: int) -> bool:
    problem = self._problems[key]
    values = problem.values[:k]
    # The values of samples without an answer are NaN already.
    best = votes.best_of(['an answer'] * len(values), values)
    return best is not None and bool(problem.correct[best])


def format_summary(summary: Mapping[str, Any]) -> str:
  """Returns the summary as a small table for a terminal."""
  lines = [
    f'{summary["num_correct"]:,} of {summary["num_samples"]:,} samples correct, '
    f'{summary["num_problems"]:,} problems'
  ]
  shares = _percentages(summary)
  width = max(10, *map(len, shares))
  lines += [f'  {name:<{width}} {text}' for name, text in shares.items()]
  for level, values in summary.get('by_level', {}).items():
    name = f'level {level}'
    lines.append(
      f'  {name:<{width}} {_percentages(values)["pass@1"]}   '
      f'pass@1 of {values["num_problems"]:,} problems'
    )
  if 'mean_length' in summary:
    lines.append(f'  mean length {summary["mean_length"]:.1f} tokens')
  if 'truncation_rate' in summary:
    lines.append(f'  cut at the length limit {100 * summary["truncation_rate"]:.2f}%')
  if 'mean_kl' in summary:
    lines.append(f'  mean KL to the reference {summary["mean_kl"]:.3f} nats')
  unanswered = summary['num_unanswered'] / summary['num_samples']
  lines.append(f'  without an answer {100 * unanswered:.2f}%')
  if 'num_without_value' in summary:
    lines.append(
      f'  {summary["num_without_value"]:,} samples carry no value of a value model, '
      'so there is no best-of-n'
    )
  for name in ('num_timeouts', 'num_crashes'):
    if summary.get(name):
      lines.append(f'  {name} {summary[name]} (graded as incorrect)')
  return '\n'.join(lines)


def _percentages(summary: Mapping[str, Any]) -> dict[str, str]:
  """Returns '12.34%   [10.00, 15.00]' by the name of the estimate."""
  return {
    name: '{value:6.2%}   [{low:6.2%}, {high:6.2%}]'.format(**value)
    for name, value in summary.items()
    if isinstance(value, Mapping) and 'low' in value
  }
