"""How much memory sampling takes on a device, known before anything is there."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mrjax import trees
from mrjax.models.attention_blocks import BLOCK
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.sampling.drawing import Models
from mrjax.sampling.plan import Layout
from mrjax.sampling.prefill import CHUNK
from mrjax.sampling.programs import empty_state
from mrjax.sampling.weights import weight_shardings

# Arrays of about the size of the logits that live at once while a token is drawn, and
# of scores while attention is computed. Measured: see tests/test_sampling_memory.py.
_LOGITS_COPIES = 10
_SCORES_COPIES = 4


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """Bytes on each device, at most.

  Attributes:
    weights: Of all models.
    state: The cache with all its places, and what else lives between dispatches.
    growth: The state before, which stands beside the new one while it grows.
    decode: What drawing a token takes beside weights and state.
    prefill: What reading prompts takes.
  """

  weights: int
  state: int
  growth: int
  decode: int
  prefill: int

  @property
  def workspace(self) -> int:
    return max(self.growth, self.decode, self.prefill)

  @property
  def total(self) -> int:
    return self.weights + self.state + self.workspace

  def __str__(self) -> str:
    return (
      f'{_gb(self.total)} a device: weights {_gb(self.weights)}, cache and rows '
      f'{_gb(self.state)}, to work in {_gb(self.workspace)}'
    )


def plan_memory(
  models: Models,
  mesh: Mesh,
  layout: Layout,
  *,
  cache_dtype: Any,
  num_stops: int = 8,
  penalises: bool = False,
) -> MemoryPlan:
  """What a run with a layout takes; nothing is made.

  Weights and state are exact, the workspace is an upper estimate.

  Args:
    models: What draws.
    mesh: Its tensor axis splits weights and heads.
    layout: Of a data shard.
    cache_dtype: Of keys and values.
    num_stops: As for `empty_state`.
    penalises: As for `empty_state`.
  """
  state_bytes = lambda places: _state_bytes(
    functools.partial(
      empty_state,
      models,
      jnp.dtype(cache_dtype),
      layout,
      num_places=places,
      shards=1,
      num_stops=num_stops,
      penalises=penalises,
    ),
    mesh.shape['tensor'],
  )
  *before, last = (state_bytes(places) for places in layout.place_buckets)
  decoders = [models.decoder, *([models.guide.decoder] if models.guide else [])]
  decode = _decode_bytes(models.decoder, layout, rows=layout.lanes)
  prefill = _prefill_bytes(models.decoder, layout)
  if models.guide:
    asked = models.guide.guidance.num_candidates(models.decoder.config.vocab_size)
    guide = models.guide.decoder
    decode += _decode_bytes(guide, layout, rows=layout.lanes * asked)
    prefill = max(prefill, _prefill_bytes(guide, layout))
  return MemoryPlan(
    weights=sum(weight_bytes(decoder, mesh) for decoder in decoders),
    state=last,
    growth=max(before, default=0),
    decode=decode,
    prefill=prefill,
  )


@functools.cache
def weight_bytes(decoder: Decoder, mesh: Mesh) -> int:
  """Bytes of the weights of a decoder on each device, as `split_layers` places them."""
  stacked = decoder.clone(scan_layers=True)
  init = lambda: stacked.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  shapes = jax.eval_shape(init)['params']
  shardings = trees.flatten(weight_shardings(shapes, mesh))
  total = 0
  for name, leaf in trees.flatten(shapes).items():
    dtype = leaf.dtype if name.endswith('norm/scale') else jnp.dtype(decoder.dtype)
    total += math.prod(shardings[name].shard_shape(leaf.shape)) * dtype.itemsize
  return total


def _state_bytes(make: Callable[[], Any], tensor: int) -> int:
  """Bytes of a state on each device; keys and values are split by heads."""
  state = jax.eval_shape(make)
  cache = trees.num_bytes((state.cache, state.guide_cache))
  return trees.num_bytes(state) - cache + cache // tensor


def _decode_bytes(decoder: Decoder, layout: Layout, *, rows: int) -> int:
  """To draw a token a row."""
  c: DecoderConfig = decoder.config
  places = layout.slots * layout.slot_places + layout.place_buckets[-1]
  logits = _LOGITS_COPIES * rows * c.vocab_size * 4
  scores = _SCORES_COPIES * rows * c.num_heads * places * 4
  hidden = rows * (8 * c.hidden_size + 3 * c.intermediate_size) * 4
  stored = layout.groups * layout.slots * layout.slot_places
  stored += layout.lanes * layout.place_buckets[-1]
  # One layer at a time, in the dtype that products are computed in.
  cast = 2 * stored * c.num_kv_heads * c.head_dim * jnp.dtype(decoder.dtype).itemsize
  return logits + scores + hidden + cast


def _prefill_bytes(decoder: Decoder, layout: Layout) -> int:
  """To read prompts."""
  c: DecoderConfig = decoder.config
  prompts = layout.groups * layout.slots
  prompts = min(prompts, max(1, CHUNK // layout.slot_places))
  tokens = prompts * min(layout.slot_places, CHUNK)
  stored = 2 * c.num_layers * c.num_kv_heads * c.head_dim * layout.slot_places * prompts
  width = 8 * c.hidden_size + 3 * c.intermediate_size + 4 * c.num_heads * c.head_dim
  seen = min(layout.slot_places, 4 * BLOCK)
  scores = _SCORES_COPIES * c.num_heads * seen * 4
  itemsize = jnp.dtype(decoder.dtype).itemsize
  return stored * itemsize + tokens * (width * itemsize + scores)


def _gb(number: int) -> str:
  return f'{number / 1e9:.2f} GB'
