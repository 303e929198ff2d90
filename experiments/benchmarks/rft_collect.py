r"""Time and memory of `experiments.rft.collect` at the size of the paper.

The samples repeat the reference solutions of a problem set with changes: other words,
other equations (some six paths a question), four in ten with a wrong answer. Samples of
a question lie scattered over eight shards. The selection runs in a fresh process.

  python -m experiments.benchmarks.rft_collect --data=gsm8k:train --data_root=PATH
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.benchmarks import figures
from mrjax.data.problems import Problem, load_problems
from mrjax.records import Record, write_jsonl
from mrjax.runs import cli

_DATA = flags.DEFINE_string('data', 'arithmetic:train?size=2000', 'Problems.')
_DATA_ROOT = flags.DEFINE_string('data_root', None, 'Local copies of data sets.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 100, 'Samples of every problem.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')

_NUM_SHARDS = 8
_MEASURE = """
import json, sys, time
from experiments.benchmarks import figures
from mrjax.runs import collect
start = time.perf_counter()
summary = collect.run(collect.Config(**json.loads(sys.argv[1])))
print(json.dumps({
  'seconds': time.perf_counter() - start,
  'cpu_seconds': time.process_time(),
  'peak_memory_mb': figures.peak_memory_mb(),
  **{name: summary[name] for name in (
    'num_questions', 'num_samples', 'num_correct', 'paths_per_question')},
}))
"""


def change(solution: str, rng: random.Random) -> str:
  """Returns a solution with other words, maybe other equations or another answer."""
  words = [
    rng.choice(('so', 'then', 'now', 'which is', 'that')) + ' ' + word
    if word.isalpha() and rng.random() < 0.15
    else word
    for word in solution.split(' ')
  ]
  text = ' '.join(words)
  path = min(int(rng.expovariate(0.5)), 12)  # path 0, the solution's own, is common
  if path:
    text = f'Start with <<{path}*1={path}>>{path}.\n{text}'
  if rng.random() < 0.4:
    text = re.sub(r'#### .*', f'#### {rng.randrange(1000)}.5', text)
  return text


def _samples(problems: Sequence[Problem], places: np.ndarray) -> Iterator[Record]:
  for place in places.tolist():
    number, index = divmod(place, _NUM_SAMPLES.value)
    rng = random.Random(place)
    text = change(problems[number].solution or '', rng)
    yield {
      'problem_id': problems[number].id,
      'sample_index': index,
      'text': text,
      'token_ids': [ord(character) for character in text[::3]],
      'finish_reason': 'stop',
      'num_tokens': len(text) // 3,
      'seed': 0,
    }


def main(argv: Sequence[str]) -> None:
  del argv
  problems = load_problems(_DATA.value, data_root=_DATA_ROOT.value)
  places = np.random.default_rng(0).permutation(len(problems) * _NUM_SAMPLES.value)
  with tempfile.TemporaryDirectory() as name:
    for shard in range(_NUM_SHARDS):
      file = Path(name) / 'samples' / f'samples-{shard:05d}-of-{_NUM_SHARDS:05d}.jsonl'
      write_jsonl(file, _samples(problems, places[shard::_NUM_SHARDS]))
    config = {
      'problems': _DATA.value,
      'data_root': _DATA_ROOT.value,
      'samples': f'{name}/samples',
      'output': f'{name}/out.jsonl',
    }
    done = subprocess.run(
      [sys.executable, '-c', _MEASURE, json.dumps(config)],
      stdout=subprocess.PIPE,
      check=True,
    )
  figures.emit(
    'rft_collect', _OUTPUT.value, data=_DATA.value, **json.loads(done.stdout)
  )


if __name__ == '__main__':
  cli.run(main)
