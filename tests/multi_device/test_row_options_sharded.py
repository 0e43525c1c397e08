"""Adam for table rows and averages of the weights on 8 fake devices give what they give on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parent / 'row_options_worker.py'


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device():
  """Also where a step's rows travel in several rounds: each row moves once a step."""
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(WORKER.parents[2])}
  command = [sys.executable, '-W', 'error', str(WORKER)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['devices'] == 8
  assert result['moved'] > 0.9
  assert result['found']['rounds']['exchanges'] > 1
  for name, differences in result['found'].items():
    for key in ('rows', 'moments', 'average'):
      assert differences[key] < 1e-5, (name, key)
