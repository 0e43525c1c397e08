"""`pinfm bench tables`: what the number of table rows costs, in a whole pretraining step and in the tables alone."""

import gc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pinfm_jax.bench import plot
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.bench.segments import Stepper, random_segments
from pinfm_jax.bench.timing import Spread, interleave, ratios
from pinfm_jax.bench.traffic import DEVICES, measure_traffic
from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig, TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.model.tables import Tables, as_float32, gather_rows, init_rows, item_vectors, plan_rows, update_rows
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import make_mesh

Array = jax.Array

PARTS = ('step', 'alone', 'dense', 'traffic')


@dataclass(frozen=True)
class TableSizes:
  """What is measured; the defaults are the sizes at which the ratios are asked.

  Attributes:
    sub_tables: of the full step.
    small: rows a sub-table of the full step's small tables.
    large: of its large tables.
    width: of a row.
    dtype: of the stored rows; the comparison with a dense gradient is in float32.
    tower: of the full step: a small one, beside which the cost of the tables shows.
    segments: a batch of the full step.
    length: events a segment.
    columns: negatives of its losses.
    alone_small: rows of the one sub-table, small.
    alone_large: rows of the one sub-table, large.
    dense_rows: rows of the one sub-table that is compared with a dense gradient.
    dense_ids: looked up and updated a step there; each number is measured.
    ids: looked up and updated a step by the tables alone, all fresh.
    rounds: timed rounds.
    dense_rounds: timed rounds of the dense comparison.
    quick: nothing is asked of these sizes, and the traffic is that of a small batch.
  """

  sub_tables: int = 8
  small: int = 128_000
  large: int = 8_000_000
  width: int = 32
  dtype: str = 'float32'
  tower: TowerConfig = TowerConfig(layers=2, width=256, heads=8, output_width=256, max_positions=256)
  segments: int = 16
  length: int = 256
  columns: int = 1024
  alone_small: int = 1_000_000
  alone_large: int = 64_000_000
  dense_rows: int = 8_000_000
  dense_ids: tuple[int, ...] = (4_096, 16_384)
  ids: int = 16_384
  rounds: int = 15
  dense_rounds: int = 9
  quick: bool = False


FULL = TableSizes()
QUICK = TableSizes(
  small=200, large=2_000, width=8, tower=TowerConfig(layers=1, width=16, heads=2, output_width=16, max_positions=16),
  segments=4, length=16, columns=16, alone_small=1_000, alone_large=8_000, dense_rows=20_000, dense_ids=(128,), ids=256,
  rounds=3, dense_rounds=2, quick=True,
)  # fmt: skip


def bench_tables(out: str | Path, parts: tuple[str, ...] = PARTS, sizes: TableSizes = FULL) -> Findings:
  """Measures the parts asked for; prints and writes the results.

  Args:
    out: directory of results.json, results.md, tables.png and traffic.png.
    parts: some of PARTS.
    sizes: what is measured.

  Raises:
    UserError: a part that does not exist, or a directory that cannot be made.
  """
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise UserError(f"--parts names '{unknown[0]}'; expected some of: {','.join(PARTS)}")
  directory, machine = make_directory(out), environment()
  figures: list[Figure] = []
  for part in parts:
    print(f'== {part}', flush=True)
    if part == 'traffic':
      figures += measure_traffic(directory, sizes.quick)
    else:
      figures += {'step': _full_step, 'alone': _alone, 'dense': _dense}[part](sizes)
    gc.collect()  # the next part needs the memory of this one's tables
  if sizes.quick:
    figures = [replace(figure, at_most=None, at_least=None) for figure in figures]
  notes = ['Every timed step brings fresh uniform ids, so that rows come from memory and not from a cache.']
  if 'traffic' in parts:
    notes.append(
      f'Traffic: {DEVICES} simulated devices, 8 x 80 M x 32 float32 rows, global batch of 512 x 64 events (--quick: '
      'less); the capacity is set on a first batch, the figures are of 8 others. What a device sends to itself counts.'
    )
  settings = asdict(sizes) | {'tower': f'{sizes.tower.layers} layers x {sizes.tower.width}'}
  findings = Findings('Tables: cost against the number of rows', settings, figures, notes, machine)
  write_findings(findings, directory)
  for unit, label, name in (('s', 'seconds a step', 'tables'), ('bytes', 'bytes a step', 'traffic')):
    wanted = [
      figure for figure in figures if figure.unit == unit and figure.name.startswith('traffic') == (unit != 's')
    ]
    values = {figure.text: figure.value for figure in wanted}
    if values:
      plot.bars(directory / f'{name}.png', findings.title, values, label)
  return findings


def _full_step(sizes: TableSizes) -> list[Figure]:
  """A pretraining step with large and with small tables."""
  mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
  actions, surfaces = 4, 3
  batches = [
    random_segments(rng, sizes.segments, sizes.length, 2**62, actions, surfaces) for _ in range(sizes.rounds + 2)
  ]
  pretrain = PretrainConfig(
    steps=1000,
    batch_segments=sizes.segments,
    segment_length=sizes.length,
    downstream_length=sizes.length * 3 // 4,
    max_columns=sizes.columns,
  )
  with jax.set_mesh(mesh):
    runs = {}
    for name, rows in (('small', sizes.small), ('large', sizes.large)):
      tables = TableConfig(sub_tables=sizes.sub_tables, rows=rows, width=sizes.width, dtype=sizes.dtype)
      model = PinFMConfig(tables, sizes.tower, num_actions=actions, num_surfaces=surfaces)
      runs[name] = Stepper(PretrainTask(model, pretrain, action_bits=0), mesh, batches)
    seconds = interleave(runs, sizes.rounds)
  return [
    Figure.of(
      'step/ratio', f'full step, {_shape(sizes, "large")} over {_shape(sizes, "small")}',
      ratios(seconds['large'], seconds['small']), at_most=1.15,
    ),
    *_memory('step', 'full step', runs['large'], runs['small']),
    *(
      Figure.of(f'step/{name}', f'full step, {_shape(sizes, name)}', Spread.of(seconds[name]), unit='s')
      for name in ('small', 'large')
    ),
  ]  # fmt: skip


def _alone(sizes: TableSizes) -> list[Figure]:
  """Lookup and update of one sub-table, large and small."""
  words = _fresh_ids(sizes.ids, sizes.rounds + 2)
  runs = {
    name: _SparseTable(_one(rows, sizes), words)
    for name, rows in (('small', sizes.alone_small), ('large', sizes.alone_large))
  }
  seconds = interleave(runs, sizes.rounds)
  names = {'small': plot.count(sizes.alone_small), 'large': plot.count(sizes.alone_large)}
  return [
    Figure.of(
      'alone/ratio', f'tables alone, {names["large"]} over {names["small"]} rows',
      ratios(seconds['large'], seconds['small']), at_most=2.5,
    ),
    *_memory('alone', 'tables alone', runs['large'], runs['small']),
    *(
      Figure.of(f'alone/{name}', f'tables alone, {names[name]} rows', Spread.of(seconds[name]), unit='s')
      for name in ('small', 'large')
    ),
  ]  # fmt: skip


def _dense(sizes: TableSizes) -> list[Figure]:
  """Lookup and update of one sub-table against the gradient of a dense lookup with Optax's Adagrad."""
  config = replace(_one(sizes.dense_rows, sizes), dtype='float32')  # what the dense table is stored in
  figures, rows = [], plot.count(sizes.dense_rows)
  for ids in sizes.dense_ids:
    words = _fresh_ids(ids, sizes.dense_rounds + 1)
    runs = {'sparse': _SparseTable(config, words), 'dense': _DenseTable(config, words)}
    seconds = interleave(runs, sizes.dense_rounds, warmup=1)
    name, where = f'dense/{ids}', f'{rows} rows, {ids:,} ids'
    ratio, text = (
      ratios(seconds['dense'], seconds['sparse']),
      f'dense gradient and optax.adagrad over rows alone, {where}',
    )
    figures += [
      Figure.of(f'{name}/ratio', text, ratio, at_least=100.0),
      Figure.of(f'{name}/dense', f'dense gradient and optax.adagrad, {where}', Spread.of(seconds['dense']), unit='s'),
      Figure.of(f'{name}/sparse', f'rows alone, {where}', Spread.of(seconds['sparse']), unit='s'),
    ]
    del runs
    gc.collect()  # a dense table takes several times its size
  return figures


class _SparseTable:
  """Lookup, gradient and update of the rows that a batch touches; step i takes the ids i."""

  def __init__(self, config: TableConfig, words_NM2: Array):
    self._words_NM2, self.steps = words_NM2, 0
    self._weight_MV = _weights(words_NM2.shape[1], config.item_width)
    self.arrays = jax.jit(
      lambda salt: Tables(init_rows(config, config.rows, salt), jnp.zeros(config.rows, jnp.float32))
    )(jnp.uint32(0))

    def step(tables, words_M2, weight_MV, number):
      plan = plan_rows(words_M2, config)
      gathered_KE = as_float32(gather_rows(tables.rows_GE, plan.unique_K))
      grad_KE = jax.grad(lambda rows: _loss(item_vectors(rows, plan.inverse_MS), weight_MV))(gathered_KE)
      return update_rows(tables, plan.unique_K, grad_KE, 0.05, number)

    arguments = self.arrays, words_NM2[0], self._weight_MV, jnp.uint32(0)
    self._step = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes

  def __call__(self, number: int) -> Any:
    words_M2 = self._words_NM2[number % len(self._words_NM2)]
    self.arrays = self._step(self.arrays, words_M2, self._weight_MV, jnp.uint32(number))
    self.steps += 1
    return self.arrays


class _DenseTable:
  """The plain way: the whole table is a parameter, its gradient is as large, and Optax updates all of it."""

  def __init__(self, config: TableConfig, words_NM2: Array):
    self._words_NM2, self.steps = words_NM2, 0
    self._weight_MV = _weights(words_NM2.shape[1], config.item_width)
    optimizer = optax.adagrad(0.05)

    def step(table_RE, state, words_M2, weight_MV):
      rows_M = hash_rows(words_M2, 1, config.rows, config.hash_seed)[:, 0]
      grad_RE = jax.grad(lambda table: _loss(table[rows_M], weight_MV))(table_RE)
      update_RE, state = optimizer.update(grad_RE, state, table_RE)
      return optax.apply_updates(table_RE, update_RE), state

    table_RE = jax.jit(lambda: jnp.full((config.rows, config.width), config.init_scale))()
    self.arrays = table_RE, jax.jit(optimizer.init)(table_RE)
    arguments = *self.arrays, words_NM2[0], self._weight_MV
    self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes

  def __call__(self, number: int) -> Any:
    words_M2 = self._words_NM2[number % len(self._words_NM2)]
    self.arrays = self._step(*self.arrays, words_M2, self._weight_MV)
    self.steps += 1
    return self.arrays


def _one(rows: int, sizes: TableSizes) -> TableConfig:
  return TableConfig(sub_tables=1, rows=rows, width=sizes.width, dtype=sizes.dtype)


def _loss(vectors_MV: Array, weight_MV: Array) -> Array:
  """A loss whose gradient differs from id to id and costs next to nothing."""
  return jnp.sum(vectors_MV * weight_MV)


def _weights(ids: int, width: int) -> Array:
  return jax.random.normal(jax.random.key(1), (ids, width))


def _fresh_ids(ids: int, steps: int) -> Array:
  """uint32 [steps, ids, 2], on the device before any clock runs."""
  return jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (steps, ids, 2), dtype=np.uint32))


def _memory(name: str, text: str, large: Any, small: Any) -> list[Figure]:
  """Temporary memory of both compiled programs, which should be equal."""
  ratio = large.temporary_bytes / max(small.temporary_bytes, 1)
  return [
    Figure(f'{name}/temporary_ratio', f'{text}: temporary memory, large over small', ratio, at_most=1.0, at_least=1.0),
    Figure(f'{name}/temporary', f'{text}: temporary memory, large', large.temporary_bytes, unit='bytes'),
  ]


def _shape(sizes: TableSizes, name: str) -> str:
  return f'{sizes.sub_tables} x {plot.count(getattr(sizes, name))} rows'
