"""What the training commands share: configuration, weights, resumption, the run itself.

A command encodes its records into `TextBatches`, makes a loss from `Setup.decoder`, and
calls `train`:

    setup = training.start(config)
    batches = training.make_batches(config, units)
    training.train(config, setup, batches, loss_fn=make_loss_fn(setup.decoder))
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mrjax.checkpoint.orbax import CheckpointStore
from mrjax.checkpoint.source import ModelSource, resolve_model
from mrjax.data.batches import TextBatches
from mrjax.data.sft import OVERLONG_POLICIES, Example
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.models.decoder import REMAT_POLICIES, Decoder
from mrjax.runs import common, training_state
from mrjax.runs.watch import TrainingWatch
from mrjax.sharding.mesh import batch_shards, make_mesh
from mrjax.sharding.rules import explain_sharding
from mrjax.training import loop, optimizer, step
from mrjax.training.preemption import StopSignal

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config(optimizer.OptimizerConfig):
  """Everything that decides a training run, whatever its loss.

  A command derives its own configuration from it.
  """

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  tokenizer: str = ''  # empty: the model's own
  data: str = ''
  data_root: str = ''  # directory with local copies of named data sets
  prompt_template: str = 'raw'  # layout put around prompts and completions
  output_dir: str = ''
  mesh: str = 'data:1,fsdp:-1,tensor:1'
  dtype: str = 'auto'  # of the computation; what trains is float32
  remat: str = 'none'
  seed: int = 0  # of the data order and of all that is random
  trainable: str = ''  # mask preset, or regex:PATTERN[;PATTERN...]; empty: all
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
  keep_last: int = 1  # checkpoints kept
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
    if self.eval_every and not self.eval_data:
      raise ValueError(f'--eval_every={self.eval_every} needs --eval_data.')
    training_state.mask_rules(self.trainable)
    _profile(self.profile_steps, Path(self.output_dir))


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run has before it has weights or data."""

  mesh: Mesh
  source: ModelSource
  tokenizer: Tokenizer
  decoder: Decoder


# (trainable, frozen) -> metrics; `loss` is what the best checkpoint has least of.
Evaluate = Callable[[PyTree, PyTree], dict[str, float]]


def start(config: Config, *, num_value_outputs: int = 0) -> Setup:
  """Joins the processes of the run and finds its model; nothing is loaded yet.

  Args:
    config: Of the run.
    num_value_outputs: As for `Decoder`.

  Raises:
    MeshError, ValueError: A mesh that does not fit the devices or the batch.
    FileNotFoundError, CheckpointError, ConfigError: See `resolve_model`.
  """
  common.start_processes()
  mesh = make_mesh(config.mesh)
  _check_rows(config, mesh)
  source = resolve_model(config.model)
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  decoder = Decoder(
    source.config,
    dtype=common.resolve_dtype(config.dtype),
    remat=config.remat,
    num_value_outputs=num_value_outputs,
  )
  return Setup(mesh, source, tokenizer, decoder)


def make_batches(
  config: Config,
  units: Sequence[Sequence[Example]],
  *,
  row_length: int = 0,
  labels: Mapping[str, np.ndarray] | None = None,
) -> TextBatches:
  """The batches of a run, as `TextBatches` makes them; logs one line about them.

  Args:
    config: Of the run.
    units: What must stay in one row: one text, or the two of a pair.
    row_length: Tokens of a row; 0 is `max_length`.
    labels: Numbers of each text.
  """
  batches = TextBatches(
    units,
    row_length=row_length or config.max_length,
    batch_size=config.batch_size,
    grad_accumulation=config.grad_accumulation,
    packing=config.packing,
    seed=config.seed,
    labels=labels,
  )
  logging.info('Batches: %s', batches.describe())
  return batches


def make_evaluate(setup: Setup, loss_fn: step.LossFn, batches: TextBatches) -> Evaluate:
  """The mean loss and metrics over all of a data set, without dropout."""
  total = jax.jit(functools.partial(step.evaluate_step, loss_fn=loss_fn))

  def evaluate(trainable: PyTree, frozen: PyTree) -> dict[str, float]:
    sums: dict[str, float] = {}
    for batch in batches.one_epoch():
      found = total(trainable, frozen, loop.shard_batch(batch, setup.mesh))
      for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums.pop('weight')
    return {name: value / weight for name, value in sums.items()}

  return evaluate


def train(
  config: Config,
  setup: Setup,
  batches: TextBatches,
  *,
  loss_fn: step.LossFn,
  evaluate: Evaluate | None = None,
  prepare: Callable[[PyTree], PyTree] | None = None,
  constants: Mapping[str, PyTree] | None = None,
  facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Trains and leaves a run directory.

  A run that was stopped goes on from its last checkpoint, with bit-identical results;
  a finished one is left as it is. SIGTERM ends it after the step it is in, with a
  checkpoint.

  Args:
    config: Of the run; recorded in the output directory.
    setup: What `start` gave.
    batches: Of the training data.
    loss_fn: Its `frozen` holds the weights that do not train, and `constants`.
    evaluate: Run every `eval_every` steps and before each checkpoint; the checkpoint
      with the least `loss` is never deleted.
    prepare: Changes the loaded weights before anything trains, such as by adding a
      value head: a pure function of the parameter tree, used on shapes too.
    constants: Trees beside the weights, by names that no weight begins with. The loss
      takes them out before it merges what is left.
    facts: What else a checkpoint shall say about itself, for JSON.

  Returns:
    `steps` done, `loss` of the last one, `checkpoint` (its directory), `num_records`,
    `tokens_per_second` (padding not counted), `stopped` (whether by SIGTERM), `best`
    (`step` and `loss` of the best checkpoint, where there is an evaluation).
  """
  num_steps = config.num_steps or batches.num_steps(config.num_epochs)
  output_dir = Path(config.output_dir)
  if jax.process_index() == 0:
    common.prepare_output_dir(
      output_dir, _recorded(config), overwrite=config.overwrite, resume=True
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('mrjax output directory')
  with (
    StopSignal() as stop,
    CheckpointStore(
      output_dir,
      hf_dir=setup.source.hf_dir,
      keep_last=config.keep_last,
      keep_every=config.keep_every,
    ) as store,
  ):
    start = store.latest_step() or 0
    if start >= num_steps:
      logging.info('%s is finished: %d steps are done.', output_dir, start)
      return {'steps': start, 'checkpoint': str(store.path(start))}
    schedule = optimizer.make_schedule(config, num_steps)
    tx = optimizer.make_optimizer(config, schedule)
    begun = training_state.begin(
      setup.source,
      setup.mesh,
      tx,
      store,
      start=start,
      rules=training_state.mask_rules(config.trainable),
      position={
        'seed': config.seed,
        'batch_size': config.batch_size,
        'row_length': batches.row_length,
        'num_units': batches.num_units,
        'data_sha256': batches.fingerprint(),
      },
      prepare=prepare,
    )
    if config.explain_sharding:
      print(explain_sharding(begun.state.params, setup.mesh))
    frozen = begun.frozen | dict(constants or {})
    train_step = jax.jit(
      functools.partial(step.train_step, loss_fn=loss_fn, tx=tx, seed=config.seed),
      donate_argnums=0,
      out_shardings=(begun.shardings, None),
    )
    watch = TrainingWatch(
      output_dir,
      start_step=start,
      num_steps=num_steps,
      log_every=config.log_every,
      describe=lambda done: {
        'learning_rate': float(schedule(done - 1)),
        'epoch': batches.epoch(done),
      },
      tensorboard=config.tensorboard,
      wandb=config.wandb_project,
    )
    scores = training_state.Scores(begun.metadata)

    def evaluate_state(done: int, state: step.TrainState) -> None:
      assert evaluate is not None
      metrics = evaluate(state.params, frozen)
      scores.add(done, metrics['loss'])
      watch.evaluated(done, metrics)

    def save(done: int, state: step.TrainState) -> None:
      found = scores.saved(done)
      store.save(
        done,
        {begun.item: state.params, 'opt_state': state.opt_state},
        begun.position | dict(facts or {}) | found,
        keep=[found['best']['step']] if found['best'] else [],
      )

    try:
      done, _ = loop.fit(
        begun.state,
        lambda state, batch: train_step(state, frozen, batch),
        batches,
        mesh=setup.mesh,
        start_step=start,
        num_steps=num_steps,
        on_step=watch,
        save=save,
        save_every=config.save_every,
        evaluate=evaluate_state if evaluate else None,
        eval_every=config.eval_every,
        should_stop=stop.reached,
        profile=_profile(config.profile_steps, output_dir),
      )
    except loop.NonFiniteLossError as error:
      raise _name_records(error, batches) from None
    finally:
      watch.close()
    store.wait()
    if done < num_steps:
      logging.warning(
        'Stopped by SIGTERM after step %d of %d, which is saved. Run the same command '
        'to go on.',
        done,
        num_steps,
      )
    return watch.summary() | {
      'num_records': batches.num_units,
      'checkpoint': str(store.path(done)),
      'stopped': done < num_steps,
      'best': scores.best,
    }


def _recorded(config: Config) -> Config:
  """The configuration but for what may change when a run goes on."""
  return dataclasses.replace(
    config,
    resume_step=0,
    profile_steps='',
    explain_sharding=False,
    dry_run=False,
    overwrite=False,
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


def _name_records(
  error: loop.NonFiniteLossError, batches: TextBatches
) -> loop.NonFiniteLossError:
  error.add_note(
    f'Its records: {", ".join(batches.names(error.step - 1))}. Lower '
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
