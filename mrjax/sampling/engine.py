"""The sampling engine: requests in, completions out as a stream without order."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax import trees
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling import programs
from mrjax.sampling.batches import Batch, place_buckets, plan_batches, prompt_bucket
from mrjax.sampling.compiled import CompiledPrograms
from mrjax.sampling.requests import Completion, Request, check_text, fit_requests
from mrjax.sharding.mesh import BATCH, BATCH_AXES, MeshError, batch_shards
from mrjax.sharding.rules import param_shardings

# From a request and the tokens of one of its rows to how many of them to keep, if the
# row ends there, else None.
ShouldStop = Callable[[Request, Sequence[int]], int | None]

STEPS_BETWEEN_CHECKS = 32  # of `ShouldStop`, which runs on the host
_PREFILL_TOKENS = 16384  # on a device at once: bounds the memory of prompt attention


class Engine:
  """Samples from one model on one mesh, and scores texts with it.

  Attributes:
    compiled: Number of programs compiled so far, and their compile time. Shapes come
      in a few buckets; sampling controls are data and never compile anything.
  """

  def __init__(
    self,
    config: DecoderConfig,
    params: Any,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    max_batch: int = 256,
    max_length: int | None = None,
    truncate_prompts: bool = False,
    donate_params: bool = False,
  ):
    """Places the weights on the mesh.

    Args:
      config: The decoder's.
      params: Its parameters, layers stacked.
      mesh: Rows are split over its data and fsdp axes, heads over tensor.
      dtype: Compute and cache dtype; matrices are stored in it too.
      max_batch: Most rows that run together.
      max_length: Most tokens of a prompt with its completion; by default as many as
        the model has positions.
      truncate_prompts: Cut prompts that are too long at their start, and log it,
        rather than refuse them.
      donate_params: Give back the memory of each stacked leaf as soon as its layers
        are split off, so that the weights are never held twice; `params` is then
        used up.

    Raises:
      MeshError: The mesh does not divide the weights or `max_batch`.
    """
    self.config, self.mesh = config, mesh
    self.max_batch = max_batch
    self.max_length = max_length or config.max_positions
    self.truncate_prompts = truncate_prompts
    self._shards = batch_shards(mesh)
    check_mesh(config, mesh, max_batch=max_batch)
    self._decoder = Decoder(config, dtype=dtype, scan_layers=False)
    self._params = _split_layers(params, mesh, dtype=dtype, donate=donate_params)
    self.compiled = CompiledPrograms(mesh, owner=(config, jnp.dtype(dtype)))

  def generate(
    self, requests: Sequence[Request], *, should_stop: ShouldStop | None = None
  ) -> Iterator[Completion]:
    """Yields every sample of every request once, in no promised order.

    Args:
      requests: All of them are checked before the first is served.
      should_stop: Asked about every row at least every `STEPS_BETWEEN_CHECKS` tokens
        and when it has ended; where it returns a number, at least 1, the row ends with
        that many tokens and reason `stop`.

    Raises:
      RequestError: A request the model cannot serve.
      FloatingPointError: The model gave a log-probability that is not finite.
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
    batches = plan_batches(requests, max_rows=self.max_batch, shards=self._shards)
    return (self._run_batch(batch, should_stop) for batch in batches)

  def score(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Each text's log-probabilities, float32 [len(text)] in nats.

    Entry t is log p(token t | tokens before it) under the model; entry 0 is 0.

    Raises:
      RequestError: A text that is empty, too long, or holds ids the model has not.
    """
    for number, text in enumerate(texts):
      check_text(number, text, self.config, max_length=self.max_length)
    # By length, so that texts of one batch need about the same number of places.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    scores: dict[int, np.ndarray] = {}
    while len(scores) < len(order):
      bucket = prompt_bucket(len(texts[order[len(scores)]]))
      most = min(self.max_batch // self._shards, max(1, _PREFILL_TOKENS // bucket))
      needed = -(-len(order) // self._shards)
      size = self._shards * min(most, needed)
      chosen = order[len(scores) : len(scores) + size]
      results = self._score_batch([texts[i] for i in chosen], size)
      scores.update(zip(chosen, results, strict=True))
    return [scores[i] for i in range(len(texts))]

  def _run_batch(
    self, batch: Batch, should_stop: ShouldStop | None
  ) -> list[Completion]:
    buckets = place_buckets(batch.max_new_tokens)
    pauses = set(buckets)
    if should_stop is not None:
      pauses |= set(range(STEPS_BETWEEN_CHECKS, buckets[-1], STEPS_BETWEEN_CHECKS))
    ends: dict[int, int | None] = {}  # what `should_stop` said of rows that ended
    rows = self._put(batch.row_arrays())
    state = self._start(batch, rows, buckets[0])
    for until in sorted(pauses):
      num_places = state.tokens_TB.shape[0]
      if until > num_places:
        state = self._grow(state, min(b for b in buckets if b >= until))
      state = self._go_on(state, rows, until)
      if should_stop is not None:
        state = self._end_rows(state, batch, should_stop, ends)
      if not jax.device_get(state.running_B).any():
        break
    return list(_completions(state, batch, ends))

  def _end_rows(self, state, batch: Batch, should_stop: ShouldStop, ends):
    """Asks `should_stop` about every row that had not ended before."""
    tokens_TB, num_tokens_B, running_B = jax.device_get(
      (state.tokens_TB, state.num_tokens_B, state.running_B)
    )
    running_B = running_B.copy()
    for row, request, _ in batch.rows():
      if row in ends:
        continue
      keep = should_stop(request, tokens_TB[: num_tokens_B[row], row].tolist())
      if keep is not None or not running_B[row]:
        ends[row] = keep
        running_B[row] = False
    return state.replace(running_B=self._put(running_B))

  def _start(self, batch: Batch, rows: programs.Rows, num_places: int):
    per_device = batch.num_groups // self._shards
    num_blocks = -(-per_device * batch.prompt_bucket // _PREFILL_TOKENS)
    while per_device % num_blocks:
      num_blocks += 1
    return self.compiled.call(
      f'prefill in {num_blocks} blocks, {num_places} places',
      functools.partial(
        programs.start, self._decoder, num_places=num_places, num_blocks=num_blocks
      ),
      self._params,
      self._put(batch.prompt_array()),
      rows,
      out_shardings=self._state_shardings,
    )

  def _go_on(self, state, rows: programs.Rows, until: int):
    return self.compiled.call(
      'decode',
      functools.partial(programs.go_on, self._decoder),
      self._params,
      state,
      rows,
      np.int32(until),
      out_shardings=self._state_shardings,
      donate_argnums=(1,),
    )

  def _grow(self, state, num_places: int):
    return self.compiled.call(
      f'grow to {num_places} places',
      functools.partial(programs.grow, num_places=num_places),
      state,
      out_shardings=self._state_shardings,
    )

  def _state_shardings(self, state: programs.State) -> programs.State:
    return programs.state_shardings(state, self.mesh)

  def _score_batch(self, texts: Sequence[Sequence[int]], size: int) -> list[np.ndarray]:
    tokens_BT = np.zeros((size, prompt_bucket(max(map(len, texts)))), np.int32)
    lengths_B = np.ones(size, np.int32)
    for row, text in enumerate(texts):
      tokens_BT[row, : len(text)] = text
      lengths_B[row] = len(text)
    logps_BT = self.compiled.call(
      'score',
      functools.partial(programs.score, self._decoder),
      self._params,
      self._put(tokens_BT),
      self._put(lengths_B),
      out_shardings=lambda _: self._by_row,
    )
    return [row[: len(text)] for row, text in zip(jax.device_get(logps_BT), texts)]

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


def _completions(
  state: programs.State, batch: Batch, ends: dict[int, int | None]
) -> Iterator[Completion]:
  tokens_TB, logps_TB, sampling_logps_TB, num_tokens_B = jax.device_get(
    (state.tokens_TB, state.logps_TB, state.sampling_logps_TB, state.num_tokens_B)
  )
  for row, request, sample_index in batch.rows():
    keep = ends.get(row)
    num_tokens = num_tokens_B[row] if keep is None else keep
    token_ids = tokens_TB[:num_tokens, row].tolist()
    logps_T = logps_TB[:num_tokens, row]
    if not np.isfinite(logps_T).all():
      raise FloatingPointError(
        f'Sample {sample_index} of {request.problem_id!r} has log-probability '
        f'{logps_T.min()} after {int(np.isfinite(logps_T).sum())} tokens: the model '
        'gives logits that are not finite. Check its weights, or use --dtype=float32.'
      )
    stopped = keep is not None or token_ids[-1] in request.params.stop_ids
    yield Completion(
      problem_id=request.problem_id,
      sample_index=sample_index,
      token_ids=token_ids,
      finish_reason='stop' if stopped else 'length',
      logprobs=logps_T.tolist(),
      sampling_logprobs=sampling_logps_TB[:num_tokens, row].tolist(),
      seed=request.params.seed,
    )


def _split_layers(params: Any, mesh: Mesh, *, dtype: Any, donate: bool) -> Any:
  """Parameters of separate layers on the mesh, made leaf by leaf from stacked ones."""
  shardings = trees.flatten(param_shardings(params, mesh))
  split: dict[str, jax.Array] = {}
  for name, leaf in trees.flatten(params).items():
    # Norm scales are used in float32 by some families, and they are small.
    leaf_dtype = leaf.dtype if name.endswith('norm/scale') else dtype
    sharding = shardings[name]
    placed = jax.device_put(leaf, sharding)
    if not name.startswith('layers/'):
      split[name] = placed.astype(leaf_dtype)
    else:
      one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
      unstack = jax.jit(
        lambda x, leaf_dtype=leaf_dtype: [layer.astype(leaf_dtype) for layer in x],
        out_shardings=[one_layer] * leaf.shape[0],
      )
      for i, layer in enumerate(unstack(placed)):
        split[name.replace('layers/', f'layers_{i}/', 1)] = layer
      if donate and isinstance(leaf, jax.Array):
        leaf.delete()
  return trees.unflatten(split)
