r"""Builds a TensorFlow Datasets data set from problems of any source.

    python -m experiments.build_tfds --data=arithmetic:train --data=arithmetic:test \
      --data=dev=jsonl:my_problems.jsonl --name=mine --output_dir=tfds_data

The files are array_record and need no TensorFlow. Read them back in any command with
`--data=tfds:mrjax_problems/mine:train --data_root=tfds_data`.
"""

from collections.abc import Sequence

from absl import flags

from mrjax.runs import build_tfds, cli

_DATA = flags.DEFINE_multi_string(
  'data', [], 'Problems, as [SPLIT=]SPEC; repeat the flag for more splits.'
)
_NAME = flags.DEFINE_string('name', None, 'Name of the data set.', required=True)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'TFDS data folder; other sets in it stay.', required=True
)
_DATA_ROOT = flags.DEFINE_string(
  'data_root', None, 'Folder with local copies of the public problem sets.'
)
_LIMIT = flags.DEFINE_integer(
  'limit', None, 'Keep the first so many problems of each split.', lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace a set of that name.')


def main(argv: Sequence[str]) -> None:
  del argv
  summary = build_tfds.run(
    build_tfds.Config(
      data=tuple(_DATA.value),
      name=_NAME.value,
      output_dir=_OUTPUT_DIR.value,
      data_root=_DATA_ROOT.value,
      limit=_LIMIT.value,
      overwrite=_OVERWRITE.value,
    )
  )
  for spec, count in zip(summary['data'], summary['splits'].values(), strict=True):
    print(f'{count} problems: --data={spec} --data_root={_OUTPUT_DIR.value}')


if __name__ == '__main__':
  cli.run(main)
