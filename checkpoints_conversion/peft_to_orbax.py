r"""Turns a PEFT LoRA adapter into an mrjax adapter checkpoint.

  python -m checkpoints_conversion.peft_to_orbax --peft_dir=adapter \
    --model=meta-llama/Llama-3.2-1B --output_dir=checkpoints/adapter

No command needs this first: --adapter takes PEFT directories as they are. The
checkpoint also holds rank, scale, targets, and the name and fingerprint of the base, so
that none is typed again; orbax_to_peft gives every tensor back bit for bit.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, convert_adapters

_D = convert_adapters.ImportConfig
_FLAGS = (
  flags.DEFINE_string('peft_dir', None, 'Directory that PEFT saved.', required=True),
  flags.DEFINE_string('model', _D.model, 'What it goes on; empty: what PEFT recorded.'),
  flags.DEFINE_string('output_dir', None, 'The new checkpoint.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace an earlier checkpoint.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = convert_adapters.import_peft(convert_adapters.ImportConfig(**values))
  print(
    f'{summary["output_dir"]}: {summary["num_params"]:,} weights, peak host memory '
    f'{summary["peak_host_bytes"] / 1e9:.2f} GB'
  )


if __name__ == '__main__':
  cli.run(main)
