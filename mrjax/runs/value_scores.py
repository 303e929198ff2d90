"""What a value model predicts of whole texts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mrjax.losses.value import expected_rewards
from mrjax.models.decoder import Decoder
from mrjax.runs.value_model import ValueSource
from mrjax.runs.value_steps import value_outputs
from mrjax.sampling.compiled import CompiledPrograms
from mrjax.sampling.texts import text_batches
from mrjax.sharding.mesh import BATCH, batch_shards


class ValueScorer:
  """A value model on a mesh."""

  def __init__(self, source: ValueSource, mesh: Mesh, *, dtype: Any, max_batch: int):
    """Loads the weights in `dtype`; at most `max_batch` texts run together."""
    self._mesh, self._max_batch = mesh, max_batch
    self._head = source.head
    num_outputs = source.head.num_outputs(source.config.vocab_size)
    self._decoder = Decoder(source.config, dtype=dtype, num_value_outputs=num_outputs)
    self._params = source.load_params(mesh, dtype)
    self._compiled = CompiledPrograms(
      mesh, owner=(source.config, source.head, jnp.dtype(dtype))
    )

  def values(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Each text's expected rewards, float32 [len(text)].

    Entry t is that of the text up to token t, the token included. With a Q head, which
    predicts a token before it is there, entry 0 is meaningless.
    """
    values: dict[int, np.ndarray] = {}
    by_row = NamedSharding(self._mesh, BATCH)
    for numbers, tokens_BT, lengths_B in text_batches(
      texts, max_batch=self._max_batch, shards=batch_shards(self._mesh)
    ):
      values_BT = self._compiled.call(
        'values',
        self._values,
        self._params,
        *jax.device_put((tokens_BT, lengths_B), by_row),
        out_shardings=lambda _: by_row,
      )
      for number, values_T in zip(numbers, jax.device_get(values_BT)):
        values[number] = values_T[: len(texts[number])]
    return [values[i] for i in range(len(texts))]

  def _values(self, params, tokens_BT, lengths_B):
    places_T = jnp.arange(tokens_BT.shape[1])
    batch = {
      'tokens': tokens_BT,
      'positions': jnp.broadcast_to(places_T, tokens_BT.shape),
      'segments': (places_T < lengths_B[:, None]).astype(jnp.int32),
    }
    outputs_BTA = value_outputs(self._decoder, params, batch, self._head)
    return expected_rewards(outputs_BTA, self._head)
