"""The CPU as sampling uses it: how many devices, and who may decide that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrjax.runs.machine import memory_bytes, most_devices, num_cores, num_devices

REPO = Path(__file__).parents[1]
# Three cores, whatever the machine has.
PROBE = """
import json, sys
import jax
from mrjax.checkpoint.source import resolve_model
from mrjax.runs import machine, sample
machine.num_cores = lambda: 3
model, mesh, first = json.loads(sys.argv[1])
if first == 'used':
  jax.devices()
elif first:
  jax.config.update('jax_num_cpu_devices', first)
config = sample.Config(model=model, data='d', output_dir='o', mesh=mesh)
split = sample.split_cpu(config, resolve_model(model))
print(json.dumps([split, jax.device_count()]))
"""


def devices_of(mesh, *, first=0, **variables):
  return run(PROBE, json.dumps(['tiny-0.2m', mesh, first]), **variables)


def run(code, argument, **variables):
  """What a program prints that nobody has told how many devices there are."""
  settings = 'JAX_NUM_CPU_DEVICES', 'XLA_FLAGS', 'JAX_COORDINATOR_ADDRESS'
  environment = {k: v for k, v in os.environ.items() if k not in settings}
  result = subprocess.run(
    [sys.executable, '-c', code, argument],
    cwd=REPO,
    env=environment | variables,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(result.stdout)


def test_every_core_becomes_a_device():
  assert devices_of('data:-1,fsdp:1,tensor:1') == [True, 3]


def test_an_explicit_mesh_gets_its_places():
  assert devices_of('data:2,tensor:2') == [True, 4]


@pytest.mark.parametrize(
  ('kwargs', 'number'),
  [
    ({'JAX_NUM_CPU_DEVICES': '2'}, 2),
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, 4),
    ({'JAX_COORDINATOR_ADDRESS': '127.0.0.1:9'}, 1),
    ({'first': 5}, 5),
    ({'first': 'used'}, 1),
  ],
)
def test_who_has_chosen_devices_keeps_them(kwargs, number):
  assert devices_of('data:-1', **kwargs) == [False, number]


@pytest.mark.parametrize(
  ('mesh', 'numbers'),
  [
    ('data:-1', [1, 2, 3, 7]),
    ('data:-1,tensor:2', [2, 2, 2, 6]),
    ('data:3,fsdp:-1', [3, 3, 3, 6]),
    ('tensor:-1', [1, 1, 1, 1]),
    ('data:2,tensor:2', [4, 4, 4, 4]),
    ('', [1, 1, 1, 1]),
  ],
)
def test_a_free_axis_takes_what_is_left(mesh, numbers):
  assert [num_devices(mesh, most) for most in (1, 2, 3, 7)] == numbers


def test_weights_rows_and_cores_bound_the_devices():
  most = lambda weights, max_batch=256: most_devices(
    weights, cores=6, memory=1000, max_batch=max_batch
  )
  assert [most(w) for w in (1, 41, 42, 62, 63, 250, 251)] == [6, 6, 5, 4, 3, 1, 1]
  assert most(1, 4) == 4
  assert 1 <= num_cores() <= os.cpu_count()
  assert 1 << 28 < memory_bytes() < 1 << 48


def test_the_quickstart_samples_on_all_cores_and_trains_on_one_device(tmp_path):
  code = """
import json, sys
import jax
from mrjax.runs import collect, convert, evaluate, grade, machine, quickstart, report
from mrjax.runs import sample, sft
machine.num_cores = lambda: 3
seen = {}
evaluate.run = lambda config: {'rule': 'gsm8k'}
sample.run = lambda config: seen.update(sampling=jax.device_count())
sft.run = lambda config, devices: seen.update(training=len(devices))
quickstart._select = convert.export_hf = report.run = lambda *args: None
quickstart.run(quickstart.Config(model='tiny-0.2m', output_dir=sys.argv[1]))
print(json.dumps(seen))
"""
  result = run(code, str(tmp_path / 'run'))
  assert result == {'sampling': 3, 'training': 1}
