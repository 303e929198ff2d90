"""Weak-to-strong reasoning, stage I: the strong model learns what both models answer.

Yang et al. 2024, "Weak-to-Strong Reasoning", arXiv 2407.13647, stage I, with details of
the authors' code. Questions on which the weak model's greedy answer equals the strong
model's in-context answer are kept; the weak texts, the in-context texts and both are
three fine-tuning sets. A second round puts the first two fine-tuned models in the
places of the weak and the in-context one. Stage II is `weak_to_strong_pairs`.

Followed: answers are compared as strings after normalisation, never as mathematics,
unless asked; the baseline learns from all weak texts. Not followed: what the authors'
code prints as accuracy of the kept divides by all questions; that is
`kept_correct_share` here, and `precision` divides by the kept ones.
"""

import dataclasses
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mrjax.grading import metrics, symbolic
from mrjax.methods.weak_to_strong_data import Response, check_covered, sft_record
from mrjax.records import Problem, Record

SETS = ('weak', 'icl', 'hybrid')
EQUIVALENCES: dict[str, Callable[[str, str], bool]] = {
  'string': operator.eq,
  # By math-verify. The authors' option of that name stops at text it cannot read and
  # takes `1,-1` for `1`; nothing they released was made with it.
  'latex': symbolic.is_equal,
}


@dataclasses.dataclass(frozen=True)
class Round:
  """Which models a round samples, greedily, on every question of `train_2`.

  Models are 'weak' and 'strong', the two at hand, or what an earlier round trained.
  Each round trains the strong model as it was at first, once per set.
  """

  number: int  # from 1
  weak: str  # asked zero-shot
  icl: str
  num_shots: int  # demonstrations in the prompt of `icl`

  @property
  def trained(self) -> dict[str, str]:
    """Names of the models this round trains, by set."""
    return {name: f'{name}-ft-{self.number}' for name in SETS}


def plan_rounds(num_rounds: int, *, num_shots: int = 4) -> list[Round]:
  """Returns the rounds of stage I, in order; the hybrid model of the last is M_plus.

  The paper has two for GSM8K and OlympicArena, and one for MATH.

  Raises:
    ValueError: No round, or a negative number of shots.
  """
  if num_rounds < 1 or num_shots < 0:
    raise ValueError(
      f'num_rounds={num_rounds} and num_shots={num_shots}; want at least 1 and 0'
    )
  rounds = [Round(1, 'weak', 'strong', num_shots)]
  for number in range(2, num_rounds + 1):
    trained = rounds[-1].trained
    rounds.append(Round(number, trained['weak'], trained['icl'], 0))
  return rounds


@dataclasses.dataclass(frozen=True)
class Selection:
  """The questions of the fine-tuning sets, and the counts of the selection.

  `kept` and `padding` are problem ids in the order of the problems. Of `statistics`,
  `num_questions` is the sum of `num_weak_unanswered`, `num_disagreeing` (the in-context
  answer is another or none) and `num_kept`. `num_padding` of the first two are added
  back; `num_textless` of them could not be, as a text is empty. Where all questions
  have golds also `weak_accuracy`, `icl_accuracy`, `kept_correct_share` (of all
  questions), `precision` and `padding_precision` (None without any).
  """

  kept: tuple[str, ...]
  padding: tuple[str, ...]
  statistics: dict[str, Any]


def select_consistent(
  problems: Sequence[Problem],
  weak: Mapping[str, Response],
  icl: Mapping[str, Response],
  *,
  equivalence: str = 'string',
  pad_to: int = 0,
  pad_seed: int = 0,
) -> Selection:
  """Returns the questions whose weak answer is not empty and equals the in-context one.

  Args:
    problems: The questions, in the order of the records to be made.
    weak: The weak model's response to each.
    icl: The strong model's.
    equivalence: 'string' as published, or 'latex': equal as mathematics.
    pad_to: Questions to end up with, where fewer are consistent; 0 adds none. The
      released MATH sets of two models were filled up to 1,000 and 2,000; how is not
      known. Here every inconsistent question with two texts is as likely, and whether
      one is added depends on no order.
    pad_seed: Of that draw.

  Raises:
    ValueError: No such equivalence, a response is missing, or too few questions.
  """
  if equivalence not in EQUIVALENCES:
    raise ValueError(
      f'unknown equivalence {equivalence!r}; one of {", ".join(EQUIVALENCES)}'
    )
  for name, responses in (('weak responses', weak), ('in-context responses', icl)):
    check_covered(problems, responses, name)
  is_equal = EQUIVALENCES[equivalence]
  kept: list[str] = []
  rest: list[str] = []
  for problem in problems:
    answers = weak[problem.id].answer, icl[problem.id].answer
    (kept if all(answers) and is_equal(*answers) else rest).append(problem.id)
  with_texts = [key for key in rest if weak[key].text and icl[key].text]
  padding = _draw(with_texts, pad_to - len(kept), pad_seed)
  if pad_to > len(kept) + len(padding):
    raise ValueError(
      f'pad_to={pad_to}, but {len(kept)} questions are consistent and '
      f'{len(with_texts)} others have two texts; ask for at most '
      f'{len(kept) + len(with_texts)}'
    )
  num_unanswered = sum(not weak[problem.id].answer for problem in problems)
  statistics: dict[str, Any] = {
    'num_questions': len(problems),
    'num_weak_unanswered': num_unanswered,
    'num_disagreeing': len(rest) - num_unanswered,
    'num_kept': len(kept),
    'num_padding': len(padding),
    'num_textless': len(rest) - len(with_texts),
  }
  everything = [problem.id for problem in problems]
  if all(weak[key].correct is not None for key in everything):
    num_kept_correct = sum(bool(weak[key].correct) for key in kept)
    statistics |= {
      'weak_accuracy': _accuracy(weak, everything),
      'icl_accuracy': _accuracy(icl, everything),
      'kept_correct_share': num_kept_correct / len(problems) if problems else None,
      'precision': _accuracy(weak, kept),
      'padding_precision': {
        'weak': _accuracy(weak, padding),
        'icl': _accuracy(icl, padding),
      },
    }
  return Selection(tuple(kept), tuple(padding), statistics)


def _draw(keys: Sequence[str], number: int, seed: int) -> list[str]:
  """So many keys (all where there are fewer), in their order."""
  ranks = {key: random.Random(f'{seed}:{key}').random() for key in keys}
  drawn = set(sorted(keys, key=ranks.__getitem__)[: max(number, 0)])
  return [key for key in keys if key in drawn]


def _accuracy(responses: Mapping[str, Response], keys: Sequence[str]) -> float | None:
  return sum(bool(responses[k].correct) for k in keys) / len(keys) if keys else None


def build_sft_sets(
  problems: Sequence[Problem],
  selection: Selection,
  weak: Mapping[str, Response],
  icl: Mapping[str, Response],
) -> dict[str, list[Record]]:
  """Returns the records of the sets 'weak', 'icl' and 'hybrid'.

  The consistent questions come first and the padding after them, as released. In the
  hybrid set the two texts of a question follow each other, weak first; equal texts are
  both kept, as in the paper. Records are `prompt`, `completion`, `problem_id`, `origin`
  ('weak' or 'icl') and `consistent`.
  """
  by_id = {problem.id: problem for problem in problems}
  sets: dict[str, list[Record]] = {name: [] for name in SETS}
  for keys, consistent in ((selection.kept, True), (selection.padding, False)):
    for key in keys:
      for origin, responses in (('weak', weak), ('icl', icl)):
        record = sft_record(by_id[key], responses[key].text)
        record |= {'origin': origin, 'consistent': consistent}
        sets[origin].append(record)
        sets['hybrid'].append(dict(record))
  return sets


def build_full_weak(
  problems: Sequence[Problem], weak: Mapping[str, Response]
) -> tuple[list[Record], dict[str, int]]:
  """Returns the records of the full-weak baseline, every weak text, and its counts.

  Empty texts, which have nothing to learn from, are left out: `num_textless`.
  """
  check_covered(problems, weak, 'weak responses')
  records = [
    sft_record(problem, weak[problem.id].text) | {'origin': 'weak'}
    for problem in problems
    if weak[problem.id].text
  ]
  return records, {
    'num_questions': len(problems),
    'num_records': len(records),
    'num_textless': len(problems) - len(records),
  }


def performance_gap_recovered(student: float, *, floor: float, ceiling: float) -> float:
  """Returns (student - floor) / (ceiling - floor), of Burns et al. 2023, 2312.09390.

  Below 0 for a student worse than its weak teacher, above 1 for one that is better
  than training on golds.

  Args:
    student: Test accuracy of the strong model that learnt from the weak one.
    floor: That of the weak model.
    ceiling: That of the strong model trained on golds, in the same unit.

  Raises:
    ValueError: There is no gap to recover.
  """
  if not ceiling > floor:
    raise ValueError(
      f'ceiling {ceiling} is not above floor {floor}, so there is no gap to recover; '
      'compare with a ceiling that is better than the weak model'
    )
  return (student - floor) / (ceiling - floor)


def any_correct(responses: Mapping[str, Sequence[Response]], k: int) -> float:
  """Returns the paper's pass@k: the share of questions that one of k samples solves.

  The first k by sample index, and not the unbiased estimator.

  Raises:
    ValueError: No questions or golds, or fewer than k samples of a question.
  """
  fewest = min(map(len, responses.values()), default=0)
  if not 1 <= k <= fewest:
    raise ValueError(f'pass@{k} needs 1 <= k <= the fewest samples, {fewest}')
  judged = [[sample.correct for sample in samples] for samples in responses.values()]
  if any(correct is None for flags in judged for correct in flags):
    raise ValueError('pass@k needs problems with answers; some here have none')
  solved = [[bool(correct) for correct in flags] for flags in judged]
  return float(metrics.any_of_k(solved, k).mean())
