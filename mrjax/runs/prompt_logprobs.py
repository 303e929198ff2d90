"""Log-probabilities of prompts, computed as the rows that want them come."""

import itertools
from collections import Counter
from collections.abc import Sequence

from mrjax.sampling.engine import Engine
from mrjax.sampling.plan import text_bucket
from mrjax.sampling.requests import Request
from mrjax.sharding.mesh import batch_shards

_PROMPTS_A_SHARD = 8  # that are read at once


class PromptLogprobs:
  """Those of the prompts of requests, each read once and kept while rows are to come.

  Prompts are read in batches of one shape for each power of two of their lengths, in
  the order in which the engine serves them. So few are held, few programs are compiled,
  and which prompts share a batch hardly changes a number.
  """

  def __init__(self, engine: Engine, requests: Sequence[Request]):
    self._engine = engine
    self._size = min(engine.max_batch, _PROMPTS_A_SHARD * batch_shards(engine.mesh))
    self._rows_left: Counter[str] = Counter()
    for request in requests:
      self._rows_left[request.problem_id] += request.num_samples
    prompts = {request.problem_id: request.prompt_ids for request in requests}
    bucket = lambda item: text_bucket(len(item[1]))
    ordered = sorted(prompts.items(), key=lambda item: -len(item[1]))
    self._batches = {
      name: batch
      for _, group in itertools.groupby(ordered, key=bucket)
      for batch in _batched(dict(group), self._size)
      for name in batch
    }
    self._known: dict[str, list[float | None]] = {}

  def of_row(self, problem_id: str) -> list[float | None]:
    """log p(token | tokens before it) of each token of a row's prompt, in nats.

    The first is None: nothing predicts it. To be asked for once a row.
    """
    if problem_id not in self._known:
      batch = self._batches[problem_id]
      texts = list(batch.values())
      texts += texts[:1] * (self._size - len(texts))
      for name, logps_T in zip(batch, self._engine.score(texts)):
        self._known[name] = [None, *logps_T[1:].tolist()]
        del self._batches[name]
    found = self._known[problem_id]
    self._rows_left[problem_id] -= 1
    if not self._rows_left[problem_id]:
      del self._known[problem_id]
    return found


def _batched(
  prompts: dict[str, tuple[int, ...]], size: int
) -> list[dict[str, tuple[int, ...]]]:
  names = list(prompts)
  return [
    {name: prompts[name] for name in names[start : start + size]}
    for start in range(0, len(names), size)
  ]
