r"""Log-probabilities of given completions under a model, or their values.

Input records carry `prompt` and `completion`, or are samples of `sample` or `evaluate`
in the directory that it made. The output holds the same records with `token_ids`,
`logprobs`, `logprob_sum` and `num_tokens`, EOS included:

  python -m experiments.score --model=tiny-1m --input=sft.jsonl --output=scored.jsonl

--adapter puts a run that trained an adapter, or a PEFT directory, on the model. With
--value_model, a run of train_value, they get `value` instead, the reward that it
expects at the last token; `grade` then reports best-of-n and votes weighted by it
(Q#-RM, arXiv 2502.20548):

  python -m experiments.score --value_model=outputs/value --input=outputs/samples \
    --output=outputs/valued.jsonl
  python -m experiments.grade --rule=gsm8k --problems='arithmetic:test?size=100' \
    --input=outputs/valued.jsonl --output=outputs/graded.jsonl --vote=string_first
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, score

_D = score.Config
_FLAGS = (
  flags.DEFINE_string(
    'model', _D.model, 'Embedded name, HF directory, hub id or checkpoint.'
  ),
  flags.DEFINE_string(
    'adapter', _D.adapter, 'PEFT directory, mrjax adapter or run that goes on it.'
  ),
  flags.DEFINE_string(
    'value_model', _D.value_model, 'Run of train_value, in place of --model.'
  ),
  flags.DEFINE_bool(
    'values', _D.values, 'With --value_model: also the values after every token.'
  ),
  flags.DEFINE_string('tokenizer', _D.tokenizer, "Empty: the model's own."),
  flags.DEFINE_string(
    'input',
    None,
    'Directory, file or glob; of `evaluate`, its subdirectory `samples`.',
    required=True,
  ),
  flags.DEFINE_string('output', None, 'Scored records, JSON Lines.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_enum(
    'dtype',
    _D.dtype,
    ['auto', 'float32', 'bfloat16'],
    'Of weights and computation; auto is bfloat16 but on a CPU.',
  ),
  flags.DEFINE_integer(
    'max_batch', _D.max_batch, 'Most texts that run together.', lower_bound=1
  ),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace an existing output.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = score.run(score.Config(**values))
  mean = (
    f'mean value {summary["mean_value"]:.4f}'
    if values['value_model']
    else f'mean log-probability {summary["mean_logprob"]:.4f} a token'
  )
  print(
    f'{values["output"]}: {summary["num_records"]:,} records, '
    f'{summary["num_tokens"]:,} tokens scored, {mean}'
  )


if __name__ == '__main__':
  cli.run(main)
