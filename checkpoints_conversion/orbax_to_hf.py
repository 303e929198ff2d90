r"""Turns an mrjax checkpoint or training run into a Hugging Face model.

  python -m checkpoints_conversion.orbax_to_hf --checkpoint=outputs/sft \
    --output_dir=exported

A run means its last checkpoint; RUN/checkpoints/STEP names another. Weights are written
as safetensors, in several files with an index where they are large; config.json and
the tokenizer are those that the model came with, byte for byte.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, convert

_D = convert.ExportConfig
_FLAGS = (
  flags.DEFINE_string(
    'checkpoint', None, 'mrjax checkpoint, run, or RUN/checkpoints/STEP.', required=True
  ),
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
  summary = convert.export_hf(convert.ExportConfig(**values))
  print(
    f'{summary["output_dir"]}: {summary["num_params"]:,} weights, peak host memory '
    f'{summary["peak_host_bytes"] / 1e9:.2f} GB'
  )


if __name__ == '__main__':
  cli.run(main)
