"""MuggleMath: new questions made from old ones.

Li et al. 2023, "MuggleMath: Assessing the Impact of Query and Response Augmentation on
Math Reasoning", arXiv 2310.05506. One request (see `mugglemath_prompts`) turns a
question into five, one for each of `QUERY_TYPES`; a MATH problem gives five questions
with their solutions. `mugglemath_responses` has what comes after.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mrjax.grading.rules import get_rule
from mrjax.methods.mugglemath_prompts import QUERY_TYPES, check_types
from mrjax.records import Problem, Record


class Parsed(NamedTuple):
  """What one response gave.

  Attributes:
    queries: (question, solution) by type; the solution is None in the GSM8K form.
    dropped: Types that gave nothing, by reason. With `queries` they are all types.
    num_extra: Items of no type asked for, or of one that came already.
  """

  queries: dict[str, tuple[str, str | None]]
  dropped: dict[str, str]
  num_extra: int


_ITEM = re.compile(r'\s*(\d+)\.\s*\*\*([^*]+?)(?::\*\*|\*\*\s*:)[ \t]*(.*)')
_ITEM_LIKE = re.compile(r'\s*\d+\s*[.)]')  # a malformed item is no continuation


def parse_queries(
  text: str, *, types: Sequence[str] = tuple(QUERY_TYPES), cut: bool = False
) -> Parsed:
  """Reads a numbered list with bold labels: the rest of the line is the new question.

  An item is of the type of its number. The colon may stand inside the bold as well as
  after it. Reasons for a type to give nothing: `missing`, `empty`, `wrong_label` (its
  label is that of another type), `continued` (text goes on in the next line, so the
  question is not whole) and `cut` (the last item of a response that was cut short).

  Args:
    text: The response.
    types: As they were asked for.
    cut: Whether the response ended at the length limit.

  Raises:
    ValueError: As `query_messages`.
  """
  chosen = check_types(types)
  lines = text.splitlines()
  items = [_ITEM.fullmatch(line) for line in lines]
  places = [place for place, item in enumerate(items) if item]
  labels = {_plain(kind.label) for kind in QUERY_TYPES.values()}
  found: dict[str, str] = {}
  dropped: dict[str, str] = {}
  num_extra = 0
  for place in places:
    item = items[place]
    assert item is not None
    number = _small_number(item[1])
    if not 1 <= number <= len(chosen) or types[number - 1] in {**found, **dropped}:
      num_extra += 1
      continue
    name, question = types[number - 1], item[3].strip()
    label = _plain(item[2])
    follows = lines[place + 1] if place + 1 < len(lines) else ''
    if cut and place == places[-1]:
      dropped[name] = 'cut'
    elif label in labels and label != _plain(chosen[number - 1].label):
      dropped[name] = 'wrong_label'
    elif not question:
      dropped[name] = 'empty'
    elif follows.strip() and not _ITEM_LIKE.match(follows):
      dropped[name] = 'continued'
    else:
      found[name] = question
  dropped |= {name: 'missing' for name in types if name not in {**found, **dropped}}
  return Parsed(
    {name: (question, None) for name, question in found.items()}, dropped, num_extra
  )


_HEAD = re.compile(r'^\[Problem (\d+)(?::[^\]\n]*)?\][ \t]*$', re.MULTILINE)
_BOXED = get_rule('boxed_strict')


def parse_math_queries(
  text: str, *, types: Sequence[str] = tuple(QUERY_TYPES), cut: bool = False
) -> Parsed:
  """Reads problems with solutions between their marks.

  A type stands for its number here, since the prompt lets others take its place.
  Reasons for one to give nothing: `missing`, `unended` (no end mark of its number
  before the next problem, as where the response was cut), `no_solution` (no solution
  mark of its number, or nothing after it), `empty` and `no_box`.

  Args:
    text: The response.
    types: As they were asked for.
    cut: Without effect: the end marks tell.

  Raises:
    ValueError: As `query_messages`.
  """
  del cut
  check_types(types)
  heads = list(_HEAD.finditer(text))
  found: dict[str, tuple[str, str | None]] = {}
  dropped: dict[str, str] = {}
  num_extra = 0
  for head, following in itertools.zip_longest(heads, heads[1:]):
    number = _small_number(head[1])
    if not 1 <= number <= len(types) or types[number - 1] in {**found, **dropped}:
      num_extra += 1
      continue
    name = types[number - 1]
    body = text[head.end() : following.start() if following else len(text)]
    body, end, _ = body.partition(f'\n[End {number}]')
    question, _, solution = body.partition(f'\n[Solution {number}]')
    question, solution = question.strip(), solution.strip()
    if not end:
      dropped[name] = 'unended'
    elif not solution:
      dropped[name] = 'no_solution'
    elif not question:
      dropped[name] = 'empty'
    elif _BOXED.extract(solution) is None:
      dropped[name] = 'no_box'
    else:
      found[name] = question, solution
  dropped |= {name: 'missing' for name in types if name not in {**found, **dropped}}
  return Parsed(found, dropped, num_extra)


def derived_id(problem_id: str, name: str, *, query_set: str, sample_index: int) -> str:
  """Returns the id of the new problem of a type: whence it is, in full.

  Args:
    problem_id: The old problem's.
    name: The type, of `QUERY_TYPES`.
    query_set: Name of the run, as the paper's D1, D2 and D3.
    sample_index: Of the response.
  """
  return f'{problem_id}-{query_set}-{sample_index}-{name}'


def augment_queries(
  problems: Sequence[Problem],
  samples: Iterable[Record],
  *,
  query_set: str,
  types: Sequence[str] = tuple(QUERY_TYPES),
  math: bool = False,
) -> tuple[list[Problem], dict[str, Any]]:
  """Returns the new problems, and statistics.

  They are in the order of the old ones, then of sample index and type; `source` is
  that of the old problem with the type. A new question that is the same as an old one,
  or as an earlier new one, but for case and spaces, is dropped.

  Args:
    problems: The old ones; no new question may repeat any of them.
    samples: Responses to the request for each, `problem_id`, `sample_index`, `text` and
      `finish_reason`; in any order.
    query_set: Part of the new ids.
    types: As they were asked for.
    math: The form of MATH; new problems then have `solution` and `answer`.

  Returns:
    The problems, and `num_problems`, `num_without_samples`, `num_samples`,
    `num_queries`, `by_type`, `num_extra` (items of no type) and `dropped`, by reason:
    those of the parser, `as_old` and `repeated`. Types times samples are all queries
    and all dropped.

  Raises:
    ValueError: A sample of no problem here, or one twice; or bad types.
  """
  check_types(types)
  by_problem = _by_problem(problems, samples)
  parse = parse_math_queries if math else parse_queries
  seen = dict.fromkeys((_plain(p.question) for p in problems), 'as_old')
  new: list[Problem] = []
  dropped: Counter[str] = Counter()
  by_type = dict.fromkeys(types, 0)
  num_samples = num_extra = 0
  for problem in problems:
    for sample in by_problem[problem.id]:
      cut = sample.get('finish_reason') == 'length'
      parsed = parse(sample['text'], types=types, cut=cut)
      num_samples += 1
      num_extra += parsed.num_extra
      dropped.update(parsed.dropped.values())
      for name in types:
        if name not in parsed.queries:
          continue
        question, solution = parsed.queries[name]
        if reason := seen.get(_plain(question)):
          dropped[reason] += 1
          continue
        seen[_plain(question)] = 'repeated'
        by_type[name] += 1
        index = sample['sample_index']
        new.append(
          Problem(
            derived_id(problem.id, name, query_set=query_set, sample_index=index),
            question,
            answer=_BOXED.extract(solution) if solution else None,
            solution=solution,
            source=f'{problem.source or "mugglemath"}/{name}',
          )
        )
  return new, {
    'num_problems': len(problems),
    'num_without_samples': sum(not found for found in by_problem.values()),
    'num_samples': num_samples,
    'num_queries': len(new),
    'by_type': by_type,
    'num_extra': num_extra,
    'dropped': dict(sorted(dropped.items())),
  }


def _plain(text: str) -> str:
  return ' '.join(text.casefold().split())


def _small_number(digits: str) -> int:
  # Python refuses to read thousands of digits, and a model may write them.
  return int(digits) if len(digits) < 4 else 0


def _by_problem(
  problems: Sequence[Problem], samples: Iterable[Record]
) -> dict[str, list[Record]]:
  """The samples of every problem, by index."""
  found: dict[str, dict[int, Record]] = {problem.id: {} for problem in problems}
  for sample in samples:
    key, index = sample['problem_id'], sample['sample_index']
    if key not in found:
      raise ValueError(
        f'a sample has problem_id {key!r:.80}, which is not among the {len(found)} '
        'problems; give the problems that were sampled'
      )
    if index in found[key]:
      raise ValueError(
        f'sample {index} of problem {key!r} comes twice; give the samples of one run, '
        'each once'
      )
    found[key][index] = sample
  return {key: [rows[i] for i in sorted(rows)] for key, rows in found.items()}
