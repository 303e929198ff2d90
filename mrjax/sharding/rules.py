"""Where every parameter lives: one table from parameter paths to mesh axes."""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrjax import trees
from mrjax.sharding.mesh import MeshError

P = PartitionSpec
PyTree = trees.PyTree

# Linear maps whose outputs, or whose inputs, are split over `tensor`.
_COLUMNS = r'layer/(attn/(q|k|v)|mlp/(gate|up))/'
_ROWS = r'layer/(attn/o|mlp/down)/'

# A path matches exactly one rule. Rules under `layer/` speak of one layer; stacked
# layers get a leading axis of their own that is never split. Only vectors (norm scales,
# biases of outputs) are replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r'embed/embedding', P('tensor', 'fsdp')),  # V D
  (r'lm_head/kernel', P('fsdp', 'tensor')),  # D V
  (r'value_head/kernel', P('fsdp', None)),  # D A
  (r'value_head/bias', P(None)),  # A
  (r'final_norm/scale', P(None)),  # D
  (r'layer/(post_)?(attn|mlp)_norm/scale', P(None)),  # D
  (r'layer/attn/(q|k|v)/kernel', P('fsdp', 'tensor', None)),  # D N H
  (r'layer/attn/(q|k|v)/bias', P('tensor', None)),  # N H
  (r'layer/attn/(q|k)_norm/scale', P(None)),  # H
  (r'layer/attn/o/kernel', P('tensor', None, 'fsdp')),  # N H D
  (r'layer/attn/o/bias', P(None)),  # D
  (r'layer/mlp/(gate|up)/kernel', P('fsdp', 'tensor')),  # D F
  (r'layer/mlp/(gate|up)/bias', P('tensor')),  # F
  (r'layer/mlp/down/kernel', P('tensor', 'fsdp')),  # F D
  (r'layer/mlp/down/bias', P(None)),  # D
  # Adapters lie as the kernel beside them; the rank is never split.
  (r'layer/attn/(q|k|v)/lora_a', P('fsdp', None)),  # D R
  (r'layer/attn/(q|k|v)/lora_b', P(None, 'tensor', None)),  # R N H
  (r'layer/attn/o/lora_a', P('tensor', None, None)),  # N H R
  (r'layer/attn/o/lora_b', P(None, 'fsdp')),  # R D
  (r'layer/mlp/(gate|up)/lora_a', P('fsdp', None)),  # D R
  (r'layer/mlp/(gate|up)/lora_b', P(None, 'tensor')),  # R F
  (r'layer/mlp/down/lora_a', P('tensor', None)),  # F R
  (r'layer/mlp/down/lora_b', P(None, 'fsdp')),  # R D
  # Quantised kernels, as the kernels they stand for; small vectors of scales are whole.
  (_COLUMNS + r'kernel_(nf4|absmax_codes|int8)', P('fsdp', 'tensor')),  # I O
  (_COLUMNS + r'kernel_absmax', P('tensor')),  # O
  (_ROWS + r'kernel_(nf4|absmax_codes|int8)', P('tensor', 'fsdp')),  # I O
  (_ROWS + r'kernel_absmax', P('fsdp')),  # O
  (r'layer/(attn|mlp)/\w+/kernel_absmax_scale', P(None)),  # M
  (r'layer/(attn|mlp)/\w+/kernel_absmax_mean', P()),
)


def matching_rules(name: str) -> list[tuple[str, PartitionSpec]]:
  """The rules whose pattern is the whole of parameter path `name`."""
  name = re.sub(r'^layers(_\d+)?/', 'layer/', name)
  return [rule for rule in RULES if re.fullmatch(rule[0], name)]


def param_specs(params: PyTree) -> PyTree:
  """A tree of `PartitionSpec` for parameters (arrays or shapes), stacked or not.

  Raises:
    KeyError: A parameter that no rule or more than one rule names.
  """

  def spec(name: str, leaf) -> PartitionSpec:
    hits = matching_rules(name)
    if len(hits) != 1:
      raise KeyError(
        f'{name} {leaf.shape} matches {len(hits)} sharding rules, want 1: {hits}'
      )
    return P(None, *hits[0][1]) if name.startswith('layers/') else hits[0][1]

  return trees.map_named(spec, params)


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
  """A tree of `NamedSharding` for parameters (arrays or shapes) on `mesh`.

  Raises:
    MeshError: A dimension that does not divide over its mesh axes.
  """

  def sharding(name: str, leaf, spec: PartitionSpec) -> NamedSharding:
    for dim, (size, axes) in enumerate(zip(leaf.shape, spec)):
      names = (axes,) if isinstance(axes, str) else (axes or ())
      parts = math.prod(mesh.shape[axis] for axis in names)
      if size % parts:
        raise MeshError(
          f'{name} {tuple(leaf.shape)}: dimension {dim} of size {size} does not divide '
          f'over {"*".join(names)} = {parts}. Choose a --mesh whose '
          f'{" and ".join(names)} size divides {size}.{_note(name)}'
        )
    return NamedSharding(mesh, spec)

  return trees.map_named(sharding, params, param_specs(params))


def _note(name: str) -> str:
  if name.endswith('/kernel_absmax_codes'):
    return ' Each stands for 64 weights, which may not be split.'
  return ''


def explain_sharding(params: PyTree, mesh: Mesh) -> str:
  """A table with each parameter's shape, spec and bytes on one device."""
  shardings = trees.flatten(param_shardings(params, mesh))
  lines = [f'{"parameter":<36} {"shape":<24} {"spec":<34} {"bytes/device":>14}']
  total = whole = 0
  for name, leaf in trees.flatten(params).items():
    shard = math.prod(shardings[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
    total += shard
    whole += leaf.size * leaf.dtype.itemsize
    spec = ', '.join(str(axes) for axes in shardings[name].spec)
    shape = 'x'.join(map(str, leaf.shape)) + ' ' + str(leaf.dtype)
    lines.append(f'{name:<36} {shape:<24} {spec:<34} {shard:>14,}')
  lines.append(f'{"total":<36} {whole:<24,} {"":<34} {total:>14,}')
  return '\n'.join(lines)


def born_sharded(init, mesh: Mesh, *args) -> PyTree:
  """Runs `init(*args)` so that each parameter is made on the devices it lives on."""
  shardings = param_shardings(jax.eval_shape(init, *args), mesh)
  return jax.jit(init, out_shardings=shardings)(*args)
