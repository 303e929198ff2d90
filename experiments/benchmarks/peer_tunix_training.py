"""The Tunix side of `experiments.benchmarks.training`: PeftTrainer, qwix for LoRA.

Usage: peer_tunix_training.py DIRECTORY VARIANT STEPS WARMUP; VARIANT is full or lora.
Prints one JSON line.
"""

import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

TEXTS_A_STEP = 8
TARGETS = 'q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj'


def load(directory, mesh):
  with open(f'{directory}/model/config.json', encoding='utf-8') as file:
    c = json.load(file)
  config = llama.ModelConfig(
    num_layers=c['num_hidden_layers'],
    vocab_size=c['vocab_size'],
    embed_dim=c['hidden_size'],
    hidden_dim=c['intermediate_size'],
    num_heads=c['num_attention_heads'],
    head_dim=c['head_dim'],
    num_kv_heads=c['num_key_value_heads'],
    rope_theta=c['rope_parameters']['rope_theta'],
    norm_eps=c['rms_norm_eps'],
    weight_tying=c['tie_word_embeddings'],
  )
  with mesh:
    return llama_params.create_model_from_safe_tensors(
      f'{directory}/model', config, mesh, dtype=jnp.float32
    )


def read_batches(directory):
  """Arrays of 8 texts each, padded to the longest of all, and their useful tokens."""
  tokenizer = AutoTokenizer.from_pretrained(f'{directory}/model')
  encode = lambda text: tokenizer(text, add_special_tokens=False)['input_ids']
  rows = []
  with open(f'{directory}/texts.jsonl', encoding='utf-8') as file:
    for line in file:
      text = json.loads(line)
      prompt = encode(text['prompt'])
      rows.append((prompt, [*encode(text['completion']), tokenizer.eos_token_id]))
  rows = [row for row in rows if len(row[0]) + len(row[1]) <= 512]
  longest = max(len(prompt) + len(completion) for prompt, completion in rows)
  batches = []
  for i in range(0, len(rows) - TEXTS_A_STEP + 1, TEXTS_A_STEP):
    tokens = np.zeros((TEXTS_A_STEP, longest), np.int32)
    mask = np.zeros((TEXTS_A_STEP, longest), np.int32)
    for row, (prompt, completion) in enumerate(rows[i : i + TEXTS_A_STEP]):
      both = prompt + completion
      tokens[row, : len(both)] = both
      mask[row, len(prompt) : len(both)] = 1
    useful = sum(len(p) + len(c) for p, c in rows[i : i + TEXTS_A_STEP])
    batches.append((tokens, mask, useful))
  return batches


def model_inputs(batch):
  real = batch.input_tokens != 0
  return {
    'input_tokens': batch.input_tokens,
    'input_mask': batch.input_mask,
    'positions': sft_utils.build_positions_from_mask(real),
    'attention_mask': sft_utils.make_causal_attn_mask(real),
  }


def main() -> None:
  directory, variant = sys.argv[1:3]
  steps, warmup = int(sys.argv[3]), int(sys.argv[4])
  mesh = jax.make_mesh(
    (1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  model = load(directory, mesh)
  batches = read_batches(directory)[: warmup + steps]
  if variant == 'lora':
    places = jnp.arange(4)
    with mesh:
      model = qwix.apply_lora_to_model(
        model,
        qwix.LoraProvider(
          module_path='|'.join(f'.*{name}' for name in TARGETS.split('|')),
          rank=16,
          alpha=32.0,
        ),
        input_tokens=places[None],
        positions=places[None],
        cache=None,
        attention_mask=jnp.tril(jnp.ones((4, 4), bool))[None],
      )
  started = []

  def timed():
    for i, (tokens, mask, _) in enumerate(batches):
      if i == warmup:
        jax.block_until_ready(nnx.state(model))
        started.append(time.perf_counter())
      yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask)

  trainer = peft_trainer.PeftTrainer(
    model,
    optax.adamw(2e-5),
    peft_trainer.TrainingConfig(
      eval_every_n_steps=1000, max_steps=warmup + steps, pbar_description=None
    ),
  ).with_gen_model_input_fn(model_inputs)
  with mesh:
    trainer.train(timed(), None)
  jax.block_until_ready(nnx.state(model))
  seconds = time.perf_counter() - started[0]
  useful = sum(useful for _, _, useful in batches[warmup:])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
  print(json.dumps({'tokens_per_second': useful / seconds, 'peak_memory_mb': peak}))


if __name__ == '__main__':
  main()
