"""MuggleMath's response augmentation: answers to new questions, and which stay.

Li et al. 2023, arXiv 2310.05506: chain-of-thought answers at a high temperature
(T >= 1) after a varied number of worked examples. With 35 thousand questions, more than
about 3 responses each gained nothing. Prompts are our own wording.
"""

import random
from collections import Counter
from collections.abc import Sequence

from mrjax.data.prompts import Prompt, render_completion, render_prompt
from mrjax.grading import votes
from mrjax.grading.calculator import all_equations_hold
from mrjax.grading.rule import Rule
from mrjax.records import Problem, Record

_TEACHER = (
  'You are a careful mathematics teacher. Solve the problem step by step, and {ending}.'
)
_ENDINGS = {
  'gsm8k': 'end with a line that holds #### and the answer as a bare number',
  'math': 'put the final answer in \\boxed{}',
}


def choose_shots(
  pool: Sequence[Problem],
  num_shots: int,
  *,
  seed: int,
  problem_id: str,
  sample_index: int = 0,
) -> list[Problem]:
  """Returns worked examples for one request, drawn at random without return.

  The draw depends on its arguments alone: the seed, the problem that is asked (which is
  never its own example), the sample index and the pool in its order.

  Raises:
    ValueError: The pool has too few others, or an example has no solution.
  """
  if not 0 <= num_shots < max(len(pool), 1):
    raise ValueError(
      f'num_shots={num_shots} of a pool of {len(pool)} problems; want at least 0 and '
      'fewer than there are'
    )
  if not num_shots:
    return []
  rng = random.Random(f'{seed}/{problem_id}/{sample_index}/shots')
  drawn = (pool[i] for i in rng.sample(range(len(pool)), num_shots + 1))
  shots = [problem for problem in drawn if problem.id != problem_id][:num_shots]
  for shot in shots:
    if shot.solution is None:
      raise ValueError(
        f'problem {shot.id!r} has no solution to show as a worked example; leave it '
        'out of the pool'
      )
  return shots


def response_messages(
  problem: Problem, shots: Sequence[Problem] = (), *, form: str = 'gsm8k'
) -> list[Record]:
  """Returns the request for a solution as chat messages, examples as turns before it.

  Args:
    problem: To be solved.
    shots: Worked examples, with solutions.
    form: Where the answer goes: 'gsm8k' (`#### n`) or 'math' (a box).

  Raises:
    ValueError: No such form.
  """
  if form not in _ENDINGS:
    raise ValueError(f'unknown form {form!r}; one of {", ".join(_ENDINGS)}')
  content = _TEACHER.format(ending=_ENDINGS[form])
  messages: list[Record] = [{'role': 'system', 'content': content}]
  for shot in shots:
    messages += [
      {'role': 'user', 'content': shot.question},
      {'role': 'assistant', 'content': shot.solution},
    ]
  return [*messages, {'role': 'user', 'content': problem.question}]


def response_prompt(
  problem: Problem, shots: Sequence[Problem] = (), *, template: str = 'qa'
) -> Prompt:
  """Returns the request for a model without chat template: examples, then the question.

  Each is rendered in the layout of `template`, and blank lines part them.

  Raises:
    ValueError: An unknown template, or 'chat': take `response_messages` for that.
  """
  if template == 'chat':
    raise ValueError("template 'chat' has turns; take response_messages for it")
  asked = render_prompt(template, problem)
  worked = [
    (render_prompt(template, shot).text + render_completion(template, shot)).rstrip()
    for shot in shots
  ]
  return Prompt('\n\n'.join([*worked, asked.text]), add_bos=asked.add_bos)


def filter_responses(
  samples: Sequence[Record],
  *,
  rule: Rule,
  calculator_check: bool = False,
  vote_share: float | None = None,
  max_responses: int | None = None,
) -> tuple[list[Record], dict[str, int]]:
  """Returns the responses to one question that stay, by sample index, and the reasons.

  Reasons, in the order in which they are looked for: `error` and `cut` (by
  `finish_reason`), `empty`, `no_answer` (the rule finds none), `false_annotation`,
  `no_majority` and `minority`, `repeated` (the text of an earlier one), `surplus`.
  Every sample stays or is counted under one of them.

  Args:
    samples: With `sample_index`, `text` and `finish_reason`.
    rule: Finds answers and compares them.
    calculator_check: Refuse responses with a false `<<a+b=c>>`, as RFT does; not in the
      paper.
    vote_share: An extension: only responses with the answer that more than this share
      of the well-formed ones give, at least 0.5, so that it is the only one. Repeated
      texts vote too. None: no vote.
    max_responses: Keep so many, the first.

  Raises:
    ValueError: A bad share or number, or an index twice.
  """
  if vote_share is not None and not 0.5 <= vote_share < 1:
    raise ValueError(
      f'vote_share={vote_share}; want 0.5 <= share < 1: at most one answer has more '
      'than half of the votes'
    )
  if max_responses is not None and max_responses < 1:
    raise ValueError(f'max_responses={max_responses}; want at least 1')
  ordered = sorted(samples, key=lambda sample: sample['sample_index'])
  if len({sample['sample_index'] for sample in ordered}) < len(ordered):
    raise ValueError(
      f'a sample of problem {ordered[0].get("problem_id")!r} comes twice; give those '
      'of one run'
    )
  dropped: Counter[str] = Counter()
  formed: list[tuple[Record, str]] = []
  for sample in ordered:
    text = sample['text']
    answer = rule.extract(text)
    if sample.get('finish_reason') == 'error':
      dropped['error'] += 1
    elif sample.get('finish_reason') == 'length':
      dropped['cut'] += 1
    elif not text.strip():
      dropped['empty'] += 1
    elif answer is None:
      dropped['no_answer'] += 1
    elif calculator_check and not all_equations_hold(text):
      dropped['false_annotation'] += 1
    else:
      formed.append((sample, answer))
  if vote_share is not None:
    formed = _majority(formed, rule, vote_share, dropped)
  kept: list[Record] = []
  texts: set[str] = set()
  for sample, _ in formed:
    text = sample['text'].strip()
    if text in texts:
      dropped['repeated'] += 1
    elif max_responses is not None and len(kept) == max_responses:
      dropped['surplus'] += 1
    else:
      texts.add(text)
      kept.append(sample)
  return kept, dict(dropped)


def response_records(
  problem: Problem, samples: Sequence[Record], *, template: str = 'alpaca'
) -> list[Record]:
  """Returns SFT records of responses that stayed, with the fields of `rft.collect`.

  Raises:
    ValueError: An unknown template, or 'chat', which needs a tokenizer.
  """
  prompt = render_prompt(template, problem).text
  records = []
  for sample in samples:
    solved = Problem(
      problem.id,
      problem.question,
      solution=sample['text'].strip(),
      options=problem.options,
    )
    records.append(
      {
        'prompt': prompt,
        'completion': render_completion(template, solved),
        'problem_id': problem.id,
        'sample_index': sample['sample_index'],
      }
    )
  return records


def _majority(
  formed: list[tuple[Record, str]], rule: Rule, share: float, dropped: Counter[str]
) -> list[tuple[Record, str]]:
  """The responses with the answer of the majority; counts the others."""
  answers = [answer for _, answer in formed]
  # No seed matters: where the draw among tied classes decides, none has the share.
  winner = votes.equivalence(answers, rule.is_equal, seed=0)
  if winner is None:
    return []
  agree = [answer == winner or rule.is_equal(winner, answer) for answer in answers]
  if sum(agree) <= share * len(agree):
    dropped['no_majority'] += len(agree)
    return []
  if len(agree) > sum(agree):
    dropped['minority'] += len(agree) - sum(agree)
  return [found for found, same in zip(formed, agree, strict=True) if same]
