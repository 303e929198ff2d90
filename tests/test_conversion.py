"""Whole models to mrjax checkpoints and back, and their comparison with torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint_hf import (
  BF16,
  assert_same_tensors,
  assert_same_trees,
  one_device,
  read_directory,
  write_model,
)

from checkpoints_conversion import comparison
from mrjax.checkpoint import source
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.store import CheckpointStore
from mrjax.runs import convert

REPO = Path(__file__).parents[1]
SIDE_FILES = ('config.json', 'tokenizer.json', 'tokenizer.model', 'chat_template.jinja')


def import_hf(tmp_path, **changes):
  fields = {'hf_dir': str(tmp_path / 'in'), 'output_dir': str(tmp_path / 'ckpt')}
  return convert.import_hf(convert.ImportConfig(**(fields | changes)))


def export_hf(tmp_path, **changes):
  fields = {'checkpoint': str(tmp_path / 'ckpt'), 'output_dir': str(tmp_path / 'out')}
  return convert.export_hf(convert.ExportConfig(**(fields | changes)))


@pytest.mark.parametrize('variant', ['llama_biases', 'llama_tied', 'gemma2', 'phi3'])
def test_there_and_back_is_bit_identical(tmp_path, variant):
  _, tensors = write_model(tmp_path / 'in', variant, num_files=3, dtype=BF16)
  summary = import_hf(tmp_path, mesh='fsdp:4,tensor:2')
  assert summary['num_params'] == sum(x.size for x in tensors.values())
  # The checkpoint stands by itself.
  shutil.move(tmp_path / 'in', tmp_path / 'moved')
  export_hf(tmp_path, mesh='data:2,fsdp:4', max_shard_gb=2e-5)
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)
  assert (tmp_path / 'out' / 'model.safetensors.index.json').is_file()
  for name in SIDE_FILES:
    want = (tmp_path / 'moved' / name).read_bytes()
    assert (tmp_path / 'ckpt' / 'hf' / name).read_bytes() == want
    assert (tmp_path / 'out' / name).read_bytes() == want


def test_mixed_dtypes_survive_there_and_back(tmp_path):
  _, tensors = write_model(tmp_path / 'in', dtype=BF16)
  for name in list(tensors)[::3]:
    tensors[name] = tensors[name].astype(np.float32) + np.float32(2**-14)
  write_model(tmp_path / 'in', tensors=tensors)
  import_hf(tmp_path)
  export_hf(tmp_path)
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)


def test_dtype_casts_on_either_way(tmp_path):
  _, tensors = write_model(tmp_path / 'in')
  want = {name: x.astype(BF16) for name, x in tensors.items()}
  import_hf(tmp_path, dtype='bfloat16')
  export_hf(tmp_path)
  assert_same_tensors(read_directory(tmp_path / 'out'), want)
  import_hf(tmp_path, overwrite=True)
  export_hf(tmp_path, dtype='bfloat16', overwrite=True)
  assert_same_tensors(read_directory(tmp_path / 'out'), want)


def test_a_training_run_is_exported_in_the_dtype_it_was_trained_in(tmp_path):
  """The files of the source were bfloat16: rounding to that would lose the training."""
  write_model(tmp_path / 'in', dtype=BF16)
  params = source.resolve_model(str(tmp_path / 'in')).load_params(
    one_device(), jnp.float32
  )
  with CheckpointStore(tmp_path / 'run', hf_dir=tmp_path / 'in') as store:
    params['final_norm']['scale'] += 2.0**-14
    store.save(7, {'params': params}, {})
  export_hf(tmp_path, checkpoint=str(tmp_path / 'run'))
  again = source.resolve_model(str(tmp_path / 'out')).load_params(one_device())
  assert_same_trees(again, params)


def test_existing_output_is_refused_before_anything_is_read(tmp_path):
  (tmp_path / 'ckpt').mkdir()
  (tmp_path / 'out').mkdir()
  for run, remedy in ((import_hf, 'overwrite'), (export_hf, 'overwrite')):
    with pytest.raises(FileExistsError, match=remedy):
      run(tmp_path)  # the source is not there: it was not looked at
    with pytest.raises(FileExistsError, match='is not replaced'):
      run(tmp_path, overwrite=True)


def test_what_is_no_hf_model_is_not_imported(tmp_path):
  write_model(tmp_path / 'in')
  import_hf(tmp_path)
  with pytest.raises(ValueError, match='is an mrjax checkpoint already'):
    import_hf(tmp_path, hf_dir=str(tmp_path / 'ckpt'), output_dir=str(tmp_path / 'x'))
  with pytest.raises(ValueError, match='want one of stored'):
    import_hf(tmp_path, dtype='int8', output_dir=str(tmp_path / 'y'))
  shutil.rmtree(tmp_path / 'ckpt' / 'params')
  with pytest.raises(CheckpointError, match='no whole Orbax checkpoint'):
    export_hf(tmp_path)


def run_binary(name: str, *args: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', f'checkpoints_conversion.{name}', *args],
    cwd=REPO,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_binaries_convert_and_fail_in_one_line(tmp_path):
  _, tensors = write_model(tmp_path / 'in')
  to_orbax = (f'--hf_dir={tmp_path / "in"}', f'--output_dir={tmp_path / "ckpt"}')
  result = run_binary('hf_to_orbax', *to_orbax)
  assert result.returncode == 0, result.stderr
  result = run_binary(
    'orbax_to_hf',
    f'--checkpoint={tmp_path / "ckpt"}',
    f'--output_dir={tmp_path / "out"}',
    '--max_shard_gb=0.00002',
  )
  assert result.returncode == 0, result.stderr
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)
  result = run_binary('hf_to_orbax', *to_orbax)
  assert result.returncode == 1
  assert 'error: ' in result.stderr and '--overwrite' in result.stderr
  assert 'Traceback' not in result.stderr


@pytest.fixture(scope='module')
def tiny_model(tmp_path_factory):
  """A random model with a tokenizer that can read the built-in prompts."""
  tmp_path = tmp_path_factory.mktemp('tiny')
  embedded = source.embedded_models()
  if not embedded:
    pytest.skip('no embedded model to take a tokenizer from')
  shutil.copytree(source.resolve_model(embedded[0]).hf_dir, tmp_path / 'in')
  import_hf(tmp_path)
  return tmp_path


def test_verify_agrees_on_a_true_checkpoint(tiny_model, capsys):
  config = comparison.Config(
    hf_dir=str(tiny_model / 'in'),
    checkpoint=str(tiny_model / 'ckpt'),
    greedy_tokens=5,
    tolerance=1e-4,
    mesh='data:8',
  )
  assert comparison.run(config) == []
  lines = capsys.readouterr().out
  assert lines.count('max abs difference') == len(comparison.PROMPTS)
  assert lines.count('greedy:') == len(comparison.PROMPTS)


def test_verify_finds_a_changed_weight_and_prompts_come_from_a_file(
  tiny_model, tmp_path
):
  found = source.resolve_model(str(tiny_model / 'ckpt'))
  params = found.load_params(one_device(), jnp.float32)
  q = params['layers']['attn']['q']
  q['kernel'] = q['kernel'].at[-1].set(jnp.flip(q['kernel'][-1], axis=1))
  with CheckpointStore(tmp_path / 'run', hf_dir=found.hf_dir) as store:
    store.save(1, {'params': params}, {})
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(
    json.dumps({'prompt': 'How many apples are left over now?'}) + '\n'
  )
  result = run_binary(
    'verify',
    f'--hf_dir={tiny_model / "in"}',
    f'--checkpoint={tmp_path / "run"}',
    f'--prompts={prompts}',
  )
  assert result.returncode == 1
  assert 'error: prompt 0: logits differ by' in result.stderr
  assert 'prompt 1' not in result.stdout + result.stderr


def test_verify_says_that_torch_is_missing(tiny_model, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ImportError, match='pip install torch'):
    comparison.run(comparison.Config(hf_dir=str(tiny_model / 'in'), checkpoint='x'))
