"""Weights below an adapter stay as they are; its gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from test_lora_quantization import TOKENS, one_device, write_model

from mrjax import trees
from mrjax.checkpoint.hf import load_hf
from mrjax.checkpoint.source import resolve_model
from mrjax.lora import adapters
from mrjax.models.decoder import Decoder
from mrjax.runs import sft, training_state
from mrjax.sharding.mesh import make_mesh
from mrjax.training import loop, step


@pytest.mark.parametrize('quantize', ['', 'nf4'])
def test_ten_steps_leave_every_frozen_bit(tmp_path, monkeypatch, quantize):
  begun = []
  begin = training_state.begin

  def spy(*args, **kwargs):
    begun.append(begin(*args, **kwargs))
    begun.append(jax.tree.map(np.array, begun[0].frozen))
    return begun[0]

  monkeypatch.setattr(training_state, 'begin', spy)
  model = tiny_runs.write_model(tmp_path / 'model')
  config = tiny_runs.make_config(
    model,
    tmp_path / 'run',
    mesh='data:8',
    lora_rank=3,
    quantize=quantize,
    num_steps=10,
    learning_rate=0.05,
  )
  assert sft.run(config)['steps'] == 10
  state, before = begun
  kept = trees.flatten(jax.tree.map(np.asarray, state.frozen))
  mesh = make_mesh('data:1', jax.devices()[:1])
  stored = trees.flatten(resolve_model(model).load_params(mesh, quantize=quantize))
  assert kept.keys() == stored.keys()
  for name, leaf in kept.items():
    assert leaf.tobytes() == trees.flatten(before)[name].tobytes(), name
    assert leaf.tobytes() == np.asarray(stored[name]).tobytes(), name
  adapter = tiny_runs.read_tree(tmp_path / 'run' / 'checkpoints' / '10' / 'adapter')
  assert all(np.any(leaf) for leaf in adapter.values())  # it has trained, B too


@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_any_mesh_gives_the_gradients_of_one_device(tmp_path, kind):
  config, _ = write_model(tmp_path)
  lora = adapters.LoraConfig(rank=3, alpha=6.0)
  rng = np.random.default_rng(3)
  adapter = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
    adapters.adapter_shapes(config, lora),
  )
  segments = np.ones((1, *TOKENS.shape), np.int32)
  batch = {
    'tokens': TOKENS[None],
    'positions': np.broadcast_to(
      np.arange(TOKENS.shape[1], dtype=np.int32), segments.shape
    ),
    'segments': segments,
    'loss_mask': rng.random(segments.shape) < 0.7,
  }
  loss_fn = sft.make_loss_fn(Decoder(config, lora_scale=lora.scale))
  tx = optax.sgd(1.0)  # so that the change of an adapter is its gradient
  take = jax.jit(functools.partial(step.train_step, loss_fn=loss_fn, tx=tx))

  def gradients(mesh):
    frozen = load_hf(tmp_path, config, mesh, quantize=kind)
    shardings = step.state_shardings(jax.eval_shape(lambda: adapter), tx, mesh)
    state = jax.device_put(step.init_state(adapter, tx), shardings)
    with jax.set_mesh(mesh):
      state, metrics = take(state, frozen, loop.shard_batch(batch, mesh))
    change = jax.tree.map(
      lambda a, b: np.asarray(a) - np.asarray(b), adapter, state.params
    )
    return metrics, trees.flatten(change), trees.flatten(state.params)

  metrics, want, _ = gradients(one_device())
  spread_metrics, got, params = gradients(make_mesh('data:2,fsdp:2,tensor:2'))
  assert float(spread_metrics['loss']) == pytest.approx(
    float(metrics['loss']), rel=1e-5
  )
  size = max(np.abs(x).max() for x in want.values())
  for name, leaf in want.items():
    # float32 sums of some hundred terms, in another order.
    np.testing.assert_allclose(got[name], leaf, atol=2e-5 * size, err_msg=name)
    assert np.abs(leaf).max() > 1e-3 * size, name
  a = params['layers/mlp/down/lora_a']
  assert a.addressable_shards[0].data.size < a.size
