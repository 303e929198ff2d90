"""Writes problems of any source as a TensorFlow Datasets data set."""

import dataclasses
import re
from typing import Any

from mrjax.data import tfds_problems
from mrjax.data.problems import load_problems, parse_spec
from mrjax.records import Problem
from mrjax.runs.common import make_folder


@dataclasses.dataclass(frozen=True)
class Config:
  data: tuple[str, ...]  # problem specifications, each as [SPLIT=]SPEC
  name: str  # of the data set: mrjax_problems/NAME
  output_dir: str  # the TFDS data folder; it may hold other sets
  data_root: str | None = None  # local copies of the public sets
  limit: int | None = None  # problems of each split
  overwrite: bool = False

  def __post_init__(self):
    if not self.data:
      raise ValueError('--data is missing: what is to be built?')


def run(config: Config) -> dict[str, Any]:
  """Builds the set and returns its folder, its splits and how to read them.

  Raises:
    ValueError: Two sources for one split, a source without a split's name, bad data.
    FileExistsError: The set is there and `overwrite` is False.
    OutputError: `output_dir` cannot be made.
  """
  splits: dict[str, list[Problem]] = {}
  for text in config.data:
    split, spec = split_and_spec(text)
    if split in splits:
      raise ValueError(f'--data={text!r}: split {split!r} is given twice')
    splits[split] = load_problems(spec, data_root=config.data_root, limit=config.limit)
  make_folder(config.output_dir, output=config.output_dir)
  folder = tfds_problems.build(
    splits,
    name=config.name,
    data_dir=config.output_dir,
    description=f'Built by mrjax from {", ".join(config.data)}.',
    overwrite=config.overwrite,
  )
  return {
    'folder': str(folder),
    'splits': {split: len(problems) for split, problems in splits.items()},
    'data': [
      f'tfds:{tfds_problems.TFDS_NAME}/{config.name}:{split}' for split in splits
    ],
  }


def split_and_spec(text: str) -> tuple[str, str]:
  """Returns the split's name and the specification of `[SPLIT=]SPEC`.

  Without a name the split keeps that of its source.
  """
  match = re.match(r'([A-Za-z_]\w*)=(.*)', text, flags=re.DOTALL)
  if match:
    return match[1], match[2]
  split = parse_spec(text).split
  if not split.isidentifier():
    raise ValueError(f'--data={text!r}: name the split, e.g. train={text}')
  return split, text
