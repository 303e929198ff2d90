"""Evaluates a model on a problem set: samples, grades and sums up."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mrjax.checkpoint.adapted import resolve_adapted
from mrjax.data.problems import Problem, load_problems
from mrjax.data.tokenization import load_tokenizer
from mrjax.grading.rules import get_rule
from mrjax.grading.votes import VOTES
from mrjax.records import write_jsonl
from mrjax.runs import common, grade, sample, score
from mrjax.runs.value_model import resolve_value_model
from mrjax.sharding.mesh import make_mesh

# A prompt that asks for another form of answer than the reference solution has. By
# layout and by form: 'number' (`#### 18`), 'boxed' or 'choice'.
_RULES_OF_LAYOUTS = {
  ('qsharp', 'number'): 'boxed_symbolic',
  ('moo', 'number'): 'moo_gsm8k',
  ('moo', 'choice'): 'moo_gsm8k',
  ('moo', 'boxed'): 'moo_math',
  ('w2s', 'number'): 'w2s_gsm8k',
  ('w2s', 'boxed'): 'w2s_math',
  ('lema', 'number'): 'lema_gsm8k',
  ('lema', 'boxed'): 'lema_math',
  ('lema', 'choice'): 'lema_csqa',
}
_RULES = {'number': 'gsm8k', 'boxed': 'boxed_symbolic', 'choice': 'choice'}


@dataclasses.dataclass(frozen=True)
class Config(sample.Config):
  """One evaluation: how to sample (greedily, one sample a problem) and to grade."""

  temperature: float = 0.0  # 0 is greedy
  rule: str = ''  # grading rule; '' takes the one of the data and the prompt layout
  vote: str = 'string_first'  # for maj@k: 'string_first', 'equivalence' or ''
  value_model: str = ''  # run of train_value: for best_of@k and weighted_maj@k

  def __post_init__(self):
    super().__post_init__()
    if self.rule:
      get_rule(self.rule)
    if self.vote and self.vote not in VOTES:
      raise ValueError(f'--vote={self.vote}: want one of {", ".join(VOTES)}')


def run(config: Config) -> dict[str, Any]:
  """Leaves a run directory and returns its `metrics.json`.

  The directory holds `samples/` (a sampling run), `problems.jsonl`, `graded.jsonl`
  and `metrics.json`: `rule` and the summary of `Tally.summary`, with `by_level` where
  the problems have levels; with a value model also `valued.jsonl`, the samples with
  their values. A run that was stopped goes on; a finished one is graded again. With
  several processes, all need to see the directory, and only the first one returns
  metrics; the others return {}.

  Raises:
    ValueError: What is asked cannot be done; before weights are loaded.
    OutputError: `output_dir` belongs to something else.
  """
  problems = load_problems(
    config.data, data_root=config.data_root or None, limit=config.limit or None
  )
  grade.golds_of(problems, config.data)  # every problem must have one
  rule = config.rule or default_rule(config.prompt_template, problems)
  # A wrong name, mesh or adapter fails before the directory is made.
  model = resolve_adapted(config.model, config.adapter)
  if config.value_model:
    tokenizer = load_tokenizer(config.tokenizer or str(model.source.hf_dir))
    source = resolve_value_model(config.value_model)
    tokenizer.check_same(
      load_tokenizer(source.hf_dir), f'--value_model={config.value_model}'
    )
  sample.split_cpu(config, model.source)
  common.start_processes()
  facts = model.adapter_facts(make_mesh(config.mesh, jax.local_devices()))
  output_dir = Path(config.output_dir)
  if jax.process_index() == 0:
    common.prepare_output_dir(
      output_dir, config, facts=facts, overwrite=config.overwrite, resume=True
    )
    write_jsonl(
      output_dir / 'problems.jsonl', (problem.to_record() for problem in problems)
    )
  _wait_for_all('mrjax evaluation directory')
  names = [field.name for field in dataclasses.fields(sample.Config)]
  settings = {name: getattr(config, name) for name in names}
  settings |= {'output_dir': str(output_dir / 'samples'), 'overwrite': False}
  sample.run(sample.Config(**settings))
  _wait_for_all('mrjax evaluation samples')
  if jax.process_index() != 0:
    return {}
  samples = output_dir / 'samples'
  if config.value_model:
    score.run(
      score.Config(
        value_model=config.value_model,
        input=str(samples),
        output=str(output_dir / 'valued.jsonl'),
        mesh=config.mesh,
        dtype=config.dtype,
        overwrite=True,
      )
    )
    samples = output_dir / 'valued.jsonl'
  return grade.run(
    grade.Config(
      rule=rule,
      input=str(samples),
      output=str(output_dir / 'graded.jsonl'),
      metrics=str(output_dir / 'metrics.json'),
      vote=config.vote if config.num_samples > 1 else '',
      problems=f'jsonl:{output_dir / "problems.jsonl"}',
      seed=config.seed,
      overwrite=True,
    )
  )


def default_rule(prompt_template: str, problems: Sequence[Problem]) -> str:
  """Returns the rule for the answers of a problem set under a prompt layout.

  Raises:
    ValueError: The problems do not show the form of their answers, or not one alone.
  """
  forms = {_form(problem) for problem in problems}
  form = forms.pop()
  if forms or not form:
    raise ValueError(
      'the problems do not all have options, a solution with "#### number" or one '
      'with \\boxed{}, so no grading rule follows; name one with --rule'
    )
  return _RULES_OF_LAYOUTS.get((prompt_template, form), _RULES[form])


def _form(problem: Problem) -> str:
  if problem.options:
    return 'choice'
  solution = problem.solution or ''
  return next((f for f, mark in _MARKS.items() if mark in solution), '')


_MARKS = {'number': '#### ', 'boxed': '\\boxed'}


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
