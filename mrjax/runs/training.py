"""What the training commands share: configuration, weights, resumption, the run itself.

A command encodes its records into `TextBatches`, makes a loss from `Setup.decoder`, and
calls `train`:

    setup = training.start(config)
    plan = training.make_plan(config, setup)
    batches = training.make_batches(config, units)
    loss_fn = make_loss_fn(setup.decoder)
    training.train(config, setup, batches, plan=plan, loss_fn=loss_fn)

What is wrong with flags, directories and shapes is found before any data are read.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mrjax.checkpoint.store import CheckpointStore, set_aside
from mrjax.data.batches import TextBatches
from mrjax.data.sft import Example
from mrjax.lora import masks
from mrjax.runs import common, dry_run, training_state
from mrjax.runs.training_config import Config
from mrjax.runs.training_output import is_finished as is_finished
from mrjax.runs.training_output import prepare_output as prepare_output
from mrjax.runs.training_setup import Setup
from mrjax.runs.training_setup import make_plan as make_plan
from mrjax.runs.training_setup import start as start  # commands call training.start
from mrjax.runs.watch import TrainingWatch
from mrjax.runs.weight_plan import WeightPlan
from mrjax.sharding.rules import explain_sharding
from mrjax.training import flops, loop, optimizer, step
from mrjax.training.preemption import StopSignal

PyTree = Any
_NAMES_SHOWN = 16


# (trainable, frozen) -> metrics; `loss` is what the best checkpoint has least of.
Evaluate = Callable[[PyTree, PyTree], dict[str, float]]


def make_batches(
  config: Config,
  units: Sequence[Sequence[Example]],
  *,
  row_length: int = 0,
  labels: Mapping[str, np.ndarray] | None = None,
  make: Callable[..., TextBatches] = TextBatches,
) -> TextBatches:
  """The batches of a run, as `TextBatches` makes them; logs one line about them.

  Args:
    config: Of the run.
    units: What must stay in one row: one text, or the two of a pair.
    row_length: Tokens of a row; 0 is `max_length`.
    labels: Numbers of each text.
    make: `TextBatches`, or what takes the same arguments.
  """
  batches = make(
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


def make_evaluate(
  setup: Setup,
  loss_fn: step.LossFn,
  batches: TextBatches,
  *,
  evaluate_step: Callable[..., dict[str, jax.Array]] = step.evaluate_step,
) -> Evaluate:
  """The mean loss and metrics over all of a data set, without dropout.

  Args:
    setup: Of the run.
    loss_fn: See `step.LossFn`.
    batches: Of the data set.
    evaluate_step: `step.evaluate_step`, or what takes the same arguments.
  """
  total = jax.jit(functools.partial(evaluate_step, loss_fn=loss_fn))

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
  plan: WeightPlan,
  loss_fn: step.LossFn,
  weight: str = 'supervised_tokens',
  train_step: Callable[..., tuple[step.TrainState, dict]] = step.train_step,
  evaluate: Evaluate | None = None,
  constants: Mapping[str, PyTree] | None = None,
  facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Trains and leaves a run directory.

  A run that was stopped goes on from its last checkpoint, with bit-identical results;
  a finished one is left as it is, after a look whether its weights are whole. SIGTERM
  ends it after the step it is in, with a checkpoint.

  Args:
    config: Of the run; recorded in the output directory.
    setup: What `start` gave.
    batches: Of the training data.
    plan: What `make_plan` gave.
    loss_fn: Its `frozen` holds the weights that do not train, and `constants`.
    weight: What `metrics.jsonl` calls the weight of the loss.
    train_step: `step.train_step`, or what takes the same arguments.
    evaluate: Run every `eval_every` steps and before each checkpoint; the checkpoint
      with the least `loss` is never deleted.
    constants: Trees beside the weights, by names that no weight begins with. The loss
      takes them out before it merges what is left.
    facts: What else a checkpoint shall say about itself, for JSON.

  Returns:
    `steps` done, `loss` of the last one, `checkpoint` (its directory), `num_records`,
    `tokens_per_second` (padding not counted), `stopped` (whether by SIGTERM), `best`
    (`step` and `loss` of the best checkpoint, where there is an evaluation). With
    `dry_run`, what `dry_run.dry_run` found.
  """
  num_steps = config.num_steps or batches.num_steps(config.num_epochs)
  config.check_profile(num_steps)
  if batches.batch_size > batches.num_rows:
    logging.warning(
      'A batch of %d rows holds the data %.1f times; an epoch has %d rows. Lower '
      '--batch_size, or --max_length where rows are packed.',
      batches.batch_size,
      batches.epoch(1),
      batches.num_rows,
    )
  schedule = optimizer.make_schedule(config, num_steps)
  tx = optimizer.make_optimizer(config, schedule)
  constants = dict(constants or {})

  def jit_step(shardings: step.TrainState):
    return jax.jit(
      functools.partial(train_step, loss_fn=loss_fn, tx=tx, seed=config.seed),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )

  if config.explain_sharding:
    print(explain_sharding(masks.merge(plan.trainable, plan.frozen), setup.mesh))
  if config.dry_run:
    return dry_run.dry_run(plan, setup.mesh, tx, jit_step, batches, constants)
  output_dir = prepare_output(config)
  if config.resume_step:  # once: the same command goes on from its own checkpoints
    set_aside(output_dir, after=config.resume_step)
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
      training_state.check_finished(plan, setup.mesh, store, start)
      logging.info('%s is finished: %d steps are done.', output_dir, start)
      return {'steps': start, 'checkpoint': str(store.path(start))}
    position = {
      'seed': config.seed,
      'batch_size': config.batch_size,
      'row_length': batches.row_length,
      'num_units': batches.num_units,
      'data_sha256': batches.fingerprint(),
    }
    if start:
      logging.info('Resuming %s after step %d.', output_dir, start)
      if config.profiled and config.profiled[0] < start:
        logging.warning('--profile_steps=%s is done before.', config.profile_steps)
      if config.resume_step not in (0, start):
        logging.info(
          '--resume_step=%d was followed before; %s has what it set aside.',
          config.resume_step,
          output_dir / 'set_aside',
        )
    begun = training_state.begin(
      plan, setup.mesh, tx, store, start=start, position=position, seed=config.seed
    )
    frozen = begun.frozen | constants
    jitted = jit_step(jax.tree.map(lambda x: x.sharding, begun.state))
    peak = flops.peak_flops(setup.mesh.devices.flat[0])
    watch = TrainingWatch(
      output_dir,
      start_step=start,
      num_steps=num_steps,
      log_every=config.log_every,
      describe=lambda done: {
        'learning_rate': float(schedule(done - 1)),
        'epoch': batches.epoch(done),
      },
      flops=plan.flops,
      # What devices reach in float32 is another number.
      peak=peak * setup.mesh.size
      if peak and np.dtype(setup.decoder.dtype).name == 'bfloat16'
      else None,
      weight=weight,
      tensorboard=config.tensorboard,
      wandb=config.wandb_project,
    )
    scores = training_state.Scores(begun.metadata)

    def evaluate_state(done: int, state: step.TrainState) -> None:
      assert evaluate is not None
      metrics = evaluate(state.params, frozen)
      loop.check_evaluation(done, metrics)
      scores.add(done, metrics['loss'])
      watch.evaluated(done, metrics)

    def save(done: int, state: step.TrainState) -> None:
      found = scores.saved(done)
      store.save(
        done,
        {plan.item: state.params, 'opt_state': state.opt_state},
        begun.position | dict(facts or {}) | found,
        keep=[found['best']['step']] if found['best'] else [],
      )

    try:
      done, _ = loop.fit(
        begun.state,
        lambda state, batch: jitted(state, frozen, batch),
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
        profile=(*config.profiled, str(output_dir / 'profile'))
        if config.profiled
        else None,
      )
    except loop.NonFiniteLossError as error:
      raise _name_records(error, batches, output_dir) from None
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


def _name_records(
  error: loop.NonFiniteLossError, batches: TextBatches, output_dir: Path
) -> loop.NonFiniteLossError:
  """The error with the first records of its step; all of them go to a file."""
  names = batches.names(error.step - 1)
  path = output_dir / 'non_finite.json'
  if jax.process_index() == 0:
    common.write_json(path, {'step': error.step, 'records': names})
  error.add_note(
    f'Its records: {", ".join(names[:_NAMES_SHOWN])}'
    f'{f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""}; '
    f'{path} has all of them. Lower --learning_rate, or look at them; a changed '
    'command needs another --output_dir, or --overwrite to begin anew.'
  )
  return error
