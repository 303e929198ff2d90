"""The main job: evaluate, sample, select, fine-tune, evaluate, export, report."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mrjax.checkpoint.source import resolve_model
from mrjax.runs import collect, common, convert, evaluate, grade, report, sample, sft

_MESH = 'data:1,fsdp:-1,tensor:1'


@dataclasses.dataclass(frozen=True)
class Config:
  model: str = 'tiny-1m'
  train_data: str = 'arithmetic:train?size=1000'
  test_data: str = 'arithmetic:test'
  data_root: str = ''  # directory with local copies of named data sets
  prompt_template: str = 'qa'
  num_samples: int = 8  # a training problem
  temperature: float = 0.7  # of those samples; evaluations are greedy
  max_new_tokens: int = 256
  num_epochs: float = 1.0
  learning_rate: float = 2e-4
  batch_size: int = 32  # texts an optimizer step
  max_length: int = 512  # tokens of a training text
  mesh: str = _MESH  # of training; sampling keeps one copy of the model a device
  dtype: str = 'auto'
  seed: int = 0
  output_dir: str = 'outputs/quickstart'
  overwrite: bool = False


def run(config: Config) -> dict[str, Any]:
  """Runs all stages. One that was stopped goes on, a finished one is not repeated.

  Returns:
    `before` and `after` (metrics of the evaluations), `selection` (statistics),
    `training` (summary), `seconds` by stage, `hf_dir` and `report` (paths).
  """
  sampling: dict[str, Any] = {
    'data_root': config.data_root,
    'prompt_template': config.prompt_template,
    'max_new_tokens': config.max_new_tokens,
    'dtype': config.dtype,
    'seed': config.seed,
  }
  to_train_on = sample.Config(
    model=config.model,
    data=config.train_data,
    output_dir=str(Path(config.output_dir) / 'samples'),
    num_samples=config.num_samples,
    temperature=config.temperature,
    **sampling,
  )
  was_split = sample.split_cpu(to_train_on, resolve_model(config.model))
  common.start_processes()
  output_dir = common.prepare_output_dir(
    config.output_dir, config, overwrite=config.overwrite, resume=True
  )
  # One CPU device trains on all cores.
  one_trains = was_split and jax.default_backend() == 'cpu'
  training_devices = jax.devices()[:1] if one_trains else None
  at = lambda name: str(output_dir / name)
  seconds: dict[str, float] = {}

  def stage(title: str, fn: Callable[[], Any]) -> Any:
    logging.info('--- %s ---', title)
    start = time.perf_counter()
    result = fn()
    seconds[title] = time.perf_counter() - start
    return result

  def evaluation(model: str, name: str) -> dict[str, Any]:
    return evaluate.run(
      evaluate.Config(
        model=model, data=config.test_data, output_dir=at(name), **sampling
      )
    )

  before = stage('evaluate', lambda: evaluation(config.model, 'before'))
  stage('sample', lambda: sample.run(to_train_on))
  selection = stage('select', lambda: _select(config, output_dir, before['rule']))
  training = stage(
    'fine-tune',
    lambda: sft.run(
      sft.Config(
        model=config.model,
        data=at('rft.jsonl'),
        output_dir=at('sft'),
        mesh=config.mesh,
        dtype=config.dtype,
        seed=config.seed,
        max_length=config.max_length,
        overlong='drop',
        packing=False,  # batch_size counts texts
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        warmup_ratio=0.05,
      ),
      devices=training_devices,
    ),
  )
  after = stage('evaluate again', lambda: evaluation(at('sft'), 'after'))
  stage(
    'export',
    lambda: convert.export_hf(
      convert.ExportConfig(checkpoint=at('sft'), output_dir=at('hf'), overwrite=True)
    ),
  )
  runs = {'before': 'before', 'after': 'after', 'train samples': 'graded', 'sft': 'sft'}
  stage(
    'report',
    lambda: report.run(
      report.Config(
        runs=','.join(f'{name}={at(path)}' for name, path in runs.items()),
        output=at('report.html'),
        title=f'mrjax quickstart: {config.model}',
      )
    ),
  )
  return {
    'before': before,
    'after': after,
    'selection': selection,
    'training': training,
    'seconds': seconds,
    'hf_dir': at('hf'),
    'report': at('report.html'),
  }


def _select(config: Config, output_dir: Path, rule: str) -> dict[str, Any]:
  """Grades the samples for the report, and writes the SFT records of RFT."""
  graded = output_dir / 'graded'
  graded.mkdir(exist_ok=True)
  shutil.copyfile(output_dir / 'samples' / 'config.json', graded / 'config.json')
  grade.run(
    grade.Config(
      rule=rule,
      input=str(output_dir / 'samples'),
      output=str(graded / 'graded.jsonl'),
      metrics=str(graded / 'metrics.json'),
      vote='string_first',
      problems=config.train_data,
      data_root=config.data_root,
      seed=config.seed,
      overwrite=True,
    )
  )
  return collect.run(
    collect.Config(
      problems=config.train_data,
      samples=str(output_dir / 'samples'),
      output=str(output_dir / 'rft.jsonl'),
      stats=str(output_dir / 'rft_statistics.json'),
      prompt_template=config.prompt_template,
      tokenizer=(
        str(resolve_model(config.model).hf_dir)
        if config.prompt_template == 'chat'
        else ''
      ),
      data_root=config.data_root,
      overwrite=True,
    )
  )
