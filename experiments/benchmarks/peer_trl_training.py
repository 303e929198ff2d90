"""The TRL side of `experiments.benchmarks.training`: SFTTrainer, with PEFT for LoRA.

Usage: peer_trl_training.py DIRECTORY VARIANT STEPS WARMUP; VARIANT is full, lora,
full_packed or lora_packed. Prints one JSON line.
"""

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
  """Notes when each step ends."""

  def __init__(self):
    self.ends = []

  def on_step_end(self, args, state, control, **kwargs):
    self.ends.append(time.perf_counter())


class CountingCollator:
  """Notes the useful tokens of each batch."""

  def __init__(self, collator):
    self._collator, self.counts = collator, []

  def __call__(self, examples):
    batch = self._collator(examples)
    self.counts.append(sum(len(example['input_ids']) for example in examples))
    return batch


def main() -> None:
  directory, variant = sys.argv[1:3]
  steps, warmup = int(sys.argv[3]), int(sys.argv[4])
  torch.set_num_threads(2)
  with open(f'{directory}/texts.jsonl', encoding='utf-8') as file:
    texts = [json.loads(line) for line in file]
  packed = variant.endswith('_packed')
  clock = Clock()
  trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(f'{directory}/model'),
    args=SFTConfig(
      output_dir=tempfile.mkdtemp(),
      max_steps=warmup + steps,
      per_device_train_batch_size=3 if packed else 8,
      packing=packed,
      gradient_checkpointing=False,
      learning_rate=2e-5,
      report_to=[],
      use_cpu=True,
      bf16=False,
      save_strategy='no',
      logging_steps=1000,
      max_length=512,
      data_seed=0,
    ),
    train_dataset=Dataset.from_list(texts),
    processing_class=AutoTokenizer.from_pretrained(f'{directory}/model'),
    peft_config=LoraConfig(
      r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'
    )
    if variant.startswith('lora')
    else None,
    callbacks=[clock],
  )
  trainer.data_collator = collator = CountingCollator(trainer.data_collator)
  trainer.train()
  useful = sum(collator.counts[warmup : warmup + steps])
  seconds = clock.ends[warmup + steps - 1] - clock.ends[warmup - 1]
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
  print(json.dumps({'tokens_per_second': useful / seconds, 'peak_memory_mb': peak}))


if __name__ == '__main__':
  main()
