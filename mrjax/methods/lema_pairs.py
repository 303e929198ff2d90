"""LEMA's pairs: a wrong path and a correction that ends in the right answer.

An et al. 2023, arXiv 2310.20689, section 2: a correction is kept only if its own final
answer is right, and that of the path it corrects is not.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mrjax.methods.lema import Counts, WrongPath, is_right
from mrjax.methods.lema_corrections import Correction, Rejected, parse_correction
from mrjax.records import Record


@dataclasses.dataclass(frozen=True)
class Pair:
  """A wrong path and its correction: one example of LEMA."""

  path: WrongPath
  correction: Correction

  @property
  def corrected_steps(self) -> tuple[str, ...]:
    """The whole right solution: the steps before the wrong one, then the new ones."""
    kept = self.path.steps[: (self.correction.step or 1) - 1]
    return kept + self.correction.solution

  def to_record(self) -> Record:
    """Returns the JSON object of this pair: that of its path and the correction."""
    correction = dataclasses.asdict(self.correction)
    correction['solution'] = list(self.correction.solution)
    return self.path.to_record() | {'correction': correction}

  @classmethod
  def from_record(cls, record: Record) -> 'Pair':
    """Returns the pair of a JSON object.

    Raises:
      ValueError: A field is missing or has the wrong type.
    """
    found = record.get('correction')
    if not isinstance(found, dict) or not isinstance(found.get('solution'), list):
      raise ValueError(
        f"field 'correction' of a pair is {found!r:.60}, want an object with step, "
        'explanation and solution; write these files with lema.correct'
      )
    solution = tuple(map(str, found['solution']))
    correction = Correction(found.get('step'), str(found.get('explanation')), solution)
    return cls(WrongPath.from_record(record), correction)


def make_pair(path: WrongPath, text: str) -> Pair:
  """Returns the pair of a wrong path and the correction written for it.

  Raises:
    Rejected: `path_is_right`, one of `lema_corrections.REASONS`, or `wrong_answer`
      (the correction's own final answer is not the reference).
  """
  if is_right(path.problem, path.task, path.steps):
    raise Rejected('path_is_right', f'of problem {path.problem.id!r}; nothing to learn')
  correction = parse_correction(text, task=path.task, num_steps=len(path.steps))
  if not is_right(path.problem, path.task, correction.solution):
    raise Rejected(
      'wrong_answer',
      f'{correction.solution[-1]!r:.60}, the reference is {path.problem.answer!r:.40}',
    )
  return Pair(path, correction)


def make_pairs(
  corrected: Iterable[tuple[WrongPath, str]],
) -> tuple[list[Pair], Counts]:
  """Returns the pairs of wrong paths and corrector texts, and counts.

  The counts are `corrections` (given), those rejected by their reason, `duplicate`
  (the same correction of the same steps again) and `kept`.
  """
  counts: Counter[str] = Counter(corrections=0, kept=0)
  pairs: list[Pair] = []
  seen: set[Any] = set()
  for path, text in corrected:
    counts['corrections'] += 1
    try:
      pair = make_pair(path, text)
    except Rejected as rejected:
      counts[rejected.reason] += 1
      continue
    key = path.problem.id, path.steps, pair.correction
    counts['duplicate' if key in seen else 'kept'] += 1
    if key not in seen:
      pairs.append(pair)
    seen.add(key)
  return pairs, dict(counts)
