"""Losses over tokens. They return sums and counts: who calls decides the average."""

import jax
import jax.numpy as jnp


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
