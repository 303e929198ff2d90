r"""Turns a Hugging Face model into an mrjax checkpoint.

  python -m checkpoints_conversion.hf_to_orbax --hf_dir=meta-llama/Llama-3.2-1B \
    --output_dir=checkpoints/llama-3.2-1b

No command needs this first: --model takes Hugging Face directories as they are.
Tokenizer and config come along byte for byte, and orbax_to_hf gives every tensor back
bit for bit.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, convert

_D = convert.ImportConfig
_FLAGS = (
  flags.DEFINE_string(
    'hf_dir', None, 'Model directory, embedded name or hub id.', required=True
  ),
  flags.DEFINE_string('output_dir', None, 'The new checkpoint.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_enum(
    'dtype', _D.dtype, convert.DTYPES, 'Of the checkpoint; stored keeps each as it is.'
  ),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace an earlier checkpoint.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = convert.import_hf(convert.ImportConfig(**values))
  print(
    f'{summary["output_dir"]}: {summary["num_params"]:,} weights, peak host memory '
    f'{summary["peak_host_bytes"] / 1e9:.2f} GB'
  )


if __name__ == '__main__':
  cli.run(main)
