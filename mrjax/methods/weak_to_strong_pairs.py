"""Weak-to-strong reasoning, stage II: the strong model learns from weak errors.

Yang et al. 2024, "Weak-to-Strong Reasoning", arXiv 2407.13647, stage II, as in
the authors' code. The samples of M_plus, the last model of stage I, vote on the answer
of a question; with enough confidence, the weak model's own response is paired with a
sample that answers otherwise. Golds decide nothing: they serve the statistics.

Followed: no answer is a vote too, and a question it wins is skipped; ties go to the
answer of the first sample; rejected samples may be equal texts, and so may chosen ones
after the first. Not followed unless asked: the authors draw from one stream for all
questions in the order of the file; here the draws of a question depend on the seed and
its id alone (`draw`).
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mrjax.data.prompts import render_completion
from mrjax.methods.weak_to_strong_data import (
  TEMPLATE,
  Response,
  check_covered,
  prompt_of,
)
from mrjax.records import Problem, Record

MODES = ('gsm8k', 'math')
DRAWS = ('problem', 'file')
OUTCOMES = (
  'low_confidence',
  'no_answer',  # most samples give none
  'too_easy',  # the weak model agrees, and so do all samples
  'unsure',  # the weak model disagrees, and the samples are not sure enough
  'weak_chosen',
  'weak_rejected',
)
"""What may become of a question; the last two give pairs."""


@dataclasses.dataclass(frozen=True)
class PairRules:
  """How pairs are made.

  Raises:
    ValueError: A value that is not possible, or thresholds that contradict.
  """

  mode: str = 'gsm8k'  # 'gsm8k': one pair a question; 'math': up to max_pairs
  min_confidence: float = 0.6  # of any pair
  weak_reject_confidence: float = 0.8  # of pairs that reject the weak response
  max_pairs: int = 3  # a question, in mode 'math'
  seed: int = 42
  draw: str = 'problem'  # or 'file': one stream in file order, as published

  def __post_init__(self) -> None:
    if self.mode not in MODES:
      raise ValueError(f'unknown mode {self.mode!r}; one of {", ".join(MODES)}')
    if self.draw not in DRAWS:
      raise ValueError(f'unknown draw {self.draw!r}; one of {", ".join(DRAWS)}')
    if self.max_pairs < 1:
      raise ValueError(f'max_pairs is {self.max_pairs}, want at least 1')
    if not 0 <= self.min_confidence <= self.weak_reject_confidence <= 1:
      raise ValueError(
        f'min_confidence={self.min_confidence} and weak_reject_confidence='
        f'{self.weak_reject_confidence}; want 0 <= the first <= the second <= 1, since '
        'the first holds for all pairs'
      )


class Vote(NamedTuple):
  """The majority answer of a question's samples, and the samples for and against it."""

  answer: str  # '' where most samples give none
  confidence: float  # share of the samples for it
  positives: tuple[Response, ...]
  negatives: tuple[Response, ...]


def count_votes(samples: Sequence[Response]) -> Vote:
  """Returns the vote of a question's samples: the most frequent string.

  Unlike `votes.string_first`, samples without an answer vote, for the empty answer. A
  tie goes to the answer seen first, so the order of the samples matters.

  Raises:
    ValueError: No samples.
  """
  if not samples:
    raise ValueError('no samples to vote; a question needs at least one')
  # most_common keeps equals in the order of their first appearance.
  ((answer, count),) = Counter(sample.answer for sample in samples).most_common(1)
  return Vote(
    answer,
    # The nearest double to the ratio, so 6 of 10 meets a threshold written 0.6.
    count / len(samples),
    tuple(sample for sample in samples if sample.answer == answer),
    tuple(sample for sample in samples if sample.answer != answer),
  )


def pair_responses(
  weak: Response, vote: Vote, rules: PairRules, rng: random.Random
) -> tuple[str, list[tuple[Response, Response]]]:
  """Returns what becomes of a question, of `OUTCOMES`, and its (chosen, rejected).

  Args:
    weak: The response of the weak model that stage I began with.
    vote: Of the samples of M_plus.
    rules: Thresholds and mode.
    rng: Draws from the samples; untouched where there is nothing to draw.
  """
  if vote.confidence < rules.min_confidence:
    return 'low_confidence', []
  if not vote.answer:
    return 'no_answer', []
  if weak.answer == vote.answer:
    if not vote.negatives:
      return 'too_easy', []
    if rules.mode == 'gsm8k':
      rejected = rng.sample(vote.negatives, 1)
    elif len(vote.negatives) <= rules.max_pairs:
      rejected = list(vote.negatives)
    else:
      rejected = rng.sample(vote.negatives, rules.max_pairs)
    return 'weak_chosen', [(weak, sample) for sample in rejected]
  if vote.confidence < rules.weak_reject_confidence:
    return 'unsure', []
  chosen = rng.sample(vote.positives, 1)
  if rules.mode == 'math':
    others = [sample for sample in vote.positives if sample.text != chosen[0].text]
    chosen += others[: rules.max_pairs - 1]
  return 'weak_rejected', [(sample, weak) for sample in chosen]


def build_pairs(
  problems: Sequence[Problem],
  weak: Mapping[str, Response],
  samples: Mapping[str, Sequence[Response]],
  rules: PairRules = PairRules(),
) -> tuple[list[Record], dict[str, Any]]:
  """Returns the preference records and their statistics.

  Records are `prompt`, `chosen`, `rejected`, `problem_id`, `sample_index` (of the
  sample of M_plus), `weak_side` ('chosen' or 'rejected') and `confidence`. Of the
  statistics, the counts of `questions`, by outcome, add up to `num_questions`;
  `pairs` are counted by the side of the weak response. Where all questions have golds
  also `majority_accuracy` (of all questions), `chosen_accuracy` and
  `rejected_accuracy` (of pairs; None without any).

  Args:
    problems: The questions, in the order of the records to be made.
    weak: The response of the weak model that stage I began with, to each.
    samples: Those of M_plus, in the order of sampling; 10 each in the paper.
    rules: Thresholds, mode and randomness.

  Raises:
    ValueError: A response is missing.
  """
  check_covered(problems, weak, 'weak responses')
  check_covered(problems, samples, 'samples')
  stream = random.Random(rules.seed)
  records: list[Record] = []
  questions = dict.fromkeys(OUTCOMES, 0)
  pairs = {'weak_chosen': 0, 'weak_rejected': 0}
  judged: dict[str, list[bool | None]] = {'majority': [], 'chosen': [], 'rejected': []}
  for problem in problems:
    vote = count_votes(samples[problem.id])
    rng = stream
    if rules.draw == 'problem':
      rng = random.Random(f'{rules.seed}:{problem.id}')
    outcome, found = pair_responses(weak[problem.id], vote, rules, rng)
    questions[outcome] += 1
    judged['majority'].append(vote.positives[0].correct)
    for chosen, rejected in found:
      pairs[outcome] += 1
      judged['chosen'].append(chosen.correct)
      judged['rejected'].append(rejected.correct)
      sample = rejected if outcome == 'weak_chosen' else chosen
      records.append(
        {
          'prompt': prompt_of(problem),
          'chosen': _completion(problem, chosen),
          'rejected': _completion(problem, rejected),
          'problem_id': problem.id,
          'sample_index': sample.sample_index,
          'weak_side': outcome.removeprefix('weak_'),
          'confidence': vote.confidence,
        }
      )
  statistics: dict[str, Any] = {
    'num_questions': len(problems),
    'num_pairs': len(records),
    'questions': questions,
    'pairs': pairs,
  }
  if None not in judged['majority']:
    for name, flags in judged.items():
      share = sum(map(bool, flags)) / len(flags) if flags else None
      statistics[f'{name}_accuracy'] = share
  return records, statistics


def _completion(problem: Problem, response: Response) -> str:
  solved = dataclasses.replace(problem, solution=response.text)
  return render_completion(TEMPLATE, solved)
