"""BOS, EOS, offsets: against transformers, sentencepiece and byte counts."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mrjax.data.arithmetic import generate_problems
from mrjax.data.tokenization import load_tokenizer, train_bpe_tokenizer

TEXTS = [
  'Tom has 3*4=<<3*4=12>>12 apples.\n#### 12',
  ' leading space',
  '  two  spaces ',
  'é漢🙂 x',
  '\n\n\tend\n',
  'a',
  '<s>already',
  'in the </s> middle',
]
LLAMA3 = (
  '{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n'
  '{{ m.content | trim }}<|eot|>{% endfor %}'
  '{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}'
)
CHATML = (
  '{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|head|>assistant\n{% endif %}'
)
# No end of turn after the last answer: the EOS of the text must come from us.
BARE = (
  '{{ bos_token }}{% for m in messages %}{% if m.role == "user" %}Q: {{ m.content }}\n'
  'A:{% else %} {{ m.content }}{% if not loop.last %}\n{% endif %}{% endif %}'
  '{% endfor %}'
)
FORGETFUL = (  # drops earlier answers, as templates of reasoning models do
  '{% for m in messages %}{% if m.role == "user" or loop.last %}[{{ m.content }}]'
  '{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}'
)
CHAT = [
  {'role': 'user', 'content': 'What is 6*7?'},
  {'role': 'assistant', 'content': 'It is 42.'},
  {'role': 'user', 'content': 'And 43+1?'},
  {'role': 'assistant', 'content': 'It is 44, not 42.'},
]


@pytest.fixture(scope='module')
def bpe_folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('bpe')
  problems = generate_problems('train', size=400)
  texts = [f'{p.question} {p.solution}' for p in problems]
  train_bpe_tokenizer(texts, vocab_size=420, output_dir=folder)
  return folder


@pytest.fixture(scope='module')
def bpe(bpe_folder):
  return load_tokenizer(bpe_folder)


@pytest.fixture(scope='module')
def spm_file(tmp_path_factory) -> Path:
  """A Llama-2-like sentencepiece model, trained here."""
  folder = tmp_path_factory.mktemp('spm')
  problems = generate_problems('train', size=400)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([f'{p.question} {p.solution}' for p in problems]),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=420,
    model_type='bpe',
    byte_fallback=True,
    split_digits=True,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    add_dummy_prefix=True,
    control_symbols=['[INST]', '[/INST]'],
    minloglevel=2,
  )
  return folder / 'tokenizer.model'


def variant(source: Path, target: Path, **settings) -> Path:
  """A copy of a HF folder with another tokenizer_config.json."""
  shutil.copytree(source, target)
  config = json.loads((target / 'tokenizer_config.json').read_text())
  (target / 'tokenizer_config.json').write_text(json.dumps(config | settings))
  return target


def add_special(folder: Path, *tokens: str) -> None:
  data = json.loads((folder / 'tokenizer.json').read_text())
  size = len(data['model']['vocab'])
  for i, token in enumerate(tokens):
    data['added_tokens'].append(
      dict(data['added_tokens'][0], id=size + i, content=token, special=True)
    )
  (folder / 'tokenizer.json').write_text(json.dumps(data))


def chat_folder(source: Path, target: Path, template: str, **settings) -> Path:
  folder = variant(source, target, chat_template=template, **settings)
  add_special(folder, '<|head|>', '<|/head|>', '<|eot|>')
  return folder


# --- BOS -----------------------------------------------------------------------------


@pytest.mark.parametrize('text', TEXTS)
def test_prompt_ids_are_those_of_transformers(bpe, bpe_folder, text):
  ids = bpe.encode_prompt(text)
  if text.startswith('<s>'):
    # transformers doubles the BOS here; once is right.
    assert AutoTokenizer.from_pretrained(bpe_folder)(text).input_ids == [1, *ids]
  else:
    assert ids == AutoTokenizer.from_pretrained(bpe_folder)(text).input_ids
  assert ids[0] == bpe.bos_id == 1 and ids.count(1) == 1


def test_bos_is_added_once_beside_a_llama_config(bpe, bpe_folder, tmp_path):
  folder = shutil.copytree(bpe_folder, tmp_path / 'model')
  (folder / 'config.json').write_text(
    json.dumps({'model_type': 'llama', 'architectures': ['LlamaForCausalLM']})
  )
  for text in TEXTS[:6]:
    ids = load_tokenizer(folder).encode_prompt(text)
    assert ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert ids == bpe.encode_prompt(text)


def test_no_bos_where_the_tokenizer_adds_none(bpe_folder, tmp_path):
  folder = shutil.copytree(bpe_folder, tmp_path / 'qwen')
  data = json.loads((folder / 'tokenizer.json').read_text())
  data['post_processor'] = None
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  tokenizer = load_tokenizer(folder)
  assert not tokenizer.adds_bos and tokenizer.bos_id == 1
  for text in TEXTS[:6]:
    assert 1 not in tokenizer.encode_prompt(text)


def test_a_post_processor_that_ends_texts_does_not_end_prompts(bpe_folder, tmp_path):
  folder = shutil.copytree(bpe_folder, tmp_path / 'eos')
  data = json.loads((folder / 'tokenizer.json').read_text())
  single = data['post_processor']['single']
  single.append({'SpecialToken': {'id': '</s>', 'type_id': 0}})
  data['post_processor']['special_tokens']['</s>'] = {
    'id': '</s>',
    'ids': [2],
    'tokens': ['</s>'],
  }
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  assert AutoTokenizer.from_pretrained(folder)('a').input_ids[-1] == 2
  tokenizer = load_tokenizer(folder)
  assert tokenizer.encode_prompt('a')[0] == 1
  assert 2 not in tokenizer.encode_prompt('a')
  ids, _ = tokenizer.encode_pair('a', 'b')
  assert ids.count(2) == 1 and ids.count(1) == 1


def test_add_bos_false_leaves_it_out(bpe):
  assert bpe.encode_prompt('a b', add_bos=False) == bpe.encode_prompt('a b')[1:]


def test_stories_model_agrees_with_transformers(shared):
  folder = shared / 'models' / 'stories260K'
  tokenizer = load_tokenizer(folder)
  reference = AutoTokenizer.from_pretrained(folder)
  for text in TEXTS[:6]:
    assert tokenizer.encode_prompt(text) == reference(text).input_ids
    ids = reference(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == reference.decode(ids)
  assert tokenizer.vocab_size == 512 and tokenizer.eos_ids == (2,)


# --- Completions ---------------------------------------------------------------------

WORDS = st.text(alphabet=st.sampled_from('ab 1é漢🙂\n:'), max_size=12)


@given(prompt=WORDS, completion=WORDS)
@settings(deadline=None)
def test_mask_covers_the_tokens_with_bytes_of_the_completion(bpe, prompt, completion):
  """Byte-level tokens tell their own length, so bytes are counted, not offsets."""
  ids, mask = bpe.encode_pair(prompt, completion)
  lengths = [0 if i < 3 else len(bpe._backend._tokenizer.id_to_token(i)) for i in ids]
  assert sum(lengths) == len((prompt + completion).encode())
  end = 0
  for length, supervised in zip(lengths[:-1], mask[:-1], strict=True):
    end += length
    assert supervised == (length > 0 and end > len(prompt.encode()))
  assert ids[-1] == 2 and mask[-1]
  assert ids[:-1] == bpe.encode_prompt(prompt + completion)


def test_a_token_across_the_boundary_is_supervised(bpe):
  tom, has = bpe.encode_prompt('Tom', add_bos=False), bpe.encode_prompt(' has')[1:]
  assert len(has) == 1
  ids, mask = bpe.encode_pair('Tom h', 'as')
  assert ids == [1, *tom, *has, 2]
  assert mask == [False] * (1 + len(tom)) + [True, True]


def test_spaces_are_supervised_too(bpe, bpe_folder, tmp_path):
  """The post-processor of Llama 3 and Qwen cuts spaces off the offsets."""
  folder = shutil.copytree(bpe_folder, tmp_path / 'llama3')
  data = json.loads((folder / 'tokenizer.json').read_text())
  trim = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
  }
  data['post_processor'] = {
    'type': 'Sequence',
    'processors': [trim, data['post_processor']],
  }
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  tokenizer = load_tokenizer(folder)
  assert tokenizer.adds_bos
  ids, mask = tokenizer.encode_pair('Q:', '  \n  Tom')
  assert (ids, mask) == bpe.encode_pair('Q:', '  \n  Tom')
  assert mask == [False] * 3 + [True] * (len(ids) - 3)


def test_offsets_are_of_the_text_before_normalization(bpe_folder, tmp_path):
  folder = shutil.copytree(bpe_folder, tmp_path / 'qwen')
  data = json.loads((folder / 'tokenizer.json').read_text())
  data['normalizer'] = {'type': 'NFC'}
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  tokenizer = load_tokenizer(folder)
  # Two characters of the text become one before they are tokenised.
  ids, mask = tokenizer.encode_pair('e\u0301e\u0301 ab', ' e\u0301 cd')
  supervised = [i for i, keep in zip(ids, mask, strict=True) if keep]
  assert tokenizer.decode(supervised) == ' é cd'


@pytest.mark.parametrize('ending', ['', '</s>', '</s></s>'])
def test_a_completion_ends_with_one_eos(bpe, ending):
  plain = bpe.encode_pair('Q:', ' Tom has 12')
  assert bpe.encode_pair('Q:', ' Tom has 12' + ending) == plain
  assert plain[0].count(2) == 1 and plain[0][-1] == 2


def test_an_empty_completion_is_an_end_alone(bpe):
  ids, mask = bpe.encode_pair('Q: Tom', '')
  assert ids == [*bpe.encode_prompt('Q: Tom'), 2]
  assert mask == [False] * (len(ids) - 1) + [True]


def test_an_end_in_the_prompt_does_not_end_the_completion(bpe):
  ids, mask = bpe.encode_pair('Q</s>', '')
  assert ids[-2:] == [2, 2] and mask[-2:] == [False, True]


def test_other_ends_count_too(bpe_folder, tmp_path):
  folder = shutil.copytree(bpe_folder, tmp_path / 'chat')
  add_special(folder, '<|eot|>')
  (folder / 'generation_config.json').write_text('{"eos_token_id": [420, 2]}')
  tokenizer = load_tokenizer(folder)
  assert tokenizer.eos_ids == (2, 420) and tokenizer.eos_id == 2
  assert tokenizer.encode_pair('Q', 'Tom<|eot|>')[0][-2:] == [
    tokenizer.encode_prompt('Tom')[-1],
    420,
  ]
  assert tokenizer.vocab_size == 421


def test_no_eos_is_an_error(bpe_folder, tmp_path):
  folder = variant(bpe_folder, tmp_path / 'no', eos_token=None)
  (folder / 'special_tokens_map.json').unlink()
  tokenizer = load_tokenizer(folder)
  assert tokenizer.eos_ids == ()
  with pytest.raises(ValueError, match='no EOS'):
    tokenizer.encode_pair('a', 'b')


# --- Conversations -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('template', 'supervised'),
  [
    (LLAMA3, ['It is 42.<|eot|>', 'It is 44, not 42.<|eot|>']),
    (CHATML, ['It is 42.<|eot|>', 'It is 44, not 42.<|eot|>']),
    (BARE, [' It is 42.', ' It is 44, not 42.</s>']),
  ],
  ids=['llama3', 'chatml', 'bare'],
)
def test_assistant_turns_are_supervised(bpe_folder, tmp_path, template, supervised):
  folder = chat_folder(bpe_folder, tmp_path / 'chat', template)
  if template != BARE:
    (folder / 'generation_config.json').write_text('{"eos_token_id": [422]}')
  tokenizer = load_tokenizer(folder)
  ids, mask = tokenizer.encode_messages(CHAT)
  reference = AutoTokenizer.from_pretrained(folder).apply_chat_template(
    CHAT, return_dict=False
  )
  assert ids == (reference if template != BARE else [*reference, 2])
  assert ids.count(1) == (template != CHATML)
  runs, last = [], False
  for i, keep in zip(ids, mask, strict=True):
    if keep and not last:
      runs.append([])
    if keep:
      runs[-1].append(i)
    last = keep
  assert [
    tokenizer.decode(run, skip_special_tokens=False) for run in runs
  ] == supervised


def test_a_chat_prompt_gets_no_second_bos(bpe_folder, tmp_path):
  tokenizer = load_tokenizer(chat_folder(bpe_folder, tmp_path / 'chat', LLAMA3))
  text = tokenizer.render_chat(CHAT[:1], add_generation_prompt=True)
  assert text.startswith('<s><|head|>user') and text.endswith('<|/head|>\n\n')
  for add_bos in (False, True):
    assert tokenizer.encode_prompt(text, add_bos=add_bos).count(1) == 1


def test_a_template_that_forgets_is_refused(bpe_folder, tmp_path):
  tokenizer = load_tokenizer(chat_folder(bpe_folder, tmp_path / 'chat', FORGETFUL))
  with pytest.raises(ValueError, match='does not keep message 1'):
    tokenizer.encode_messages(CHAT)
  ids, mask = tokenizer.encode_messages(CHAT[:2])
  assert any(mask) and ids[-1] == 2


def test_conversations_that_cannot_be_learnt(bpe, bpe_folder, tmp_path):
  with pytest.raises(ValueError, match='no chat template: give a --tokenizer with one'):
    bpe.encode_messages(CHAT)
  with pytest.raises(ValueError, match='role "assistant"'):  # the fault of the record
    bpe.encode_messages(CHAT[:1])
  tokenizer = load_tokenizer(chat_folder(bpe_folder, tmp_path / 'chat', LLAMA3))
  with pytest.raises(ValueError, match='role "assistant"'):
    tokenizer.encode_messages(CHAT[:1])
  refusing = '{{ raise_exception("no system role") }}'
  tokenizer = load_tokenizer(chat_folder(bpe_folder, tmp_path / 'no', refusing))
  with pytest.raises(ValueError, match='refuses these messages: no system role'):
    tokenizer.encode_messages(CHAT)


# --- Decoding ------------------------------------------------------------------------

ANY_TEXT = st.text(
  st.characters(codec='utf-8', exclude_characters='\ufffd'), max_size=20
)


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text_comes_back(bpe, text):
  if '<' not in text:  # no special token in it
    assert bpe.decode(bpe.encode_prompt(text)) == text


@given(prompt=ANY_TEXT, text=ANY_TEXT)
@settings(deadline=None)
def test_a_continuation_is_the_text_after_the_prompt(bpe, prompt, text):
  prefix = bpe.encode_prompt(prompt)
  ids = bpe.encode_prompt(text, add_bos=False)
  if '<' not in text:
    assert bpe.decode_continuation(prefix, ids) == text
  # Told token by token, only the last character may be incomplete.
  for cut in range(len(ids)):
    part = bpe.decode_continuation(prefix, ids[:cut]).rstrip('\ufffd')
    assert bpe.decode_continuation(prefix, ids).startswith(part)


def test_special_tokens_in_text(bpe):
  ids = bpe.encode_prompt('Tom')
  assert bpe.decode(ids) == 'Tom'
  assert bpe.decode(ids, skip_special_tokens=False) == '<s>Tom'


# --- Sentencepiece -------------------------------------------------------------------


def spm_models(spm_file: Path) -> list[Path]:
  models = [spm_file]
  spec = importlib.util.find_spec('mistral_common')
  if spec and spec.submodule_search_locations:  # a real 32k model where it is installed
    data = Path(spec.submodule_search_locations[0]) / 'data'
    models += sorted(data.glob('*240216.model.v2'))
  return models


def test_sentencepiece_ids_are_its_own(spm_file):
  for path in spm_models(spm_file):
    tokenizer = load_tokenizer(path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.adds_bos and tokenizer.eos_ids == (2,)
    for text in [*TEXTS[:6], '', 'Ünï <<1+1=2>>2']:
      ids = tokenizer.encode_prompt(text)
      assert ids == [1, *own.encode(text)]
      assert tokenizer.decode(ids) == own.decode(own.encode(text))
    assert tokenizer.vocab_size == own.vocab_size()


@given(prompt=WORDS, completion=WORDS)
@settings(deadline=None)
def test_sentencepiece_mask_covers_the_completion(spm_file, prompt, completion):
  for path in spm_models(spm_file):
    tokenizer = load_tokenizer(path)
    ids, mask = tokenizer.encode_pair(prompt, completion)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    end, start = 0, len(prompt.encode())
    assert ids == [1, *own.encode(prompt + completion), 2]
    pieces = own.encode(prompt + completion, return_type='proto').pieces
    for piece, supervised in zip(pieces, mask[1:-1], strict=True):
      text = own.id_to_piece(piece.id)
      end += 1 if own.is_byte(piece.id) else piece.end - piece.begin
      if own.is_byte(piece.id) or piece.end > piece.begin:
        assert supervised == (end > start), text
      else:
        assert not supervised  # the space put before every text


def test_sentencepiece_control_pieces_in_text(spm_file):
  tokenizer = load_tokenizer(spm_file)
  own = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
  ids = tokenizer.encode_prompt('<s>[INST] Tom [/INST]')
  inst, end = own.piece_to_id('[INST]'), own.piece_to_id('[/INST]')
  assert ids == [1, inst, *own.encode(' Tom '), end]
  assert tokenizer.decode([1, *own.encode('Tom'), 2], skip_special_tokens=False) == (
    '<s>Tom</s>'
  )


def test_a_space_hidden_in_a_continuation_is_kept(spm_file):
  tokenizer = load_tokenizer(spm_file)
  whole = tokenizer.encode_prompt('Answer: Tom has 12 pens')
  for cut in range(2, len(whole)):
    prefix, ids = whole[:cut], whole[cut:]
    text = tokenizer.decode_continuation(prefix, ids)
    assert tokenizer.decode(prefix) + text == 'Answer: Tom has 12 pens'


def test_a_folder_with_a_sentencepiece_model(spm_file, tmp_path):
  shutil.copy(spm_file, tmp_path / 'tokenizer.model')
  settings = {'add_bos_token': False, 'chat_template': BARE}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 7}')
  tokenizer = load_tokenizer(tmp_path)
  assert not tokenizer.adds_bos and tokenizer.eos_ids == (2, 7)
  text = tokenizer.render_chat(CHAT[:2])
  assert text == '<s>Q: What is 6*7?\nA: It is 42.'
  ids, mask = tokenizer.encode_messages(CHAT[:2])
  assert ids.count(1) == 1 and ids[-1] == 2
  supervised = [i for i, keep in zip(ids, mask, strict=True) if keep]
  assert tokenizer.decode(supervised) == 'It is 42.'


# --- Training, identity, errors ------------------------------------------------------


def test_digits_are_single_tokens_and_training_repeats(bpe, bpe_folder, tmp_path):
  ids = bpe.encode_prompt('1234567890', add_bos=False)
  assert len(ids) == 10 and len(set(ids)) == 10
  problems = generate_problems('train', size=400)
  texts = [f'{p.question} {p.solution}' for p in problems]
  train_bpe_tokenizer(texts, vocab_size=420, output_dir=tmp_path / 'again')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (bpe_folder / name).read_bytes()
  assert load_tokenizer(tmp_path / 'again').fingerprint() == bpe.fingerprint()
  assert bpe.vocab_size == 420 and (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
  with pytest.raises(ValueError, match='at least 259'):
    train_bpe_tokenizer(texts, vocab_size=258, output_dir=tmp_path)


def test_the_fingerprint_is_of_the_content(bpe, bpe_folder, tmp_path, spm_file):
  prints = [bpe.fingerprint(), load_tokenizer(spm_file).fingerprint()]
  prints.append(
    load_tokenizer(chat_folder(bpe_folder, tmp_path / 'a', LLAMA3)).fingerprint()
  )
  folder = shutil.copytree(bpe_folder, tmp_path / 'b')
  assert load_tokenizer(folder).fingerprint() == bpe.fingerprint()
  data = json.loads((folder / 'tokenizer.json').read_text())
  data['model']['merges'] = data['model']['merges'][:-1]
  (folder / 'tokenizer.json').write_text(json.dumps(data))
  prints.append(load_tokenizer(folder).fingerprint())
  assert len(set(prints)) == 4


def test_a_model_too_small_for_the_tokenizer(bpe):
  bpe.check_fits(420)
  with pytest.raises(ValueError, match='ids up to 419, the model only 400'):
    bpe.check_fits(400)


def test_text_that_is_no_unicode(bpe, spm_file):
  for tokenizer in (bpe, load_tokenizer(spm_file)):
    with pytest.raises(ValueError, match='not valid Unicode'):
      tokenizer.encode_prompt('a\ud800')


def test_missing_and_broken_tokenizers(bpe_folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(FileNotFoundError, match=r'no tokenizer\.json'):
    load_tokenizer(empty)
  broken = shutil.copytree(bpe_folder, tmp_path / 'broken')
  (broken / 'tokenizer.json').write_text('{"model": ')
  with pytest.raises(ValueError, match='cannot read the tokenizer'):
    load_tokenizer(broken)
  (tmp_path / 'bad.model').write_bytes(b'no model')
  with pytest.raises(ValueError, match='not a sentencepiece model'):
    load_tokenizer(tmp_path / 'bad.model')


def test_a_name_that_is_nowhere(tmp_path, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(FileNotFoundError, match='no folder here'):
    load_tokenizer(str(tmp_path / 'nope'))
  with pytest.raises(FileNotFoundError, match='no folder here'):
    load_tokenizer('mrjax-test/no-such-model')


def with_special(folder, target, *tokens) -> Path:
  """The tokenizer of a folder with more special tokens, in order."""
  hf_tokenizer = AutoTokenizer.from_pretrained(folder)
  hf_tokenizer.add_special_tokens({'additional_special_tokens': list(tokens)})
  hf_tokenizer.save_pretrained(target)
  return target


def test_the_same_content_is_the_same_tokenizer(bpe, bpe_folder, tmp_path, spm_file):
  shutil.copytree(bpe_folder, tmp_path / 'again')
  bpe.check_same(load_tokenizer(tmp_path / 'again'), 'the guide')
  spm = load_tokenizer(spm_file)
  spm.check_same(load_tokenizer(spm_file), 'the guide')
  with pytest.raises(ValueError, match=r'the guide has another tokenizer: id \d+ is'):
    bpe.check_same(spm, 'the guide')


def test_the_first_id_that_differs_is_named(bpe, bpe_folder, tmp_path):
  """As many tokens, two of them swapped: the length says nothing."""
  swapped = shutil.copytree(bpe_folder, tmp_path / 'swapped')
  data = json.loads((swapped / 'tokenizer.json').read_text())
  vocab = data['model']['vocab']
  first, second = (next(t for t, i in vocab.items() if i == n) for n in (300, 317))
  vocab[first], vocab[second] = vocab[second], vocab[first]
  (swapped / 'tokenizer.json').write_text(json.dumps(data))
  other = load_tokenizer(swapped)
  assert other.vocab_size == bpe.vocab_size
  with pytest.raises(ValueError) as error:
    bpe.check_same(other, 'runs/v')
  assert str(error.value) == (
    f'runs/v has another tokenizer: id 300 is {second!r} there and {first!r} here; '
    'both must share one vocabulary'
  )


def test_reserved_places_may_be_filled(bpe, bpe_folder, tmp_path):
  """As from Llama 3 to 3.2, which named special tokens that were reserved before."""
  old = ('<|eot|>', '<|reserved_0|>', '<|reserved_1|>')
  new = ('<|eot|>', '<|python|>', '<|reserved_0|>')
  old = load_tokenizer(with_special(bpe_folder, tmp_path / 'old', *old))
  new = load_tokenizer(with_special(bpe_folder, tmp_path / 'new', *new))
  old.check_same(new, 'the guide')
  new.check_same(old, 'the guide')
  named = with_special(bpe_folder, tmp_path / 'named', '<|end|>', '<|python|>')
  with pytest.raises(ValueError, match=r"is '<\|end\|>' there and '<\|eot\|>' here"):
    new.check_same(load_tokenizer(named), 'the guide')
  with pytest.raises(ValueError, match=r"is no token there and '<\|eot\|>' here"):
    new.check_same(bpe, 'the guide')
