"""Every attention backend gives the numbers of the reference."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jaxprs import largest

from mrjax.models import attention as attention_lib
from mrjax.models.attention import NO_WINDOW, attention, choose_backend
from mrjax.models.attention_blocks import block_attention
from mrjax.models.attention_kernels import cudnn_attention, splash_attention
from mrjax.sharding.mesh import make_mesh

B, T, N, K, H = 2, 37, 6, 3, 4
BLOCK = 16  # 37 places in three blocks of 16
SCALE = 0.7
# Packed texts; padding between and around them; a text over two blocks.
LENGTHS = ([(1, 9), (2, 20), (3, 5), (0, 3)], [(0, 4), (1, 2), (2, 3), (0, 2), (5, 26)])


def make_rows(lengths):
  segments = [np.repeat(*zip(*row)) for row in lengths]
  positions = [np.concatenate([np.arange(n) for _, n in row]) for row in lengths]
  return np.stack(segments).astype(np.int32), np.stack(positions).astype(np.int32)


SEGMENTS, POSITIONS = make_rows(LENGTHS)


def make_inputs(B=B, T=T, N=N, K=K, H=H, dtype=np.float32):
  """Queries, keys, values and a cotangent."""
  rng = np.random.default_rng(7)
  return [rng.normal(size=(B, T, n, H)).astype(dtype) for n in (N, K, K, N)]


def compile_both(attend, segments):
  """A function to outputs and gradients of real tokens; padding is in neither."""
  real = (segments > 0)[..., None, None]

  @jax.jit
  def both(q, k, v, cotangent, window):
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, window=window), q, k, v)
    return jnp.where(real, out, 0), *pull(jnp.where(real, cotangent, 0))

  return both


def run(attend, inputs, segments, window):
  return compile_both(attend, segments)(*inputs, window)


def reference(softcap=None, segments=SEGMENTS, positions=POSITIONS):
  return functools.partial(
    attention,
    positions_BT=positions,
    segments_BT=segments,
    scale=SCALE,
    softcap=softcap,
    backend='reference',
  )


def assert_close(got, want, atol=1e-5):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
  ('softcap', 'window'), [(None, NO_WINDOW), (1.5, NO_WINDOW), (None, 5), (1.5, 22)]
)
def test_blocks_give_the_numbers_and_gradients_of_the_reference(softcap, window):
  inputs = make_inputs()
  blocks = functools.partial(
    block_attention, segments_BT=SEGMENTS, scale=SCALE, softcap=softcap, block=BLOCK
  )
  want = run(reference(softcap), inputs, SEGMENTS, window)
  assert_close(run(blocks, inputs, SEGMENTS, window), want)


def test_blocks_that_no_text_needs_are_never_read():
  segments, positions = make_rows([[(1, 16), (2, 16), (0, 16), (3, 16), (4, 13)]])
  q, k, v, cotangent = make_inputs(B=1, T=77)
  blocks = compile_both(
    functools.partial(block_attention, segments_BT=segments, scale=SCALE, block=BLOCK),
    segments,
  )
  plain = reference(None, segments, positions)
  want = run(plain, (q, k, v, cotangent), segments, NO_WINDOW)
  for block in range(5):
    here = slice(16 * block, 16 * block + 16)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[:, here] = bad_v[:, here] = np.nan
    rest = np.delete(np.arange(77), here)
    for a, b in zip(blocks(q, bad_k, bad_v, cotangent, NO_WINDOW), want, strict=True):
      np.testing.assert_allclose(a[:, rest], b[:, rest], atol=1e-5)


def test_blocks_out_of_the_window_are_never_read():
  segments, positions = make_rows([[(1, 64)]])
  q, k, v, cotangent = make_inputs(B=1, T=64)
  blocks = functools.partial(
    block_attention, segments_BT=segments, scale=SCALE, block=BLOCK
  )
  plain = reference(None, segments, positions)
  want = run(plain, (q, k, v, cotangent), segments, 17)[0]
  bad_k, bad_v = k.copy(), v.copy()
  bad_k[:, :16] = bad_v[:, :16] = np.nan
  got = run(blocks, (q, bad_k, bad_v, cotangent), segments, 17)[0]
  # Queries of the third block begin at 32 and see keys from 16 on.
  np.testing.assert_allclose(got[:, 32:], want[:, 32:], atol=1e-5)
  assert np.isnan(got[:, 31]).all()


def test_blocks_hold_no_square_of_the_length():
  q, k, v, _ = make_inputs(B=1, T=128)
  ones = np.ones((1, 128), np.int32)
  kwargs = {'segments_BT': ones, 'window': NO_WINDOW, 'scale': SCALE}

  def loss(attend):
    return jax.grad(lambda *qkv: attend(*qkv, **kwargs).sum(), (0, 1, 2))

  plain = functools.partial(attention, positions_BT=ones, backend='reference')
  assert largest(loss(plain), q, k, v) == N * 128 * 128
  blocks = functools.partial(block_attention, block=16)
  assert largest(loss(blocks), q, k, v) == q.size


@pytest.mark.parametrize('spec', ['data:2,fsdp:2,tensor:2', 'fsdp:8'])
def test_any_mesh_gives_the_same_attention(spec):
  segments, positions = make_rows([LENGTHS[i % 2] for i in range(8)])
  inputs = make_inputs(B=8, N=4, K=2)
  attend = functools.partial(
    attention,
    positions_BT=positions,
    segments_BT=segments,
    scale=SCALE,
    backend='blocks',
  )
  want = run(attend, inputs, segments, 12)
  mesh = make_mesh(spec)
  heads = jax.NamedSharding(mesh, jax.P(('data', 'fsdp'), None, 'tensor'))
  with jax.set_mesh(mesh):
    got = run(attend, jax.device_put(inputs, heads), segments, 12)
  assert_close(got, want)
  assert not got[0].sharding.is_fully_replicated


@pytest.mark.parametrize(
  ('softcap', 'window', 'windows'),
  [(None, NO_WINDOW, [NO_WINDOW]), (1.5, 9, [9, NO_WINDOW]), (None, 150, [9, 150])],
)
def test_splash_gives_the_numbers_and_gradients_of_the_reference(
  softcap, window, windows
):
  segments, positions = make_rows([[(1, 60), (2, 71), (0, 8)]])
  inputs = make_inputs(B=1, T=139, N=2, K=1)
  attend = functools.partial(
    splash_attention,
    segments_BT=segments,
    windows=windows,
    scale=SCALE,
    softcap=softcap,
    interpret=True,
  )
  plain = reference(softcap, segments, positions)
  want = run(plain, inputs, segments, jnp.int32(window))
  got = run(attend, inputs, segments, jnp.int32(window))
  assert_close(got, want, atol=1e-4)


@pytest.mark.parametrize('window', [NO_WINDOW, 5])
def test_what_cudnn_is_asked_for_is_what_the_reference_gives(window):
  attend = functools.partial(
    cudnn_attention, segments_BT=SEGMENTS, scale=SCALE, implementation='xla'
  )
  inputs = make_inputs()
  want = run(reference(), inputs, SEGMENTS, window)
  assert_close(run(attend, inputs, SEGMENTS, window), want)


def test_cudnn_lowers_to_its_kernels(monkeypatch):
  # The only thing asked of the machine that lowers, which need have no GPU.
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  q, k, v, _ = make_inputs(T=38, H=8, dtype=jnp.bfloat16)
  segments = np.ones((B, 38), np.int32)

  def loss(q, k, v):
    return cudnn_attention(
      q, k, v, segments_BT=segments, window=NO_WINDOW, scale=SCALE
    ).sum()

  exported = jax.export.export(
    jax.jit(jax.grad(loss, (0, 1, 2))),
    platforms=['cuda'],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call(f'__cudnn$fmhaScaleBias{kind}')
      for kind in ('Softmax', 'SoftmaxBackward')
    ],
  )(q, k, v)
  assert '__cudnn$fmhaScaleBiasSoftmaxBackward' in exported.mlir_module()


def choose(name, **changes):
  case = {
    'platform': 'cpu',
    'dtype': jnp.bfloat16,
    'length': 512,
    'head_dim': 64,
    'softcap': None,
  }
  return choose_backend(name, **case | changes)


def test_auto_takes_the_backend_of_the_platform(monkeypatch):
  assert choose('auto') == 'blocks'
  assert choose('auto', platform='tpu', softcap=50.0) == 'splash'
  assert choose('auto', platform='tpu', length=128) == 'reference'
  monkeypatch.setattr(attention_lib, 'cudnn_fault', lambda *_, **__: None)
  assert choose('auto', platform='gpu') == 'cudnn'
  assert choose('blocks', platform='tpu') == 'blocks'
  assert choose('reference', platform='gpu') == 'reference'


@pytest.mark.parametrize(
  ('changes', 'fault'),
  [
    ({'dtype': jnp.float32}, 'it computes in bfloat16 or float16, not float32'),
    ({'softcap': 50.0}, 'it has no softcap on scores'),
    ({'length': 513}, 'rows of even length, not 513'),
    ({}, 'it failed on a small example: .*gpu'),  # there is none here
  ],
)
def test_auto_says_once_why_a_kernel_does_not_serve(caplog, changes, fault):
  attention_lib._warn_once.cache_clear()
  with caplog.at_level(logging.WARNING):
    assert choose('auto', platform='gpu', **changes) == 'blocks'
    assert choose('auto', platform='gpu', **changes) == 'blocks'
  [line] = caplog.messages
  assert line.startswith('Attention runs block-wise in XLA, not by cudnn: ')
  with pytest.raises(ValueError, match=f"'cudnn' cannot serve: .*{fault}"):
    choose('cudnn', platform='gpu', **changes)


def test_splash_needs_to_know_its_windows():
  q, k, v, _ = make_inputs()
  with pytest.raises(ValueError, match='splash attention got no windows'):
    splash_attention(q, k, v, segments_BT=SEGMENTS, window=9, windows=[], scale=SCALE)


def test_a_kernel_of_another_platform_is_refused():
  with pytest.raises(
    ValueError, match="'splash' cannot serve: it does not run on a cpu"
  ):
    choose('splash')
  with pytest.raises(ValueError, match="backend 'flash': want one of auto, reference"):
    choose('flash')
