"""Trains the small tokenizers of the embedded models."""

import json
from collections.abc import Iterable
from pathlib import Path


def train_bpe_tokenizer(
  texts: Iterable[str], *, vocab_size: int, output_dir: str | Path
) -> None:
  """Trains a byte-level BPE tokenizer and writes it as a Hugging Face folder.

  Digits are tokens of their own; every byte is in the vocabulary, so any text has ids.
  Ids 0, 1, 2 are `<pad>`, `<s>`, `</s>`; texts start with `<s>`.

  Args:
    texts: What to learn the merges from.
    vocab_size: Entries, special tokens included; at least 259.
    output_dir: Gets tokenizer.json, tokenizer_config.json, special_tokens_map.json.
  """
  from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
  )

  special = {'pad_token': '<pad>', 'bos_token': '<s>', 'eos_token': '</s>'}
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  if vocab_size < len(alphabet) + len(special):
    raise ValueError(
      f'vocab_size={vocab_size}; want at least {len(alphabet) + len(special)}: every '
      'byte and the special tokens'
    )
  backbone = Tokenizer(models.BPE())
  backbone.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backbone.decoder = decoders.ByteLevel()
  backbone.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(special.values()),
      initial_alphabet=alphabet,
      show_progress=False,
    ),
  )
  bos = special['bos_token']
  backbone.post_processor = processors.TemplateProcessing(
    single=f'{bos} $A', special_tokens=[(bos, backbone.token_to_id(bos))]
  )
  folder = Path(output_dir)
  folder.mkdir(parents=True, exist_ok=True)
  backbone.save(str(folder / 'tokenizer.json'))
  settings = {
    **special,
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': 2048,
  }
  for name, content in (
    ('tokenizer_config.json', settings),
    ('special_tokens_map.json', special),
  ):
    text = json.dumps(content, indent=2, sort_keys=True) + '\n'
    (folder / name).write_text(text, encoding='utf-8')
