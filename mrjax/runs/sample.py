"""Samples completions of problems into `samples-*-of-*.jsonl`, resumably by row."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mrjax.checkpoint.adapted import AdaptedModel, resolve_adapted
from mrjax.checkpoint.source import ModelSource
from mrjax.data.problems import load_problems
from mrjax.data.prompts import render_prompt
from mrjax.data.tokenization import Tokenizer, load_tokenizer
from mrjax.records import JsonlAppender, Record
from mrjax.runs import common, machine
from mrjax.runs.guide import GuideSource, resolve_guide
from mrjax.runs.metrics_log import MetricsLog
from mrjax.runs.progress import Progress
from mrjax.runs.prompt_logprobs import PromptLogprobs
from mrjax.runs.sample_shard import (
  Totals,
  check_shards,
  missing_requests,
  only_writer,
)
from mrjax.runs.sampling_memory import rows_at_once
from mrjax.runs.stops import StopStrings
from mrjax.runs.value_model import resolve_value_model
from mrjax.sampling.drawing import Models
from mrjax.sampling.engine import Engine, check_mesh
from mrjax.sampling.guidance import to_paper_eta
from mrjax.sampling.requests import Completion, Request, SamplingParams, fit_requests
from mrjax.sharding.mesh import batch_shards, make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
  """One sampling run; all but `mesh` and `max_batch` decide what its rows are."""

  model: str = ''  # embedded name, HF directory, hub id or mrjax checkpoint
  adapter: str = ''  # PEFT directory, mrjax adapter or run; empty: none
  tokenizer: str = ''  # empty: the model's own
  data: str = ''  # problems, NAME:SPLIT
  data_root: str = ''  # directory with local copies of named data sets
  prompt_template: str = 'raw'
  output_dir: str = ''
  mesh: str = 'data:-1,fsdp:1,tensor:1'  # of the devices of each process
  dtype: str = 'auto'  # of weights, computation and cache
  cache_dtype: str = 'auto'  # of keys and values, also int8; auto: as `dtype`
  seed: int = 0
  num_samples: int = 1  # a problem
  temperature: float = 1.0  # 0 is greedy
  top_p: float = 1.0
  top_k: int = 0  # 0 keeps all
  min_p: float = 0.0
  repetition_penalty: float = 1.0  # above 1, tokens seen are less likely
  guide: str = ''  # value model, a run of train_value; empty: none
  eta: float = 0.0  # strength of guidance
  guidance_mode: str = ''  # see GuidanceConfig; empty takes the one of the value model
  guidance_top_k: int = 20  # candidates that the guide is asked about; -1: all tokens
  cd_baseline: bool = False  # controlled decoding in place of Q#
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()  # strings that end a completion, beside EOS
  max_batch: int = 256  # rows that run together; 0: as many as memory allows
  limit: int = 0  # problems; 0 takes all
  logprobs: bool = False  # also write those of every token, and what a guide says
  prompt_logprobs: bool = False  # also write those of every token of the prompt
  truncate_prompts: bool = False  # cut long prompts at their start, not refuse them
  overwrite: bool = False

  def __post_init__(self):
    for name in ('model', 'data', 'output_dir'):
      if not getattr(self, name):
        raise ValueError(f'--{name} is empty; it must be given.')
    if self.num_samples < 1:
      raise ValueError(f'--num_samples={self.num_samples}: want at least 1.')
    if self.max_batch < 0:
      raise ValueError(f'--max_batch={self.max_batch}: want at least 1, or 0 for auto.')
    if self.limit < 0:
      raise ValueError(f'--limit={self.limit}: want at least 0 (0 takes all).')
    if not all(self.stop):
      raise ValueError('--stop holds an empty string, which would end every row.')
    if not self.guide:
      for name in ('eta', 'guidance_mode', 'cd_baseline'):
        if getattr(self, name):
          raise ValueError(
            f'--{name}={getattr(self, name)} without a value model to guide by: give '
            f'one with --guide, or leave --{name} out.'
          )
    self.sampling_params(())

  def sampling_params(self, stop_ids: Sequence[int]) -> SamplingParams:
    return SamplingParams(
      temperature=self.temperature,
      top_p=self.top_p,
      top_k=self.top_k,
      min_p=self.min_p,
      repetition_penalty=self.repetition_penalty,
      eta=self.eta,
      max_new_tokens=self.max_new_tokens,
      seed=self.seed,
      stop_ids=tuple(stop_ids),
    )


def run(config: Config) -> dict[str, Any]:
  """Samples what is not there yet and returns a summary of all rows.

  Several processes share the problems; each has a copy of the model on its own devices
  and writes its own shard. A run that was stopped goes on where it was, whatever its
  mesh and `max_batch` were; a finished one is left as it is.

  Returns:
    `output_dir`, `num_problems`, `num_rows`, `num_new_rows`, `num_tokens` (of all
    rows), `mean_tokens`, `truncated` (share of rows cut by `max_new_tokens`), `errors`
    (rows ended by logits that were not finite), with a guide `mean_kl` (of rows, in
    nats, from the model to what was drawn from) and, of the new rows,
    `tokens_per_second`, `utilisation` (share of what the lanes did that gave tokens),
    `num_programs` and `compile_seconds`.

  Raises:
    ValueError: What is asked cannot be done; before weights are loaded.
    OutputError: `output_dir` belongs to something else.
  """
  model = resolve_adapted(config.model, config.adapter)
  source = model.source
  tokenizer = load_tokenizer(config.tokenizer or str(source.hf_dir))
  tokenizer.check_fits(source.config.vocab_size)
  stops = StopStrings(config.stop, tokenizer) if config.stop else None
  guide = None
  max_length = source.config.max_positions
  if config.guide:
    guide = resolve_guide(
      config.guide,
      guided=source.config,
      tokenizer=tokenizer,
      mode=config.guidance_mode,
      top_k=config.guidance_top_k,
      cd_baseline=config.cd_baseline,
    )
    max_length = min(max_length, guide.source.config.max_positions)
    if config.eta:
      logging.info(
        'Guided with eta %g, in the convention of the paper %g.',
        config.eta,
        to_paper_eta(config.eta),
      )
    else:
      logging.warning('--eta is 0: --guide guides no row.')
  requests = fit_requests(
    make_requests(config, tokenizer),
    source.config,
    max_length=max_length,
    truncate_prompts=config.truncate_prompts,
  )
  split_cpu(config, source)
  common.start_processes()
  mesh = make_mesh(config.mesh, jax.local_devices())
  least = config.max_batch or batch_shards(mesh)
  check_mesh(source.config, mesh, max_batch=least)
  if guide:
    check_mesh(guide.source.config, mesh, max_batch=least)
  process, count = jax.process_index(), jax.process_count()
  dtype = common.resolve_dtype(config.dtype)
  own = requests[process::count]
  max_batch = rows_at_once(
    Models.make(
      source.config, guide.without_weights() if guide else None, mesh, dtype=dtype
    ),
    mesh,
    own,
    cache_dtype=dtype if config.cache_dtype == 'auto' else config.cache_dtype,
    max_batch=config.max_batch,
    may_stop=stops is not None,
  )
  facts = model.adapter_facts(mesh)
  if process == 0:
    common.prepare_output_dir(
      config.output_dir, config, facts=facts, overwrite=config.overwrite, resume=True
    )
  if count > 1:
    multihost_utils.sync_global_devices('mrjax output directory')
  shard = Path(config.output_dir) / f'samples-{process:05d}-of-{count:05d}.jsonl'
  check_shards(shard, count)
  with only_writer(shard), JsonlAppender(shard) as appender:
    return _run_shard(
      dataclasses.replace(config, max_batch=max_batch),
      model,
      guide,
      mesh,
      tokenizer,
      stops,
      own,
      appender,
    )


def split_cpu(config: Config, source: ModelSource) -> bool:
  """`machine.split_cpu` for a sampling run of a model; only the first one counts."""
  dtype = jnp.bfloat16 if config.dtype == 'bfloat16' else jnp.float32
  sources = [source]
  if config.guide:
    sources.append(resolve_value_model(config.guide))
  return machine.split_cpu(
    [source.param_shapes(dtype) for source in sources],
    mesh=config.mesh,
    max_batch=config.max_batch or machine.num_cores(),
  )


def make_requests(config: Config, tokenizer: Tokenizer) -> list[Request]:
  """One request for each problem of `config.data`, its prompt rendered and encoded."""
  params = config.sampling_params(tokenizer.eos_ids)
  requests = []
  for problem in load_problems(
    config.data, data_root=config.data_root or None, limit=config.limit or None
  ):
    prompt = render_prompt(config.prompt_template, problem, tokenizer=tokenizer)
    ids = tokenizer.encode_prompt(prompt.text, add_bos=prompt.add_bos)
    requests.append(Request(problem.id, tuple(ids), config.num_samples, params))
  return requests


def _run_shard(
  config: Config,
  model: AdaptedModel,
  guide: GuideSource | None,
  mesh: Mesh,
  tokenizer: Tokenizer,
  stops: StopStrings | None,
  requests: Sequence[Request],
  appender: JsonlAppender,
) -> dict[str, Any]:
  totals = Totals()
  missing = list(missing_requests(requests, appender.path, totals))
  num_old = totals.rows
  summary: dict[str, Any] = {}
  if missing:
    dtype = common.resolve_dtype(config.dtype)
    engine = Engine(
      model.source.config,
      model.load_params(mesh, dtype),
      mesh,
      dtype=dtype,
      cache_dtype=None if config.cache_dtype == 'auto' else config.cache_dtype,
      max_batch=config.max_batch,
      donate_params=True,
      guide=guide.load(mesh, dtype) if guide else None,
    )
    speed = _sample(config, engine, tokenizer, stops, missing, appender, totals)
    summary = {
      'tokens_per_second': speed,
      'utilisation': engine.utilisation.share,
      'num_programs': engine.compiled.count,
      'compile_seconds': engine.compiled.seconds,
    }
  else:
    logging.info('%s is finished: all %d rows are there.', appender.path, num_old)
  return {
    'output_dir': config.output_dir,
    'num_problems': len(requests),
    'num_rows': totals.rows,
    'num_new_rows': totals.rows - num_old,
    'num_tokens': totals.tokens,
    'mean_tokens': totals.tokens / max(totals.rows, 1),
    'truncated': totals.truncated / max(totals.rows, 1),
    'errors': totals.errors,
    **({'mean_kl': totals.kl / max(totals.rows, 1)} if guide else {}),
  } | summary


def _sample(
  config: Config,
  engine: Engine,
  tokenizer: Tokenizer,
  stops: StopStrings | None,
  requests: Sequence[Request],
  appender: JsonlAppender,
  totals: Totals,
) -> float:
  """Appends the rows of `requests` as they come; returns tokens a second."""
  prompts = {request.problem_id: request.prompt_ids for request in requests}
  batches = engine.generate_batches(
    requests, should_stop=stops.num_tokens_to_keep if stops else None
  )
  prompt_logprobs = PromptLogprobs(engine, requests) if config.prompt_logprobs else None
  num_left = sum(request.num_samples for request in requests)
  first = jax.process_index() == 0
  log = MetricsLog(Path(config.output_dir)) if first else None
  with Progress(
    'sample', total=totals.rows + num_left, done=totals.rows, shown=first
  ) as progress:
    for completions in batches:
      records = []
      for completion in completions:
        prompt_ids = prompts[completion.problem_id]
        text = tokenizer.decode_continuation(prompt_ids, completion.token_ids)
        text = stops.cut(text) if stops else text
        record = _record(completion, text, logprobs=config.logprobs)
        if prompt_logprobs:
          record['prompt_logprobs'] = prompt_logprobs.of_row(completion.problem_id)
        records.append(record)
      appender.append(records)
      for record in records:
        totals.add(record)
      num_tokens = sum(record['num_tokens'] for record in records)
      progress.add(
        rows=len(records),
        tokens=num_tokens,
        compile_seconds=engine.compiled.seconds,
      )
      if log:
        log.write(
          totals.rows,
          {
            'tokens_per_second': progress.tokens_per_second,
            'mean_tokens': totals.tokens / totals.rows,
            'truncated': totals.truncated / totals.rows,
            'utilisation': engine.utilisation.share,
            'compile_seconds': engine.compiled.seconds,
          },
        )
  if log:
    log.close()
  logging.info(
    'Compiled %d programs in %.1f s. %.1f%% of what lanes did gave tokens; the cache '
    'took %.3f GB.',
    engine.compiled.count,
    engine.compiled.seconds,
    100 * engine.utilisation.share,
    engine.cache_bytes / 1e9,
  )
  if totals.errors:
    logging.warning(
      '%d of %d rows ended with finish_reason "error": the model gave logits that are '
      'not finite. Check its weights, or use --dtype=float32.',
      totals.errors,
      totals.rows,
    )
  return progress.tokens_per_second


def _record(completion: Completion, text: str, *, logprobs: bool) -> Record:
  record: Record = {
    'problem_id': completion.problem_id,
    'sample_index': completion.sample_index,
    'text': text,
    'token_ids': completion.token_ids,
    'finish_reason': completion.finish_reason,
    'logprob_sum': float(np.sum(completion.logprobs, dtype=np.float64)),
    'num_tokens': completion.num_tokens,
    'seed': completion.seed,
  }
  if logprobs:
    record['logprobs'] = completion.logprobs
    record['sampling_logprobs'] = completion.sampling_logprobs
  if completion.kls is not None:
    record['kl_sum'] = float(np.sum(completion.kls, dtype=np.float64))
    if logprobs:
      record['kl'] = completion.kls
      record['values'] = completion.values
  return record
