"""The weight table: Hugging Face tensors and ours, for every family, both directions.

Layouts, which no rule has to convert: rotary pairs are (j, j + H/2), the halves layout
of Hugging Face files on both sides (Meta's own interleaved files are not read). Tied
models store the embedding once and have no `lm_head` leaf; a `lm_head.weight` found
beside a tied embedding must equal it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mrjax import trees
from mrjax.checkpoint.directories import CheckpointError
from mrjax.models.config import DecoderConfig

TIED_HEAD = 'lm_head.weight'
EMBEDDING = 'model.embed_tokens.weight'
# Buffers that old files carry and that the config determines.
IGNORED = (
  r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',
  r'model\.rotary_emb\.inv_freq',
)


@dataclasses.dataclass(frozen=True)
class WeightRule:
  """One Hugging Face tensor, or one block of the rows of a fused one, and our leaf.

  Dimensions are written with the letters of the code base, V D N K H F. A word is one
  axis; the letters of a longer word are flattened into it, so `NH D` against `D N H`
  is the transpose of a [N * H, D] matrix with its columns split in heads. Rules that
  share `hf` are fused: their blocks stand one below the other, in the table's order.

  Attributes:
    hf: Tensor name; `{i}` stands for the layer.
    ours: Parameter path; under `layers/` it has a leading axis of layers.
    hf_dims: Axes of the tensor (of this block, where fused).
    our_dims: Axes of one layer of our leaf.
    when: Whether a decoder of this config has the weight.
  """

  hf: str
  ours: str
  hf_dims: str
  our_dims: str
  when: Callable[[DecoderConfig], bool] = lambda config: True

  @property
  def stacked(self) -> bool:
    return '{i}' in self.hf

  @property
  def transposed(self) -> bool:
    return self.hf_dims.replace(' ', '') != self.our_dims.replace(' ', '')

  def our_shape(self, config: DecoderConfig) -> tuple[int, ...]:
    """Shape of one layer of our leaf."""
    return tuple(dim_sizes(config)[dim] for dim in self.our_dims.split())

  def block_shape(self, config: DecoderConfig) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor, or of this rule's block of it."""
    sizes = dim_sizes(config)
    return tuple(math.prod(sizes[d] for d in word) for word in self.hf_dims.split())


_fused = lambda config: config.family == 'phi3'
_separate = lambda config: config.family != 'phi3'
_qkv_bias = lambda config: config.qkv_bias
_output_bias = lambda config: config.output_bias
_mlp_bias = lambda config: config.mlp_bias
_qk_norm = lambda config: config.qk_norm
_post_norms = lambda config: config.post_norms
_pre_norms_only = lambda config: not config.post_norms
_untied = lambda config: not config.tie_embeddings

_L = 'model.layers.{i}.'
_A, _M = _L + 'self_attn.', _L + 'mlp.'
_Q, _K, _V, _O = (f'layers/attn/{x}/' for x in 'qkvo')
_GATE, _UP, _DOWN = (f'layers/mlp/{x}/' for x in ('gate', 'up', 'down'))
RULES: tuple[WeightRule, ...] = (
  WeightRule(EMBEDDING, 'embed/embedding', 'V D', 'V D'),
  WeightRule(_L + 'input_layernorm.weight', 'layers/attn_norm/scale', 'D', 'D'),
  WeightRule(_A + 'q_proj.weight', _Q + 'kernel', 'NH D', 'D N H', _separate),
  WeightRule(_A + 'k_proj.weight', _K + 'kernel', 'KH D', 'D K H', _separate),
  WeightRule(_A + 'v_proj.weight', _V + 'kernel', 'KH D', 'D K H', _separate),
  WeightRule(_A + 'qkv_proj.weight', _Q + 'kernel', 'NH D', 'D N H', _fused),
  WeightRule(_A + 'qkv_proj.weight', _K + 'kernel', 'KH D', 'D K H', _fused),
  WeightRule(_A + 'qkv_proj.weight', _V + 'kernel', 'KH D', 'D K H', _fused),
  WeightRule(_A + 'q_proj.bias', _Q + 'bias', 'NH', 'N H', _qkv_bias),
  WeightRule(_A + 'k_proj.bias', _K + 'bias', 'KH', 'K H', _qkv_bias),
  WeightRule(_A + 'v_proj.bias', _V + 'bias', 'KH', 'K H', _qkv_bias),
  WeightRule(_A + 'q_norm.weight', 'layers/attn/q_norm/scale', 'H', 'H', _qk_norm),
  WeightRule(_A + 'k_norm.weight', 'layers/attn/k_norm/scale', 'H', 'H', _qk_norm),
  WeightRule(_A + 'o_proj.weight', _O + 'kernel', 'D NH', 'N H D'),
  WeightRule(_A + 'o_proj.bias', _O + 'bias', 'D', 'D', _output_bias),
  # Gemma 2 gives the name of the norm before the MLP to the one after attention.
  WeightRule(
    _L + 'post_attention_layernorm.weight',
    'layers/mlp_norm/scale',
    'D',
    'D',
    _pre_norms_only,
  ),
  WeightRule(
    _L + 'post_attention_layernorm.weight',
    'layers/post_attn_norm/scale',
    'D',
    'D',
    _post_norms,
  ),
  WeightRule(
    _L + 'pre_feedforward_layernorm.weight',
    'layers/mlp_norm/scale',
    'D',
    'D',
    _post_norms,
  ),
  WeightRule(
    _L + 'post_feedforward_layernorm.weight',
    'layers/post_mlp_norm/scale',
    'D',
    'D',
    _post_norms,
  ),
  WeightRule(_M + 'gate_proj.weight', _GATE + 'kernel', 'F D', 'D F', _separate),
  WeightRule(_M + 'up_proj.weight', _UP + 'kernel', 'F D', 'D F', _separate),
  WeightRule(_M + 'gate_up_proj.weight', _GATE + 'kernel', 'F D', 'D F', _fused),
  WeightRule(_M + 'gate_up_proj.weight', _UP + 'kernel', 'F D', 'D F', _fused),
  WeightRule(_M + 'gate_proj.bias', _GATE + 'bias', 'F', 'F', _mlp_bias),
  WeightRule(_M + 'up_proj.bias', _UP + 'bias', 'F', 'F', _mlp_bias),
  WeightRule(_M + 'down_proj.weight', _DOWN + 'kernel', 'D F', 'F D'),
  WeightRule(_M + 'down_proj.bias', _DOWN + 'bias', 'D', 'D', _mlp_bias),
  WeightRule('model.norm.weight', 'final_norm/scale', 'D', 'D'),
  WeightRule(TIED_HEAD, 'lm_head/kernel', 'V D', 'D V', _untied),
)


def rules_for(config: DecoderConfig) -> tuple[WeightRule, ...]:
  """The rules of a decoder's weights: every leaf of its tree has exactly one."""
  return tuple(rule for rule in RULES if rule.when(config))


def param_shapes(config: DecoderConfig, dtype: Any = np.float32) -> dict[str, Any]:
  """Our parameter tree (scanned form) as `jax.ShapeDtypeStruct` leaves."""
  return trees.unflatten(
    {
      rule.ours: jax.ShapeDtypeStruct(
        (config.num_layers,) * rule.stacked + rule.our_shape(config), dtype
      )
      for rule in rules_for(config)
    }
  )


class HfTensor(NamedTuple):
  """One tensor of a Hugging Face model: its shape, its layer, its block or blocks."""

  shape: tuple[int, ...]
  layer: int | None
  rules: tuple[WeightRule, ...]


def hf_tensors(config: DecoderConfig) -> dict[str, HfTensor]:
  """Every tensor of the Hugging Face model by name, in model order."""
  tensors: dict[str, HfTensor] = {}
  for stacked, group in itertools.groupby(rules_for(config), lambda r: r.stacked):
    rules = list(group)
    for i in range(config.num_layers) if stacked else (None,):
      for rule in rules:
        name, shape = rule.hf.format(i=i), rule.block_shape(config)
        if name in tensors:  # a further block of a fused tensor
          before = tensors[name]
          shape = (before.shape[0] + shape[0], *shape[1:])
          tensors[name] = HfTensor(shape, i, (*before.rules, rule))
        else:
          tensors[name] = HfTensor(shape, i, (rule,))
  return tensors


def block_start(rule: WeightRule, config: DecoderConfig) -> int:
  """First row of the rule's block in its tensor; 0 unless fused."""
  start = 0
  for other in rules_for(config):
    if other == rule:
      return start
    if other.hf == rule.hf:
      start += other.block_shape(config)[0]
  raise KeyError(f'{rule.hf} is no weight of this {config.family} model.')


def check_tensors(
  config: DecoderConfig, found: Mapping[str, Sequence[int]], *, where: str
) -> list[str]:
  """Holds the names and shapes of a checkpoint against the table.

  Args:
    config: What config.json describes.
    found: Shape of every tensor of the checkpoint.
    where: The checkpoint, for messages.

  Returns:
    Names that are there and need not be: known buffers, and `lm_head.weight` beside
    tied embeddings.

  Raises:
    CheckpointError: A tensor no rule knows, one this config has no place for, one
      that is missing, or a wrong shape; with up to four names.
  """
  want = hf_tensors(config)
  spare, unknown, homeless = [], [], []
  for name in found:
    if name in want:
      continue
    known = any(re.fullmatch(pattern, name) for pattern in IGNORED)
    if known or (name == TIED_HEAD and config.tie_embeddings):
      spare.append(name)
    elif re.sub(r'\.\d+\.', '.{i}.', name, count=1) in {rule.hf for rule in RULES}:
      homeless.append(name)
    else:
      unknown.append(name)
  if unknown:
    raise CheckpointError(
      f'{where}: no weight rule names {_some(unknown)}. Either this is not a plain '
      f'{config.family} language model, or the file is a quantised or adapter file.'
    )
  if homeless:
    raise CheckpointError(
      f'{where}: config.json has no place for {_some(homeless)} (a {config.family} '
      f'model of {config.num_layers} layers). config.json and weights do not belong '
      'together.'
    )
  missing = [name for name in want if name not in found]
  if missing:
    raise CheckpointError(
      f'{where}: no file holds {_some(missing)}, which config.json asks for. Copy the '
      'missing shard, or the config.json that belongs to these weights.'
    )
  for name, tensor in want.items():
    if tuple(found[name]) != tensor.shape:
      raise CheckpointError(
        f'{where}: {name} has shape {list(found[name])}, want {list(tensor.shape)} by '
        'config.json. config.json and weights do not belong together.'
      )
  return spare


def check_leaves(
  config: DecoderConfig, found: Mapping[str, Sequence[int]], *, where: str
) -> None:
  """Holds the parameter paths and shapes of a tree against what the config asks for.

  Raises:
    CheckpointError: A leaf too many, too few or of a wrong shape; a value model.
  """
  if 'value_head/kernel' in found:
    raise CheckpointError(
      f'{where} is a value model: it predicts rewards, not tokens. Give a language '
      'model.'
    )
  want = {n: leaf.shape for n, leaf in trees.flatten(param_shapes(config)).items()}
  for names, fault in (
    (want.keys() - found.keys(), 'lacks'),
    (found.keys() - want.keys(), 'has, and the config has no place for,'),
  ):
    if names:
      raise CheckpointError(
        f'{where} {fault} {_some(names)}: weights and config.json do not belong '
        'together.'
      )
  for name, shape in want.items():
    if tuple(found[name]) != shape:
      raise CheckpointError(
        f'{where}: {name} has shape {list(found[name])}, want {list(shape)} by '
        'config.json.'
      )


def dim_sizes(config: DecoderConfig) -> dict[str, int]:
  """Size of each dimension letter."""
  return {
    'V': config.vocab_size,
    'D': config.hidden_size,
    'N': config.num_heads,
    'K': config.num_kv_heads,
    'H': config.head_dim,
    'F': config.intermediate_size,
  }


def _some(names: Iterable[str]) -> str:
  names = sorted(names)
  rest = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(names[:4]) + rest
