"""Rankers with TransAct train on 8 fake devices as on one: what is hidden of a user is drawn by its place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).resolve().parent / 'transact_worker.py'
pytestmark = pytest.mark.slow


def _steps(toy_run, devices, *mesh):
  flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
  root = str(WORKER.parent.parent.parent)
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': root}
  command = [sys.executable, '-W', 'error', str(WORKER), str(toy_run.workdir), *mesh]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['devices'] == devices
  return result['steps']


def test_a_mesh_gives_the_figures_of_one_device(toy_run):
  single, sharded = _steps(toy_run, 1, '1', '1', '1'), _steps(toy_run, 8, '2', '2', '2')
  assert len({row['ranking'] for row in single}) == 3
  for a, b in zip(single, sharded, strict=True):
    for name, value in a.items():
      if not name.startswith('exchange/'):  # what devices ask of each other depends on the mesh
        np.testing.assert_allclose(b[name], value, rtol=2e-4 if name == 'grad_norm' else 2e-5, err_msg=name)
