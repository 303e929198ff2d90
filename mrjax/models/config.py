"""`DecoderConfig`: what a Llama-family decoder is made of, read from `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROPE_TYPES = ('default', 'linear', 'llama3', 'longrope')
ARCHITECTURES = {
  'LlamaForCausalLM': 'llama',
  'MistralForCausalLM': 'mistral',
  'Qwen2ForCausalLM': 'qwen2',
  'Qwen3ForCausalLM': 'qwen3',
  'GemmaForCausalLM': 'gemma',
  'Gemma2ForCausalLM': 'gemma2',
  'Phi3ForCausalLM': 'phi3',
}
_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu': 'gelu',
}


class ConfigError(ValueError):
  """A `config.json` that mrjax does not understand or that contradicts itself."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding, Su et al. 2021, in the halves (rotate-half) layout.

  `factor` and the `*_freq_factor` pair scale frequencies as `kind` says: `linear`
  divides all by `factor`; `llama3` divides the low ones and blends in between;
  `longrope` divides each by its own entry of `short_factors`, or of `long_factors`
  for rows longer than `original_max_positions`, and scales cos and sin by
  `attention_factor`.
  """

  theta: float = 10000.0
  kind: str = 'default'
  rotary_dim: int = 0  # leading part of the head width that is rotated
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 0  # tokens
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape and flavour of one decoder; hashable, so it can be static under `jit`.

  `layer_windows` has one entry a layer: the number of most recent positions a query
  sees, its own included, or None for all of them.
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: RopeConfig
  layer_windows: tuple[int | None, ...]
  activation: str = 'silu'
  norm_eps: float = 1e-6
  norm_adds_one: bool = False  # Gemma: the norm multiplies by (1 + scale)
  post_norms: bool = False  # Gemma 2: norms after attention and after the MLP too
  qk_norm: bool = False  # Qwen3: RMS norm over the head width of q and k
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  scale_embeddings: bool = False  # Gemma: embeddings times sqrt(hidden_size)
  attention_scale: float = 0.0  # multiplies q.k
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  tie_embeddings: bool = False
  max_positions: int = 2048  # tokens
  initializer_range: float = 0.02

  def __post_init__(self):
    for name in (
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'head_dim',
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f'{name} is {value!r}, want a positive integer.')
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f'num_attention_heads {self.num_heads} is not a multiple of '
        f'num_key_value_heads {self.num_kv_heads}.'
      )
    if len(self.layer_windows) != self.num_layers:
      raise ConfigError(
        f'{len(self.layer_windows)} layer windows for {self.num_layers} layers.'
      )

  @property
  def num_params(self) -> int:
    """Weights of the language model, the tied head counted once."""
    d, h = self.hidden_size, self.head_dim
    attn = d * h * (2 * self.num_heads + 2 * self.num_kv_heads)
    attn += self.qkv_bias * h * (self.num_heads + 2 * self.num_kv_heads)
    attn += self.output_bias * d + self.qk_norm * 2 * h
    mlp = 3 * d * self.intermediate_size
    mlp += self.mlp_bias * (2 * self.intermediate_size + d)
    norms = d * (4 if self.post_norms else 2)
    heads = 1 if self.tie_embeddings else 2
    return heads * self.vocab_size * d + self.num_layers * (attn + mlp + norms) + d

  @classmethod
  def from_hf(cls, hf: Mapping[str, Any]) -> 'DecoderConfig':
    """Reads a Hugging Face config, in the older or the transformers 5 form.

    Raises:
      ConfigError: An architecture, rope type or activation that is not supported
        (named), a missing field, or a contradiction.
    """
    family = _family(hf)
    try:
      return _from_hf(cls, family, hf)
    except KeyError as error:
      raise ConfigError(
        f'config.json of a {family} model has no field {error}.'
      ) from None


def load_hf_config(directory: str | Path) -> dict[str, Any]:
  """The parsed `config.json` of a Hugging Face model directory."""
  path = Path(directory) / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} does not exist: a Hugging Face model directory holds config.json.'
    )
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path} is not valid JSON: {error}.') from None
  if not isinstance(config, dict):
    raise ConfigError(f'{path} holds a {type(config).__name__}, want a JSON object.')
  return config


def _family(hf: Mapping[str, Any]) -> str:
  names = hf.get('architectures') or []
  for name in names:
    if name in ARCHITECTURES:
      return ARCHITECTURES[name]
  model_type = hf.get('model_type')
  if not names and model_type in ARCHITECTURES.values():
    return str(model_type)
  raise ConfigError(
    f'Architecture {", ".join(names) or model_type!r} is not supported; '
    f'mrjax has {", ".join(ARCHITECTURES)}.'
  )


def _from_hf(cls, family: str, hf: Mapping[str, Any]) -> DecoderConfig:
  gemma = family in ('gemma', 'gemma2')
  hidden_size, num_heads = hf['hidden_size'], hf['num_attention_heads']
  head_dim = hf.get('head_dim')
  if head_dim is None:
    head_dim = {'qwen3': 128, 'gemma': 256, 'gemma2': 256}.get(family)
  if head_dim is None:
    if hidden_size % num_heads:
      raise ConfigError(
        f'hidden_size {hidden_size} is not a multiple of num_attention_heads '
        f'{num_heads} and config.json gives no head_dim.'
      )
    head_dim = hidden_size // num_heads
  # The other families read no such field: Qwen 2 always has q, k and v biases and no
  # output bias, Mistral and Phi-3 have none.
  attention_bias = family in ('llama', 'qwen3', 'gemma', 'gemma2') and bool(
    hf.get('attention_bias', False)
  )
  if family == 'gemma2':
    scale = float(hf.get('query_pre_attn_scalar', 256)) ** -0.5
  else:
    scale = head_dim**-0.5
  return cls(
    family=family,
    vocab_size=hf['vocab_size'],
    hidden_size=hidden_size,
    intermediate_size=hf['intermediate_size'],
    num_layers=hf['num_hidden_layers'],
    num_heads=num_heads,
    num_kv_heads=hf.get('num_key_value_heads') or num_heads,
    head_dim=head_dim,
    rope=_rope(family, hf, head_dim),
    layer_windows=_layer_windows(family, hf),
    activation=_activation(family, hf),
    norm_eps=hf.get('rms_norm_eps', 1e-5 if family == 'phi3' else 1e-6),
    norm_adds_one=gemma,
    post_norms=family == 'gemma2',
    qk_norm=family == 'qwen3',
    qkv_bias=family == 'qwen2' or attention_bias,
    output_bias=attention_bias,
    mlp_bias=family == 'llama' and bool(hf.get('mlp_bias', False)),
    scale_embeddings=gemma,
    attention_scale=scale,
    attention_softcap=hf.get('attn_logit_softcapping') if family == 'gemma2' else None,
    logit_softcap=hf.get('final_logit_softcapping') if family == 'gemma2' else None,
    tie_embeddings=bool(hf.get('tie_word_embeddings', gemma)),
    max_positions=hf.get('max_position_embeddings', 2048),
    initializer_range=hf.get('initializer_range', 0.02),
  )


def _activation(family: str, hf: Mapping[str, Any]) -> str:
  if family in ('gemma', 'gemma2'):
    # Early Gemma files say hidden_act "gelu", yet the model was trained with the tanh
    # form; `hidden_activation` is the field that later files correct it with.
    name = hf.get('hidden_activation') or 'gelu_pytorch_tanh'
  else:
    name = hf.get('hidden_act', 'silu')
  if name not in _ACTIVATIONS:
    raise ConfigError(
      f'Activation {name!r} is not supported; mrjax has {", ".join(_ACTIVATIONS)}.'
    )
  return _ACTIVATIONS[name]


def _layer_windows(family: str, hf: Mapping[str, Any]) -> tuple[int | None, ...]:
  num_layers, window = hf['num_hidden_layers'], hf.get('sliding_window')
  if family in ('llama', 'gemma'):
    window = None
  if family in ('qwen2', 'qwen3') and not hf.get('use_sliding_window', False):
    window = None
  if window is None:
    return (None,) * num_layers
  if window < 1:
    raise ConfigError(f'sliding_window is {window}, want a positive number of tokens.')
  types = hf.get('layer_types')
  if types is not None:
    known = {'sliding_attention': window, 'full_attention': None}
    unknown = sorted(set(types) - set(known))
    if unknown:
      raise ConfigError(f'layer_types {unknown} are not supported; want {list(known)}.')
    return tuple(known[kind] for kind in types)
  if family == 'gemma2':
    return tuple(None if layer % 2 else window for layer in range(num_layers))
  first = hf.get('max_window_layers', 0) if family in ('qwen2', 'qwen3') else 0
  return tuple(window if layer >= first else None for layer in range(num_layers))


def _rope(family: str, hf: Mapping[str, Any], head_dim: int) -> RopeConfig:
  # transformers 5 keeps everything in `rope_parameters`; older files have a top-level
  # `rope_theta` and, when scaled, `rope_scaling` whose kind is under `type`.
  params = dict(hf.get('rope_scaling') or {}) | dict(hf.get('rope_parameters') or {})
  kind = params.get('rope_type') or params.get('type') or 'default'
  if kind == 'su' and family == 'phi3':  # the first name of longrope
    kind = 'longrope'
  if kind not in ROPE_TYPES:
    raise ConfigError(
      f'Rope type {kind!r} is not supported; mrjax has {", ".join(ROPE_TYPES)}.'
    )
  theta = params.get('rope_theta', hf.get('rope_theta', 10000.0))
  partial = params.get('partial_rotary_factor', hf.get('partial_rotary_factor', 1.0))
  rotary_dim = int(head_dim * (partial or 1.0))
  base = RopeConfig(theta=float(theta), kind=kind, rotary_dim=rotary_dim)
  if kind == 'linear':
    return dataclasses.replace(base, factor=float(params['factor']))
  if kind == 'llama3':
    return dataclasses.replace(
      base,
      factor=float(params['factor']),
      low_freq_factor=float(params['low_freq_factor']),
      high_freq_factor=float(params['high_freq_factor']),
      original_max_positions=int(params['original_max_position_embeddings']),
    )
  if kind == 'longrope':
    return _longrope(base, params, hf)
  return base


def _longrope(
  base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]
) -> RopeConfig:
  original = hf.get(
    'original_max_position_embeddings', params.get('original_max_position_embeddings')
  )
  if original is None:
    raise KeyError('original_max_position_embeddings')
  short: Sequence[float] = params['short_factor']
  long: Sequence[float] = params['long_factor']
  for name, factors in (('short_factor', short), ('long_factor', long)):
    if len(factors) != base.rotary_dim // 2:
      raise ConfigError(
        f'rope {name} has {len(factors)} entries, want {base.rotary_dim // 2}: '
        'one for each pair of rotated dimensions.'
      )
  attention_factor = params.get('attention_factor')
  if attention_factor is None:
    ratio = params.get('factor') or hf['max_position_embeddings'] / original
    attention_factor = (
      1.0 if ratio <= 1.0 else math.sqrt(1 + math.log(ratio) / math.log(original))
    )
  return dataclasses.replace(
    base,
    original_max_positions=int(original),
    short_factors=tuple(map(float, short)),
    long_factors=tuple(map(float, long)),
    attention_factor=float(attention_factor),
  )
