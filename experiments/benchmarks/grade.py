r"""Speed and memory of `experiments.grade` on many records.

The records repeat the reference solutions of a problem set, every third one with
another final number. Each figure is measured in a fresh process, start-up included.

  python -m experiments.benchmarks.grade --data=gsm8k:train --data_root=PATH
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from experiments.benchmarks import figures
from mrjax.data.problems import load_problems
from mrjax.records import Record, write_jsonl
from mrjax.runs import cli

_DATA = flags.DEFINE_string('data', 'arithmetic:train?size=2000', 'Problems.')
_DATA_ROOT = flags.DEFINE_string('data_root', None, 'Local copies of data sets.')
_NUM_RECORDS = flags.DEFINE_integer('num_records', 1_000_000, 'Records to grade.')
_RULE = flags.DEFINE_string('rule', 'gsm8k', 'Grading rule.')
_VOTE = flags.DEFINE_string('vote', '', 'Majority vote.')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON Lines file to append to.')

_MEASURE = """
import json, sys, time
from experiments.benchmarks import figures
from mrjax.runs import grade
start = time.perf_counter()
grade.run(grade.Config(**json.loads(sys.argv[1])))
seconds = time.perf_counter() - start
print(json.dumps({'seconds': seconds, 'cpu_seconds': time.process_time(),
                  'peak_memory_mb': figures.peak_memory_mb()}))
"""


def _records() -> Iterator[Record]:
  problems = load_problems(_DATA.value, data_root=_DATA_ROOT.value)
  for number in range(_NUM_RECORDS.value):
    problem = problems[number % len(problems)]
    text = problem.solution or ''
    if number % 3 == 0:
      text = re.sub(r'#### .*', f'#### {number}', text)
    yield {
      'problem_id': problem.id,
      'sample_index': number // len(problems),
      'text': text,
      'gold': problem.answer,
      'finish_reason': 'stop',
      'num_tokens': len(text) // 4,
    }


def main(argv: Sequence[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as name:
    write_jsonl(Path(name) / 'in.jsonl', _records())
    config = {
      'rule': _RULE.value,
      'input': f'{name}/in.jsonl',
      'output': f'{name}/out.jsonl',
      'vote': _VOTE.value,
    }
    start = time.perf_counter()
    done = subprocess.run(
      [sys.executable, '-c', _MEASURE, json.dumps(config)],
      stdout=subprocess.PIPE,
      check=True,
    )
    wall_seconds = time.perf_counter() - start
  measured = json.loads(done.stdout)
  figures.emit(
    'grade',
    _OUTPUT.value,
    rule=_RULE.value,
    vote=_VOTE.value,
    data=_DATA.value,
    num_records=_NUM_RECORDS.value,
    records_per_second=_NUM_RECORDS.value / measured['seconds'],
    wall_seconds=wall_seconds,
    **measured,
  )


if __name__ == '__main__':
  cli.run(main)
