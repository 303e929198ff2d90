r"""Turns an mrjax adapter into a directory that PEFT loads.

  python -m checkpoints_conversion.orbax_to_peft --checkpoint=outputs/lora \
    --output_dir=exported

A run means its last checkpoint; RUN/checkpoints/STEP names another. Where the model
fuses projections that were trained apart (Phi-3), they are stacked with a larger rank,
which PEFT loads with equal logits.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from mrjax.runs import cli, convert_adapters

_D = convert_adapters.ExportConfig
_FLAGS = (
  flags.DEFINE_string(
    'checkpoint',
    None,
    'mrjax adapter, run that trained one, or RUN/checkpoints/STEP.',
    required=True,
  ),
  flags.DEFINE_string(
    'model', _D.model, 'Name of the base for PEFT; empty: the recorded one.'
  ),
  flags.DEFINE_string('output_dir', None, 'The new PEFT directory.', required=True),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
  flags.DEFINE_bool('overwrite', _D.overwrite, 'Replace an earlier adapter.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  summary = convert_adapters.export_peft(convert_adapters.ExportConfig(**values))
  print(
    f'{summary["output_dir"]}: {summary["num_params"]:,} weights, peak host memory '
    f'{summary["peak_host_bytes"] / 1e9:.2f} GB'
  )


if __name__ == '__main__':
  cli.run(main)
