"""Supervised fine-tuning: records in, a run directory with checkpoints out."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mrjax.checkpoint.orbax import CheckpointStore
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.checkpoint.weights import param_shapes
from mrjax.data.batches import pad_batch
from mrjax.data.order import batch_indices, epoch_of
from mrjax.data.sft import (
  OVERLONG_POLICIES,
  Example,
  encode_sft,
  load_sft_records,
)
from mrjax.data.tokenization import load_tokenizer
from mrjax.lora import masks
from mrjax.losses.tokens import cross_entropy
from mrjax.models.decoder import REMAT_POLICIES, Decoder
from mrjax.runs import common
from mrjax.runs.watch import TrainingWatch
from mrjax.sharding.mesh import batch_shards, make_mesh
from mrjax.sharding.rules import explain_sharding
from mrjax.training import loop, optimizer, step


@dataclasses.dataclass(frozen=True)
class Config(optimizer.OptimizerConfig):
  """Everything that decides a run, beside the optimizer's fields."""

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  tokenizer: str = ''  # empty: the model's own
  data: str = ''  # SFT records (file, directory, glob) or problems (NAME:SPLIT)
  data_root: str = ''  # directory with local copies of named data sets
  prompt_template: str = 'raw'  # layout put around prompts and completions
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1,tensor:1'
  dtype: str = 'auto'  # of the computation; weights are float32
  remat: str = 'none'
  seed: int = 0
  max_length: int = 1024  # tokens
  overlong: str = 'error'
  batch_size: int = 32  # records an optimizer step, over all devices
  grad_accumulation: int = 1  # micro-batches a step
  num_epochs: float = 3.0
  num_steps: int = 0  # optimizer steps; 0: num_epochs decides
  save_every: int = 0  # steps; 0: at the end alone
  keep_last: int = 1  # checkpoints kept
  log_every: int = 10  # steps
  tensorboard: bool = True
  wandb_project: str = ''
  profile_steps: str = ''  # 'FIRST:LAST', LAST excluded
  explain_sharding: bool = False
  overwrite: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in (('overlong', OVERLONG_POLICIES), ('remat', REMAT_POLICIES)):
      if getattr(self, name) not in known:
        raise ValueError(
          f'--{name}={getattr(self, name)}: want one of {", ".join(known)}.'
        )
    for name in ('model', 'data', 'output_dir'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; it must be given.')
    for name in ('max_length', 'batch_size', 'grad_accumulation', 'log_every'):
      if getattr(self, name) < 1:
        raise ValueError(f'--{name}={getattr(self, name)}: want at least 1.')
    if self.num_steps < 1 and self.num_epochs <= 0:
      raise ValueError('One of --num_steps and --num_epochs must be positive.')
    if self.batch_size % self.grad_accumulation:
      raise ValueError(
        f'--batch_size={self.batch_size} is not a multiple of --grad_accumulation='
        f'{self.grad_accumulation}: every micro-batch has the same number of rows.'
      )
    _profile(self.profile_steps, Path(self.output_dir))


def run(config: Config) -> dict[str, Any]:
  """Fine-tunes and leaves a run directory that `--model` accepts.

  A run that was stopped goes on from its last checkpoint, with bit-identical results;
  a finished one is left as it is.

  Returns:
    `steps`, `loss` of the last step, `checkpoint` (its directory), `num_records`,
    `tokens_per_second` (padding not counted).
  """
  common.start_processes()
  mesh = make_mesh(config.mesh)
  _check_rows(config, mesh)
  source = resolve_model(config.model)
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  examples = encode_sft(
    load_sft_records(config.data, data_root=config.data_root),
    tokenizer,
    template=config.prompt_template,
    max_length=config.max_length,
    overlong=config.overlong,
  )
  num_steps = config.num_steps or max(
    1, round(config.num_epochs * len(examples) / config.batch_size)
  )
  output_dir = Path(config.output_dir)
  if jax.process_index() == 0:
    common.prepare_output_dir(
      output_dir, config, overwrite=config.overwrite, resume=True
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('mrjax output directory')
  with CheckpointStore(
    output_dir, hf_dir=source.hf_dir, keep_last=config.keep_last
  ) as store:
    return _train(config, source, examples, num_steps, mesh, store, output_dir)


def make_loss_fn(decoder: Decoder):
  """Next-token cross-entropy of the supervised tokens, as a `step.LossFn`."""

  def loss_fn(trainable, frozen, batch, key):
    del key  # nothing here is random
    params = masks.merge(trainable, frozen)
    logits_BTV: Any = decoder.apply(
      {'params': params}, batch['tokens'], segments_BT=batch['segments']
    )
    loss, num_tokens = cross_entropy(
      logits_BTV, batch['tokens'], batch['loss_mask'], batch['segments']
    )
    return loss, (num_tokens, {})

  return loss_fn


def make_batch(
  examples: Sequence[Example], config: Config, index: int
) -> dict[str, np.ndarray]:
  """Host arrays [A, B, T] of optimizer step `index` (from 0)."""
  chosen = batch_indices(
    config.seed, index, batch_size=config.batch_size, num_records=len(examples)
  )
  batch = pad_batch([examples[i] for i in chosen], max_length=config.max_length)
  return {
    name: x.reshape(config.grad_accumulation, -1, *x.shape[1:])
    for name, x in batch.items()
  }


def _train(
  config: Config,
  source: ModelSource,
  examples: Sequence[Example],
  num_steps: int,
  mesh: Mesh,
  store: CheckpointStore,
  output_dir: Path,
) -> dict[str, Any]:
  position = {
    'seed': config.seed,
    'batch_size': config.batch_size,
    'num_records': len(examples),
    'data_sha256': _fingerprint(examples),
  }
  schedule = optimizer.make_schedule(config, num_steps)
  tx = optimizer.make_optimizer(config, schedule)
  start = store.latest_step() or 0
  if start >= num_steps:
    logging.info('%s is finished: %d steps are done.', output_dir, start)
    return {'steps': start, 'checkpoint': str(store.path(start))}
  state, shardings = _initial_state(config, source, tx, mesh, store, start, position)
  if config.explain_sharding:
    print(explain_sharding(state.params, mesh))
  decoder = Decoder(
    source.config, dtype=common.resolve_dtype(config.dtype), remat=config.remat
  )
  train_step = jax.jit(
    functools.partial(
      step.train_step, loss_fn=make_loss_fn(decoder), tx=tx, seed=config.seed
    ),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  watch = TrainingWatch(
    output_dir,
    start_step=start,
    num_steps=num_steps,
    log_every=config.log_every,
    describe=lambda done: {
      'learning_rate': float(schedule(done - 1)),
      'epoch': epoch_of(done, batch_size=config.batch_size, num_records=len(examples)),
    },
    tensorboard=config.tensorboard,
    wandb=config.wandb_project,
  )
  try:
    loop.fit(
      state,
      lambda state, batch: train_step(state, {}, batch),
      lambda i: make_batch(examples, config, i),
      mesh=mesh,
      start_step=start,
      num_steps=num_steps,
      on_step=watch,
      save=lambda done, state: store.save(
        done, {'params': state.params, 'opt_state': state.opt_state}, position
      ),
      save_every=config.save_every,
      profile=_profile(config.profile_steps, output_dir),
    )
  except loop.NonFiniteLossError as error:
    raise _name_records(error, config, examples) from None
  finally:
    watch.close()
  store.wait()
  return watch.summary() | {
    'num_records': len(examples),
    'checkpoint': str(store.path(num_steps)),
  }


def _initial_state(config, source, tx, mesh, store, start, position):
  """The state to start from, and where its leaves live."""
  if not start:
    params = source.load_params(mesh, dtype=jnp.float32)
    shardings = step.state_shardings(jax.eval_shape(lambda: params), tx, mesh)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
    return _state(start, params, opt_state, shardings), shardings
  saved = store.metadata(start)
  changed = [
    f'{name}: was {saved.get(name)!r}, now {value!r}'
    for name, value in position.items()
    if saved.get(name) != value
  ]
  if changed:
    raise common.OutputError(
      f'{config.output_dir} was trained on other data ({"; ".join(changed)}). Choose '
      'another --output_dir, or pass --overwrite to start again.'
    )
  logging.info('Resuming %s after step %d.', config.output_dir, start)
  shapes = param_shapes(source.config, jnp.float32)
  shardings = step.state_shardings(shapes, tx, mesh)
  opt_shapes = jax.eval_shape(tx.init, shapes)
  items = store.restore(
    start,
    {
      'params': _abstract(shapes, shardings.params),
      'opt_state': _abstract(opt_shapes, shardings.opt_state),
    },
  )
  return _state(start, items['params'], items['opt_state'], shardings), shardings


def _state(done: int, params, opt_state, shardings) -> step.TrainState:
  number = jax.device_put(jnp.asarray(done, jnp.int32), shardings.step)
  return step.TrainState(number, params, opt_state)


def _abstract(shapes, shardings):
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def _check_rows(config: Config, mesh: Mesh) -> None:
  rows, shards = config.batch_size // config.grad_accumulation, batch_shards(mesh)
  if rows % shards:
    raise ValueError(
      f'--batch_size={config.batch_size} over --grad_accumulation='
      f'{config.grad_accumulation} gives {rows} rows a micro-batch, which do not '
      f'divide over data*fsdp = {shards} of --mesh={config.mesh}. Choose a batch '
      f'size that is a multiple of {shards * config.grad_accumulation}.'
    )


def _fingerprint(examples: Sequence[Example]) -> str:
  digest = hashlib.sha256()
  for example in examples:
    digest.update(len(example.ids).to_bytes(4, 'big'))
    digest.update(example.ids.tobytes())
    digest.update(example.loss_mask.tobytes())
  return digest.hexdigest()


def _name_records(error, config, examples) -> loop.NonFiniteLossError:
  indices = batch_indices(
    config.seed,
    error.step - 1,
    batch_size=config.batch_size,
    num_records=len(examples),
  )
  error.add_note(
    f'Its records (counted from 0): {", ".join(map(str, indices))}. Lower '
    '--learning_rate, or look at them.'
  )
  return error


def _profile(steps: str, output_dir: Path) -> tuple[int, int, str] | None:
  """`--profile_steps` as `loop.fit` takes it."""
  if not steps:
    return None
  first, _, last = steps.partition(':')
  if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise ValueError(f'--profile_steps={steps}: want FIRST:LAST, as in 10:13.')
  return int(first), int(last), str(output_dir / 'profile')
