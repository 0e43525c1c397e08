"""Row traffic between 8 devices: what the exchange of deduplicated ids moves, and what automatic partitioning moves.

Started by `pinfm bench tables` as `python -m pinfm_jax.bench.traffic OUT.json WORKDIR QUICK` in a process of its own,
because the number of simulated devices is fixed when JAX starts. No table is allocated: plans need ids alone, and the
automatic path is compiled for abstract arrays.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pinfm_jax.bench.results import Figure
from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.pipeline import Segments, training_batches
from pinfm_jax.data.prepare import prepare
from pinfm_jax.data.simulator import SimulatorConfig, simulate, simulated_prepare_config
from pinfm_jax.model.tables import Tables, gather_rows, item_vectors, plan_rows, update_rows
from pinfm_jax.train.exchange import Exchange
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import batch_sharding, make_mesh, replicated, table_sharding
from pinfm_jax.train.step import TrainState, fitted_layout

DEVICES = 8


@dataclass(frozen=True)
class TrafficSizes:
  """The named batches: segments of the simulated feed, and uniform ids, of one size.

  Attributes:
    feed: preset of the simulator.
    segments: of the global batch.
    length: events a segment.
    tables: the paper's, by default; plans need no memory for them.
    batches: the first one sets the capacity (`train.step.fitted_layout`), the others are measured.
  """

  feed: str = 'quickstart'
  segments: int = 512
  length: int = 64
  tables: TableConfig = TableConfig()
  batches: int = 9


QUICK = TrafficSizes('tiny', 32, 16, TableConfig(rows=5_000), batches=3)


def measure_traffic(workdir: Path, quick: bool) -> list[Figure]:
  """Runs this module with 8 simulated CPU devices and returns its figures.

  Raises:
    RuntimeError: the process failed, with the end of what it said.
  """
  out = workdir / 'traffic.json'
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={DEVICES}'
  environment = {**os.environ, 'XLA_FLAGS': flags.strip(), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-m', 'pinfm_jax.bench.traffic', str(out), str(workdir), str(int(quick))]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError(f'{" ".join(command)} failed: {done.stderr[-2000:]}')
  figures = [Figure(**values) for values in json.loads(out.read_text(encoding='utf-8'))]
  out.unlink()
  return figures


def collective_bytes(hlo: str, devices: int) -> dict[str, int]:
  """Bytes that each device sends in the collectives of a compiled program, by kind; rings where they reduce.

  Every collective counts once: the program must not repeat one in a loop.

  Args:
    hlo: text of the compiled program.
    devices: that take part in each collective.
  """
  sent: dict[str, int] = {}
  pattern = r'= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\('
  for shapes, kind in re.findall(pattern, hlo):
    size = sum(
      int(bits) // 8 * math.prod(int(n) for n in dims.split(',') if n)
      for bits, dims in re.findall(r'[a-z]+(\d+)\[([\d,]*)\]', shapes.replace('pred[', 'u8['))
    )
    times = {'all-reduce': 2 * (devices - 1) / devices, 'reduce-scatter': devices - 1, 'collective-permute': 1.0}
    sent[kind] = sent.get(kind, 0) + round(size * times.get(kind, (devices - 1) / devices))
  return sent


def exchange_bytes(config: TableConfig, places: float, rounds: float) -> dict[str, float]:
  """Bytes that cross between devices in a step of `train.exchange`, by what they are.

  Every round of the lookup sends ids and rows. Gradients go back with their ids, once for their norm and, in rounds
  after the first, once more for the update.

  Args:
    config: width and storage of the rows.
    places: of all rounds of one pass (`Exchange.traffic`); a share 1 / devices of them stays at home and counts too.
    rounds: of one pass.
  """
  passes = (2 * rounds - 1) / rounds
  return {
    'rows': places * config.width * (2 if config.dtype == 'bfloat16' else 4),
    'ids': places * 4 * (1 + passes),
    'gradients': places * config.width * 4 * passes,
  }


def automatic_bytes(mesh: Mesh, config: TableConfig, shape: tuple[int, int]) -> dict[str, int]:
  """Collectives of the same lookup and update when the compiler partitions it, by kind, bytes sent by a device."""
  rows = table_sharding(mesh)

  def step(tables: Tables, ids: jax.Array) -> Tables:
    plan = plan_rows(ids.reshape(-1, 2), config)

    def loss(gathered: jax.Array) -> jax.Array:
      vectors = item_vectors(gathered, plan.inverse_MS).reshape(*shape, -1)
      return jnp.sum(jax.lax.with_sharding_constraint(vectors, batch_sharding(mesh)) ** 2)

    grad = jax.grad(loss)(gather_rows(tables.rows_GE, plan.unique_K))
    return update_rows(tables, plan.unique_K, grad, 0.1, jnp.uint32(0))

  size = config.sub_tables * config.rows
  tables = Tables(
    jax.ShapeDtypeStruct((size, config.width), jnp.float32, sharding=rows),
    jax.ShapeDtypeStruct((size,), jnp.float32, sharding=rows),
  )
  ids = jax.ShapeDtypeStruct((*shape, 2), jnp.uint32, sharding=batch_sharding(mesh))
  compiled = jax.jit(step, donate_argnums=0, out_shardings=Tables(rows, rows)).lower(tables, ids).compile()
  return collective_bytes(compiled.as_text(), mesh.size)


def _figures(name: str, batches: list[np.ndarray], mesh: Mesh, sizes: TrafficSizes) -> list[Figure]:
  """One kind of batch: the capacity from its first, the traffic of the others."""
  total = sizes.tables.sub_tables * sizes.tables.rows
  rows = -(-total // mesh.size) * mesh.size
  ids = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
  # The rule that training follows, on a state whose table is a shape alone.
  tables = Tables(jax.ShapeDtypeStruct((rows, sizes.tables.width), jnp.float32), None)
  task = PretrainTask(PinFMConfig(sizes.tables), PretrainConfig(), 0)
  state = TrainState(jnp.int32(0), None, None, None, tables)
  layout = fitted_layout(task, state, MeshConfig(), {'item': ids[0]})
  exchange = Exchange(sizes.tables, rows, capacity=layout.exchange_capacity)
  traffic = jax.jit(lambda x: exchange.traffic(exchange.plan((x,))), out_shardings=replicated(mesh))
  found = [{k.split('/')[1]: float(v) for k, v in traffic(x).items()} for x in ids[1:]]
  needed, places, rounds = (float(np.mean([f[k] for f in found])) for k in ('rows', 'places', 'rounds'))
  moved = exchange_bytes(sizes.tables, places / mesh.size, rounds)
  ratios = [f['places'] / f['rows'] for f in found]
  return [
    Figure(
      f'traffic/{name}/ratio', f'traffic, {name}: row capacity over distinct rows', places / needed, min(ratios),
      max(ratios), at_most=1.3,
    ),
    Figure(f'traffic/{name}/rounds', f'traffic, {name}: rounds', rounds, unit=''),
    Figure(f'traffic/{name}/distinct', f'traffic, {name}: distinct rows of a device', needed / mesh.size, unit='rows'),
    *(
      Figure(f'traffic/{name}/{kind}', f'traffic, {name}: {kind} of a device', value, unit='bytes')
      for kind, value in moved.items()
    ),
    Figure(f'traffic/{name}/all', f'traffic, {name}: all of a device', sum(moved.values()), unit='bytes'),
  ]  # fmt: skip


def _simulated(workdir: Path, sizes: TrafficSizes) -> Iterator[np.ndarray]:
  """Segments as pretraining reads them."""
  data = workdir / f'segments_{sizes.feed}'
  if not (data / 'dataset.json').exists():
    feed = simulate(SimulatorConfig.preset(sizes.feed), workdir / f'raw_{sizes.feed}')
    prepare(simulated_prepare_config(feed, data))
  segments = Segments.before(PreparedDataset.open(data), None, sizes.length)
  return (batch['item'] for batch in training_batches(segments, sizes.segments, 0, 0))


def main(out: str, workdir: str, quick: str) -> None:
  """Measures both kinds of batches and writes their figures."""
  sizes, mesh = QUICK if int(quick) else TrafficSizes(), make_mesh(MeshConfig())
  shape, rng = (sizes.segments, sizes.length), np.random.default_rng(0)
  batches = {
    'simulated segments': list(itertools.islice(_simulated(Path(workdir), sizes), sizes.batches)),
    'uniform ids': [rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32) for _ in range(sizes.batches)],
  }
  with jax.set_mesh(mesh):
    figures = [figure for name, arrays in batches.items() for figure in _figures(name, arrays, mesh, sizes)]
    automatic = automatic_bytes(mesh, sizes.tables, shape)
  for kind, value in automatic.items():
    text = f'traffic, automatic partitioning: {kind} of a device'
    figures.append(Figure(f'traffic/automatic/{kind}', text, value, unit='bytes'))
  text = 'traffic, automatic partitioning: all of a device, any ids'
  figures.append(Figure('traffic/automatic/all', text, sum(automatic.values()), unit='bytes'))
  Path(out).write_text(json.dumps([asdict(figure) for figure in figures]), encoding='utf-8')


if __name__ == '__main__':
  main(*sys.argv[1:])
