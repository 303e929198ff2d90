"""The prompts of samples, made again from the settings of the run that drew them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mrjax.checkpoint.source import resolve_model
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.runs import sample
from mrjax.sampling.requests import fit_requests


class SampledPrompts(NamedTuple):
  """Ids by problem, and the tokenizer they are of."""

  ids: Mapping[str, tuple[int, ...]]
  tokenizer: Tokenizer


def load_sampled_prompts(folder: Path) -> SampledPrompts:
  """The prompts of the samples of a directory of `sample` or `evaluate`.

  Raises:
    ValueError: It holds no `config.json` of such a run, or what that names cannot be
      had any more: the problems, or the tokenizer.
  """
  path = folder / 'config.json'
  try:
    saved = json.loads(path.read_text(encoding='utf-8'))['config']
    names = {field.name for field in dataclasses.fields(sample.Config)}
    config = sample.Config(**{k: v for k, v in saved.items() if k in names})
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(
      f'the prompts of the samples in {folder} are not known: they follow from '
      'config.json of the directory that `sample` or `evaluate` made. Name the samples '
      'there, or give records that carry prompt_ids'
    ) from None
  try:
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
    requests = fit_requests(
      sample.make_requests(config, tokenizer),
      source.config,
      truncate_prompts=config.truncate_prompts,
    )
  except (ValueError, OSError) as error:
    raise ValueError(
      f'the prompts of the samples in {folder} cannot be made again as {path} tells: '
      f'{error}'
    ) from None
  return SampledPrompts({r.problem_id: r.prompt_ids for r in requests}, tokenizer)
