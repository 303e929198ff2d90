"""The language-model head on its own, for losses that take it a chunk at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mrjax import trees
from mrjax.models.decoder import Decoder

PyTree = Any
Head = Callable[[PyTree, jax.Array], jax.Array]


def head_function(decoder: Decoder, params: PyTree) -> tuple[Head, PyTree]:
  """`Decoder.head` as a function, and the part of the parameters that it reads.

  The function takes that part and hidden states [..., D], and gives float32 logits
  [..., V]. The weight comes rounded to the compute dtype, so that this is done, and
  the weight gathered from its shards, once for all chunks.

  Args:
    decoder: A language model.
    params: All its parameters.

  Raises:
    ValueError: `decoder` has a value head.
  """
  if decoder.num_value_outputs:
    raise ValueError(
      f'The decoder has a value head of {decoder.num_value_outputs} outputs, which '
      'gives no log-probabilities of tokens; want a language model.'
    )
  name = 'embed' if decoder.config.tie_embeddings else 'lm_head'

  def cast(path: str, leaf):
    is_weight = path in ('kernel', 'embedding')
    return leaf.astype(decoder.dtype) if is_weight else leaf

  head_params = {name: trees.map_named(cast, params[name])}
  return functools.partial(_head, decoder), head_params


def _head(decoder: Decoder, head_params: PyTree, hidden: jax.Array) -> jax.Array:
  logits: Any = decoder.apply({'params': head_params}, hidden, method='head')
  return logits
