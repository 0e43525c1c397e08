"""`pinfm bench serving --parts rows`: a bundle with the paper's 20.48 B parameters is built, opened, read and served.

Its rows are generated: a lookup costs what it costs whatever the values are. What is measured runs in a process of its
own (`bench.serving_rows_measure`), so that its memory is the memory of serving.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from pinfm_jax.bench.plot import count
from pinfm_jax.bench.results import Figure
from pinfm_jax.bench.timing import Spread, ratios
from pinfm_jax.config import MeshConfig, PinFMConfig, RankerConfig, TableConfig, TowerConfig
from pinfm_jax.data.featurize import FeatureSchema
from pinfm_jax.data.info import Features, IdTypes
from pinfm_jax.errors import UserError
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, DenseStats, RankingBatch, RankingModel
from pinfm_jax.progress import Progress
from pinfm_jax.serve.bundle import TABLES, TrainedRanker, export_bundle
from pinfm_jax.serve.quantize import PackedRows, row_bytes
from pinfm_jax.train.finetune import feature_spec
from pinfm_jax.train.sharding import make_mesh

_LENGTH = 32
_PART_ROWS = 1 << 18
_SCHEMA = FeatureSchema(Features((), (), ()), 0, 1, 0, _LENGTH, ('save',))


@dataclass(frozen=True)
class RowSizes:
  """What is measured; the defaults are the paper's tables.

  Attributes:
    sub_tables: S.
    rows: R of a sub-table.
    width: E, packed as int4.
    warm_ids: looked up at once from the page cache.
    cold_ids: looked up at once from the disk.
    batches: of ids, which the warm rounds go through.
    rounds: timed.
    requests: scored in a batch of 256 candidates each.
  """

  sub_tables: int = 8
  rows: int = 80_000_000
  width: int = 32
  warm_ids: int = 8192
  cold_ids: int = 512
  batches: int = 4
  rounds: int = 20
  requests: int = 8

  @property
  def table_bytes(self) -> int:
    """Size of tables.bin."""
    return self.sub_tables * self.rows * row_bytes(self.width, 'int4')


FULL_ROWS = RowSizes()
QUICK_ROWS = RowSizes(sub_tables=2, rows=200_000, warm_ids=512, cold_ids=64, batches=2, rounds=3, requests=2)


def measure_rows(directory: str | Path, sizes: RowSizes = FULL_ROWS, keep: bool = False) -> list[Figure]:
  """Builds the bundle, and opens, reads and serves it in another process.

  Args:
    directory: where the bundle is made; needs the space of the tables.
    sizes: what is measured.
    keep: leave the bundle there.

  Returns:
    The figures.

  Raises:
    UserError: no space.
  """
  bundle = Path(directory) / 'bundle_rows'
  free, needed = shutil.disk_usage(directory).free, int(1.02 * sizes.table_bytes) + (64 << 20)
  if free < needed:
    raise UserError(
      f'{directory} has {free / 1e9:.1f} GB free, the tables need {needed / 1e9:.1f} GB: name another --out'
    )
  begin = time.perf_counter()
  try:
    build_bundle(bundle, sizes)
    built = time.perf_counter() - begin
    return [*_build_figures(sizes, built), *_figures(_measured(bundle, sizes), sizes)]
  finally:
    if not keep:
      shutil.rmtree(bundle, ignore_errors=True)


def build_bundle(out: Path, sizes: RowSizes) -> Path:
  """A bundle of a tiny tower with generated tables, packed already."""
  tables = TableConfig(sizes.sub_tables, sizes.rows, sizes.width)
  tower = TowerConfig(layers=2, width=32, heads=2, mlp_ratio=2, output_width=16, max_positions=_LENGTH + 1)
  model = PinFMConfig(tables, tower, num_actions=2, num_surfaces=1)
  ranker = RankerConfig(cross_layers=1, mlp=(16,), item_buckets=0, module_width=8, embedding_width=4)
  spec = feature_spec(_SCHEMA)
  stats = DenseStats(*(jnp.full(spec.num_dense, value, jnp.float32) for value in (0, 100, 0, 1)))
  with jax.set_mesh(make_mesh(MeshConfig())):
    module, batch = RankingModel(model, ranker, spec), _batch(spec.num_dense, len(spec.sparse_sizes))
    vectors = (jnp.zeros((1, _LENGTH, tables.item_width)), jnp.zeros((1, 1, tables.item_width)))
    params = jax.jit(module.init)(jax.random.key(0), *vectors, batch, stats)['params']
    trained = TrainedRanker(
      model_config=model,
      ranker_config=ranker,
      schema=_SCHEMA,
      spec=spec,
      params=meta.unbox(params),
      rows_GE=PackedRows(_packed_parts(sizes), 'int4'),
      stats=stats,
      actions=('save', 'hide'),
      surfaces=('feed',),
      id_type=IdTypes('integer', 'integer'),
      history_block=8,
      run={'name': 'generated rows'},
    )
    export_bundle(out, trained, 'int4', overwrite=True)
  with open(out / TABLES, 'rb') as file:
    os.fsync(file.fileno())  # pages that are not on the disk yet could not be dropped from the page cache
  return out


def _packed_parts(sizes: RowSizes) -> Iterator[np.ndarray]:
  """Random codes, with a scale and a bias that give values of a trained table's size."""
  rng, total, size = (
    np.random.Generator(np.random.SFC64(0)),
    sizes.sub_tables * sizes.rows,
    row_bytes(sizes.width, 'int4'),
  )
  constants = np.array([0.01, -0.075], '<f2').view(np.uint8)
  progress = Progress('tables', total, 'rows')
  for start in range(0, total, _PART_ROWS):
    rows = min(_PART_ROWS, total - start)
    packed = rng.integers(0, 2**64, -(-rows * size // 8), np.uint64).view(np.uint8)[: rows * size].reshape(rows, size)
    packed[:, -4:] = constants
    yield packed
    progress.update(start + rows)
  progress.close()


def _batch(dense: int, sparse: int) -> RankingBatch:
  """One user with one candidate, to make the parameters from."""
  events = EventBatch(
    jnp.zeros((1, _LENGTH, 2), jnp.uint32),
    jnp.zeros((1, _LENGTH), jnp.int32),
    jnp.zeros((1, _LENGTH), jnp.uint32),
    jnp.ones((1, _LENGTH), bool),
  )
  candidates = CandidateBatch(
    jnp.zeros((1, 1, 2), jnp.uint32),
    jnp.ones((1, 1), bool),
    jnp.zeros((1, 1)),
    jnp.zeros((1, 1, dense)),
    jnp.zeros((1, 1, sparse), jnp.int32),
    jnp.zeros((1, 1, 0)),
  )
  return RankingBatch(events, candidates, jnp.zeros((1, 1, 1)), jnp.zeros(1, jnp.int32))


def _measured(bundle: Path, sizes: RowSizes) -> dict:
  """What the measuring process found."""
  command = [sys.executable, '-m', 'pinfm_jax.bench.serving_rows_measure', str(bundle), json.dumps(asdict(sizes))]
  result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
  if result.returncode:
    raise RuntimeError(f'the measuring process ended with code {result.returncode}')
  return json.loads(result.stdout.splitlines()[-1])


def _build_figures(sizes: RowSizes, seconds: float) -> list[Figure]:
  parameters = sizes.sub_tables * sizes.rows * sizes.width
  return [
    Figure('rows/parameters', 'parameters of the tables', parameters, unit=''),
    Figure('rows/table_bytes', 'their int4 rows', sizes.table_bytes, unit='bytes'),
    Figure('rows/build', 'bundle built, checksums included', seconds, unit='s'),
  ]


def _figures(found: Mapping, sizes: RowSizes) -> list[Figure]:
  figures = [
    Figure('rows/open', 'opened and checked, page cache cold', found['open_s'], unit='s', at_most=5.0),
    Figure('rows/start', 'the same with the start of the process and its imports', found['start_s'], unit='s'),
  ]
  for kind, ids, text in (('warm', sizes.warm_ids, 'in the page cache'), ('cold', sizes.cold_ids, 'on the disk')):
    own, plain = (tuple(found[kind][name]) for name in ('own', 'plain'))
    rates = {name: Spread.of(tuple(ids / s for s in seconds)) for name, seconds in (('own', own), ('plain', plain))}
    figures += [
      Figure.of(f'rows/{kind}/ratio', f'lookups over a plain gather, rows {text}', ratios(plain, own), at_least=0.5),
      Figure.of(f'rows/{kind}/own', f'lookups of items (hash and gather), rows {text}', rates['own'], unit='items/s'),
      Figure.of(f'rows/{kind}/plain', f'plain gather, rows {text}', rates['plain'], unit='items/s'),
    ]
  advised = ratios(tuple(found['cold']['advised']), tuple(found['cold']['own']))
  figures.append(
    Figure.of('rows/cold/advised', 'lookups over a plain gather that reads nothing ahead, rows on the disk', advised)
  )
  return [*figures, *_memory_figures(found), Figure(
    'rows/score', f'{sizes.requests} requests of 256 candidates scored, compiled before', found['score_s'], unit='s',
  )]  # fmt: skip


def _memory_figures(found: Mapping) -> list[Figure]:
  memory, cold = found['memory'], found['cold']
  return [
    Figure(
      'rows/memory/file', f'memory that {count(memory["rows"])} cold rows brought, a row',
      memory['file'] / memory['rows'], unit='bytes', at_most=memory['page'] * 1.05,
    ),
    Figure('rows/memory/anonymous', 'memory of the process besides', memory['anonymous'], unit='bytes'),
    Figure('rows/disk/own', 'read from the disk for a cold row', cold['own_bytes'] / cold['rows'], unit='bytes'),
    Figure('rows/disk/plain', 'the same of the plain gather', cold['plain_bytes'] / cold['rows'], unit='bytes'),
    Figure('rows/peak', 'peak memory of opening, these rows and scoring', found['peak'], unit='bytes'),
  ]  # fmt: skip


def rows_notes(sizes: RowSizes) -> list[str]:
  """What a reader of the figures must know."""
  return [
    f'Rows: {sizes.sub_tables} x {sizes.rows:,} of {sizes.width} values, generated. A lookup hashes ids and gathers '
    'their rows through MappedRows; the plain gather indexes an array over a map of the same file by row numbers that '
    'are known before. Both take turns; ids are new in each cold round, before which the file is dropped from the page '
    'cache. The memory of a row is of a fresh process whose page cache was cold: a page for each row at most.',
  ]
