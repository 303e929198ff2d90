"""The sampling engine: requests in, completions out as a stream without order."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mrjax import trees
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling import programs
from mrjax.sampling.compiled import CompiledPrograms
from mrjax.sampling.drawing import Models
from mrjax.sampling.guidance import GuidanceConfig
from mrjax.sampling.guide import Guide, by_token
from mrjax.sampling.lanes import State
from mrjax.sampling.plan import Layout, plan
from mrjax.sampling.requests import (
  Completion,
  Request,
  check_text,
  check_unguided,
  fit_requests,
)
from mrjax.sampling.schedule import Row, Schedule, Utilisation
from mrjax.sampling.texts import text_batches
from mrjax.sampling.weights import split_layers
from mrjax.sharding.mesh import BATCH, BATCH_AXES, MeshError, batch_shards
from mrjax.sharding.rules import param_shardings

# From a request and the tokens of one of its rows to how many of them to keep, if the
# row ends there, else None.
ShouldStop = Callable[[Request, Sequence[int]], int | None]

STEPS_A_DISPATCH = 32  # most; also between two calls of `ShouldStop`, on the host


class Engine:
  """Samples from one model on one mesh, and scores texts with it.

  Attributes:
    compiled: Number of programs compiled so far, and their compile time. Shapes come
      in a few buckets; sampling controls are data and never compile anything.
    utilisation: Of the lanes, in the newest call of `generate`.
    cache_bytes: Size of the key/value cache of that call, on all devices.
  """

  def __init__(
    self,
    config: DecoderConfig,
    params: Any,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    cache_dtype: Any = None,
    max_batch: int = 256,
    max_length: int | None = None,
    truncate_prompts: bool = False,
    donate_params: bool = False,
    guide: Guide | None = None,
  ):
    """Places the weights on the mesh.

    Args:
      config: The decoder's.
      params: Its parameters, layers stacked.
      mesh: Rows are split over its data and fsdp axes, heads over tensor.
      dtype: Compute dtype; matrices are stored in it too.
      cache_dtype: Of keys and values, also int8; by default `dtype`.
      max_batch: Most rows that run together.
      max_length: Most tokens of a prompt with its completion; by default as many as
        the model has positions.
      truncate_prompts: Cut prompts that are too long at their start, and log it,
        rather than refuse them.
      donate_params: Give back the memory of each stacked leaf as soon as its layers
        are split off, so that the weights are never held twice; `params` is then
        used up. So are those of the guide.
      guide: A value model that guides rows with an `eta`; it computes in `dtype` too.

    Raises:
      MeshError: The mesh does not divide the weights or `max_batch`.
      ValueError: The guide has another vocabulary, or cannot guide as it shall.
    """
    self.config, self.mesh = config, mesh
    self.max_batch = max_batch
    self.max_length = max_length or config.max_positions
    if guide:
      check_guide(guide.config, guide.head, guide.guidance, config)
      check_mesh(guide.config, mesh, max_batch=max_batch)
      self.max_length = min(self.max_length, guide.config.max_positions)
    self.truncate_prompts = truncate_prompts
    self._shards = batch_shards(mesh)
    check_mesh(config, mesh, max_batch=max_batch)
    self._cache_dtype = jnp.dtype(cache_dtype or dtype)
    self._models = Models.make(config, guide, mesh, dtype=dtype)
    place = functools.partial(
      split_layers, mesh=mesh, dtype=dtype, donate=donate_params
    )
    self._weights = (place(params), None)
    if guide:
      guide_params = by_token(place(guide.params), guide.head, mesh)
      self._weights = (self._weights[0], guide_params)
    self.utilisation, self.cache_bytes = Utilisation(), 0
    self.compiled = CompiledPrograms(mesh, owner=self._models)

  def generate(
    self, requests: Sequence[Request], *, should_stop: ShouldStop | None = None
  ) -> Iterator[Completion]:
    """Yields every sample of every request once, in no promised order.

    A row whose model gives logits that are not finite ends there, with reason `error`.

    Args:
      requests: All of them are checked before the first is served.
      should_stop: Asked about every row at least every `STEPS_A_DISPATCH` tokens
        and when it has ended; where it returns a number, at least 1, the row ends with
        that many tokens and reason `stop`.

    Raises:
      RequestError: A request the model cannot serve.
    """
    return itertools.chain.from_iterable(
      self.generate_batches(requests, should_stop=should_stop)
    )

  def generate_batches(
    self, requests: Sequence[Request], *, should_stop: ShouldStop | None = None
  ) -> Iterator[list[Completion]]:
    """As `generate`, in lists of rows that came from the device together."""
    requests = fit_requests(
      requests,
      self.config,
      max_length=self.max_length,
      truncate_prompts=self.truncate_prompts,
    )
    if self._models.guide is None:
      check_unguided(requests)
    return self._serve(requests, should_stop) if requests else iter(())

  def score(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Each text's log-probabilities, float32 [len(text)] in nats.

    Entry t is log p(token t | tokens before it) under the model; entry 0 is 0.

    Raises:
      RequestError: A text that is empty, too long, or holds ids the model has not.
    """
    for number, text in enumerate(texts):
      check_text(number, text, self.config, max_length=self.max_length)
    scores: dict[int, np.ndarray] = {}
    for numbers, tokens_BT, lengths_B in text_batches(
      texts, max_batch=self.max_batch, shards=self._shards
    ):
      logps_BT = self.compiled.call(
        'score',
        functools.partial(programs.score, self._models.decoder),
        self._weights[0],
        self._put(tokens_BT),
        self._put(lengths_B),
        out_shardings=lambda _: self._by_row,
      )
      for number, logps_T in zip(numbers, jax.device_get(logps_BT)):
        scores[number] = logps_T[: len(texts[number])]
    return [scores[i] for i in range(len(texts))]

  def _serve(
    self, requests: Sequence[Request], should_stop: ShouldStop | None
  ) -> Iterator[list[Completion]]:
    layout = plan(
      requests,
      max_lanes=self.max_batch // self._shards,
      shards=self._shards,
      may_stop=should_stop is not None,
    )
    schedule = Schedule(requests, layout, shards=self._shards)
    num_lanes = self._shards * layout.lanes
    lengths_B = np.zeros(num_lanes, np.int32)  # own places that are taken
    state = self._empty_state(
      layout, schedule.num_stops, any(request.penalises for request in requests)
    )
    places = layout.place_buckets[0]
    ended = np.zeros(num_lanes, bool)  # by the host
    self.utilisation = Utilisation()
    self.cache_bytes = trees.num_bytes((state.cache, state.guide_cache))
    while not schedule.done:
      if (counts := schedule.share_out()) is not None:
        slots = state.slots.replace(num_samples=self._put(counts))
        state = state.replace(slots=slots)
      for prompts in schedule.next_prompts():
        state = self._fill(state, prompts)
      needed = min(int(lengths_B.max()) + STEPS_A_DISPATCH, layout.place_buckets[-1])
      if (fit := min(c for c in layout.place_buckets if c >= needed)) != places:
        state, places = self._resize(state, fit), fit
        self.cache_bytes = max(
          self.cache_bytes, trees.num_bytes((state.cache, state.guide_cache))
        )
      state, log = self._go_on(state, ended, schedule.most_idle())
      log, lanes = jax.device_get((log, state.lanes))
      self.utilisation.add(log.owners_TB)
      rows, going = schedule.gather(log, lanes.running)
      completions = []
      for row in rows:
        keep = should_stop(row.request, row.token_ids) if should_stop else None
        schedule.end(row)
        completions.append(_completion(row, keep))
      ended = np.zeros(num_lanes, bool)
      for lane, row in going:
        keep = should_stop(row.request, row.token_ids) if should_stop else None
        if keep is not None:
          ended[lane] = True
          schedule.end(row)
          completions.append(_completion(row, keep))
      lengths_B = np.where(lanes.running & ~ended, lanes.own_lengths, 0)
      if completions:
        yield completions

  def _empty_state(self, layout: Layout, num_stops: int, penalises: bool) -> State:
    make = functools.partial(
      programs.empty_state,
      self._models,
      self._cache_dtype,
      layout,
      num_places=layout.place_buckets[0],
      shards=self._shards,
      num_stops=num_stops,
      penalises=penalises,
    )
    return self.compiled.call(
      f'empty {layout} for {num_stops} stop ids in {self._cache_dtype}'
      + ' with penalties' * penalises,
      make,
      out_shardings=self._state_shardings,
    )

  def _fill(self, state: State, prompts: programs.Prompts) -> State:
    return self.compiled.call(
      'fill',
      programs.fill_program(self._models, self.mesh),
      self._weights,
      state,
      self._put(prompts),
      out_shardings=self._state_shardings,
      donate_argnums=(1,),
    )

  def _go_on(self, state: State, ended_B: np.ndarray, most_idle: np.ndarray):
    return self.compiled.call(
      'decode',
      programs.decode_program(self._models, self.mesh, num_steps=STEPS_A_DISPATCH),
      self._weights,
      state,
      self._put(ended_B),
      self._put(most_idle),
      out_shardings=lambda out: (
        self._state_shardings(out[0]),
        programs.log_shardings(out[1], self.mesh),
      ),
      donate_argnums=(1,),
    )

  def _resize(self, state: State, num_places: int) -> State:
    return self.compiled.call(
      f'resize to {num_places} places',
      functools.partial(programs.resize, num_places=num_places),
      state,
      out_shardings=self._state_shardings,
    )

  def _state_shardings(self, state: State) -> State:
    return programs.state_shardings(state, self.mesh)

  @property
  def _by_row(self) -> NamedSharding:
    return NamedSharding(self.mesh, BATCH)

  def _put(self, tree: Any) -> Any:
    return jax.device_put(tree, self._by_row)


def check_mesh(config: DecoderConfig, mesh: Mesh, *, max_batch: int) -> None:
  """Raises `MeshError` where the mesh does not divide the weights or `max_batch`."""
  shards = batch_shards(mesh)
  if max_batch < shards:
    raise MeshError(
      f'max_batch {max_batch} is less than {shards}, the number of parts that the '
      f'{" and ".join(BATCH_AXES)} axes of the mesh split rows into; raise it or '
      'choose another mesh.'
    )
  decoder = Decoder(config)
  init = lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  param_shardings(jax.eval_shape(init)['params'], mesh)


def check_guide(
  config: DecoderConfig,
  head: ValueHead,
  guidance: GuidanceConfig,
  guided: DecoderConfig,
) -> None:
  """Raises ValueError where a value model cannot guide a model of `guided`.

  That they share a tokenizer shows in the tokenizers alone; the number of token ids is
  what can be seen here.
  """
  if config.vocab_size != guided.vocab_size:
    raise ValueError(
      f'the guide has {config.vocab_size:,} token ids and the model '
      f'{guided.vocab_size:,}: a guide must have been trained with the tokenizer of '
      'the model it guides.'
    )
  guidance.check(head, vocab_size=guided.vocab_size)


def _completion(row: Row, keep: int | None) -> Completion:
  """The completion of a row that has ended, by `should_stop` where it said how."""
  num_tokens = len(row.token_ids) if keep is None else keep
  params = row.request.params_by_sample()[row.sample]
  reason = 'length'
  if keep is not None or row.token_ids[-1] in params.stop_ids:
    reason = 'stop'
  if not math.isfinite(row.logprobs[num_tokens - 1]):  # none comes after such a one
    num_tokens, reason = num_tokens - 1, 'error'
  guided = bool(row.values) and not math.isnan(row.values[0])
  return Completion(
    problem_id=row.request.problem_id,
    sample_index=row.request.first_sample_index + row.sample,
    token_ids=row.token_ids[:num_tokens],
    finish_reason=reason,
    logprobs=row.logprobs[:num_tokens],
    sampling_logprobs=row.sampling_logprobs[:num_tokens],
    seed=params.seed,
    values=row.values[:num_tokens] if guided else None,
    kls=row.kls[:num_tokens] if row.kls else None,
  )
