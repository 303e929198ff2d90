"""What is asked of the sampling engine, and what it gives back."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from absl import logging

from mrjax.models.config import DecoderConfig


class RequestError(ValueError):
  """A request that the engine or the model cannot serve."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How the rows of a request are drawn; see `logits.Controls` for the filters."""

  temperature: float = 1.0  # 0 takes the most likely token at every step
  top_p: float = 1.0
  top_k: int = 0  # 0 keeps all
  min_p: float = 0.0
  repetition_penalty: float = 1.0  # above 1, tokens seen are less likely; 1 is off
  eta: float = 0.0  # strength of guidance, see `guidance`; 0 decodes plainly
  max_new_tokens: int = 256
  seed: int = 0
  stop_ids: tuple[int, ...] = ()  # a row ends with the first of these

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise RequestError(
        f'temperature is {self.temperature}, want a finite number >= 0.'
      )
    if not 0 < self.top_p <= 1:
      raise RequestError(f'top_p is {self.top_p}, want 0 < top_p <= 1 (1 keeps all).')
    if self.top_k < 0:
      raise RequestError(f'top_k is {self.top_k}, want an integer >= 0 (0 keeps all).')
    if not 0 <= self.min_p <= 1:
      raise RequestError(f'min_p is {self.min_p}, want 0 <= min_p <= 1 (0 keeps all).')
    if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
      raise RequestError(
        f'repetition_penalty is {self.repetition_penalty}, want a finite number > 0 '
        '(1 changes nothing).'
      )
    if not (math.isfinite(self.eta) and self.eta >= 0):
      raise RequestError(
        f'eta is {self.eta}, want a finite strength >= 0 (0 decodes plainly).'
      )
    if self.max_new_tokens < 1:
      raise RequestError(f'max_new_tokens is {self.max_new_tokens}, want at least 1.')
    if not 0 <= self.seed < 1 << 32:
      raise RequestError(f'seed is {self.seed}, want 0 <= seed < 2**32.')


@dataclasses.dataclass(frozen=True)
class Request:
  """`num_samples` rows from one prompt, numbered from `first_sample_index`.

  A row depends on the weights, the prompt, its `params`, `problem_id` and its sample
  index alone: asking for samples 0-7 and then 8-15 gives the rows of asking for 0-15.
  `params` holds for all samples, or is a tuple with those of each.
  """

  problem_id: str
  prompt_ids: tuple[int, ...]
  num_samples: int = 1
  params: SamplingParams | tuple[SamplingParams, ...] = SamplingParams()
  first_sample_index: int = 0

  def __post_init__(self):
    if not self.prompt_ids:
      raise RequestError(f'The prompt of {self.problem_id!r} has no tokens.')
    if self.num_samples < 1:
      raise RequestError(
        f'num_samples of {self.problem_id!r} is {self.num_samples}, want at least 1.'
      )
    last = self.first_sample_index + self.num_samples
    if self.first_sample_index < 0 or last > 1 << 32:
      raise RequestError(
        f'Sample indices of {self.problem_id!r} run from {self.first_sample_index} to '
        f'{last - 1}, want 0 <= index < 2**32.'
      )
    if isinstance(self.params, tuple) and len(self.params) != self.num_samples:
      raise RequestError(
        f'The request for {self.problem_id!r} has params for {len(self.params)} '
        f'samples and asks for {self.num_samples}; give one for all, or one each.'
      )

  def params_by_sample(self) -> Sequence[SamplingParams]:
    """The parameters of each sample."""
    if isinstance(self.params, tuple):
      return self.params
    return (self.params,) * self.num_samples

  @property
  def max_new_tokens(self) -> int:
    """That of the longest sample."""
    return max(params.max_new_tokens for params in set(self.params_by_sample()))

  @property
  def stop_ids(self) -> set[int]:
    """Those of any sample."""
    return {i for params in set(self.params_by_sample()) for i in params.stop_ids}

  @property
  def penalises(self) -> bool:
    """Whether any sample has a repetition penalty."""
    return any(p.repetition_penalty != 1 for p in set(self.params_by_sample()))


@dataclasses.dataclass(frozen=True)
class Completion:
  """One finished row.

  `token_ids` ends with the stop id, or with the token that completed a stop string,
  when `finish_reason` is `stop`; `length` means that `max_new_tokens` cut it, and
  `error` that the model gave no finite logits for a next token.
  `logprobs` are the model's own (before temperature and filters), `sampling_logprobs`
  those of the distribution drawn from; one a token, in nats. With a guide, `values` are
  the rewards that it expects after each token, None for rows that it does not guide (of
  eta 0, or in mode 'disabled'), and `kls` the divergences from the model of what was
  drawn from, in nats (`guidance.kl_per_token`).
  """

  problem_id: str
  sample_index: int
  token_ids: list[int]
  finish_reason: str
  logprobs: list[float]
  sampling_logprobs: list[float]
  seed: int
  values: list[float] | None = None
  kls: list[float] | None = None

  @property
  def num_tokens(self) -> int:
    return len(self.token_ids)


def fit_requests(
  requests: Sequence[Request],
  config: DecoderConfig,
  *,
  max_length: int | None = None,
  truncate_prompts: bool = False,
) -> list[Request]:
  """The requests as the model can serve them.

  Args:
    requests: What is asked for.
    config: The model's.
    max_length: Most tokens of a prompt with its completion; by default as many as the
      model has positions.
    truncate_prompts: Cut prompts that are too long at their start, and log how many,
      rather than refuse them.

  Raises:
    RequestError: No room for a prompt and its completion, or a token id that the model
      does not have.
  """
  max_length = max_length or config.max_positions
  fitting, num_cut = [], 0
  for request in requests:
    length, new = len(request.prompt_ids), request.max_new_tokens
    room = max_length - new
    if truncate_prompts and 0 < room < length:
      request = dataclasses.replace(request, prompt_ids=request.prompt_ids[-room:])
      num_cut += 1
    elif length > room:
      remedy = 'Shorten it, lower --max_new_tokens, or pass --truncate_prompts.'
      if room <= 0:
        remedy = f'Lower --max_new_tokens below {max_length}.'
      raise RequestError(
        f'The prompt of {request.problem_id!r} has {length} tokens; with '
        f'max_new_tokens={new} it needs {length + new} positions and the limit is '
        f'{max_length}. {remedy}'
      )
    ids = (*request.prompt_ids, *request.stop_ids)
    _check_ids(f'request for {request.problem_id!r}', ids, config)
    fitting.append(request)
  if num_cut:
    logging.warning(
      '%d of %d prompts were cut at their start to fit, with max_new_tokens, into %d '
      'positions.',
      num_cut,
      len(requests),
      max_length,
    )
  return fitting


def check_unguided(requests: Sequence[Request]) -> None:
  """Raises `RequestError` for an `eta` where there is no guide."""
  for request in requests:
    for params in set(request.params_by_sample()):
      if params.eta:
        raise RequestError(
          f'eta of {request.problem_id!r} is {params.eta} and there is no value model '
          'to guide by. Give one with --guide, or leave --eta at 0.'
        )


def check_text(
  number: int, text: Sequence[int], config: DecoderConfig, *, max_length: int
) -> None:
  """Raises `RequestError` for a text to score that the model cannot read."""
  if not 0 < len(text) <= max_length:
    raise RequestError(
      f'Text {number} has {len(text)} tokens, want 1 to {max_length}: shorten it or '
      'leave it out.'
    )
  _check_ids(f'text {number}', text, config)


def hash_problem_id(problem_id: str) -> np.ndarray:
  """Two uint32 that stand for the id, the same on every machine."""
  digest = hashlib.blake2b(problem_id.encode('utf-8'), digest_size=8).digest()
  return np.frombuffer(digest, '<u4').astype(np.uint32)


def _check_ids(what: str, ids: Sequence[int], config: DecoderConfig) -> None:
  for bad in (min(ids), max(ids)):
    if not 0 <= bad < config.vocab_size:
      raise RequestError(
        f'The {what} holds token id {bad}; the model has ids 0 to '
        f'{config.vocab_size - 1}. Use the tokenizer the model was trained with.'
      )
