"""Imported rows reach the right places of tables that are sharded or replicated over several devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pinfm_jax.config import TableConfig
from pinfm_jax.data.item_vectors import open_item_vectors
from pinfm_jax.serve.import_tables import import_tables

ROOT = Path(__file__).resolve().parent.parent.parent


def test_rows_are_put_into_any_mesh(tmp_path):
  np.save(tmp_path / 'v.npy', np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32))
  np.save(tmp_path / 'i.npy', np.arange(500))
  vectors = open_item_vectors(tmp_path / 'v.npy', tmp_path / 'i.npy')
  import_tables(tmp_path / 'out', vectors, TableConfig(sub_tables=2, rows=1000, width=4))
  flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-W', 'error', str(Path(__file__).with_name('imported_worker.py')), str(tmp_path / 'out')]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[-1]) == {'devices': 4, 'seen': [[True, True, 4]] * 3}
