"""No array of all logits exists in a whole training step, whatever the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import largest

from mrjax.checkpoint.weights import param_shapes
from mrjax.lora.adapters import LoraConfig, adapter_shapes
from mrjax.losses.tokens import cross_entropy
from mrjax.models.config import DecoderConfig
from mrjax.models.decoder import Decoder
from mrjax.runs import preference_losses as losses
from mrjax.runs import sft
from mrjax.training import step

B, T, V = 3, 14, 211
CONFIG = DecoderConfig.from_hf(
  {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': V,
    'hidden_size': 16,
    'intermediate_size': 26,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 6,
  }
)
LORA = LoraConfig(rank=5)
DECODER = Decoder(CONFIG, lora_scale=LORA.scale)
WHOLE, ADAPTER = param_shapes(CONFIG), adapter_shapes(CONFIG, LORA)


def batch_of(num_micro: int) -> dict[str, np.ndarray]:
  """Two texts a row and no padding, of which all but the first token counts."""
  positions = np.r_[np.arange(T // 2 + 1), np.arange(T - T // 2 - 1)]
  facts = {
    'tokens': np.arange(T) % V,
    'positions': positions,
    'segments': np.cumsum(positions == 0),
    'loss_mask': positions > 0,
  }
  return {
    name: np.broadcast_to(
      x if x.dtype == bool else x.astype(np.int32), (num_micro, B, T)
    )
    for name, x in facts.items()
  }


def whole_logits(trainable, frozen, batch, key):
  del frozen, key
  logits = DECODER.apply({'params': trainable}, batch['tokens'])
  facts = batch['tokens'], batch['loss_mask'], batch['segments']
  loss, weight = cross_entropy(logits, *facts)
  return loss, (weight, {})


def preference_loss(config, reference=''):
  return losses.make_loss_fn(losses.Policies(DECODER, reference), config, num_texts=2)


def most_elements(loss_fn, trainable, frozen, *, num_micro=1, **labels) -> int:
  """Elements of the largest array in a step of the loss."""
  tx = optax.adamw(1e-3)
  state = jax.eval_shape(lambda params: step.init_state(params, tx), trainable)
  take = functools.partial(step.train_step, loss_fn=loss_fn, tx=tx)
  return largest(take, state, frozen, batch_of(num_micro) | labels)


@pytest.mark.parametrize('num_micro', [1, 2])
def test_the_search_finds_all_logits_where_they_are(num_micro):
  found = most_elements(whole_logits, WHOLE, {}, num_micro=num_micro)
  assert found >= B * T * V


DPO = losses.LossConfig(sft_weight=0.2)
LOGPS = jnp.zeros((1, B, 2), jnp.float32)
CASES = {
  'sft': (sft.make_loss_fn(DECODER), WHOLE, {}),
  'sft, adapter': (sft.make_loss_fn(DECODER), ADAPTER, WHOLE),
  'dpo, adapter off': (preference_loss(DPO, losses.ADAPTER_OFF), ADAPTER, WHOLE),
  'dpo, resident': (
    preference_loss(DPO, losses.RESIDENT),
    WHOLE,
    {losses.REFERENCE: WHOLE},
  ),
  'ipo, precomputed': (
    preference_loss(losses.LossConfig('ipo'), losses.PRECOMPUTED),
    WHOLE,
    {},
  ),
  'orpo': (preference_loss(losses.LossConfig('orpo')), WHOLE, {}),
  'simpo': (preference_loss(losses.LossConfig('simpo')), WHOLE, {}),
}


@pytest.mark.parametrize('name', CASES)
def test_no_step_holds_all_logits(name):
  labels = {losses.REFERENCE: LOGPS} if 'precomputed' in name else {}
  assert V * 16 <= most_elements(*CASES[name], **labels) < B * T * V


def test_micro_batches_do_not_add_up_to_all_logits():
  assert most_elements(*CASES['sft'], num_micro=2) < B * T * V
