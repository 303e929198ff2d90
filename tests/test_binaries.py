"""Every binary explains itself at once, has the flags it promises, refuses others."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Programs of other projects in environments of their own, run by our benchmarks.
PEERS = 'peer_'

# Flags that scripts may rely on: they are neither renamed nor dropped.
RUN_FLAGS = 'model tokenizer mesh data data_root prompt_template output_dir seed dtype'
SAMPLING_FLAGS = 'num_samples temperature top_p top_k min_p max_new_tokens stop'
TRAINING_FLAGS = (
  'learning_rate num_epochs batch_size grad_accumulation max_length packing lora_rank '
  'quantize adapter trainable eval_data save_every resume_step dry_run overwrite '
  'profile_steps explain_sharding'
)
PROMISED = {
  'checkpoints_conversion.fold_adapter': 'adapter model output_dir',
  'checkpoints_conversion.hf_to_orbax': 'hf_dir output_dir',
  'checkpoints_conversion.orbax_to_hf': 'checkpoint output_dir',
  'checkpoints_conversion.orbax_to_peft': 'checkpoint output_dir',
  'checkpoints_conversion.peft_to_orbax': 'model peft_dir output_dir',
  'checkpoints_conversion.verify': 'hf_dir checkpoint',
  'experiments.evaluate': f'{RUN_FLAGS} {SAMPLING_FLAGS} adapter rule overwrite',
  'experiments.grade': 'rule input output metrics vote',
  'experiments.quickstart': 'model output_dir',
  'experiments.report': 'runs output',
  'experiments.rft.collect': (
    'problems samples output stats dedup calculator_check include_human'
  ),
  'experiments.sample': f'{RUN_FLAGS} {SAMPLING_FLAGS} adapter overwrite',
  'experiments.score': 'model adapter input output',
  'experiments.train_preference': (
    f'{RUN_FLAGS} {TRAINING_FLAGS} loss beta reference reference_model equal_pairs'
  ),
  'experiments.train_sft': f'{RUN_FLAGS} {TRAINING_FLAGS}',
  'experiments.train_value': (
    f'{RUN_FLAGS} {TRAINING_FLAGS} classifier_type loss_type num_atoms init_mode'
  ),
}
TEXT_ONLY = ('experiments.grade', 'experiments.report', 'experiments.rft.collect')


def find_binaries() -> list[str]:
  return sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for top in ('experiments', 'checkpoints_conversion')
    for path in (ROOT / top).rglob('*.py')
    if "if __name__ == '__main__'" in path.read_text(encoding='utf-8')
    and not path.name.startswith(PEERS)
  )


def run_binary(module: str, *args: str) -> tuple[subprocess.CompletedProcess, float]:
  """The finished process, and the seconds of CPU it took (not of a busy clock)."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  result = subprocess.run(
    [sys.executable, '-m', module, *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return result, seconds


def test_every_promised_command_is_there():
  assert set(PROMISED) <= set(find_binaries())


@pytest.mark.parametrize('module', find_binaries())
def test_help_is_quick_and_lists_the_promised_flags(module):
  result, seconds = run_binary(module, '--help')
  assert f'{module.split(".")[-1]}.py:' in result.stdout, result.stderr
  assert result.returncode == 0
  assert 'Traceback' not in result.stderr
  # On an idle core: a tenth of a second, or one with jax.
  assert seconds < (1.5 if module in TEXT_ONLY else 8)
  flags = set()
  for line in result.stdout.splitlines():
    if line.startswith('  --'):
      flags.add(line.strip().removeprefix('--').removeprefix('[no]').split(':')[0])
  missing = set(PROMISED.get(module, '').split()) - flags
  assert not missing


@pytest.mark.parametrize('module', find_binaries())
def test_an_unknown_flag_is_refused_by_name(module):
  result, _ = run_binary(module, '--no_such_flag=3')
  assert result.returncode == 1
  assert result.stderr.startswith("error: Unknown command line flag 'no_such_flag'")
  assert len(result.stderr.splitlines()) == 1


def test_missing_and_bad_flags_end_in_one_line():
  result, _ = run_binary('experiments.grade', '--rule=gsm8k')
  assert result.returncode == 1
  assert result.stderr == 'error: --input is missing. (--help lists all flags)\n'
  result, _ = run_binary('experiments.grade', '--rule=gsm')
  assert result.returncode == 1
  assert result.stderr.startswith('error: flag --rule=gsm: value should be one of <')
  assert len(result.stderr.splitlines()) == 1


def test_a_stray_argument_is_refused():
  args = ['--rule=gsm8k', '--input=a.jsonl', '--output=b.jsonl', 'stray.jsonl']
  result, _ = run_binary('experiments.grade', *args)
  assert result.returncode == 1
  assert result.stderr.startswith("error: unexpected arguments ['stray.jsonl']")
  assert len(result.stderr.splitlines()) == 1


SUMMARY = {
  'errors': 2,
  'output_dir': 'out',
  'num_problems': 1200,
  'num_rows': 2400,
  'num_new_rows': 3,
  'mean_tokens': 12.34,
  'truncated': 0.025,
  'steps': 1000,
  'checkpoint': 'out/checkpoints/1000',
}
LAST_STEP = {
  'num_records': 7,
  'loss': 0.25,
  'tokens_per_second': None,
  'best': None,
  'stopped': False,
}


@pytest.mark.parametrize(
  ('call', 'summary', 'text'),
  [
    (
      'sample.describe',
      SUMMARY,
      'out: 2,400 samples of 1,200 problems, 3 of them new; mean length 12.3 tokens, '
      '2.50% cut at the length limit; 2 ended by logits that are not finite',
    ),
    (
      'training_flags.describe',
      SUMMARY,
      'out/checkpoints/1000: 1,000 steps, done before',
    ),
    (
      'training_flags.describe',
      SUMMARY | LAST_STEP,
      'out/checkpoints/1000: 1,000 steps on 7 records, last loss 0.2500',
    ),
  ],
)
def test_closing_lines_are_for_readers(call, summary, text):
  # Two binaries in one process would define the same flags twice.
  module = call.split('.')[0]
  code = f'from experiments import {module}; print({call}({summary!r}))'
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout == text + '\n', done.stderr
