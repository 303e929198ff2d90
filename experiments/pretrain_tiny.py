r"""Retrains the tiny Llamas that ship with mrjax, in Hugging Face format.

They were made on two CPU cores with the commands below, the largest in three stretches
of about 20, 20 and 50 minutes; all share the tokenizer that the first command makes.
Accuracies are in the README.

  python -m experiments.pretrain_tiny --size=tiny-1m --output_dir=OUT/tiny-1m
  python -m experiments.pretrain_tiny --size=tiny-0.2m --tokenizer=OUT/tiny-1m \
    --num_steps=1000 --output_dir=OUT/tiny-0.2m
  python -m experiments.pretrain_tiny --size=tiny-3m --tokenizer=OUT/tiny-1m \
    --learning_rate=2e-3 --num_steps=750 --output_dir=OUT/tiny-3m-a
  python -m experiments.pretrain_tiny --size=tiny-3m --start_from=OUT/tiny-3m-a \
    --tokenizer=OUT/tiny-1m --learning_rate=2e-3 --num_steps=750 --seed=1 \
    --output_dir=OUT/tiny-3m-b
  python -m experiments.pretrain_tiny --size=tiny-3m --start_from=OUT/tiny-3m-b \
    --tokenizer=OUT/tiny-1m --learning_rate=2e-3 --num_steps=2000 --seed=2 \
    --output_dir=OUT/tiny-3m
"""

from collections.abc import Sequence

from absl import flags

from mrjax.runs import cli, pretrain

_D = pretrain.Config
_SIZE = flags.DEFINE_enum('size', 'tiny-1m', list(pretrain.SIZES), 'Which model.')
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'New directory for the model.', required=True
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  _D.tokenizer,
  'Model directory whose tokenizer to reuse; else trains one.',
)
_START_FROM = flags.DEFINE_string(
  'start_from', _D.start_from, 'Model of this size to go on from; else random weights.'
)
_NUM_STEPS = flags.DEFINE_integer('num_steps', _D.num_steps, 'Steps.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', _D.batch_size, 'Texts a step.', lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float('learning_rate', _D.learning_rate, 'Peak.')
_SEED = flags.DEFINE_integer('seed', _D.seed, 'Of weights and problems.')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace the output directory.')


def main(argv: Sequence[str]) -> None:
  del argv
  summary = pretrain.run(
    pretrain.Config(
      size=_SIZE.value,
      output_dir=_OUTPUT_DIR.value,
      start_from=_START_FROM.value,
      tokenizer=_TOKENIZER.value,
      num_steps=_NUM_STEPS.value,
      batch_size=_BATCH_SIZE.value,
      learning_rate=_LEARNING_RATE.value,
      seed=_SEED.value,
      overwrite=_OVERWRITE.value,
    )
  )
  print(
    f'{_OUTPUT_DIR.value}: {summary["size"]}, {summary["num_params"]:,} weights, last '
    f'loss {summary["loss"]:.4f} after {summary["num_texts"]:,} texts '
    f'({summary["num_tokens"]:,} tokens)'
  )


if __name__ == '__main__':
  cli.run(main)
