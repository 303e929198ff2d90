r"""Compares a checkpoint with the Hugging Face model it came from.

  python -m checkpoints_conversion.verify --hf_dir=DIR --checkpoint=CKPT \
    --greedy_tokens=32

Logits of every prompt token are computed in float32 by transformers (with torch, which
must be installed: pip install torch) and by mrjax, and must agree to --tolerance; with
--greedy_tokens, so must the tokens that each would go on with. The exit code is 1 where
they do not. --checkpoint may also be the Hugging Face directory itself.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from checkpoints_conversion import comparison
from mrjax.runs import cli

_D = comparison.Config
_FLAGS = (
  flags.DEFINE_string('hf_dir', None, 'The Hugging Face model.', required=True),
  flags.DEFINE_string('checkpoint', None, 'What is held against it.', required=True),
  flags.DEFINE_string(
    'prompts', _D.prompts, 'JSON Lines with prompt; or built-in ones.'
  ),
  flags.DEFINE_integer(
    'greedy_tokens', _D.greedy_tokens, 'Compare as many greedy tokens.', lower_bound=0
  ),
  flags.DEFINE_float('tolerance', _D.tolerance, 'Of logits, absolute.', lower_bound=0),
  flags.DEFINE_string('mesh', _D.mesh, 'Axis sizes; -1 takes the rest.'),
)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  faults = comparison.run(comparison.Config(**values))
  for fault in faults:
    print(f'error: {fault}', file=sys.stderr)
  if faults:
    sys.exit(1)
  print('The checkpoint agrees with transformers.')


if __name__ == '__main__':
  cli.run(main)
