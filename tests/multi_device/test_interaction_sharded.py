"""Interaction blocks on 8 fake devices give what they give on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).resolve().parent / 'interaction_worker.py'
WHOLE = ('mixture tanh, sigmoid', 'cin')  # widths of 21 and 3, which no axis divides
DIVIDED = ('final', 'finalmlp gated', 'dhen', 'transformer')


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device():
  root = str(WORKER.parent.parent.parent)
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root}
  command = [sys.executable, '-W', 'error', str(WORKER), *WHOLE, *DIVIDED]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['devices'] == 8
  for case, found in result['cases'].items():
    assert found['difference'] < 2e-4, case
    assert (found['in_parts'] > 0) == (case in DIVIDED), case
