r"""Samples completions of problems, many a problem, resumably.

On a laptop, with the embedded model and problems:

  python -m experiments.sample --model=tiny-1m --data='arithmetic:test?size=100' \
    --prompt_template=qa --num_samples=8 --temperature=0.7 --output_dir=outputs/samples

On a TPU VM with four chips (not measured yet), two copies of the model:

  python -m experiments.sample --model=meta-llama/Llama-3.2-1B-Instruct \
    --data=gsm8k:train --prompt_template=chat --num_samples=100 --temperature=0.7 \
    --max_new_tokens=512 --mesh=data:2,tensor:2 --output_dir=outputs/samples

Guided by a value model that train_value trained (Q#):

  python -m experiments.sample --model=tiny-1m --guide=outputs/value --eta=5 \
    --data='arithmetic:test?size=100' --prompt_template=qa --output_dir=outputs/guided

An adapter that train_sft or train_preference trained, or PEFT, goes on its base:

  python -m experiments.sample --model=tiny-1m --adapter=outputs/lora \
    --data='arithmetic:test?size=100' --prompt_template=qa --output_dir=outputs/adapted

Run it again with the same flags after it was stopped, and it goes on; rows that are
there stay as they are. A row depends on the weights, its prompt, --seed, the id of its
problem and its sample index, not on --mesh, --max_batch, or the other rows.
"""

import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.data.prompts import TEMPLATES
from mrjax.runs import cli, sample
from mrjax.sampling.guidance import MODES

_D = sample.Config


class _RowsParser(flags.ArgumentParser):
  """A number, at least 1, or `auto`, which is 0 in the configuration."""

  syntactic_help = 'a number of rows, at least 1, or auto'

  def parse(self, argument: str | int) -> int:
    if argument in ('auto', 0):
      return 0
    if not str(argument).isdecimal() or not int(argument):
      raise ValueError('want a number of rows, at least 1, or auto')
    return int(argument)

  def flag_type(self) -> str:
    return 'rows'


_FLAGS = (
  flags.DEFINE_string(
    'model', None, 'Embedded name, HF directory, hub id or checkpoint.', required=True
  ),
  flags.DEFINE_string(
    'adapter', _D.adapter, 'PEFT directory, mrjax adapter or run that goes on it.'
  ),
  flags.DEFINE_string('tokenizer', _D.tokenizer, "Empty: the model's own."),
  flags.DEFINE_string(
    'data', None, 'Problems: NAME:SPLIT[?key=value&...] or jsonl:PATH.', required=True
  ),
  flags.DEFINE_string('data_root', _D.data_root, 'Local copies of named data sets.'),
  flags.DEFINE_integer(
    'limit', _D.limit, 'Take the first problems; 0: all.', lower_bound=0
  ),
  flags.DEFINE_enum(
    'prompt_template', _D.prompt_template, TEMPLATES, 'Layout of the prompts.'
  ),
  flags.DEFINE_string('output_dir', None, 'Directory of the samples.', required=True),
  flags.DEFINE_string(
    'mesh', _D.mesh, 'Axis sizes over the devices of a process; -1 takes the rest.'
  ),
  flags.DEFINE_enum(
    'dtype',
    _D.dtype,
    ['auto', 'float32', 'bfloat16'],
    'Of weights, computation and cache; auto is bfloat16 but on a CPU.',
  ),
  flags.DEFINE_enum(
    'cache_dtype',
    _D.cache_dtype,
    ['auto', 'float32', 'bfloat16', 'int8'],
    'Of cached keys and values; auto is --dtype. int8 has a scale a vector.',
  ),
  flags.DEFINE_integer('seed', _D.seed, 'Of all rows.', lower_bound=0),
  flags.DEFINE_integer(
    'num_samples', _D.num_samples, 'Completions a problem.', lower_bound=1
  ),
  flags.DEFINE_float('temperature', _D.temperature, '0: greedy.', lower_bound=0.0),
  flags.DEFINE_float(
    'top_p', _D.top_p, 'Keep the likeliest tokens of this total probability; 1: all.'
  ),
  flags.DEFINE_integer('top_k', _D.top_k, 'Keep the k likeliest tokens; 0: all.'),
  flags.DEFINE_float(
    'min_p', _D.min_p, 'Keep tokens this likely relative to the likeliest; 0: all.'
  ),
  flags.DEFINE_float(
    'repetition_penalty',
    _D.repetition_penalty,
    'Above 1, tokens of the prompt and the row are less likely.',
  ),
  flags.DEFINE_string(
    'guide', _D.guide, 'Value model that guides (Q#): a run of train_value.'
  ),
  flags.DEFINE_float(
    'eta', _D.eta, 'Strength of guidance, 1 over the KL weight; 0: none.'
  ),
  flags.DEFINE_enum(
    'guidance_mode',
    _D.guidance_mode,
    ['', *MODES],
    'How values raise logits; empty takes what the value model was trained for.',
  ),
  flags.DEFINE_integer(
    'guidance_top_k', _D.guidance_top_k, 'Tokens the guide is asked about; -1: all.'
  ),
  flags.DEFINE_bool(
    'cd_baseline', _D.cd_baseline, 'Controlled decoding: eta times the value.'
  ),
  flags.DEFINE_integer(
    'max_new_tokens', _D.max_new_tokens, 'Longest completion, tokens.', lower_bound=1
  ),
  flags.DEFINE_multi_string(
    'stop',
    [],
    r'Strings that end a completion, with commas between or one a flag; \n, \t, \, '
    r'and \\ stand for a newline, a tab, a comma and a backslash. Not in the text.',
  ),
  flags.DEFINE(
    _RowsParser(),
    'max_batch',
    _D.max_batch,
    'Rows that run together; auto: as many as memory allows.',
    serializer=flags.ArgumentSerializer(),
  ),
  flags.DEFINE_bool(
    'logprobs',
    _D.logprobs,
    'Write the log-probabilities of every token too; with --guide, also its values '
    'and the divergences from the model (kl).',
  ),
  flags.DEFINE_bool(
    'prompt_logprobs',
    _D.prompt_logprobs,
    "Write those of every token of a row's prompt too; the first is null.",
  ),
  flags.DEFINE_bool(
    'truncate_prompts',
    _D.truncate_prompts,
    'Cut prompts that are too long at their start; otherwise they are an error.',
  ),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Delete what --output_dir holds.'),
)


def parse_stops(values: Sequence[str]) -> tuple[str, ...]:
  """The stop strings of all `--stop` flags, escapes resolved."""
  escapes = {'n': '\n', 't': '\t'}
  return tuple(
    re.sub(r'\\(.)', lambda match: escapes.get(match[1], match[1]), part)
    for value in values
    for part in re.findall(r'(?:[^,\\]|\\.)+', value)
  )


def describe(summary: dict[str, Any]) -> str:
  """What `sample.run` returns, in one line or two."""
  lines = [
    f'{summary["output_dir"]}: {summary["num_rows"]:,} samples of '
    f'{summary["num_problems"]:,} problems, {summary["num_new_rows"]:,} of them new; '
    f'mean length {summary["mean_tokens"]:.1f} tokens, {summary["truncated"]:.2%} cut '
    'at the length limit'
  ]
  if summary['errors']:
    lines[0] += f'; {summary["errors"]:,} ended by logits that are not finite'
  if 'mean_kl' in summary:
    lines.append(f'mean KL to the model: {summary["mean_kl"]:.3f} nats a row')
  if 'tokens_per_second' in summary:
    lines.append(
      f'{summary["tokens_per_second"]:,.0f} tokens/s; compiled '
      f'{summary["num_programs"]} programs in {summary["compile_seconds"]:.1f} s'
    )
  return '\n'.join(lines)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  values['stop'] = parse_stops(values['stop'])
  print(describe(sample.run(sample.Config(**values))))


if __name__ == '__main__':
  cli.run(main)
