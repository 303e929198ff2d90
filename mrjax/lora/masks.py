"""Which weights train: ordered rules on parameter paths, and the split they give.

A mask is a tree like the parameters. Its leaves are True (trains), False (frozen), or,
for a stacked leaf, the number of last layers that train. `split` cuts the parameters
in two by it, so that a frozen weight has no gradient, no optimizer state and no bytes
in a checkpoint; `merge` puts the two together again.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp

from mrjax import trees

PyTree = trees.PyTree
Rule = tuple[str, bool | int]

# The first rule whose pattern is found in a path decides; what none names is frozen.
PRESETS: dict[str, tuple[Rule, ...]] = {
  'all': ((r'', True),),
  'lora': ((r'/lora_[ab]$', True),),
  'head': ((r'^(lm|value)_head/', True),),
  'norms': ((r'norm/scale$', True),),
  'embeddings': ((r'^embed/', True), (r'^lm_head/', True)),
}
_LAST_LAYERS = re.compile(r'last_layers:([1-9]\d*)')


def rules_named(name: str) -> tuple[Rule, ...]:
  """The rules of a preset, `last_layers:K` included.

  Raises:
    ValueError: No such preset.
  """
  if match := _LAST_LAYERS.fullmatch(name):
    return ((r'^layers/', int(match[1])), (r'^(final_norm|(lm|value)_head)/', True))
  if name not in PRESETS:
    raise ValueError(
      f'--trainable={name}: want one of {", ".join(PRESETS)}, last_layers:K, or '
      'regex:PATTERN[;PATTERN...].'
    )
  return PRESETS[name]


def make_mask(params: PyTree, rules: Sequence[Rule]) -> PyTree:
  """The mask that the rules give for parameters (arrays or shapes).

  Raises:
    ValueError: Nothing trains, or more last layers than there are.
  """

  def value(name: str, leaf) -> bool | int:
    found = next((value for regex, value in rules if re.search(regex, name)), False)
    if isinstance(found, bool):
      return found
    if not name.startswith('layers/') or not 0 < found <= leaf.shape[0]:
      raise ValueError(
        f'{found} last layers of {name} {leaf.shape}: want 1 to the number of layers.'
      )
    return True if found == leaf.shape[0] else found

  mask = trees.map_named(value, params)
  if not any(trees.flatten(mask).values()):
    raise ValueError(
      f'No parameter is trainable under the rules {list(rules)}. Parameters: '
      f'{", ".join(trees.flatten(params))}.'
    )
  return mask


def split(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
  """Trainable and frozen parameters; a leaf cut by layers is in both."""
  trainable, frozen = {}, {}
  leaves = trees.flatten(mask)
  for name, leaf in trees.flatten(params).items():
    last = leaves[name]
    if last is True:
      trainable[name] = leaf
    elif last is False:
      frozen[name] = leaf
    else:
      trainable[name], frozen[name] = leaf[-last:], leaf[:-last]
  return trees.unflatten(trainable), trees.unflatten(frozen)


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
  """What `split` cut, whole again: `merge(*split(params, mask))` equals `params`."""
  leaves = trees.flatten(frozen)
  for name, leaf in trees.flatten(trainable).items():
    below = leaves.get(name)
    leaves[name] = leaf if below is None else jnp.concatenate([below, leaf])
  return trees.unflatten(leaves)
