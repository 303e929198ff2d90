"""The other side of `experiments.benchmarks.sft`: TRL's SFTTrainer as it comes.

Usage: peer_trl_sft.py DIRECTORY STEPS WARMUP; prints one JSON line.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

BATCH_SIZE = 8


class Clock(TrainerCallback):
  """Notes when each step ends."""

  def __init__(self):
    self.ends = []

  def on_step_end(self, args, state, control, **kwargs):
    self.ends.append(time.perf_counter())


def main() -> None:
  directory, steps, warmup = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  torch.set_num_threads(2)
  with open(f'{directory}/texts.jsonl', encoding='utf-8') as file:
    texts = [json.loads(line) for line in file]
  tokenizer = AutoTokenizer.from_pretrained(f'{directory}/model')
  clock = Clock()
  config = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=BATCH_SIZE,
    gradient_checkpointing=False,
    learning_rate=2e-5,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy='no',
    logging_steps=1000,
    max_length=1024,
    shuffle_dataset=False,
    data_seed=0,
  )
  trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(f'{directory}/model'),
    args=config,
    train_dataset=Dataset.from_list(texts),
    processing_class=tokenizer,
    callbacks=[clock],
  )
  # The same order of texts as the other side, so both time the same tokens.
  trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(
    trainer.train_dataset
  )
  trainer.train()
  useful = sum(
    len(tokenizer(text['prompt'] + text['completion'])['input_ids']) + 1
    for text in texts[warmup * BATCH_SIZE :]
  )
  seconds = clock.ends[-1] - clock.ends[warmup - 1]
  print(json.dumps({'tokens_per_second': useful / seconds}))


if __name__ == '__main__':
  main()
