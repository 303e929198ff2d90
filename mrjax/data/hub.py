"""Data sets of the Hugging Face hub, also of machines that cannot reach it."""

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

from mrjax.records import Record

_CONNECT_SECONDS = 4.0


def load_hub(repository: str, config: str | None, split: str) -> Iterable[Record]:
  """Returns the rows of a data set on the Hugging Face hub, or of its local cache.

  Raises:
    FileNotFoundError: Neither cached nor there, or the hub cannot be reached.
    ValueError: No such configuration or split.
  """
  import datasets

  offline = why_offline()
  try:
    with _offline_mode() if offline else contextlib.nullcontext():
      return datasets.load_dataset(repository, config, split=split)
  except ValueError as error:  # an unknown config or split; the message lists them
    raise ValueError(f'{repository}: {error}') from None
  except Exception as error:  # network libraries raise what they like
    reason = offline or f'{type(error).__name__}: {str(error)[:160]}'
    raise FileNotFoundError(
      f'the hub did not give {repository!r} ({reason}); check the name and the network'
    ) from None


def why_offline() -> str:
  """Why the hub cannot be reached; '' where it can, or where that is not known.

  One attempt to connect, which the hub's own client would repeat for half a minute.
  With a proxy or with HF_HUB_OFFLINE nothing is tried: that client knows better.
  """
  from huggingface_hub import constants

  proxies = {'http', 'https', 'all'} & urllib.request.getproxies().keys()
  if proxies or constants.is_offline_mode():
    return ''
  url = urllib.parse.urlsplit(constants.ENDPOINT)
  host, port = url.hostname, url.port or (80 if url.scheme == 'http' else 443)
  try:
    socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
  except OSError as error:
    return f'no connection to {host}: {error.strerror or error}'
  return ''


@contextlib.contextmanager
def _offline_mode() -> Iterator[None]:
  """What HF_HUB_OFFLINE=1 does, for a block: only the cache is read."""
  import datasets
  from huggingface_hub import constants

  modules: tuple[Any, ...] = (datasets.config, constants)
  before = [module.HF_HUB_OFFLINE for module in modules]
  try:
    for module in modules:
      module.HF_HUB_OFFLINE = True
    yield
  finally:
    for module, value in zip(modules, before):
      module.HF_HUB_OFFLINE = value
