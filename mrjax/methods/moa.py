"""Vanilla mixture of agents: which calls go to which model, layer by layer.

Wang et al. 2024, arXiv 2406.04692, as the baseline of Mixture of Opinions (Chen et al.
2025, arXiv 2502.19622) runs it: R layers of P proposers, of which the first sees the
question alone and each later one all answers of the layer before; then the aggregator
sees those of the last layer, and is also asked alone ("raw").

Nothing here calls a model. `next_calls` says what is to be asked, given all answers so
far, and `step` hands the calls of a phase, over all questions, to a callable: they do
not depend on each other, so they may run together, and the answers of finished phases
are all there is to save. As in the authors' code reviews are asked for anew for every
proposer that reads them, from the second layer on, and the aggregator reads none. Not
as there: questions are drawn by a seed, as examples are (`moo.draw_shots`).
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mrjax.methods import moa_messages
from mrjax.methods.moa_messages import Messages
from mrjax.records import Problem, Record

History = tuple[tuple[str, ...], ...]
"""Of one question: the answers to the calls of each finished phase."""


class Phase(NamedTuple):
  """Calls that may run together: 'review', 'proposal' or 'aggregate' of a layer."""

  kind: str
  layer: int


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Who is asked what.

  Raises:
    ValueError: A number below 0, layers without proposers, no such placement.
  """

  proposers: tuple[str, ...]  # models, one call of each in every layer
  aggregator: str
  rounds: int = 1  # layers of proposers; 0 asks the aggregator alone
  feedback: bool = False  # answers come with a review by each proposer
  share_reviews: bool = False  # one review for all readers; the same text when greedy
  raw: bool = True  # the aggregator also answers alone, to compare with
  placement: str = 'user'  # of references: 'user' (MoO) or 'system' (Together's code)
  synthesis: str = moa_messages.SYNTHESIS  # stands before the references
  reminder: str = ''  # of the task, a user turn behind them; see `with_references`
  review: str = moa_messages.REVIEW  # stands behind a question and an answer to it

  def __post_init__(self) -> None:
    if self.rounds < 0:
      raise ValueError(f'rounds={self.rounds}; want 0 or more layers of proposers')
    if self.rounds and not self.proposers:
      raise ValueError(f'rounds={self.rounds} layers need at least one proposer')
    moa_messages.with_references((), (), placement=self.placement)

  @property
  def phases(self) -> tuple[Phase, ...]:
    """What is asked after what; a phase needs the answers of those before."""
    phases = []
    for layer in range(1, self.rounds + 1):
      if self.feedback and layer > 1:
        phases.append(Phase('review', layer))
      phases.append(Phase('proposal', layer))
    return (*phases, Phase('aggregate', self.rounds + 1))

  def num_calls(self, phase: Phase) -> int:
    """Returns how many calls a phase has for one question, the raw one included."""
    width = len(self.proposers)
    if phase.kind == 'review':
      return width**2 if self.share_reviews else width**3
    return width if phase.kind == 'proposal' else 1 + self.raw


class Question(NamedTuple):
  """A problem as `moa_messages.conversation` asks it."""

  id: str
  messages: Messages


class Call(NamedTuple):
  """One request. `kind` is that of its phase, or 'raw' for the aggregator alone."""

  question_id: str
  kind: str
  layer: int
  model: str
  messages: Messages


Answer = Callable[[Sequence[Call]], Sequence[str]]
"""Takes calls and returns the text of each, in their order."""


def choose_problems(
  problems: Sequence[Problem], count: int, *, seed: int
) -> list[Problem]:
  """Returns `count` of the problems, in their order, by seed and problem ids.

  The choice does not depend on the order, and a larger one holds a smaller one. The
  authors draw 1000 questions of the test split without a seed.

  Raises:
    ValueError: There are fewer problems.
  """
  if not 0 < count <= len(problems):
    raise ValueError(f'count={count}; want 1 to {len(problems)}, as many as there are')

  def rank(place: int) -> bytes:
    return hashlib.sha256(f'{seed}/{problems[place].id}'.encode()).digest()

  chosen = sorted(range(len(problems)), key=rank)[:count]
  return [problems[place] for place in sorted(chosen)]


def next_calls(
  mixture: Mixture, question: Question, history: History
) -> tuple[Call, ...]:
  """Returns the calls of the next phase of a question; none when it is done.

  Args:
    mixture: Who is asked.
    question: What is asked.
    history: The answers to all calls before, by phase and in the order of the calls.

  Raises:
    ValueError: The history is that of another mixture.
  """
  phases = mixture.phases
  found = [len(texts) for texts in history]
  if found != [mixture.num_calls(phase) for phase in phases[: len(history)]]:
    raise ValueError(
      f'question {question.id!r} has {found} answers by phase, but the mixture asks '
      f'for {[mixture.num_calls(phase) for phase in phases]}; go on with the settings '
      'it was begun with'
    )
  if len(history) == len(phases):
    return ()
  phase = phases[len(history)]
  said = dict(zip(phases, history))
  answers = said.get(Phase('proposal', phase.layer - 1), ())

  def call(kind: str, model: str, messages: Messages) -> Call:
    return Call(question.id, kind, phase.layer, model, messages)

  def shown(references: Sequence[str]) -> Messages:
    return moa_messages.with_references(
      question.messages,
      references,
      placement=mixture.placement,
      synthesis=mixture.synthesis,
      reminder=mixture.reminder,
    )

  if phase.kind == 'review':
    asked = [
      moa_messages.review_messages(
        question.messages, answer, instruction=mixture.review
      )
      for answer in answers
    ]
    return tuple(
      call('review', reviewer, messages)
      for _ in mixture.proposers[: 1 if mixture.share_reviews else None]
      for messages in asked
      for reviewer in mixture.proposers
    )
  if phase.kind == 'proposal':
    reviews = said.get(Phase('review', phase.layer), ())
    return tuple(
      call('proposal', model, shown(_references(mixture, answers, reviews, reader)))
      for reader, model in enumerate(mixture.proposers)
    )
  calls = [call('aggregate', mixture.aggregator, shown(answers))]
  if mixture.raw:
    calls.append(call('raw', mixture.aggregator, question.messages))
  return tuple(calls)


def _references(
  mixture: Mixture, answers: Sequence[str], reviews: Sequence[str], reader: int
) -> list[str]:
  """The answers as one proposer gets them, each with the reviews made for it."""
  width = len(mixture.proposers)
  first = 0 if mixture.share_reviews else reader * width * width
  return [
    moa_messages.with_reviews(answer, reviews[start : start + width])
    for start, answer in zip(range(first, first + width * width, width), answers)
  ]


def step(
  mixture: Mixture,
  questions: Sequence[Question],
  histories: Mapping[str, History],
  answer: Answer,
) -> dict[str, History]:
  """Runs the next phase of every question that is not done; returns all histories.

  Args:
    mixture: Who is asked.
    questions: Of different ids.
    histories: By question id; a question that is not there is at its beginning.
    answer: Called once, with the calls of all questions; not at all when all are done.

  Raises:
    ValueError: An id twice, a history of another mixture, or not one text a call.
  """
  counts = collections.Counter(question.id for question in questions)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    raise ValueError(f'question ids {twice[:8]} are there twice; give each its own')
  after = {question.id: histories.get(question.id, ()) for question in questions}
  calls = [
    call
    for question in questions
    for call in next_calls(mixture, question, after[question.id])
  ]
  if not calls:
    return after
  texts = answer(calls)
  if len(texts) != len(calls) or not all(isinstance(text, str) for text in texts):
    raise ValueError(
      f'want one string for each of {len(calls)} calls, got {len(texts)}: {texts!r:.80}'
    )
  said: dict[str, list[str]] = {}
  for call, text in zip(calls, texts, strict=True):
    said.setdefault(call.question_id, []).append(text)
  return after | {name: (*after[name], tuple(said[name])) for name in said}


def run(
  mixture: Mixture,
  questions: Sequence[Question],
  answer: Answer,
  *,
  histories: Mapping[str, History] | None = None,
) -> dict[str, History]:
  """Returns the histories of all questions, run to their end by `step` after `step`."""
  done = dict(histories or {})
  for _ in mixture.phases:
    done = step(mixture, questions, done, answer)
  return done


def transcript(mixture: Mixture, question: Question, history: History) -> Record:
  """Returns all that was said on a question.

  Returns:
    `problem_id`, `text` (the aggregator's answer), `raw` (its answer alone, or None),
    and `calls`: `kind`, `layer`, `model`, `messages` and `text` of each.

  Raises:
    ValueError: The question is not done, or the history is that of another mixture.
  """
  if next_calls(mixture, question, history):
    raise ValueError(
      f'question {question.id!r} is at phase {len(history)} of {len(mixture.phases)}; '
      'run it to the end first'
    )
  calls: list[Record] = []
  for phase, texts in enumerate(history):
    asked = next_calls(mixture, question, history[:phase])
    for call, text in zip(asked, texts, strict=True):
      calls.append(
        {
          'kind': call.kind,
          'layer': call.layer,
          'model': call.model,
          'messages': list(call.messages),
          'text': text,
        }
      )
  return {
    'problem_id': question.id,
    'text': history[-1][0],
    'raw': history[-1][1] if mixture.raw else None,
    'calls': calls,
  }


def count_calls(transcripts: Iterable[Record]) -> dict[str, int]:
  """Returns numbers of calls: `proposal`, `review`, `aggregate`, `raw`, and `empty`.

  The last counts answers that say nothing. They are shown to others as they are.
  """
  counts = dict.fromkeys(('proposal', 'review', 'aggregate', 'raw', 'empty'), 0)
  for record in transcripts:
    for call in record['calls']:
      counts[call['kind']] += 1
      counts['empty'] += not call['text'].strip()
  return counts


def without_dollars(text: str) -> str:
  """Returns an answer as MoA is graded there: its `#### $18` is 18, unlike MoO's.

  For the rule 'moo_gsm8k', which drops the commas.
  """
  return text.replace('$', '')
