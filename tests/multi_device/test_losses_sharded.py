"""The sequence losses and gradients are those of the global batch on any mesh; vectors of tokens stay at home."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import losses_worker  # isort: skip

ROOT = Path(__file__).resolve().parent.parent.parent
OTHERS = [('plain', '2_2_2'), ('fewer', '2_2_2'), *(('all', mesh) for mesh in losses_worker.MESHES if mesh != '1')]


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
  """part -> value for every configuration and mesh."""
  out = tmp_path_factory.mktemp('losses') / 'seen.npz'
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-W', 'error', losses_worker.__file__, str(out)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  found = {}
  for name, value in np.load(out).items():
    config, mesh, part = name.split('/')
    found.setdefault((config, mesh), {})[part] = value
  return found


@pytest.mark.parametrize(('config', 'mesh'), OTHERS)
def test_losses_and_gradients_are_those_of_one_device(config, mesh, seen):
  """Float sums over rows come in another order, nothing else: a few units of 2^-24 of each value."""
  expected, found = seen[config, '1'], dict(seen[config, mesh])
  assert expected.keys() == found.keys()
  for part, value in expected.items():
    if part in ('columns', 'sketch', 'temperature'):
      np.testing.assert_array_equal(found[part], value, err_msg=part)
    elif part != 'floats_that_cross':
      np.testing.assert_allclose(found[part], value, rtol=2e-6, atol=2e-6 * np.abs(value).max(), err_msg=part)


@pytest.mark.parametrize('config', losses_worker.CONFIGS)
def test_the_batch_is_worth_comparing(config, seen):
  """Every loss and gradient is there, and the sample leaves columns out."""
  one = seen[config, '1']
  assert all(one[name] > 0 for name in ('ntl', 'mtl', 'ftl'))
  names = ['grad_h', 'grad_z', 'grad_temperature'] + ['grad_z_drawn'] * (config != 'plain')
  assert all(np.abs(one[name]).max() > 1e-3 for name in names)
  assert one['columns'] >= losses_worker.CONFIGS[config].max_columns
  _, events = losses_worker.batch()
  positive = np.asarray(events.mask_UL) & (np.asarray(events.actions_UL) & 2 > 0)
  assert len(set(np.asarray(events.item_UL2)[positive][:, 0].tolist())) > losses_worker.PLAIN.max_columns
  users = np.asarray(events.user_UL)
  assert all(np.any(users == user, axis=1).sum() > 2 for user in range(5))


@pytest.mark.parametrize('mesh', ['2', '8', 'fsdp8'])
def test_only_the_columns_vectors_cross_devices(mesh, seen):
  columns = losses_worker.PLAIN.max_columns + losses_worker.CONFIGS['all'].uniform_negatives
  crossed = seen['all', mesh]['floats_that_cross']
  assert crossed[0] == columns * losses_worker.WIDTH
  assert crossed[0] < losses_worker.ROWS * losses_worker.LENGTH * losses_worker.WIDTH  # H of all tokens
  # Their vectors once, and their gradient once: not in every chunk of the loop over anchors.
  assert np.sum(crossed == crossed[0]) == 2
