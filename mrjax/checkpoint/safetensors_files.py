"""Safetensors files: many read slice by slice, one written tensor by tensor."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mrjax.checkpoint.directories import CheckpointError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# In the order in which files hold them: wide types first, so that all are aligned.
DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
  dtype: str  # as safetensors names it, e.g. 'BF16'
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsReader:
  """The tensors of a Hugging Face directory, one file or an index and its shards.

  Files are opened for each read only: the pages of a mapped file count as memory of
  the process for as long as the file stays open.

  Attributes:
    directory: Where the files are.
    specs: Dtype and shape of each tensor, by name.
  """

  def __init__(self, directory: str | Path, *, file: str = ''):
    """Reads all headers, no data.

    Args:
      directory: A Hugging Face model's, or with `file` any.
      file: The one file to read, where it is not a model's.

    Raises:
      FileNotFoundError: No directory, no safetensors, or a shard that the index names
        is not there.
      CheckpointError: A truncated or malformed file or index, a tensor in two files,
        or a dtype that is not float32, bfloat16 or float16.
    """
    self.directory = Path(directory)
    self.specs: dict[str, TensorSpec] = {}
    self._files: dict[str, Path] = {}
    for path in _one_file(self.directory, file) or _weight_files(self.directory):
      try:
        self._read_header(path)
      except SafetensorError as error:
        raise CheckpointError(
          f'{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: '
          f'{error}. Fetch it again.'
        ) from None

  def read(self, name: str, slices: Sequence[slice]) -> np.ndarray:
    """The given part of a tensor, in the stored dtype."""
    with safe_open(self._files[name], framework='numpy') as file:
      return file.get_slice(name)[tuple(slices)]

  def _read_header(self, path: Path) -> None:
    with safe_open(path, framework='numpy') as file:
      for name in file.keys():  # noqa: SIM118 (a safe_open does not iterate)
        if name in self._files:
          raise CheckpointError(
            f'{self.directory}: {name} stands in both {self._files[name].name} and '
            f'{path.name}. Remove the file that does not belong here.'
          )
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in DTYPES:
          raise CheckpointError(
            f'{path}: {name} has dtype {dtype}, want one of {", ".join(DTYPES)}. '
            'Quantised checkpoints are not read: use the full-precision one.'
          )
        self._files[name] = path
        self.specs[name] = TensorSpec(dtype, tuple(tensor.get_shape()))


def write_safetensors(
  path: Path | None,
  specs: Mapping[str, TensorSpec],
  tensor: Callable[[str], np.ndarray],
) -> None:
  """Writes the file that `safetensors.save_file` would, holding one tensor at a time.

  Args:
    path: The file; None fetches all tensors and writes nothing (what the other
      processes do while process 0 writes, where fetching is collective).
    specs: The tensors of the file.
    tensor: Returns one of them, contiguous, with the dtype and shape of its spec.
  """
  order = sorted(specs, key=lambda name: (list(DTYPES).index(specs[name].dtype), name))
  header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in order:
    start, end = end, end + specs[name].num_bytes
    header[name] = {
      'dtype': specs[name].dtype,
      'shape': list(specs[name].shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  with open(path or os.devnull, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in order:
      data = tensor(name)
      if (data.dtype, data.shape) != (DTYPES[specs[name].dtype], specs[name].shape):
        raise ValueError(
          f'{name} is {data.dtype} {data.shape}, want {specs[name]} as announced.'
        )
      file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def _one_file(directory: Path, file: str) -> list[Path]:
  if file and not (directory / file).is_file():
    _refuse_pickles(directory, 'PeftModel')
    raise FileNotFoundError(f'{directory} holds no {file}.')
  return [directory / file] if file else []


def _refuse_pickles(directory: Path, loader: str) -> None:
  pickles = [p.name for end in ('bin', 'pth', 'pt') for p in directory.glob(f'*.{end}')]
  if pickles:
    raise FileNotFoundError(
      f'{directory} holds pickled weights only ({min(pickles)}); those can run code '
      'when they are opened, so they are never read. Save them again as safetensors: '
      f'{loader}.from_pretrained(...).save_pretrained(...).'
    )


def _weight_files(directory: Path) -> list[Path]:
  if not directory.is_dir():
    raise FileNotFoundError(
      f'{directory} is no directory; want a Hugging Face model directory.'
    )
  if (directory / SINGLE).is_file():
    return [directory / SINGLE]
  index = directory / INDEX
  if not index.is_file():
    _refuse_pickles(directory, 'AutoModelForCausalLM')
    raise FileNotFoundError(
      f'{directory} holds neither {SINGLE} nor {INDEX}; want a Hugging Face model '
      'directory with its weights.'
    )
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    names = sorted(set(weight_map.values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise CheckpointError(f'{index} is damaged ({error!r}). Fetch it again.') from None
  for name in names:
    if Path(name).name != name:
      raise CheckpointError(f'{index} names {name!r}; want plain file names.')
    if not (directory / name).is_file():
      raise FileNotFoundError(
        f'{directory / name} does not exist, yet {INDEX} names it. Fetch the missing '
        'shard.'
      )
  return [directory / name for name in names]
