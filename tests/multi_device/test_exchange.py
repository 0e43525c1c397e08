"""Sharded tables on 8 fake devices: lookups bit-equal to one device, updates equal up to the order of sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy

sys.path.insert(0, str(Path(__file__).resolve().parent))

import exchange_worker as worker  # noqa: E402

from pinfm_jax.config import TableConfig  # noqa: E402
from pinfm_jax.model.hashing import hash_rows  # noqa: E402
from pinfm_jax.train.exchange import Exchange, read_vectors  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
SHARDED = [name for name in worker.CASES if not name.startswith('one')]
# A row's gradient is a sum over the batch; devices add theirs first, so float32 sums differ in their order. A row moves
# by 0.1 * gradient / norm, so 3 steps of values near 1 differ by some units of 2^-24.
ATOL = 2e-6


@pytest.fixture(scope='module')
def out(tmp_path_factory):
  path = tmp_path_factory.mktemp('exchange')
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-W', 'error', worker.__file__, str(path)], env=environment,
                        capture_output=True, text=True, timeout=600)  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return path


@pytest.fixture(scope='module')
def seen(out):
  return json.loads((out / 'result.json').read_text())


def _one(name):
  """The case of one device that a case is compared with."""
  return {'bfloat16': 'one_bfloat16', 'skewed': 'one_skewed'}.get(name.split('_')[-1], 'one')


def _rows(found):
  rows = found['rows']
  return rows.view(ml_dtypes.bfloat16).astype(np.float32) if rows.dtype == np.uint16 else rows


@pytest.mark.parametrize('name', SHARDED)
def test_a_mesh_gives_the_vectors_and_rows_of_one_device(name, out, seen):
  found, expected = np.load(out / f'{name}.npz'), np.load(out / f'{_one(name)}.npz')
  np.testing.assert_allclose(found['accumulator'], expected['accumulator'], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(seen[name]['squares'], seen[_one(name)]['squares'], rtol=1e-5)
  if 'bfloat16' in name:  # a sum's last bit may push a value to the other neighbour: rarely, and by one place of 2^-8
    close = np.isclose(_rows(found), _rows(expected), rtol=2**-7, atol=1e-6)
    assert close.all()
    assert np.mean(found['rows'] != expected['rows']) < 1e-3
    return
  np.testing.assert_allclose(found['rows'], expected['rows'], atol=ATOL)
  for key in ('vectors0', 'vectors1'):
    np.testing.assert_allclose(found[key], expected[key], atol=ATOL)


def test_one_device_reads_the_rows_that_the_hash_names():
  config = TableConfig(sub_tables=2, rows=2000, width=8)
  rows, ids = toy.tables(config).rows_GE, worker.batch(False)
  found = read_vectors(rows, tuple(map(jnp.asarray, ids)), config)
  for part, vectors in zip(ids, found, strict=True):
    np.testing.assert_array_equal(vectors, np.asarray(rows)[hash_rows(part, 2, 2000)].reshape(*part.shape[:2], 16))


def test_rounds_change_no_bit(out, seen):
  for narrow, wide in (('8_narrow', '8_wide'), ('replicas_narrow', 'replicas_wide')):
    assert seen[narrow]['exchange/rounds'] > 1
    assert seen[wide]['exchange/rounds'] == 1
    for key, value in np.load(out / f'{wide}.npz').items():
      np.testing.assert_array_equal(np.load(out / f'{narrow}.npz')[key], value, err_msg=key)


def test_skewed_ids_take_more_rounds_and_lose_nothing(seen):
  assert seen['8_skewed']['exchange/rounds'] > 1
  assert seen['8_skewed']['exchange/places'] >= seen['8_skewed']['exchange/rows']


def test_replicas_agree_bit_for_bit(seen):
  assert seen['replicas']['parts'] == 4
  assert seen['replicated']['parts'] == 1
  assert all(case['replicas_agree'] for case in seen.values())


@pytest.mark.parametrize('name', ['8', '2x2x2', 'model8', 'replicas'])
def test_each_device_asks_for_its_distinct_rows_alone(name, seen):
  """The rows counted are those of NumPy's unique over each device's part of the ids."""
  mesh, axes, *_ = worker.CASES[name]
  data, fsdp, model = worker.MESHES[mesh]
  sizes = dict(zip(worker.AXES, (data, fsdp, model), strict=True))
  total, largest, owners = 0, 0, int(np.prod([sizes[axis] for axis in axes]))
  for device in range(data * fsdp):
    for m in range(model):
      parts = []
      for part in worker.batch(False):
        part = np.pad(part, ((0, 0), (0, -part.shape[1] % model), (0, 0)))
        columns = part.shape[1] // model
        mine = part[device * len(part) // (data * fsdp) : (device + 1) * len(part) // (data * fsdp)]
        parts.append(mine[:, m * columns : (m + 1) * columns].reshape(-1, 2))
      rows = np.unique(hash_rows(np.concatenate(parts), 2, 2000))
      total += len(rows)
      largest = max(largest, np.bincount(rows // (worker.ROWS // owners)).max())
  assert seen[name]['exchange/rows'] == total
  assert seen[name]['largest'] == largest


def test_temporaries_do_not_grow_with_the_table():
  memory = []
  for rows in (1 << 12, 1 << 18):
    config = TableConfig(sub_tables=2, rows=rows // 2, width=8)
    exchange, ids = Exchange(config, rows), (jnp.zeros((8, 14, 2), jnp.uint32),)

    def step(tables, exchange=exchange, ids=ids):
      plan = exchange.plan(ids)
      grad = exchange.lookup(tables.rows_GE, plan)
      summed = exchange.sum_gradients(plan, grad)
      return exchange.update(tables, plan, grad, summed, jnp.float32(1), jnp.float32(0.1), jnp.uint32(0))

    compiled = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(lambda config=config: toy.tables(config))).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == rows * 9 * 4
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
  assert memory[0] == memory[1]
