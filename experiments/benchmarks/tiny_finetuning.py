r"""What fine-tuning does to an embedded model: full, LoRA, QLoRA; then DPO and ORPO.

The model answers `arithmetic` as GSM8K does and has never seen a box. It learns to box
its answers from solutions of `arithmetic:train?form=boxed`, in full, with LoRA and with
QLoRA (NF4, folded into the full-precision weights for the evaluation). Preferences are
its own right samples over its wrong ones, which it tells apart by their likelihood
before, and boxed solutions over plain ones, which it does not; a part is held out.

  python -m experiments.benchmarks.tiny_finetuning --directory=outputs/tiny \
    --output=tiny_finetuning.jsonl

Run again after it was stopped, it goes on.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks.figures import emit
from mrjax.data.problems import load_problems
from mrjax.data.prompts import render_completion, render_prompt
from mrjax.records import Record, read_jsonl, write_jsonl
from mrjax.runs import cli, evaluate, preference, sft
from mrjax.runs.common import environment

_MODEL = flags.DEFINE_string('model', 'tiny-1m', 'Embedded model.')
_DIRECTORY = flags.DEFINE_string('directory', 'outputs/tiny', 'Of all runs.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of data order, adapters and samples.')
_NUM_TRAIN = flags.DEFINE_integer('num_train', 8000, 'Solutions to learn from.')
_NUM_TEST = flags.DEFINE_integer('num_test', 1000, 'Problems to evaluate on.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')

LAYOUT = 'qa'
WAYS: dict[str, dict[str, Any]] = {
  'full': {'learning_rate': 5e-4},
  'lora': {'learning_rate': 2e-3, 'lora_rank': 16},
  'qlora_nf4': {'learning_rate': 2e-3, 'lora_rank': 16, 'quantize': 'nf4'},
}
LOSSES: dict[str, dict[str, Any]] = {
  'before': {'loss': 'orpo', 'beta': 0.5, 'learning_rate': 0.0, 'num_steps': 1},
  'dpo': {'loss': 'dpo', 'beta': 0.1, 'learning_rate': 1e-4, 'num_epochs': 2},
  'orpo': {'loss': 'orpo', 'beta': 0.5, 'learning_rate': 1e-4, 'num_epochs': 2},
}
PROBLEMS = 'arithmetic:train?size=6000&seed=1'
NOT_BOXED = 'arithmetic:train?size=1200&seed=2'
BOXED = f'{NOT_BOXED}&form=boxed'
HELD_OUT = 4  # every fourth problem of them


def main(argv: Sequence[str]) -> None:
  del argv
  root = Path(_DIRECTORY.value)
  emit(
    'tiny_finetuning',
    _OUTPUT.value,
    model=_MODEL.value,
    seed=_SEED.value,
    num_train=_NUM_TRAIN.value,
    num_test=_NUM_TEST.value,
    boxed_accuracy=_compare_ways(root),
    right_over_wrong=_compare_losses(root, 'right', _right_and_wrong(root)),
    boxed_over_not=_compare_losses(root, 'boxed', _boxed_and_not()),
    versions=environment()['versions'],
  )


def _compare_ways(root: Path) -> dict[str, dict[str, float]]:
  found = {'before': _accuracy(root / 'before', _MODEL.value, '')}
  for name, options in WAYS.items():
    run = str(root / name)
    sft.run(
      sft.Config(
        model=_MODEL.value,
        data=f'arithmetic:train?form=boxed&size={_NUM_TRAIN.value}',
        prompt_template=LAYOUT,
        num_epochs=2,
        max_length=512,
        seed=_SEED.value,
        output_dir=run,
        **options,
      )
    )
    model, adapter = (_MODEL.value, run) if 'lora_rank' in options else (run, '')
    found[name] = _accuracy(root / f'{name}_test', model, adapter)
  return found


def _accuracy(directory: Path, model: str, adapter: str) -> dict[str, float]:
  """pass@1 of greedy decoding, with its 95% interval."""
  config = evaluate.Config(
    model=model,
    adapter=adapter,
    data=f'arithmetic:test?form=boxed&size={_NUM_TEST.value}',
    prompt_template=LAYOUT,
    output_dir=str(directory),
  )
  return evaluate.run(config)['pass@1']


def _compare_losses(root: Path, name: str, pairs: Sequence[Record]) -> dict[str, Any]:
  """Evaluations on the held-out part of `pairs`, after training on the others."""
  parts = {
    'held_out': [pair for i, pair in enumerate(pairs) if i % HELD_OUT == 0],
    'train': [pair for i, pair in enumerate(pairs) if i % HELD_OUT],
  }
  for part, records in parts.items():
    write_jsonl(root / f'{name}_{part}.jsonl', records)
  found: dict[str, Any] = {f'{part}_pairs': len(parts[part]) for part in parts}
  for loss, options in LOSSES.items():
    run = root / f'{name}_{loss}'
    config = preference.Config(
      model=_MODEL.value,
      data=str(root / f'{name}_train.jsonl'),
      eval_data=str(root / f'{name}_held_out.jsonl'),
      max_length=512,
      seed=_SEED.value,
      output_dir=str(run),
    )
    preference.run(dataclasses.replace(config, **options))
    found[loss] = _last_evaluation(run)
  return found


def _right_and_wrong(root: Path) -> list[Record]:
  """A right and a wrong sample of the model for every problem that has both."""
  sampled = evaluate.Config(
    model=_MODEL.value,
    data=PROBLEMS,
    prompt_template=LAYOUT,
    num_samples=4,
    temperature=1.0,
    seed=_SEED.value,
    output_dir=str(root / 'samples'),
  )
  evaluate.run(sampled)
  prompts = {p.id: render_prompt(LAYOUT, p).text for p in load_problems(PROBLEMS)}
  by_problem: dict[str, dict[bool, Record]] = defaultdict(dict)
  for record in read_jsonl(root / 'samples' / 'graded.jsonl'):
    by_problem[record['problem_id']].setdefault(record['correct'], record)
  return [
    {
      'prompt': prompts[problem_id],
      'chosen': sides[True]['text'],
      'rejected': sides[False]['text'],
    }
    for problem_id, sides in by_problem.items()
    if len(sides) == 2
  ]


def _boxed_and_not() -> list[Record]:
  """The solution of a problem with its answer in a box, and as the model writes it."""
  ways = zip(load_problems(BOXED), load_problems(NOT_BOXED), strict=True)
  return [
    {
      'prompt': render_prompt(LAYOUT, chosen).text,
      'chosen': render_completion(LAYOUT, chosen),
      'rejected': render_completion(LAYOUT, rejected),
    }
    for chosen, rejected in ways
  ]


def _last_evaluation(run: Path) -> dict[str, float]:
  lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  evaluations = [line for line in map(json.loads, lines) if 'eval_loss' in line]
  return evaluations[-1]


if __name__ == '__main__':
  cli.run(main)
