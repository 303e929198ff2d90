r"""Adds an adapter into the weights of its base: a Hugging Face model by itself.

  python -m checkpoints_conversion.fold_adapter --adapter=outputs/lora \
    --output_dir=folded

Weights are the full-precision ones, whatever they were quantised to in training, and
the sum is float32. A base other than that which the adapter was trained on is refused.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, convert, convert_adapters

_D = convert_adapters.FoldConfig
_FLAGS = (
  flags.DEFINE_string(
    'adapter',
    None,
    'PEFT directory, mrjax adapter, run, or RUN/checkpoints/STEP.',
    required=True,
  ),
  flags.DEFINE_string('model', _D.model, 'What it goes on; empty: the recorded one.'),
  flags.DEFINE_string('output_dir', None, 'The new model directory.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_enum(
    'dtype', _D.dtype, convert.DTYPES, 'Of the tensors; stored keeps each as it is.'
  ),
  flags.DEFINE_float(
    'max_shard_gb', _D.max_shard_gb, 'Largest file, in 10^9 bytes.', lower_bound=0
  ),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace an earlier model directory.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = convert_adapters.fold_adapter(convert_adapters.FoldConfig(**values))
  print(
    f'{summary["output_dir"]}: {summary["num_params"]:,} weights, peak host memory '
    f'{summary["peak_host_bytes"] / 1e9:.2f} GB'
  )


if __name__ == '__main__':
  cli.run(main)
