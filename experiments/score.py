r"""Log-probability of every completion token of given records under a model.

Input records carry `prompt` and `completion`; the output holds the same records with
`token_ids`, `logprobs`, `logprob_sum` and `num_tokens`, EOS included:

  python -m experiments.score --model=tiny-1m --input=sft.jsonl --output=scored.jsonl

--adapter puts a run that trained an adapter, or a PEFT directory, on the model.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, score

_D = score.Config
_FLAGS = (
  flags.DEFINE_string(
    'model', None, 'Embedded name, HF directory, hub id or checkpoint.', required=True
  ),
  flags.DEFINE_string(
    'adapter', _D.adapter, 'PEFT directory, mrjax adapter or run that goes on it.'
  ),
  flags.DEFINE_string('tokenizer', _D.tokenizer, "Empty: the model's own."),
  flags.DEFINE_string('input', None, 'Directory, file or glob.', required=True),
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
  print(
    f'{values["output"]}: {summary["num_records"]:,} records, '
    f'{summary["num_tokens"]:,} tokens scored, mean log-probability '
    f'{summary["mean_logprob"]:.4f} a token'
  )


if __name__ == '__main__':
  cli.run(main)
