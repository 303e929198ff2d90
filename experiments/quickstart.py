r"""The main job from end to end, on the embedded model and problems by default.

Evaluates a model, samples several solutions of each training problem, keeps the correct
and different ones (RFT, arXiv 2308.01825), fine-tunes on them, evaluates again, exports
the result to the Hugging Face format and writes a report. Minutes on two CPU cores:

  python -m experiments.quickstart

With a model of your own, on a TPU slice or GPUs (not measured):

  python -m experiments.quickstart --model=meta-llama/Llama-3.2-1B \
    --train_data=gsm8k:train --test_data=gsm8k:test --learning_rate=1e-5 \
    --mesh=data:1,fsdp:-1 --output_dir=outputs/llama

A run that was stopped goes on when it is started again; a finished one only shows its
result. With other flags it wants another --output_dir, or --overwrite.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.data.prompts import TEMPLATES
from mrjax.runs import cli, quickstart

_D = quickstart.Config
_FLAGS = (
  flags.DEFINE_string('model', _D.model, 'Embedded name, HF directory or hub id.'),
  flags.DEFINE_string('train_data', _D.train_data, 'Problems to sample and train on.'),
  flags.DEFINE_string('test_data', _D.test_data, 'Problems to evaluate on.'),
  flags.DEFINE_string('data_root', _D.data_root, 'Local copies of named data sets.'),
  flags.DEFINE_enum('prompt_template', _D.prompt_template, TEMPLATES, 'Layout.'),
  flags.DEFINE_integer(
    'num_samples', _D.num_samples, 'A training problem.', lower_bound=1
  ),
  flags.DEFINE_float('temperature', _D.temperature, 'Of the training samples.'),
  flags.DEFINE_integer('max_new_tokens', _D.max_new_tokens, 'Of a solution.'),
  flags.DEFINE_float('num_epochs', _D.num_epochs, 'Of fine-tuning.'),
  flags.DEFINE_float('learning_rate', _D.learning_rate, 'Peak, of fine-tuning.'),
  flags.DEFINE_integer('batch_size', _D.batch_size, 'Texts an optimizer step.'),
  flags.DEFINE_integer('max_length', _D.max_length, 'Tokens of a training text.'),
  flags.DEFINE_string('mesh', _D.mesh, 'Of fine-tuning.'),
  flags.DEFINE_enum('dtype', _D.dtype, ['auto', 'float32', 'bfloat16'], 'Computation.'),
  flags.DEFINE_integer('seed', _D.seed, 'Of sampling and data order.', lower_bound=0),
  flags.DEFINE_string('output_dir', _D.output_dir, 'For everything it makes.'),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Delete what --output_dir holds.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  config = quickstart.Config(**values)
  print(_describe(config, quickstart.run(config)))


def _describe(config: quickstart.Config, summary: dict[str, Any]) -> str:
  before, after = (summary[name]['pass@1'] for name in ('before', 'after'))
  percent = lambda x: f'{100 * x:.1f}%'
  show = lambda x: (
    f'{percent(x["value"])} (95% interval {percent(x["low"])} to {percent(x["high"])})'
  )
  selection = summary['selection']
  lines = [
    '',
    f'Model {config.model}, {summary["before"]["num_problems"]} test problems of '
    f'{config.test_data}, greedy:',
    f'  before {show(before)}',
    f'  after  {show(after)}',
    f'In between, {config.num_samples} samples a problem of {config.train_data}:',
    f'  {selection["num_correct"]} of {selection["num_samples"]} correct, '
    f'{selection["num_records"]} records kept for fine-tuning.',
    'Seconds: '
    + ', '.join(f'{name} {value:.0f}' for name, value in summary['seconds'].items()),
    '',
    f'Report:              {summary["report"]}',
    f'Hugging Face model:  {summary["hf_dir"]}',
    'The same with Llama 3, on an accelerator:',
    '  python -m experiments.quickstart --model=meta-llama/Llama-3.2-1B '
    '--train_data=gsm8k:train --test_data=gsm8k:test --learning_rate=1e-5 '
    '--output_dir=outputs/llama',
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
