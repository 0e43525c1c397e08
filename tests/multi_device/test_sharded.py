"""One pretraining run on meshes of 8 fake devices gives what one device gives; checkpoints cross between them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import load_arrays

from pinfm_jax.config import MeshConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.sharding import AXES, make_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent))

import worker  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
# Compiling for 8 devices takes most of a minute a mesh: one that has all three axes stands for them in quick runs.
QUICK = 'data2_fsdp2_model2'
NAMES = tuple(name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in worker.MESHES)

# A mesh changes the order in which float32 sums are taken: partial matmuls and gradients are added over devices. One
# sum differs by a few units of 2^-24, the losses of 6 steps by some 1e-6. Adam then divides a gradient by its own
# size, so an element whose gradient is nearly 0 may move the other way: by at most twice the learning rates of all
# steps, 2 * 6 * 3e-3. That concerns single elements, so their bound is wide and that of the mean is tight.
LOSS_RTOL = 2e-5
ELEMENT_ATOL = 2 * 6 * 3e-3
MEAN_ATOL = 2e-5
ROW_ATOL = 2e-3  # rows move by the rate 0.05 times gradient / its norm, which has no such element-wise division


@pytest.fixture(scope='module')
def out(toy_run, tmp_path_factory, request):
  """The worker's directory, with the meshes that the selected tests ask for."""
  wanted = {i.callspec.params['name'] for i in request.session.items if 'name' in getattr(i, 'fixturenames', ())
            and i.path == request.path}  # fmt: skip
  path = tmp_path_factory.mktemp('sharded')
  # Compilation is most of the time, so the worker's programs are compiled with few optimisations.
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-W', 'error', worker.__file__, str(toy_run.workdir), str(path), QUICK]
  command += sorted(wanted - {QUICK})
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return path


@pytest.fixture(scope='module')
def seen(out):
  return json.loads((out / 'result.json').read_text())


@pytest.fixture(scope='module')
def single(toy_run, tmp_path_factory):
  """The single-device run: its directory and final state."""
  directory = tmp_path_factory.mktemp('single')
  state = worker.train(toy_run, toy_run.mesh, directory)
  return directory, worker.flat(state.params), *(np.asarray(x) for x in state.tables[:2])


@pytest.mark.parametrize('name', NAMES)
def test_a_mesh_gives_the_losses_parameters_and_rows_of_one_device(name, out, seen, single):
  directory, params, rows, accumulator = single
  assert seen['devices'] == 8
  np.testing.assert_allclose(seen[name]['losses'], worker.losses(directory), rtol=LOSS_RTOL)
  found = dict(np.load(out / f'{name}.npz'))
  np.testing.assert_allclose(found.pop('rows'), rows, atol=ROW_ATOL)
  np.testing.assert_allclose(found.pop('accumulator'), accumulator, rtol=1e-3, atol=1e-7)
  assert found.keys() == params.keys()
  for path, value in params.items():
    np.testing.assert_allclose(found[path], value, atol=ELEMENT_ATOL, err_msg=path)
  difference = np.concatenate([np.abs(found[path] - value).ravel() for path, value in params.items()])
  assert difference.mean() < MEAN_ATOL


@pytest.mark.parametrize('name', NAMES)
def test_tables_lie_on_all_devices_by_rows(name, seen):
  found = seen[name]
  assert (2 * worker.ROWS) % 8 != 0  # rounded up
  rows = found['rows'][0]
  assert rows >= 2 * worker.ROWS
  assert found['row_shards'] == [[rows // 8, 8]] * 8
  assert found['accumulator_shards'] == [[rows // 8]] * 8
  assert found['first_rows'] == [i * rows // 8 for i in range(8)]


@pytest.mark.parametrize('name', NAMES)
def test_kernels_are_sharded_where_the_rules_say(name, seen):
  config = worker.MESHES[name]
  assert seen[name]['mesh'] == {'data': config.data, 'fsdp': config.fsdp, 'model': config.model}
  assert (seen[name]['sharded_parameters'] > 0) == (config.fsdp * config.model > 1)
  assert seen[name]['moments_alike']


@pytest.mark.parametrize('name', NAMES)
def test_a_checkpoint_of_8_devices_continues_on_one(name, toy_run, out, seen, tmp_path):
  """Six steps on 8 devices; the checkpoint after the third continues here with the same batches and losses."""
  directory = tmp_path / name
  shutil.copytree(out / name, directory)
  shutil.rmtree(directory / 'checkpoints' / '6')
  assert int(load_arrays(directory / 'checkpoints')['step']) == 3
  state = worker.train(toy_run, toy_run.mesh, directory)
  assert int(state.step) == 6
  found = worker.losses(directory)
  assert found[:3] == seen[name]['losses'][:3]
  np.testing.assert_allclose(found[3:], seen[name]['losses'][3:], rtol=LOSS_RTOL)


def test_a_whole_checkpoint_of_8_devices_is_read_bit_exactly(toy_run, out):
  state = worker.train(toy_run, toy_run.mesh, out / QUICK)  # finished: restored, no step runs
  expected = dict(np.load(out / f'{QUICK}.npz'))
  np.testing.assert_array_equal(state.tables.rows_GE, expected['rows'])
  np.testing.assert_array_equal(state.tables.accumulator_G, expected['accumulator'])
  for path, value in worker.flat(state.params).items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_meshes_of_one_device():
  assert jax.device_count() == 1
  for config in (MeshConfig(), MeshConfig(1, 1, 1), MeshConfig(1, 0, 1), MeshConfig(1, 1, 0)):
    mesh = make_mesh(config)
    assert tuple(mesh.axis_names) == AXES
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'model': 1}


@pytest.mark.parametrize(
  'config', [MeshConfig(2), MeshConfig(0, 3), MeshConfig(0, 0, 1), MeshConfig(1, 1, 2), MeshConfig(-1, -1, 1)], ids=str
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(config):
  with pytest.raises(UserError, match=rf'mesh {config.data} x {config.fsdp} x {config.model} .* the 1 devices'):
    make_mesh(config)
