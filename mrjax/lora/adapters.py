"""Low-rank adapters: their configuration, their leaves, and folding them away.

An adapter is a tree of `lora_a` and `lora_b` leaves that lie beside the kernels they
add to: `layers/attn/q/lora_a` [L, *in_dims, R] and `lora_b` [L, R, *out_dims], float32.
`masks.merge(adapter, params)` puts it on; `without_adapter` takes it off, which is the
reference model of DPO without a second copy.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from mrjax import trees
from mrjax.models.config import DecoderConfig
from mrjax.models.layers import linear_dims

PyTree = trees.PyTree
# Regular expressions by preset; one that is found in a kernel's path takes it.
PRESETS: dict[str, tuple[str, ...]] = {
  'attention': (r'/attn/[qkvo]/',),
  'qv': (r'/attn/[qv]/',),
  'all_linear': (r'/(attn|mlp)/',),
}
LORA_LEAF = re.compile(r'(.+)/lora_[ab]')


class AdapterError(ValueError):
  """An adapter that does not fit the model, or that is not supported."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What an adapter is, Hu et al. 2021, https://arxiv.org/abs/2106.09685.

  Attributes:
    rank: Inner dimension of the two factors.
    alpha: Numerator of the scale.
    dropout: Share of the adapter's inputs dropped in training, in [0, 1).
    rslora: Scale by alpha / sqrt(rank), Kalajdzievski 2023,
      https://arxiv.org/abs/2312.03732; otherwise alpha / rank.
    targets: Regular expressions; a kernel (`layers/attn/q/kernel`) in whose path one
      is found gets an adapter.
  """

  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  rslora: bool = False
  targets: tuple[str, ...] = PRESETS['all_linear']

  def __post_init__(self):
    if self.rank < 1:
      raise AdapterError(f'LoRA rank {self.rank}: want at least 1.')
    if not (math.isfinite(self.alpha) and self.alpha > 0):
      raise AdapterError(f'LoRA alpha {self.alpha}: want a positive number.')
    if not 0 <= self.dropout < 1:
      raise AdapterError(f'LoRA dropout {self.dropout}: want a number in [0, 1).')
    for regex in self.targets:
      try:
        re.compile(regex)
      except re.error as error:
        raise AdapterError(
          f'LoRA target {regex!r} is no regular expression: {error}.'
        ) from None

  @property
  def scale(self) -> float:
    """Factor of the product of the two matrices."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def targets_named(name: str) -> tuple[str, ...]:
  """Regular expressions of a preset, or the given ones, with commas between."""
  return PRESETS.get(name) or tuple(filter(None, map(str.strip, name.split(','))))


def target_modules(config: DecoderConfig, targets: Iterable[str]) -> list[str]:
  """Paths of the linear maps that get an adapter, such as `layers/attn/q`.

  Raises:
    AdapterError: A pattern that is found in no kernel's path.
  """
  modules = [f'layers/{name}' for name in linear_dims(config)]
  chosen = set()
  for regex in targets:
    hits = {name for name in modules if re.search(regex, f'{name}/kernel')}
    if not hits:
      raise AdapterError(
        f'LoRA target {regex!r} is found in none of {_kernels(modules)}. Adapters go '
        f'to these alone; presets are {", ".join(PRESETS)}.'
      )
    chosen |= hits
  if not chosen:
    raise AdapterError(
      f'No LoRA target is given: want a preset ({", ".join(PRESETS)}) or regular '
      f'expressions on {_kernels(modules)}.'
    )
  return [name for name in modules if name in chosen]


def adapter_shapes(config: DecoderConfig, lora: LoraConfig) -> PyTree:
  """The adapter's tree (scanned form) as float32 `jax.ShapeDtypeStruct` leaves."""
  dims, leaves = linear_dims(config), {}
  for name in target_modules(config, lora.targets):
    in_dims, out_dims = dims[name.removeprefix('layers/')]
    for leaf, shape in (
      ('lora_a', (config.num_layers, *in_dims, lora.rank)),
      ('lora_b', (config.num_layers, lora.rank, *out_dims)),
    ):
      leaves[f'{name}/{leaf}'] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return trees.unflatten(leaves)


def init_adapter(config: DecoderConfig, lora: LoraConfig, key: jax.Array) -> PyTree:
  """A fresh adapter, which changes nothing: `lora_b` is zero.

  `lora_a` is uniform in +-1/sqrt(inputs), PEFT's default (Kaiming with a = sqrt(5)).
  Each leaf depends on the key and its own path alone. Run it under
  `rules.born_sharded`, so that each leaf is made where it lives.
  """

  def init(name: str, shape) -> jax.Array:
    if name.endswith('lora_b'):
      return jnp.zeros(shape.shape, shape.dtype)
    bound = math.prod(shape.shape[1:-1]) ** -0.5
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.uniform(own, shape.shape, shape.dtype, -bound, bound)

  return trees.map_named(init, adapter_shapes(config, lora))


def adapter_of(params: PyTree) -> PyTree:
  """The adapter's leaves alone; `{}` where there are none."""
  leaves = trees.flatten(params).items()
  return trees.unflatten({n: leaf for n, leaf in leaves if LORA_LEAF.fullmatch(n)})


def without_adapter(params: PyTree) -> PyTree:
  """The same weights with the adapter off."""
  leaves = trees.flatten(params).items()
  return trees.unflatten({n: leaf for n, leaf in leaves if not LORA_LEAF.fullmatch(n)})


def check_adapter(
  config: DecoderConfig, lora: LoraConfig, adapter: PyTree, *, where: str
) -> None:
  """Holds an adapter's leaves (arrays or shapes) against a model and a LoraConfig.

  Raises:
    AdapterError: A leaf too many, too few, or of a wrong rank or shape.
  """
  want = {n: x.shape for n, x in trees.flatten(adapter_shapes(config, lora)).items()}
  found = {n: tuple(x.shape) for n, x in trees.flatten(adapter).items()}
  for name in sorted(want.keys() | found.keys()):
    if want.get(name) != found.get(name):
      raise AdapterError(
        f'{where}: {name} has shape {found.get(name, "(not there)")}, want '
        f'{want.get(name, "(not there)")} for rank {lora.rank}, targets '
        f'{", ".join(lora.targets)} and this {config.family} model.'
      )


def fold(params: PyTree, lora: LoraConfig, *, donate: bool = False) -> PyTree:
  """Full-precision weights with the adapter added in, and without its leaves.

  Sums are float32, layer by layer; each kernel keeps its dtype.

  Args:
    params: Parameters (scanned form) with their adapter.
    lora: The adapter's configuration.
    donate: Write over the kernels of `params`, so that there is no second copy.

  Raises:
    AdapterError: No adapter, or one beside a quantised kernel.
  """
  leaves = trees.flatten(params)
  modules = [n.removesuffix('/lora_a') for n in leaves if n.endswith('/lora_a')]
  if not modules:
    raise AdapterError('There is no adapter to fold: the parameters hold no lora_a.')
  fold_leaf = jax.jit(
    functools.partial(_fold_leaf, scale=lora.scale),
    donate_argnums=0 if donate else (),
  )
  for module in modules:
    a, b = leaves.pop(f'{module}/lora_a'), leaves.pop(f'{module}/lora_b')
    kernel = leaves.get(f'{module}/kernel')
    if kernel is None:
      raise AdapterError(
        f'{module} is quantised: fold the adapter into the full-precision weights.'
      )
    leaves[f'{module}/kernel'] = fold_leaf(kernel, a, b)
  return trees.unflatten(leaves)


def _fold_leaf(kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: float):
  def one(leaves: tuple[Any, ...]) -> jax.Array:
    kernel, a, b = leaves
    delta = jnp.tensordot(
      a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision='highest'
    )
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

  return jax.lax.map(one, (kernel, a, b))


def _kernels(modules: Iterable[str]) -> str:
  return ', '.join(f'{name}/kernel' for name in modules)
