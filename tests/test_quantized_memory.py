"""A model quantised while it loads is never in memory as it was stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_lora_quantization import write_model

REPO = Path(__file__).parents[1]
# The peak is that of Linux since a moment, so that imports do not count.
WORKER = """
import json, sys
from pathlib import Path
import jax
jax.config.update('jax_platforms', 'cpu')
from mrjax.checkpoint.hf import load_hf
from mrjax.models.config import DecoderConfig, load_hf_config
from mrjax.sharding.mesh import make_mesh

def status(name):
  lines = Path('/proc/self/status').read_text().splitlines()
  (line,) = [line for line in lines if line.startswith(name + ':')]
  return int(line.split()[1]) * 1024

small, large, kind = sys.argv[1:]
mesh = make_mesh('data:1')

def load(directory):
  config = DecoderConfig.from_hf(load_hf_config(directory))
  return jax.block_until_ready(load_hf(directory, config, mesh, quantize=kind))

load(small)  # what is compiled and started once is not the model's
Path('/proc/self/clear_refs').write_text('5')
before = status('VmRSS')
params = load(large)
peak = status('VmHWM') - before
held = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({'peak': peak, 'held': held}))
"""


@pytest.mark.skipif(
  not os.access('/proc/self/clear_refs', os.W_OK),
  reason='needs Linux, which tells the peak of memory since a moment',
)
def test_loading_nf4_needs_a_few_layers_beside_the_codes(tmp_path):
  write_model(tmp_path / 'small')
  _, tensors = write_model(
    tmp_path / 'large', num_hidden_layers=24, hidden_size=512, intermediate_size=1536
  )
  stored = sum(x.nbytes for x in tensors.values())
  layer = sum(x.nbytes for name, x in tensors.items() if '.layers.0.' in name)
  del tensors
  paths = [str(tmp_path / name) for name in ('small', 'large')]
  command = [sys.executable, '-c', WORKER, *paths, 'nf4']
  done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found['held'] < 0.3 * stored
  # Measured: 7 layers. Were the model loaded first, it would be all 24 of them.
  assert found['peak'] < found['held'] + 11 * layer < 0.75 * stored
