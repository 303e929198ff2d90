"""Adapters between PEFT and mrjax on the same base: logits agree both ways."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrjax.checkpoint.adapters import resolve_adapter
from mrjax.checkpoint.peft import save_peft
from mrjax.checkpoint.source import resolve_model
from mrjax.lora import adapters, masks
from mrjax.models.decoder import Decoder
from mrjax.sharding.mesh import make_mesh

peft = pytest.importorskip('peft', reason='PEFT is not installed: pip install peft')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

STORIES = Path(__file__).parents[1] / '..' / 'shared' / 'models' / 'stories260K'
# Absolute, where logits reach 20: 1e-5 is five units in the last place of float32, and
# in float32 each side is as far from the exact numbers. So both compute in float64;
# what they hold in float32 all the same (norms, softmax, angles) leaves 4e-6 between.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def stories():
  if not STORIES.is_dir():
    pytest.skip(f'{STORIES} is not there: a real model to compare with, not shipped.')
  return STORIES.resolve()


def torch_model(directory):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager'
  )
  return model.eval()


def torch_logits(model, tokens_BT):
  with torch.no_grad():
    tokens = torch.tensor(tokens_BT, dtype=torch.long)
    return model.double()(tokens).logits.numpy()


def our_logits(directory, adapter_dir, tokens_BT):
  mesh = make_mesh('', jax.devices()[:1])
  source = resolve_model(str(directory))
  found = resolve_adapter(str(adapter_dir))
  params = source.load_params(mesh, jnp.float32)
  return decoder_logits(
    source.config, found.lora, found.load(source.config, mesh), params, tokens_BT
  )


def decoder_logits(config, lora, adapter, params, tokens_BT):
  with jax.enable_x64(True):
    merged = masks.merge(adapter, params)
    merged = jax.tree.map(lambda x: x.astype(jnp.float64), merged)
    decoder = Decoder(config, lora_scale=lora.scale, dtype=jnp.float64)
    return np.asarray(jax.jit(decoder.apply)({'params': merged}, tokens_BT))


def random_tokens(vocab_size):
  rng = np.random.default_rng(0)
  return rng.integers(3, vocab_size, (2, 40)).astype(np.int32)


@pytest.mark.parametrize(
  'options',
  [
    {'target_modules': 'all-linear'},
    {'target_modules': ['q_proj', 'v_proj'], 'use_rslora': True},
    {'target_modules': r'.*\.(o_proj|mlp\.(up|down)_proj)'},
  ],
)
def test_pefts_adapter_gives_the_same_logits_here(stories, tmp_path, options):
  config = peft.LoraConfig(
    r=4, lora_alpha=12, lora_dropout=0.1, task_type='CAUSAL_LM', **options
  )
  model = peft.get_peft_model(torch_model(stories), config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if 'lora_' in name:
        p.copy_(0.03 * torch.randn(p.shape, generator=generator))
  model.eval().save_pretrained(tmp_path / 'peft')
  tokens = random_tokens(512)
  want = torch_logits(model, tokens)
  got = our_logits(stories, tmp_path / 'peft', tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
  with model.disable_adapter():
    assert np.abs(want - torch_logits(model, tokens)).max() > 1

  source = resolve_model(str(stories))
  found = resolve_adapter(str(tmp_path / 'peft'))
  leaves = found.load(source.config, make_mesh('fsdp:4,tensor:2'), None)
  save_peft(leaves, found.lora, source.config, tmp_path / 'again', base=str(stories))
  file = 'adapter_model.safetensors'
  assert (tmp_path / 'again' / file).read_bytes() == (
    tmp_path / 'peft' / file
  ).read_bytes()


def save_random(source, lora, directory, size=0.03):
  rng = np.random.default_rng(1)
  adapter = jax.tree.map(
    lambda x: jnp.asarray(size * rng.standard_normal(x.shape), jnp.float32),
    adapters.adapter_shapes(source.config, lora),
  )
  save_peft(adapter, lora, source.config, directory, base=str(source.hf_dir))
  return adapter


@pytest.mark.parametrize('rslora', [False, True])
def test_our_adapter_gives_the_same_logits_in_peft(stories, tmp_path, rslora):
  source = resolve_model(str(stories))
  lora = adapters.LoraConfig(rank=5, alpha=7.5, dropout=0.05, rslora=rslora)
  save_random(source, lora, tmp_path / 'ours')
  tokens = random_tokens(512)
  want = our_logits(stories, tmp_path / 'ours', tokens)
  model = peft.PeftModel.from_pretrained(torch_model(stories), tmp_path / 'ours')
  got = torch_logits(model.eval(), tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
  with model.disable_adapter():
    assert np.abs(want - torch_logits(model, tokens)).max() > 1


@pytest.mark.parametrize('rslora', [False, True])
def test_stacked_adapters_of_fused_projections_load_in_peft(tmp_path, rslora):
  config = transformers.Phi3Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
  )
  torch.manual_seed(0)
  transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / 'base')
  source = resolve_model(str(tmp_path / 'base'))
  lora = adapters.LoraConfig(rank=3, alpha=6.0, rslora=rslora)
  adapter = save_random(source, lora, tmp_path / 'ours', size=0.3)
  fields = json.loads((tmp_path / 'ours' / 'adapter_config.json').read_text())
  assert fields['rank_pattern'] == {'qkv_proj': 9, 'gate_up_proj': 6}
  tokens = random_tokens(37)
  params = source.load_params(make_mesh('', jax.devices()[:1]), jnp.float32)
  want = decoder_logits(source.config, lora, adapter, params, tokens)
  model = peft.PeftModel.from_pretrained(
    torch_model(tmp_path / 'base'), tmp_path / 'ours'
  )
  got = torch_logits(model.eval(), tokens)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
  with model.disable_adapter():
    assert np.abs(want - torch_logits(model, tokens)).max() > 0.1
