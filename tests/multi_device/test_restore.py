"""A checkpoint is read into other meshes of several devices while that mesh is set, as the loop does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_tables_are_restored_and_warm_started_on_other_meshes(tmp_path):
  flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-W', 'error', str(Path(__file__).with_name('restore_worker.py')), str(tmp_path)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[-1]) == {'devices': 4, 'seen': [[True] * 4] * 4}
