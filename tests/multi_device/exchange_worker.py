"""Lookups and updates of sharded tables on 8 fake devices, against one device; started by test_exchange.py.

python exchange_worker.py OUT: writes OUT/NAME.npz for each case below, and OUT/result.json.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pinfm_jax.config import TableConfig
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.model.tables import Tables, init_rows
from pinfm_jax.train.exchange import Exchange
from pinfm_jax.train.sharding import AXES, BATCH_AXES

ROWS = 4096  # of the stored array: 2 sub-tables of 2,000 rows, rounded up
STEPS = 3
MESHES = {'one': (1, 1, 1), '2': (2, 1, 1), '2x2': (2, 1, 2), '8': (8, 1, 1), '2x2x2': (2, 2, 2), 'model8': (1, 1, 8)}
# name: mesh, table axes, capacity, dtype, whether the ids are skewed
CASES = {
  **{f'{mesh}': (mesh, AXES, 0, 'float32', False) for mesh in MESHES},
  'one_bfloat16': ('one', AXES, 0, 'bfloat16', False),
  '2x2x2_bfloat16': ('2x2x2', AXES, 0, 'bfloat16', False),
  '8_wide': ('8', AXES, 40, 'float32', False),
  '8_narrow': ('8', AXES, 3, 'float32', False),
  'replicas': ('2x2x2', ('fsdp', 'model'), 0, 'float32', False),
  'replicas_wide': ('2x2x2', ('fsdp', 'model'), 40, 'float32', False),
  'replicas_narrow': ('2x2x2', ('fsdp', 'model'), 5, 'float32', False),
  'replicated': ('2', ('model',), 0, 'float32', False),
  'one_skewed': ('one', AXES, 0, 'float32', True),
  '8_skewed': ('8', AXES, 0, 'float32', True),
}


def batch(skewed: bool) -> tuple[np.ndarray, np.ndarray]:
  """Two arrays of ids with many duplicates; skewed ones lie with the first of 8 owners."""
  rng = np.random.default_rng(0)
  pool = rng.integers(0, 2**32, (4000, 2), dtype=np.uint32)
  if skewed:
    pool = pool[(hash_rows(pool, 2, 2000)[:, 0] < ROWS // 8)]
  events = pool[rng.zipf(1.3, (8, 14)) % len(pool)]
  return events, pool[rng.integers(0, len(pool), (16, 3))]  # 3 does not divide over the model axis


def run(name: str, out: Path) -> dict:
  """Runs one case."""
  mesh_name, axes, capacity, dtype, skewed = CASES[name]
  shape = MESHES[mesh_name]
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  config = TableConfig(sub_tables=2, rows=2000, width=8, dtype=dtype)
  exchange = Exchange(config, ROWS, axes, capacity)
  ids = tuple(jax.device_put(part, NamedSharding(mesh, P(BATCH_AXES))) for part in batch(skewed))
  weights = jax.random.normal(jax.random.key(0), (16,))

  def step(tables, ids, salt):
    plan = exchange.plan(ids)
    rows_KE = exchange.lookup(tables.rows_GE, plan)

    def loss(rows_KE):
      vectors = exchange.vectors(rows_KE, plan, ids)
      return sum(jnp.sum(jnp.sin(v + weights)) for v in vectors), vectors

    (_, vectors), grad_KE = jax.value_and_grad(loss, has_aux=True)(rows_KE)
    summed = exchange.sum_gradients(plan, grad_KE)
    tables = exchange.update(tables, plan, grad_KE, summed, jnp.float32(0.01), jnp.float32(0.1), salt)
    return tables, vectors, summed.squares, exchange.traffic(plan), exchange.largest_request(ids)

  with jax.set_mesh(mesh):
    own = NamedSharding(mesh, P(axes))
    tables = Tables(init_rows(config, ROWS, jnp.uint32(1)), jnp.zeros(ROWS))
    tables = jax.device_put(tables, Tables(own, own))
    step = jax.jit(step, donate_argnums=0)
    squares = []
    for number in range(STEPS):
      tables, vectors, square, traffic, largest = step(tables, ids, jnp.uint32(number))
      squares.append(float(square))
  np.savez(out / f'{name}.npz', rows=tables.rows_GE, accumulator=tables.accumulator_G,
           **{f'vectors{i}': v for i, v in enumerate(vectors)})  # fmt: skip
  shards = {}
  for shard in tables.rows_GE.addressable_shards:
    shards.setdefault(str(shard.index), []).append(np.asarray(shard.data))
  replicas_agree = all(np.array_equal(copies[0], copy) for copies in shards.values() for copy in copies)
  figures = {key: float(value) for key, value in traffic.items()}
  return {
    'squares': squares,
    'replicas_agree': replicas_agree,
    'parts': len(shards),
    'largest': int(largest),
    **figures,
  }


def main(out: str) -> None:
  """Runs all cases."""
  out = Path(out)
  (out / 'result.json').write_text(json.dumps({name: run(name, out) for name in CASES}))


if __name__ == '__main__':
  main(*sys.argv[1:])
