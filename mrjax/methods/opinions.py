"""Opinions of several models on the same problems, joined and made into training rows.

The data of Mixture of Opinions (Chen, Pesaranghader and Sadhu 2025, arXiv 2502.19622),
whose layouts are in `moo`. As in the authors' code opinions are what models said up to
a stop string, stripped; wrong, empty, cut and repeated ones stay, but are counted. Not
as there: an opinion or a label without `####` is cut to the answer of its last box, so
that the ablations mean something on MATH too.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mrjax.grading.boxed import last_boxed
from mrjax.grading.rules import get_rule
from mrjax.methods import moo
from mrjax.records import DataError, Problem, Record

VARIANTS = ('full', 'no-cot', 'answer-only-label')
FORMS = ('prompt_completion', 'text')


def opinion_record(
  problem: Problem, response: str, *, prompt: str, finish_reason: str = 'stop'
) -> Record:
  """Returns the record of one model's answer to a problem.

  Args:
    problem: Its solution becomes the label.
    response: What the model said up to a stop string; it is stripped here.
    prompt: What the model was asked with.
    finish_reason: 'length' where the answer was cut short, which is counted later.

  Raises:
    ValueError: The problem has no solution.
  """
  if problem.solution is None:
    raise ValueError(f'problem {problem.id!r} has no solution to be the label')
  return {
    'problem_id': problem.id,
    'prompt_ori': moo.prompt_ori_of(problem),
    'prompt': prompt,
    'label': problem.solution,
    'response': response.strip(),
    'finish_reason': finish_reason,
  }


class OpinionFile(NamedTuple):
  """One model's opinions of a split: (line, record) as `records.read_numbered` gives.

  Records are those of `opinion_record`; they need `prompt_ori`, `label`, `response`.
  """

  model: str
  path: str
  records: Iterable[tuple[int, Record]]


class Opinion(NamedTuple):
  """What a model said, where that is written, and whether it was cut short."""

  model: str
  response: str
  path: str
  line: int
  is_cut: bool


@dataclasses.dataclass(frozen=True)
class OpinionRow:
  """One question with the opinions of all models, in the order of their files."""

  problem_id: str | None
  prompt_ori: str
  label: str
  opinions: tuple[Opinion, ...]


def join_opinions(files: Sequence[OpinionFile]) -> Iterator[OpinionRow]:
  """Yields the rows that the files hold together, in their common order.

  Raises:
    ValueError: No file, or a model twice.
    DataError: The files differ in their questions, labels or number; names the first
      row that does. Or a field is no string.
  """
  models = [file.model for file in files]
  if not models or len(set(models)) < len(models):
    raise ValueError(f'want the opinions of one or more different models: {models}')
  for number, group in enumerate(
    itertools.zip_longest(*[file.records for file in files])
  ):
    items = [item for item in group if item is not None]
    if len(items) < len(files):
      short = files[group.index(None)]
      file, item = next(pair for pair in zip(files, group) if pair[1] is not None)
      raise DataError(
        file.path,
        item[0],
        f'row {number} has no counterpart in {short.path}, which holds {number} rows; '
        f'collect the opinions of {short.model} to the end, or of the same problems',
      )
    yield _joined(files, items)


def _joined(
  files: Sequence[OpinionFile], items: Sequence[tuple[int, Record]]
) -> OpinionRow:
  first_line, first = items[0]
  opinions = []
  for file, (line, record) in zip(files, items, strict=True):
    for name in ('prompt_ori', 'label', 'response'):
      if not isinstance(record.get(name), str):
        raise DataError(
          file.path, line, f'field {name!r} must be a string: {record.get(name)!r:.80}'
        )
    for name in ('prompt_ori', 'label'):
      if record[name] != first[name]:
        raise DataError(
          file.path,
          line,
          f'{name} {record[name]!r:.80} is not that of {files[0].path}:{first_line}, '
          f'{first[name]!r:.80}; opinions must be of the same problems in the same '
          'order: collect them again',
        )
    is_cut = record.get('finish_reason') == 'length'
    opinions.append(Opinion(file.model, record['response'], file.path, line, is_cut))
  return OpinionRow(
    first.get('problem_id'), first['prompt_ori'], first['label'], tuple(opinions)
  )


def accuracies(rows: Iterable[OpinionRow], *, rule: str) -> dict[str, float]:
  """Returns by model the share of its opinions that are right, by a grading rule.

  Raises:
    ValueError: No row, no such rule, or a label without an answer.
  """
  grade = get_rule(rule).grade
  correct: collections.Counter[str] = collections.Counter()
  num_rows = 0
  for row in rows:
    num_rows += 1
    for opinion in row.opinions:
      correct[opinion.model] += grade(opinion.response, row.label)[1]
  if not num_rows:
    raise ValueError('no opinions to grade: there is no row')
  return {model: count / num_rows for model, count in correct.items()}


def weaker_models(accuracies: Mapping[str, float], *, main: str) -> tuple[str, ...]:
  """Returns the models that are right less often than the main one.

  The authors name their weaker models by hand; where the paper draws the line is not
  known, and ours is accuracy on the rows at hand.

  Raises:
    ValueError: The main model has no opinions.
  """
  if main not in accuracies:
    raise ValueError(
      f'the main model {main!r} gave no opinions, which say how good it is; collect '
      f'them too: there are only those of {", ".join(accuracies)}'
    )
  return tuple(name for name, a in accuracies.items() if a < accuracies[main])


# Training rows ----------------------------------------------------------------

_COUNTS = (
  *('num_rows', 'num_opinions', 'num_rows_without_opinions'),
  *('num_empty', 'num_cut', 'num_without_answer', 'num_escaped'),
  *('num_dropped_empty', 'num_dropped_repeated'),
)


def build_rows(
  rows: Iterable[OpinionRow],
  *,
  variant: str = 'full',
  models: Sequence[str] | None = None,
  drop_empty: bool = False,
  dedup: bool = False,
  reserved: str = 'error',
  form: str = 'prompt_completion',
) -> tuple[list[Record], dict[str, int]]:
  """Returns training records, one for each row, and what was counted on the way.

  The paper's other variants are choices of models: `models=weaker_models(...)`, or any
  subset. They combine with these.

  Args:
    rows: As `join_opinions` gives them.
    variant: 'full'; 'no-cot' cuts every opinion to its final answer, and leaves one
      without a marker whole, as the authors do; 'answer-only-label' cuts the label.
    models: Whose opinions are written, in the order of the files; None takes all.
    drop_empty: Leaves out opinions that say nothing. Off in the paper.
    dedup: Leaves out opinions that repeat an earlier one of the row letter by letter.
      What was said counts, not what a variant leaves of it, so that rows of all
      variants show the same models. Off in the paper.
    reserved: As in `moo.protect`.
    form: 'prompt_completion', or the paper's 'text', both in one string, for a loss on
      all tokens.

  Returns:
    The records, with `problem_id` where it is known, and `num_rows`, `num_opinions`
    (written), `num_rows_without_opinions`; of those written `num_empty`, `num_cut` (at
    the limit of tokens), `num_without_answer` (no marker, or nothing behind it) and
    `num_escaped`; `num_dropped_empty`, `num_dropped_repeated`.

  Raises:
    ValueError: An unknown variant, model, policy or form, or no row.
    DataError: An opinion or a question that cannot be written, or a label without a
      final answer where that is wanted.
  """
  if variant not in VARIANTS:
    raise ValueError(f'unknown variant {variant!r}; one of {", ".join(VARIANTS)}')
  if form not in FORMS:
    raise ValueError(f'unknown form {form!r}; one of {", ".join(FORMS)}')
  if models is not None and not models:
    raise ValueError('models is empty: no opinion would be left; None takes all models')
  moo.protect('', reserved=reserved)
  counts = dict.fromkeys(_COUNTS, 0)
  records: list[Record] = []
  for row in rows:
    opinions = _selected(row, models, drop_empty, dedup, counts)
    texts = []
    for opinion in opinions:
      answer = final_answer(opinion.response)
      text = opinion.response
      if variant == 'no-cot' and answer is not None:
        text = answer
      with _blaming(opinion):
        counts['num_escaped'] += moo.protect(text, reserved=reserved) != text
      counts['num_empty'] += not opinion.response.strip()
      counts['num_cut'] += opinion.is_cut
      counts['num_without_answer'] += not answer
      texts.append(text)
    counts['num_rows'] += 1
    counts['num_opinions'] += len(texts)
    counts['num_rows_without_opinions'] += not texts
    with _blaming(row.opinions[0]):
      prompt = moo.format_prompt(row.prompt_ori, texts, reserved=reserved)
      label = row.label if variant != 'answer-only-label' else _answer_line(row.label)
    record = {'text': prompt + label}
    if form != 'text':
      record = {'prompt': prompt, 'completion': label}
    if row.problem_id is not None:
      record['problem_id'] = row.problem_id
    records.append(record)
  if not records:
    raise ValueError('no rows to build: the opinions are empty')
  return records, counts


@contextlib.contextmanager
def _blaming(opinion: Opinion) -> Iterator[None]:
  """Names the file and line of an opinion in what is wrong with it or its row."""
  try:
    yield
  except ValueError as error:
    raise DataError(opinion.path, opinion.line, str(error)) from None


def _selected(
  row: OpinionRow,
  models: Sequence[str] | None,
  drop_empty: bool,
  dedup: bool,
  counts: dict[str, int],
) -> list[Opinion]:
  known = [opinion.model for opinion in row.opinions]
  unknown = sorted(set(models or ()) - set(known))
  if unknown:
    raise ValueError(f'no opinions of {unknown}; there are those of {known}')
  selected = []
  seen: set[str] = set()
  for opinion in row.opinions:
    if models is not None and opinion.model not in models:
      continue
    response = opinion.response.strip()
    if drop_empty and not response:
      counts['num_dropped_empty'] += 1
    elif dedup and response in seen:
      counts['num_dropped_repeated'] += 1
    else:
      seen.add(response)
      selected.append(opinion)
  return selected


def final_answer(text: str) -> str | None:
  """Returns what follows the last `####`, else what the last box holds; may be empty.

  The authors know `####` alone, and cut nothing off a MATH solution.
  """
  found = get_rule('moo_gsm8k').marked(text)
  return last_boxed(text) if found is None else found


def _answer_line(label: str) -> str:
  answer = final_answer(label)
  if not answer:
    raise ValueError(f'the label has no final answer to be cut to: {label[-60:]!r}')
  return f'#### {answer}' if '####' in label else f'\\boxed{{{answer}}}'
