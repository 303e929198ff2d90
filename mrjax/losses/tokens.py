"""Losses over tokens. They return sums and counts: who calls decides the average.

The chunked forms start from hidden states and never hold all logits: tokens that count
are put first, and a loop takes them a chunk at a time through the head, the softmax
and, where gradients are asked for, back. Each device does so with its own tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mrjax.sharding import mesh as mesh_lib

PyTree = Any
# (head_params, hidden states [R, D]) -> float32 logits [R, V] of a language model.
Head = Callable[[PyTree, jax.Array], jax.Array]


def next_token_logps(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """Log-probability of each row's next token, float32 [B, T], in nats.

  Entry t is log p(token t + 1 | tokens 0..t); the last entry is meaningless.
  """
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def next_token_mask(loss_mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """Which entries of `next_token_logps` are supervised, bool [B, T].

  Args:
    loss_mask_BT: True on supervised tokens (those to be predicted).
    segments_BT: Text numbers; a token is never predicted from another text.
  """
  same_BT = segments_BT == jnp.roll(segments_BT, -1, axis=1)
  last_T = jnp.arange(loss_mask_BT.shape[1]) == loss_mask_BT.shape[1] - 1
  return jnp.roll(loss_mask_BT, -1, axis=1) & same_BT & ~last_T


def cross_entropy(
  logits_BTV: jax.Array,
  tokens_BT: jax.Array,
  loss_mask_BT: jax.Array,
  segments_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Summed negative log-likelihood of the supervised tokens, and their number.

  Args:
    logits_BTV: Logits of a causal model.
    tokens_BT: int32 token ids.
    loss_mask_BT: True on tokens to be predicted; others add exactly zero.
    segments_BT: int32 text numbers, 0 for padding.

  Returns:
    Two float32 scalars: the sum in nats and the count of tokens.
  """
  mask_BT = next_token_mask(loss_mask_BT, segments_BT)
  logps_BT = next_token_logps(logits_BTV, tokens_BT)
  return -jnp.where(mask_BT, logps_BT, 0.0).sum(), mask_BT.sum().astype(jnp.float32)


def chunked_cross_entropy(
  head: Head,
  head_params: PyTree,
  hidden_BTD: jax.Array,
  tokens_BT: jax.Array,
  loss_mask_BT: jax.Array,
  segments_BT: jax.Array,
  *,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`cross_entropy` of the head's logits; see `weighted_logps` for the arguments."""
  mask_BT = next_token_mask(loss_mask_BT, segments_BT).astype(jnp.float32)
  logps = weighted_logps(
    head, head_params, hidden_BTD, tokens_BT, mask_BT, chunk_size=chunk_size
  )
  return -logps, mask_BT.sum()


def weighted_logps(
  head: Head,
  head_params: PyTree,
  hidden_BTD: jax.Array,
  tokens_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  """Sum of weights times `next_token_logps` of the head's logits, a float32 scalar.

  Gradients are made in the forward pass, where the logits are at hand: no logits are
  computed twice, and what waits for the backward pass is as large as `hidden_BTD` and
  the head.

  Args:
    head: Logits of hidden states, as `decoder.head_function` gives it.
    head_params: What `head` reads. A leaf that is not differentiated costs no gradient.
    hidden_BTD: Hidden states after the final norm.
    tokens_BT: int32 token ids.
    weights_BT: Weights of the entries of `next_token_logps`, without gradient. Entries
      of weight 0 are skipped: prompts and padding cost nothing.
    chunk_size: Tokens that go through the head together, on one device; by default as
      many as the platform needs to be fast, and never all.
  """
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  return _weighted(head, chunk_size, head_params, hidden_BTD, targets_BT, weights_BT)


def chunked_next_token_logps(
  head: Head,
  head_params: PyTree,
  hidden_BTD: jax.Array,
  tokens_BT: jax.Array,
  mask_BT: jax.Array | None = None,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  """`next_token_logps` of the head's logits, float32 [B, T], in nats.

  For what is no weighted sum, as preference losses; the backward pass computes the
  logits again.

  Args:
    head: As the other arguments, see `weighted_logps`.
    head_params: What `head` reads.
    hidden_BTD: Hidden states after the final norm.
    tokens_BT: int32 token ids.
    mask_BT: True on the entries that are wanted (by default all); others are 0 and
      cost nothing.
    chunk_size: Tokens that go through the head together, on one device.
  """
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  if mask_BT is None:
    mask_BT = jnp.ones(tokens_BT.shape, bool)
  return _logps(head, chunk_size, head_params, hidden_BTD, targets_BT, mask_BT)


# What is frozen is known while the forward pass is traced (`perturbed`). From there on
# (head_params, hidden) are two trees, differentiated and frozen, with None for what is
# in the other one.
def _partition(tree: PyTree) -> tuple[PyTree, PyTree]:
  trained = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, tree)
  frozen = jax.tree.map(lambda leaf: None if leaf.perturbed else leaf.value, tree)
  return trained, frozen


def _join(trained: PyTree, frozen: PyTree) -> PyTree:
  return jax.tree.map(
    lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(head, chunk_size, head_params, hidden, targets, weights):
  inputs = head_params, hidden
  nothing = jax.tree.map(lambda _: None, inputs)
  logps, _ = _sweep(head, chunk_size, nothing, inputs, targets, weights)
  return jnp.sum(weights * logps)


def _weighted_fwd(head, chunk_size, head_params, hidden, targets, weights):
  inputs = _partition((head_params, hidden))
  logps, grads = _sweep(head, chunk_size, *inputs, targets.value, weights.value)
  return jnp.sum(weights.value * logps), grads


def _weighted_bwd(head, chunk_size, grads, cotangent):
  del head, chunk_size
  scaled = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), grads)
  return *scaled, None, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logps(head, chunk_size, head_params, hidden, targets, mask):
  inputs = head_params, hidden
  nothing = jax.tree.map(lambda _: None, inputs)
  return _sweep(head, chunk_size, nothing, inputs, targets, mask)[0]


def _logps_fwd(head, chunk_size, head_params, hidden, targets, mask):
  inputs = _partition((head_params, hidden))
  logps = _logps(head, chunk_size, *_join(*inputs), targets.value, mask.value)
  return logps, (inputs, targets.value, mask.value)


def _logps_bwd(head, chunk_size, residuals, cotangent):
  (trained, frozen), targets, mask = residuals
  weights = jnp.where(mask, cotangent, 0.0)
  _, grads = _sweep(head, chunk_size, trained, frozen, targets, weights)
  return *grads, None, None


_logps.defvjp(_logps_fwd, _logps_bwd, symbolic_zeros=True)


def _sweep(head, chunk_size, trained, frozen, targets_BT, weights_BT):
  """`next_token_logps` where weights are not 0 (0 elsewhere), and the gradients of
  their weighted sum with respect to `trained`, in the form of `trained`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh_lib.batch_shards(mesh) == 1:
    return _local_sweep(head, chunk_size, (), trained, frozen, targets_BT, weights_BT)
  # Each shard loops over its own tokens, and gradients of the head are summed over
  # shards once, after the loop. Other axes of the mesh are left to the compiler.
  rows = mesh_lib.BATCH
  specs = jax.sharding.PartitionSpec(), rows
  sweep = functools.partial(_local_sweep, head, chunk_size, mesh_lib.BATCH_AXES)
  return jax.shard_map(
    sweep,
    in_specs=(specs, specs, rows, rows),
    out_specs=(rows, specs),
    axis_names=set(mesh_lib.BATCH_AXES),
    check_vma=False,
  )(trained, frozen, targets_BT, weights_BT)


def _local_sweep(head, chunk_size, axes, trained, frozen, targets_BT, weights_BT):
  """`_sweep` over the tokens of one shard; `axes` are the mesh axes of the shards."""
  params, hidden_BTD = _join(trained, frozen)
  num_tokens, width = targets_BT.size, hidden_BTD.shape[-1]
  if chunk_size is None:
    one = jax.ShapeDtypeStruct((1, width), hidden_BTD.dtype)
    vocab_size = jax.eval_shape(head, params, one).shape[-1]
    chunk_size = _default_chunk_size(num_tokens, vocab_size)
  num_chunks = -(-num_tokens // chunk_size)

  def arrange(x_BT):
    """Tokens that count first, in chunks [C, R]; the last is filled up with zeros."""
    x_N = jnp.asarray(x_BT).reshape(num_tokens, *x_BT.shape[2:])[order_N]
    rest = num_chunks * chunk_size - num_tokens
    x_N = jnp.pad(x_N, [(0, rest)] + [(0, 0)] * (x_N.ndim - 1))
    return x_N.reshape(num_chunks, chunk_size, *x_N.shape[1:])

  def restore(x_CR):
    x_N = x_CR.reshape(num_chunks * chunk_size, *x_CR.shape[2:])
    return x_N[jnp.argsort(order_N)].reshape(*targets_BT.shape, *x_CR.shape[2:])

  skipped_N = jnp.asarray(weights_BT).reshape(-1) == 0
  order_N = jnp.argsort(skipped_N, stable=True)
  num_needed = -(-jnp.sum(~skipped_N) // chunk_size)
  if axes:  # shards stay in step: the head may hold collectives over other axes
    num_needed = jax.lax.pmax(num_needed, axes)
  hidden_CRD = arrange(hidden_BTD)
  targets_CR, weights_CR = arrange(targets_BT), arrange(weights_BT)
  train_params, train_hidden = trained

  def step(c, carry):
    logps_CR, params_grads, hidden_grads_CRD = carry

    def logits_of(train_params, hidden_RD):
      return head(_join(train_params, frozen[0]), hidden_RD).astype(jnp.float32)

    logits_RV, pull = jax.vjp(logits_of, train_params, hidden_CRD[c])
    total_R = jax.nn.logsumexp(logits_RV, axis=-1)
    targets_R1 = targets_CR[c][:, None]
    chosen_R = jnp.take_along_axis(logits_RV, targets_R1, axis=-1)[:, 0]
    logps_CR = logps_CR.at[c].set(chosen_R - total_R)
    if not jax.tree.leaves(trained):
      return logps_CR, params_grads, hidden_grads_CRD
    probs_RV = jnp.exp(logits_RV - total_R[:, None])
    hits_RV = jnp.arange(logits_RV.shape[-1]) == targets_R1
    params_grad, hidden_grad_RD = pull(weights_CR[c][:, None] * (hits_RV - probs_RV))
    params_grads = jax.tree.map(lambda a, b: a + b, params_grads, params_grad)
    if train_hidden is not None:
      hidden_grads_CRD = hidden_grads_CRD.at[c].set(hidden_grad_RD)
    return logps_CR, params_grads, hidden_grads_CRD

  carry = (
    jnp.zeros(targets_CR.shape, jnp.float32),
    jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), train_params),
    None if train_hidden is None else jnp.zeros_like(hidden_CRD),
  )
  logps_CR, params_grads, hidden_grads_CRD = jax.lax.fori_loop(
    0, num_needed, step, carry
  )
  if axes:
    params_grads = jax.lax.psum(params_grads, axes)
  grads = (
    jax.tree.map(lambda g, x: g.astype(x.dtype), params_grads, train_params),
    None if train_hidden is None else restore(hidden_grads_CRD),
  )
  return jnp.where(weights_BT == 0, 0.0, restore(logps_CR)), grads


def _default_chunk_size(num_tokens: int, vocab_size: int) -> int:
  """Tokens a chunk: enough for fast products, and never all of them.

  On a CPU 128 rows are enough, and more pay while the logits stay below 64 MiB;
  accelerators need 1,024 to be bound by arithmetic rather than by reading the head.
  """
  on_cpu = mesh_lib.platform() == 'cpu'
  most = min(max(2**24 // vocab_size, 128), 512) if on_cpu else 1024
  return min(most, -(-num_tokens // 2))
