r"""Supervised fine-tuning of a Llama-family model on any mesh: full, LoRA or QLoRA.

On a laptop, with the embedded model and problems:

  python -m experiments.train_sft --model=tiny-1m --data='arithmetic:train?size=500' \
    --prompt_template=qa --num_epochs=1 --learning_rate=5e-4 --output_dir=outputs/sft

On a TPU slice (not measured yet), GSM8K with the setting of RFT (arXiv 2308.01825):

  python -m experiments.train_sft --model=meta-llama/Llama-2-7b-hf --data=gsm8k:train \
    --prompt_template=alpaca --packing=false --batch_size=128 --num_epochs=3 \
    --learning_rate=2e-5 --warmup_ratio=0.03 --max_length=512 --mesh=data:1,fsdp:-1 \
    --remat=full --output_dir=outputs/sft

QLoRA: add --lora_rank=16 --quantize=nf4 --learning_rate=2e-4. To see beforehand whether
it fits: --dry_run.

Run it again with the same flags after it was stopped and it goes on from its last
checkpoint. --model of the other commands accepts --output_dir; after LoRA, --adapter.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import training_flags
from mrjax.runs import cli, sft

_FLAGS = training_flags.define(
  sft.Config,
  data='SFT records in JSON Lines (file, directory, glob), or problems as NAME:SPLIT.',
)

flags.adopt_module_key_flags(training_flags)


def main(argv: Sequence[str]) -> None:
  del argv
  values: dict[str, Any] = {flag.name: flag.value for flag in _FLAGS}
  print(training_flags.describe(sft.run(sft.Config(**values))))


if __name__ == '__main__':
  cli.run(main)
