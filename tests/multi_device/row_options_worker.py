"""Adam for table rows and averages of the weights on a mesh; started by test_row_options_sharded.py.

python row_options_worker.py: prints JSON, the largest difference between one device and each mesh.
"""

import json
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import MeshConfig, TableConfig, UpdateConfig
from pinfm_jax.model.hashing import EXACT_ROWS, key_words
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.sharding import AXES, put_batch
from pinfm_jax.train.step import init_state, make_step

RULE = UpdateConfig(table_learning_rate=0.05, table_rule='adam', warmup_steps=0, clip_norm=1.0)
LAYOUTS = {
  'one': MeshConfig(1, 1, 1),
  'rounds': MeshConfig(2, 2, 2, exchange_capacity=3),
  'replicas': MeshConfig(4, 2, 1, table_axes=('fsdp',)),
}


@dataclass(frozen=True)
class Rows:
  """Pulls the rows of a batch's ids towards its numbers."""

  update: Update = Update(RULE, 100, ema_decay=0.7, ema_tables=True)
  tables: TableConfig = TableConfig(sub_tables=1, rows=2000, width=4, hash_seed=EXACT_ROWS)

  def init(self, key):
    return {'pinfm': {'x': jax.random.normal(key)}, 'log_temperature': jnp.zeros(())}

  def ids(self, batch, step):
    return (batch['id'],)

  def observe(self, constants, batch, step):
    return constants

  def loss(self, params, vectors, batch, step, key, constants):
    return jnp.sum(jnp.square(vectors[0] - batch['y'])) + jnp.square(params['pinfm']['x'] - 1), {}


def run(layout: MeshConfig) -> tuple[dict[str, np.ndarray], float]:
  """The table and its average after some steps of skewed ids, and the rounds of the last exchange."""
  shape = (layout.data, layout.fsdp, layout.model)
  devices = jax.devices()[: math.prod(shape)]
  mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)
  with jax.set_mesh(mesh):
    state, step = init_state(Rows(), mesh, 0, layout=layout)(), make_step(Rows(), layout)
    for number in range(5):
      rng = np.random.default_rng(number)
      ids = rng.integers(0, 60, (8, 6)).astype(np.uint64)  # all at one owner
      batch = {'id': key_words(ids), 'y': rng.normal(size=(8, 6, 1)).astype(np.float32)}
      state, figures = step(state, put_batch(batch, mesh))
    arrays = {'rows': state.tables.rows_GE, 'moments': state.tables.moments_G2E, 'average': state.average['rows']}
    return {name: np.asarray(x) for name, x in arrays.items()}, float(figures['exchange/rounds'])


def main() -> None:
  """Compares the meshes with one device."""
  expected, found = run(LAYOUTS['one'])[0], {}
  for name in ('rounds', 'replicas'):
    arrays, rounds = run(LAYOUTS[name])
    found[name] = {key: float(np.max(np.abs(arrays[key] - expected[key]))) for key in arrays} | {'exchanges': rounds}
  moved = float(np.mean(np.any(expected['moments'][:60, 0] != 0, axis=1)))
  print(json.dumps({'devices': jax.device_count(), 'moved': moved, 'found': found}))


if __name__ == '__main__':
  main()
