"""The configuration that all training commands share."""

import dataclasses
import re
from typing import Self

from mrjax.data.sft import OVERLONG_POLICIES
from mrjax.lora import masks
from mrjax.lora.adapters import LoraConfig, targets_named
from mrjax.models import quantized
from mrjax.models.attention import BACKENDS
from mrjax.models.remat import POLICIES as REMAT_POLICIES
from mrjax.training import optimizer
from mrjax.training.ranges import BELOW_ONE, NOT_NEGATIVE, POSITIVE, check_ranges


@dataclasses.dataclass(frozen=True)
class Config(optimizer.OptimizerConfig):
  """Everything that decides a training run, whatever its loss.

  A command derives its own configuration from it.
  """

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  adapter: str = ''  # PEFT directory, mrjax adapter or run: trains on; empty: a new one
  tokenizer: str = ''  # empty: the model's own
  data: str = ''
  data_root: str = ''  # directory with local copies of named data sets
  prompt_template: str = 'raw'  # layout put around prompts and completions
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1,tensor:1'
  dtype: str = 'auto'  # of the computation; what trains is float32
  remat: str = 'minimal'
  attention_backend: str = 'auto'
  loss_chunk: int = 0  # tokens that go through the head together; 0: as many as is fast
  seed: int = 0  # of the data order and of all that is random
  trainable: str = ''  # mask preset, or regex:PATTERN[;...]; empty: adapter, or all
  lora_rank: int = 0  # 0: no adapter
  lora_alpha: float = 32.0  # the adapter's product is scaled by alpha / rank
  lora_dropout: float | None = None  # None: 0, or that of `adapter`
  lora_rslora: bool = False  # scale by alpha / sqrt(rank) instead
  lora_targets: str = 'all_linear'  # preset, or regular expressions with commas
  quantize: str = ''  # nf4 or int8: how the frozen kernels are held
  max_length: int = 1024  # tokens of a row, and of the longest text in it
  overlong: str = 'error'
  packing: bool = True
  batch_size: int = 8  # rows an optimizer step, over all devices
  grad_accumulation: int = 1  # micro-batches a step
  num_epochs: float = 3.0
  num_steps: int = 0  # optimizer steps; 0: num_epochs decides
  eval_data: str = ''  # like data; empty: no evaluation
  eval_every: int = 0  # steps; 0: before checkpoints alone
  save_every: int = 0  # steps; 0: at the end alone
  keep_last: int = 2  # checkpoints kept: should the last one be damaged
  keep_every: int = 0  # steps whose multiples are kept too; 0: none
  resume_step: int = 0  # checkpoint to go on from; 0: the last
  log_every: int = 10  # steps
  tensorboard: bool = True
  wandb_project: str = ''
  profile_steps: str = ''  # 'FIRST:LAST', LAST excluded
  explain_sharding: bool = False
  dry_run: bool = False  # compile, print the memory plan, write nothing
  overwrite: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in (
      ('overlong', OVERLONG_POLICIES),
      ('remat', REMAT_POLICIES),
      ('attention_backend', BACKENDS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'--{name}={getattr(self, name)}: want one of {", ".join(known)}.'
        )
    for name in ('model', 'data', 'output_dir'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; it must be given.')
    for name, least in (
      ('max_length', 2),  # the first token of a text is never predicted
      ('batch_size', 1),
      ('grad_accumulation', 1),
      ('log_every', 1),
      ('num_steps', 0),
      ('lora_rank', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f'--{name}={getattr(self, name)}: want at least {least}.')
    check_ranges(
      self,
      {
        'num_epochs': NOT_NEGATIVE,
        'lora_alpha': POSITIVE,
        'lora_dropout': BELOW_ONE,
      },
    )
    if not self.num_steps and not self.num_epochs:
      raise ValueError('One of --num_steps and --num_epochs must be positive.')
    if self.batch_size % self.grad_accumulation:
      raise ValueError(
        f'--batch_size={self.batch_size} is not a multiple of --grad_accumulation='
        f'{self.grad_accumulation}: every micro-batch has the same number of rows.'
      )
    if self.eval_every and not self.evaluates:
      raise ValueError(f'--eval_every={self.eval_every} needs --eval_data.')
    if self.quantize and self.quantize not in quantized.KINDS:
      raise ValueError(
        f'--quantize={self.quantize}: want one of {", ".join(quantized.KINDS)}.'
      )
    if self.overwrite and self.resume_step:
      raise ValueError(
        f'--overwrite deletes the run that --resume_step={self.resume_step} goes on '
        'with: leave one of them out.'
      )
    self._check_lora()
    if self.lora_plus_ratio != 1 and not self.has_adapter:
      raise ValueError('--lora_plus_ratio is for adapters; it needs --lora_rank.')
    _ = self.rules, self.lora, self.profiled  # these check themselves
    if self.num_steps:
      self.check_profile(self.num_steps)

  def _check_lora(self) -> None:
    """An option of adapters that would change nothing is refused."""
    if self.adapter and self.lora_rank:
      raise ValueError(
        f'--adapter={self.adapter} has its own rank: leave --lora_rank out.'
      )
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name in ('lora_alpha', 'lora_rslora', 'lora_targets'):
      value = getattr(self, name)
      if value == defaults[name]:
        continue
      if self.adapter:
        raise ValueError(
          f'--adapter={self.adapter} has its own: leave --{name}={value} out.'
        )
      if not self.lora_rank:
        raise ValueError(f'--{name}={value} is for adapters; it needs --lora_rank.')
    if self.lora_dropout and not self.has_adapter:
      raise ValueError(
        f'--lora_dropout={self.lora_dropout} is for adapters; it needs --lora_rank or '
        '--adapter.'
      )

  @property
  def evaluates(self) -> bool:
    """Whether there are data to evaluate on."""
    return bool(self.eval_data)

  @property
  def has_adapter(self) -> bool:
    """Whether there is an adapter, a new one or that of `adapter`."""
    return bool(self.lora_rank or self.adapter)

  @property
  def lora(self) -> LoraConfig | None:
    """The new adapter, where there is one."""
    if not self.lora_rank:
      return None
    return LoraConfig(
      self.lora_rank,
      self.lora_alpha,
      self.lora_dropout or 0.0,
      self.lora_rslora,
      targets_named(self.lora_targets),
    )

  @property
  def rules(self) -> tuple[masks.Rule, ...]:
    """The rules of the mask; by default adapters train, or all where there are none."""
    kind, _, patterns = self.trainable.partition(':')
    if kind != 'regex':
      return masks.rules_named(
        self.trainable or ('lora' if self.has_adapter else 'all')
      )
    for pattern in patterns.split(';'):
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f'--trainable={self.trainable}: {pattern!r} is no pattern: {error}.'
        ) from None
    return tuple((pattern, True) for pattern in patterns.split(';'))

  @property
  def profiled(self) -> tuple[int, int] | None:
    """The first step to trace, and the one after the last."""
    if not self.profile_steps:
      return None
    first, _, last = self.profile_steps.partition(':')
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
      raise ValueError(
        f'--profile_steps={self.profile_steps}: want FIRST:LAST, as in 10:13.'
      )
    return int(first), int(last)

  def check_profile(self, num_steps: int) -> None:
    """Raises ValueError where `profiled` begins after the last of `num_steps`."""
    if self.profiled and self.profiled[0] >= num_steps:
      raise ValueError(
        f'--profile_steps={self.profile_steps}: want a FIRST below the '
        f'{num_steps} steps of the run.'
      )

  @property
  def may_change(self) -> frozenset[str]:
    """Fields that may change when a run goes on, often since its mesh does.

    They change no result beyond rounding. `batch_size` is over all micro-batches, so
    the batch stays the same; but dropout takes other random numbers in each of them.
    """
    names = {'remat', 'attention_backend', 'loss_chunk', 'keep_last', 'keep_every'}
    may_drop = bool(self.adapter) and self.lora_dropout is None  # it has its own
    if not (self.lora_dropout or may_drop):
      names.add('grad_accumulation')
    return frozenset(names)

  def recorded(self) -> Self:
    """Itself, but for what says nothing about the run as a whole."""
    return dataclasses.replace(
      self,
      # What `adapter` has is not known here; all others have a number.
      lora_dropout=self.lora_dropout if self.adapter else self.lora_dropout or 0.0,
      resume_step=0,
      profile_steps='',
      explain_sharding=False,
      dry_run=False,
      overwrite=False,
    )
