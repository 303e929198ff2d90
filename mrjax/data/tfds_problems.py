"""Problems as a TensorFlow Datasets data set, written and read without TensorFlow.

The files are array_record, read through `as_data_source`: random access, slices such as
`train[:10%]`, and any other TFDS or Grain pipeline can read them too. A set is built
from problems, so there is no dataset script and nothing of a downloaded set is run.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mrjax.records import Problem, Record

TFDS_NAME = 'mrjax_problems'
VERSION = '1.0.0'

_TEXT_FIELDS = ('id', 'question', 'answer', 'solution', 'source')


def to_features(problem: Problem) -> Record:
  """Returns the TFDS example of a problem: absent texts are '', `level` is JSON."""
  example: Record = {name: getattr(problem, name) or '' for name in _TEXT_FIELDS}
  example['options'] = list(problem.options or ())
  example['level'] = '' if problem.level is None else json.dumps(problem.level)
  return example


def from_features(example: Mapping[str, Any]) -> Record:
  """Returns the problem record of a TFDS example; the inverse of `to_features`."""
  record = {name: value for name, value in example.items() if value not in ('', [])}
  if 'level' in record:
    record['level'] = json.loads(record['level'])
  return record


def _make_builder(
  name: str, splits: Mapping[str, Sequence[Problem]], data_dir: Path, description: str
) -> Any:
  import tensorflow_datasets as tfds

  # The name of the class decides the folder. It stays out of TFDS's registry, where two
  # builds of one process would meet.
  class MrjaxProblems(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
  ):
    """Word problems in mrjax's format."""

    # Nothing is downloaded. Left to itself, TFDS looks for a checksum file beside the
    # code, with a package (importlib_resources) that it does not install.
    code_path = None
    url_infos: ClassVar[dict[str, Any]] = {}
    BUILDER_CONFIGS: ClassVar[list[Any]] = [
      tfds.core.BuilderConfig(name=name, version=VERSION, description=description)
    ]

    def _info(self) -> Any:
      text = tfds.features.Text()
      features: dict[str, Any] = {field: text for field in (*_TEXT_FIELDS, 'level')}
      features['options'] = tfds.features.Sequence(text)
      return tfds.core.DatasetInfo(
        builder=self,
        description='Word problems with final answers and, where known, solutions.',
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # problems are read back in their own order
      )

    def _split_generators(self, download_manager: Any) -> Any:
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
      for i, problem in enumerate(splits[split]):
        yield i, to_features(problem)

  return MrjaxProblems(config=name, data_dir=data_dir, file_format='array_record')


def build(
  splits: Mapping[str, Sequence[Problem]],
  *,
  name: str,
  data_dir: str | Path,
  description: str = '',
  overwrite: bool = False,
) -> Path:
  """Writes problems as the TFDS data set `mrjax_problems/NAME` and returns its folder.

  The folder appears when it is whole. Read it with `tfds:mrjax_problems/NAME:SPLIT` and
  `--data_root=DATA_DIR`.

  Args:
    splits: Problems of each split, in order; ids are unique within a split.
    name: Lower-case letters, digits and underscores.
    data_dir: The TFDS data folder; it may hold other sets.
    description: Where the problems come from.
    overwrite: Replaces a set of that name.

  Raises:
    ValueError: A bad name, no problems, or an id twice.
    FileExistsError: The set is there and `overwrite` is False.
  """
  if not name.isidentifier() or name != name.lower():
    raise ValueError(f'name={name!r}; want lower-case letters, digits and underscores')
  if not splits:
    raise ValueError('no split to build')
  for split, problems in splits.items():
    if not problems:
      raise ValueError(f'split {split!r} holds no problem')
    ids = {problem.id for problem in problems}
    if len(ids) != len(problems):
      raise ValueError(
        f'split {split!r}: {len(problems)} problems share {len(ids)} ids'
      )
  folder = Path(data_dir) / TFDS_NAME / name / VERSION
  if folder.exists():
    if not overwrite:
      raise FileExistsError(f'{folder} is there; give another name, or overwrite it')
    shutil.rmtree(folder)
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  builder = _make_builder(name, splits, Path(data_dir), description)
  builder.download_and_prepare()
  return folder


def read_rows(
  name: str, split: str, *, data_dir: str | Path | None
) -> Iterator[Record]:
  """Yields the examples of a prepared TFDS data set as plain Python values.

  Args:
    name: `mrjax_problems/NAME`, or any prepared set in array_record format.
    split: A split, or a TFDS slice of one (`train[:10%]`).
    data_dir: The TFDS data folder; None is TFDS's own (~/tensorflow_datasets).

  Raises:
    FileNotFoundError: No such set there.
    ValueError: An unknown split, or files that need TensorFlow.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise FileNotFoundError(
      f'no prepared TFDS data set {name!r} in '
      f'{data_dir or "~/tensorflow_datasets"}; build it with '
      'python -m experiments.build_tfds, or point --data_root at its folder'
    ) from None
  try:
    source = builder.as_data_source(split)
  except NotImplementedError:
    raise ValueError(
      f'the TFDS data set {name!r} is stored as {builder.info.file_format}, which '
      'needs TensorFlow; prepare it with file_format="array_record"'
    ) from None
  except ValueError as error:
    raise ValueError(f'TFDS data set {name!r}: {error}') from None
  ours = name.split('/')[0] == TFDS_NAME
  for i in range(len(source)):
    row = {key: _plain(value) for key, value in source[i].items()}
    yield from_features(row) if ours else row


def _plain(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  return value
