"""Two processes with four devices each load, convert and export one model together."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from test_checkpoint_hf import (
  BF16,
  Q0,
  assert_same_tensors,
  read_directory,
  write_model,
)

REPO = Path(__file__).parents[1]
WORKER = """
import json, os, sys
os.environ['JAX_PROCESS_ID'] = sys.argv[2]
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
from mrjax.checkpoint import hf
from mrjax.runs import convert

read = hf.SafetensorsReader.read
seen = set()

def spy(self, name, slices):
  if name == sys.argv[3]:
    seen.add(tuple((s.start, s.stop) for s in slices))
  return read(self, name, slices)

hf.SafetensorsReader.read = spy
root, mesh = sys.argv[1], 'fsdp:4,tensor:2'
convert.import_hf(convert.ImportConfig(root + '/in', root + '/ckpt', mesh))
assert jax.process_count() == 2 and jax.device_count() == 8
print('seen', json.dumps(sorted(seen)))
convert.export_hf(
  convert.ExportConfig(root + '/ckpt', root + '/out', mesh, max_shard_gb=2e-5)
)
convert.export_hf(
  convert.ExportConfig(root + '/ckpt', root + '/out', mesh, overwrite=True)
)
"""


def test_two_processes_convert_there_and_back(tmp_path):
  _, tensors = write_model(tmp_path / 'in', 'llama_biases', num_files=2, dtype=BF16)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  environment = {
    'PATH': '/usr/bin:/bin',
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': '2',
  }
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, str(tmp_path), str(i), Q0],
      cwd=REPO,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [worker.communicate(timeout=240) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for worker, (_, stderr) in zip(workers, outputs):
    assert worker.returncode == 0, stderr[-3000:]
  assert_same_tensors(read_directory(tmp_path / 'out'), tensors)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt', 'in', 'out']
  # Each process has read half of the tensor, and not the same half.
  seen = []
  for stdout, _ in outputs:
    line = next(x for x in stdout.splitlines() if x.startswith('seen'))
    seen.append({str(slices) for slices in json.loads(line.removeprefix('seen '))})
  assert len(seen[0]) == len(seen[1]) == 4 and not seen[0] & seen[1]
