"""Guided sampling of Llama-3-8B by a value model of 1B compiles for eight v5p chips.

Shapes are real and no weights are made: see `test_tpu_compile`. Of 32 and 16 layers,
which are alike, 2 and 1 are compiled: all of them take minutes (and 9.8 GB of arguments
and 0.4 GB of temporary memory a chip, for a 'V' head).
"""

import jax
import jax.numpy as jnp
import pytest
import sampling_programs
from sampling_programs import Sampling
from tpu_slices import Memory, describe_slice, memory_of

from mrjax import trees
from mrjax.losses.value import ValueHead
from mrjax.models.config import DecoderConfig
from mrjax.sampling.guidance import GuidanceConfig
from mrjax.sharding.mesh import make_mesh

TOPOLOGY, MESH = 'v5p:2x2x2', 'data:4,tensor:2'
CHIP_BYTES = 95e9  # of a v5p
_LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 128256,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'max_position_embeddings': 8192,
  'rope_theta': 500000.0,
}
LLAMA_8B = DecoderConfig.from_hf(
  _LLAMA
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 2,
    'head_dim': 128,
    'tie_word_embeddings': False,
  }
)
LLAMA_1B = DecoderConfig.from_hf(
  _LLAMA
  | {
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 1,
    'head_dim': 64,
    'tie_word_embeddings': True,
  }
)
HEADS = {'V': ValueHead('V'), 'Q': ValueHead('Q')}


def compile_for_tpu(build, classifier_type: str) -> tuple[Memory, int]:
  """What it needs, and the bytes of the cache of a chip."""
  mesh = make_mesh(MESH, describe_slice(TOPOLOGY))
  guide = LLAMA_1B, HEADS[classifier_type], GuidanceConfig(top_k=20)
  parts: Sampling = sampling_programs.sampling(LLAMA_8B, mesh, guide)
  program = build(parts)
  with jax.set_mesh(mesh):
    memory = memory_of(program.jitted.lower(*program.args).compile())
  cache = trees.num_bytes((parts.state.cache, parts.state.guide_cache))
  return memory, cache // len(mesh.devices.flat)


def weight_bytes(classifier_type: str) -> float:
  """Of a chip, in bfloat16: a copy on each data shard, split over tensor."""
  mesh = make_mesh('data:1', jax.devices()[:1])
  guide = LLAMA_1B, HEADS[classifier_type], GuidanceConfig()
  parts = sampling_programs.sampling(LLAMA_8B, mesh, guide)
  assert {x.dtype for x in jax.tree.leaves(parts.weights)} == {jnp.dtype(jnp.bfloat16)}
  return trees.num_bytes(parts.weights) / 2


@pytest.mark.parametrize(
  ('build', 'classifier_type'),
  [
    (sampling_programs.fill, 'V'),
    (sampling_programs.decode, 'V'),
    (sampling_programs.decode, 'Q'),
  ],
  ids=['fill', 'decode-V', 'decode-Q'],
)
def test_guided_sampling_compiles_for_a_slice(tpu_compiler, build, classifier_type):
  memory, cache_bytes = tpu_compiler(compile_for_tpu, build, classifier_type)
  # Both caches are written where they lie.
  assert memory.reused > 0.99 * memory.outputs
  if build is sampling_programs.decode:  # the other leaves out what logits need
    assert weight_bytes(classifier_type) < memory.arguments
    # Nothing as large as the weights, and nothing as large as the caches, is copied.
    assert memory.temporary < 0.2 * weight_bytes(classifier_type)
  assert memory.peak < CHIP_BYTES
  assert cache_bytes < memory.outputs
