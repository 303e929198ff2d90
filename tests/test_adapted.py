"""`--adapter` in sample, score and evaluate: the model that fold_adapter writes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_runs import make_config, write_model

from mrjax import trees
from mrjax.checkpoint.adapted import resolve_adapted
from mrjax.checkpoint.adapters import save_adapter
from mrjax.checkpoint.directories import CheckpointError
from mrjax.checkpoint.fingerprint import fingerprint
from mrjax.checkpoint.source import resolve_model
from mrjax.lora.adapters import AdapterError, LoraConfig, adapter_shapes
from mrjax.records import read_jsonl, write_jsonl
from mrjax.runs import convert_adapters, evaluate, sample, score, sft
from mrjax.runs.common import OutputError
from mrjax.runs.report_inputs import read_run
from mrjax.runs.report_page import render_page
from mrjax.sharding.mesh import make_mesh

REPOSITORY = Path(__file__).resolve().parents[1]
SHARD = 'samples-00000-of-00001.jsonl'
DATA = 'arithmetic:test?size=5'
LORA = LoraConfig(rank=3, alpha=7.0, targets=('/attn/[qv]/', '/mlp/down/'))


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> str:
  return write_model(tmp_path_factory.mktemp('model') / 'hf')


@pytest.fixture(scope='module', params=['', 'nf4'])
def trained(request, base, tmp_path_factory) -> Path:
  """A run that trained an adapter, and `folded`, what fold_adapter makes of it."""
  folder = tmp_path_factory.mktemp(f'trained{request.param}')
  changes = {
    'lora_rank': 3,
    'quantize': request.param,
    'num_steps': 2,
    'mesh': 'data:8',
  }
  sft.run(make_config(base, folder / 'run', **changes, learning_rate=0.05))
  fold(folder / 'run', folder / 'folded')
  return folder


@pytest.fixture(scope='module')
def adapter(base, tmp_path_factory) -> str:
  """An adapter checkpoint."""
  folder = tmp_path_factory.mktemp('adapter')
  return write_adapter(folder / 'adapter', base)


def write_adapter(directory: Path, model: str, *, lora=LORA, seed=0, change=None):
  source = resolve_model(model)
  rng = np.random.default_rng(seed)
  leaves = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
    adapter_shapes(source.config, lora),
  )
  base = {'model': model, 'fingerprint': fingerprint(source.load_params(one_device()))}
  leaves = change(leaves) if change else leaves
  save_adapter(directory, leaves, lora, hf_dir=source.hf_dir, base=base, overwrite=True)
  return str(directory)


def one_device():
  return make_mesh('data:1', jax.devices()[:1])


def fold(adapter, output_dir) -> str:
  convert_adapters.fold_adapter(
    convert_adapters.FoldConfig(adapter=str(adapter), output_dir=str(output_dir))
  )
  return str(output_dir)


def to_peft(checkpoint, output_dir) -> str:
  convert_adapters.export_peft(
    convert_adapters.ExportConfig(
      checkpoint=str(checkpoint), output_dir=str(output_dir)
    )
  )
  return str(output_dir)


def config(model, output_dir, adapter='', **changes) -> sample.Config:
  fields = {
    'data': DATA,
    'prompt_template': 'qa',
    'num_samples': 3,
    'max_new_tokens': 8,
    'max_batch': 16,
    'logprobs': True,
  }
  return sample.Config(
    model=str(model),
    adapter=str(adapter),
    output_dir=str(output_dir),
    **(fields | changes),
  )


def rows_of(made: sample.Config) -> dict:
  sample.run(made)
  rows = read_jsonl(Path(made.output_dir) / SHARD)
  return {(row['problem_id'], row['sample_index']): row for row in rows}


def assert_same_rows(rows, others):
  assert rows.keys() == others.keys()
  for name, row in rows.items():
    assert row['token_ids'] == others[name]['token_ids']
    assert row['logprobs'] == pytest.approx(others[name]['logprobs'], abs=1e-6)


def test_samples_are_those_of_the_folded_model(base, trained, tmp_path):
  rows = rows_of(config(base, tmp_path / 'a', trained / 'run'))
  assert_same_rows(rows, rows_of(config(trained / 'folded', tmp_path / 'b')))
  bare = rows_of(config(base, tmp_path / 'c'))
  assert any(bare[name]['token_ids'] != rows[name]['token_ids'] for name in rows)
  peft = to_peft(trained / 'run', tmp_path / 'peft')
  assert_same_rows(rows, rows_of(config(base, tmp_path / 'd', peft)))


def test_scores_are_those_of_the_folded_model(base, trained, tmp_path):
  records = [
    {'prompt': 'Tom has 3 apples.', 'completion': ' He eats 2.'},
    {'prompt': 'How many', 'completion': ' are left? 3 - 2 = 1.\n#### 1'},
  ]
  write_jsonl(tmp_path / 'in.jsonl', records)

  def logprobs(model, adapter=''):
    output = tmp_path / 'out.jsonl'
    made = score.Config(
      model=str(model),
      adapter=str(adapter),
      input=str(tmp_path / 'in.jsonl'),
      output=str(output),
      overwrite=True,
    )
    score.run(made)
    return np.concatenate([row['logprobs'] for row in read_jsonl(output)])

  got = logprobs(base, trained / 'run')
  np.testing.assert_allclose(got, logprobs(trained / 'folded'), rtol=0, atol=1e-6)
  assert np.abs(got - logprobs(base)).max() > 1e-2


@pytest.mark.parametrize('dtype', [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('stored', [np.float32, ml_dtypes.bfloat16])
def test_weights_are_those_that_fold_adapter_writes(tmp_path, stored, dtype):
  model = write_model(tmp_path / 'model', dtype=stored)
  adapter = write_adapter(tmp_path / 'adapter', model)
  mesh = make_mesh('fsdp:4,tensor:2')
  want = resolve_model(fold(adapter, tmp_path / 'folded')).load_params(mesh, dtype)
  got = trees.flatten(resolve_adapted(model, adapter).load_params(mesh, dtype))
  assert got.keys() == trees.flatten(want).keys()
  for name, leaf in trees.flatten(want).items():
    assert (leaf.dtype, leaf.sharding) == (got[name].dtype, got[name].sharding), name
    np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def test_evaluate_names_its_adapter(tmp_path):
  model = 'tiny-0.2m'
  adapter = write_adapter(tmp_path / 'adapter', model)
  flags = [f'--model={model}', f'--adapter={adapter}', f'--data={DATA}']
  flags += ['--prompt_template=qa', '--max_new_tokens=24', '--num_samples=2']
  flags += ['--temperature=0.7', f'--output_dir={tmp_path / "run"}']
  command = [sys.executable, '-m', 'experiments.evaluate', *flags]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  folded = evaluate.Config(
    model=fold(adapter, tmp_path / 'folded'),
    data=DATA,
    prompt_template='qa',
    max_new_tokens=24,
    num_samples=2,
    temperature=0.7,
    output_dir=str(tmp_path / 'other'),
  )
  assert json.loads((tmp_path / 'run' / 'metrics.json').read_text()) == (
    evaluate.run(folded)
  )
  texts = [
    {(r['problem_id'], r['sample_index']): r['text'] for r in read_jsonl(path)}
    for path in (tmp_path / 'run' / 'graded.jsonl', tmp_path / 'other' / 'graded.jsonl')
  ]
  assert texts[0] == texts[1] and len(texts[0]) == 10
  for folder in (tmp_path / 'run', tmp_path / 'run' / 'samples'):
    saved = json.loads((folder / 'config.json').read_text())['config']
    assert saved['adapter'] == adapter
    assert (saved['adapter_lora']['rank'], saved['adapter_lora']['alpha']) == (3, 7.0)
    assert len(saved['adapter_sha256']) == 64
  page = render_page([read_run('run', tmp_path / 'run', max_samples=1)], title='')
  assert f'{tmp_path.name}/adapter' in page


def test_a_run_goes_on_with_the_same_adapter_alone(base, tmp_path):
  adapter = write_adapter(tmp_path / 'adapter', base)
  made = config(base, tmp_path / 'run', adapter)
  rows = rows_of(made)
  shard = tmp_path / 'run' / SHARD
  lines = shard.read_text().splitlines(keepends=True)
  shard.write_text(''.join(lines[:4]))  # what a kill leaves
  other = write_adapter(tmp_path / 'other', base)
  for name in ('', other):
    with pytest.raises(OutputError, match=r"adapter: was '.*adapter', now '"):
      sample.run(dataclasses.replace(made, adapter=name))
  for change, message in (
    ({'seed': 1}, r"adapter_sha256: was '\w{64}', now '\w{64}'\)"),
    (
      {'lora': dataclasses.replace(LORA, alpha=8.0)},
      r"adapter_lora: was .*'alpha': 7.0.*now .*'alpha': 8.0",
    ),
  ):
    write_adapter(tmp_path / 'adapter', base, **change)
    with pytest.raises(OutputError, match=message):
      sample.run(made)
  assert shard.read_text() == ''.join(lines[:4])
  write_adapter(tmp_path / 'adapter', base)
  moved = dataclasses.replace(made, mesh='data:1,fsdp:-1', max_batch=8)
  assert_same_rows(rows_of(moved), rows)


def test_another_base_is_refused(adapter, base, tmp_path):
  other = write_model(tmp_path / 'other', seed=1)
  message = rf"trained on '{base}' with other weights than these"
  with pytest.raises(CheckpointError, match=message):
    sample.run(config(other, tmp_path / 'run', adapter))
  write_jsonl(tmp_path / 'in.jsonl', [{'prompt': 'a', 'completion': 'b'}])
  made = score.Config(
    model=other,
    adapter=adapter,
    input=str(tmp_path / 'in.jsonl'),
    output=str(tmp_path / 'out.jsonl'),
  )
  with pytest.raises(CheckpointError, match=message):
    score.run(made)
  assert not (tmp_path / 'out.jsonl').exists()


def test_a_quantised_base_is_known_on_meshes_that_would_cut_its_blocks(base, trained):
  mesh = make_mesh('data:4,tensor:2')
  got = trees.flatten(resolve_adapted(base, str(trained / 'run')).load_params(mesh))
  want = resolve_model(str(trained / 'folded')).load_params(mesh)
  for name, leaf in trees.flatten(want).items():
    # Rounded once more to bfloat16, where the order of a sum of 16 terms may show.
    np.testing.assert_allclose(got[name], leaf, rtol=2**-7, err_msg=name)


def test_the_base_of_a_quantised_run_is_known_by_its_codes(trained, tmp_path):
  other = write_model(tmp_path / 'other', seed=1)
  with pytest.raises(CheckpointError, match=r'run was trained on .* other weights'):
    resolve_adapted(other, str(trained / 'run')).load_params(one_device())


def test_a_base_without_files_to_quantise_is_explained(base, adapter, tmp_path):
  found = resolve_adapted(base, adapter)
  assert found.adapter is not None
  quantised = dataclasses.replace(
    found.adapter, base=dict(found.adapter.base) | {'quantize': 'nf4'}
  )
  run = dataclasses.replace(found.source, params_dir=tmp_path)
  with pytest.raises(CheckpointError, match='orbax_to_hf') as error:
    dataclasses.replace(found, source=run, adapter=quantised).load_params(one_device())
  assert 'trained on nf4 weights' in error.value.__notes__[0]


def change_peft(directory: Path, **fields):
  path = directory / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_that_does_not_fit_leaves_no_directory(adapter, base, tmp_path):
  no_number = lambda leaves: jax.tree.map(lambda x: x.at[0, 1].set(jnp.nan), leaves)
  more = lambda leaves: trees.unflatten(
    trees.flatten(leaves) | {'layers/attn/k/lora_a': jnp.zeros((2, 64, 3))}
  )
  peft = Path(to_peft(adapter, tmp_path / 'peft'))
  for name in ('rank', 'target'):
    shutil.copytree(peft, tmp_path / name)
  change_peft(tmp_path / 'rank', r=5)
  change_peft(tmp_path / 'target', target_modules=['q_proj', 'v_proj'])
  cases = {
    str(tmp_path / 'rank'): (AdapterError, r'down_proj.* want \(5, 128\) for rank 5'),
    str(tmp_path / 'target'): (
      AdapterError,
      r'down_proj.* is in adapter_model.safetensors but not in adapter_config.json',
    ),
    write_adapter(tmp_path / 'more', base, change=more): (
      AdapterError,
      r'attn/k/lora_a has shape \(2, 64, 3\), want \(not there\) for rank 3',
    ),
    write_adapter(tmp_path / 'nan', base, change=no_number): (
      CheckpointError,
      r'nan: layers/attn/q/lora_a holds NaN',
    ),
    write_adapter(tmp_path / 'tiny', 'tiny-0.2m'): (AdapterError, 'lora_a has shape'),
    base: (FileNotFoundError, 'Adapter .*adapter_config.json'),
    str(tmp_path / 'nowhere'): (FileNotFoundError, 'Adapter .*nowhere'),
  }
  for name, (error, message) in cases.items():
    made = config(base, tmp_path / 'run', name)
    with pytest.raises(error, match=message):
      sample.run(made)
    with pytest.raises(error, match=message):
      evaluate.run(evaluate.Config(**dataclasses.asdict(made)))
    assert not (tmp_path / 'run').exists()


def test_an_adapter_as_model_is_told_its_flag(base, trained, adapter, tmp_path):
  run = trained / 'run'
  for name in (run, run / 'checkpoints' / '2'):
    with pytest.raises(CheckpointError) as error:
      sample.run(config(name, tmp_path / 'run'))
    assert f'Pass --model={base} --adapter={name}.' in str(error.value)
  peft = to_peft(adapter, tmp_path / 'peft')
  for name in (adapter, peft):
    with pytest.raises(CheckpointError, match=r'no model but .* it as --adapter'):
      sample.run(config(name, tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
