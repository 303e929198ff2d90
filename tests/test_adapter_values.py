"""Numbers of an adapter across a run: as PEFT gave them, and folded as stated."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import make_config, read_tree, weights_of, write_model

from mrjax.checkpoint.adapters import resolve_adapter
from mrjax.checkpoint.peft import save_peft
from mrjax.checkpoint.source import resolve_model
from mrjax.lora.adapters import LoraConfig, adapter_shapes
from mrjax.runs import convert_adapters, sft
from mrjax.sharding.mesh import make_mesh

RANK, ALPHA, NUM_STEPS = 3, 7.0, 2


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> str:
  return write_model(tmp_path_factory.mktemp('model') / 'hf')


def test_an_adapter_on_nf4_is_folded_into_the_weights_before_they_were_quantised(
  base, tmp_path
):
  config = make_config(
    base,
    tmp_path / 'run',
    mesh='data:8',
    lora_rank=RANK,
    lora_alpha=ALPHA,
    quantize='nf4',
    num_steps=NUM_STEPS,
    learning_rate=0.05,
  )
  sft.run(config)
  folded = tmp_path / 'folded'
  convert_adapters.fold_adapter(
    convert_adapters.FoldConfig(adapter=config.output_dir, output_dir=str(folded))
  )
  adapter = read_tree(tmp_path / 'run' / 'checkpoints' / str(NUM_STEPS) / 'adapter')
  original, got = weights_of(base), weights_of(folded)
  modules = {name.rpartition('/')[0] for name in adapter}
  assert len(modules) == 7
  for name, kernel in original.items():
    module = name.removesuffix('/kernel')
    if module not in modules:
      np.testing.assert_array_equal(got[name], kernel, err_msg=name)
      continue
    a, b = (np.asarray(adapter[f'{module}/lora_{x}'], np.float64) for x in 'ab')
    num_layers = len(kernel)
    product = a.reshape(num_layers, -1, RANK) @ b.reshape(num_layers, RANK, -1)
    exact = kernel + (ALPHA / RANK) * product.reshape(kernel.shape)
    rounded = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    # A sum in float32 that falls beside a midpoint of bfloat16 may round the other way.
    differs = got[name] != rounded
    assert differs.mean() < 1e-3, name
    np.testing.assert_allclose(got[name], exact, rtol=2**-8, atol=1e-6, err_msg=name)
    assert (got[name] != kernel).mean() > 0.5, name


@pytest.mark.parametrize('rslora', [False, True])
def test_a_peft_adapter_that_does_not_learn_comes_out_as_it_went_in(
  base, tmp_path, rslora
):
  source = resolve_model(base)
  lora = LoraConfig(
    rank=5, alpha=ALPHA, dropout=0.1, rslora=rslora, targets=('/attn/[qo]/', '/mlp/up/')
  )
  rng = np.random.default_rng(6)
  leaves = jax.tree.map(
    lambda x: jax.numpy.asarray(0.1 * rng.standard_normal(x.shape), 'float32'),
    adapter_shapes(source.config, lora),
  )
  given, again = tmp_path / 'peft', tmp_path / 'again'
  save_peft(leaves, lora, source.config, given, base=base)
  config = make_config(
    base, tmp_path / 'run', adapter=str(given), learning_rate=0.0, num_steps=NUM_STEPS
  )
  sft.run(config)
  convert_adapters.export_peft(
    convert_adapters.ExportConfig(checkpoint=config.output_dir, output_dir=str(again))
  )
  file = 'adapter_model.safetensors'
  want, got = load_file(given / file), load_file(again / file)
  assert want.keys() == got.keys() and len(want) == 2 * 2 * 3
  for name in want:
    assert want[name].dtype == got[name].dtype
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  before, after = (
    json.loads(Path(folder / 'adapter_config.json').read_text())
    for folder in (given, again)
  )
  assert (after['r'], after['lora_alpha'], after['use_rslora']) == (5, ALPHA, rslora)
  assert sorted(after['target_modules']) == ['o_proj', 'q_proj', 'up_proj']
  assert after == before
  found = resolve_adapter(config.output_dir)
  assert found.lora.scale == lora.scale and found.base['model'] == base
  assert found.load(source.config, make_mesh('data:8')).keys() == leaves.keys()
