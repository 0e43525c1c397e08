"""`pinfm bench pretrain`: tokens/s of a pretraining step, alone and against a published PyTorch rival in one run."""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from pinfm_jax.bench import plot
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.bench.rival import Rival, Shape, find_rival, load_rival, rival_commit, torch_is_installed
from pinfm_jax.bench.segments import Stepper, random_segments
from pinfm_jax.bench.timing import Spread, interleave, ratios
from pinfm_jax.bench.tower import measure_tower
from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig, TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import make_mesh

_ACTIONS, _SURFACES = 2, 2

PARTS = ('speed', 'tower')

# Catalogue size -> how many times the rival's tokens/s are asked.
ASKED = {12_000: 1.0, 1_000_000: 5.0}


@dataclass(frozen=True)
class TrainingSizes:
  """What is measured.

  Attributes:
    shape: width, depth, heads and length of both sides.
    batches: sequences a step; each is measured.
    items: catalogue sizes; each is measured.
    columns: negatives of each of our anchors.
    rounds: timed rounds.
    threads: of both sides.
    tower: whose share of the FLOP/s of plain matmuls is measured.
    tower_batch: histories and their length.
    quick: nothing is asked of these sizes.
  """

  shape: Shape = Shape(width=64, layers=2, heads=1, length=200)
  batches: tuple[int, ...] = (16, 128)
  items: tuple[int, ...] = (12_000, 1_000_000)
  columns: int = 128
  rounds: int = 9
  threads: int = 2
  tower: TowerConfig = TowerConfig(layers=4, width=512, heads=8, max_positions=256)
  tower_batch: tuple[int, int] = (8, 256)
  quick: bool = False


FULL = TrainingSizes()
QUICK = TrainingSizes(
  Shape(width=8, layers=1, heads=1, length=16), (4,), (60, 600), columns=8, rounds=2, threads=1, quick=True,
  tower=TowerConfig(layers=2, width=16, heads=2, max_positions=16), tower_batch=(2, 16),
)  # fmt: skip


def bench_pretrain(
  out: str | Path, rival: str | Path | None = None, parts: tuple[str, ...] = PARTS, sizes: TrainingSizes = FULL
) -> Findings:
  """Measures our step for each catalogue size and batch, interleaved with the rival's where there is one.

  Args:
    out: directory of results.json, results.md and pretrain.png.
    rival: checkout of the rival (see `rival.find_rival`), or None to measure our step alone.
    parts: some of PARTS.
    sizes: what is measured.

  Raises:
    UserError: a part that does not exist, no rival in that directory, sizes that do not fit, or no directory.
  """
  _check(parts, sizes)
  module = _module(rival) if 'speed' in parts else None
  directory = make_directory(out)
  machine = environment(('torch',) if module else ())
  figures: list[Figure] = []
  speeds: dict[str, dict[int, float]] = {}
  if 'tower' in parts:
    print('== tower', flush=True)
    figures += _tower(sizes)
  for items, batch in itertools.product(sizes.items, sizes.batches) if 'speed' in parts else ():
    print(f'== {items:,} items, {batch} sequences of {sizes.shape.length} a step', flush=True)
    figures += _compare(items, batch, module, sizes, speeds)
    gc.collect()
  if sizes.quick:
    figures = [replace(figure, at_most=None, at_least=None) for figure in figures]
  tower = f'{sizes.tower.layers} layers x {sizes.tower.width}, {sizes.tower.heads} heads'
  settings = {**asdict(sizes), 'tower': tower, 'rival': rival_commit(module) if module else 'none'}
  findings = Findings('Pretraining: tokens a second', settings, figures, _notes(parts, sizes, rival, module), machine)
  write_findings(findings, directory)
  if speeds:
    series = {name: (list(points), list(points.values())) for name, points in speeds.items()}
    plot.lines(directory / 'pretrain.png', [('Full training step', 'sequences a step', series)], 'tokens/s', log_y=True)
  return findings


def _tower(sizes: TrainingSizes) -> list[Figure]:
  """The tower's share of what plain matmuls reach."""
  users, length = sizes.tower_batch
  found = measure_tower(sizes.tower, users, length, repeats=sizes.rounds)
  text = f'tower, d={sizes.tower.width}, L={length}: share of the FLOP/s of its plain matmuls'
  share = Spread(found['ratio_median'], found['ratio_min'], found['ratio_max'])
  return [
    Figure.of('tower/share', text, share, at_least=0.7),
    Figure('tower/flops', 'tower: at best', found['tower_flops'] / 1e9, unit='GFLOP/s'),
    Figure('tower/plain_flops', 'plain matmuls: at best', found['plain_flops'] / 1e9, unit='GFLOP/s'),
  ]


def _compare(
  items: int, batch: int, module: ModuleType | None, sizes: TrainingSizes, speeds: dict[str, dict[int, float]]
) -> list[Figure]:
  """One catalogue size and batch."""
  mesh, tokens = make_mesh(MeshConfig()), batch * sizes.shape.length
  with jax.set_mesh(mesh):
    runs = {'ours': _ours(items, batch, sizes)}
    if module is not None:
      runs['SASRec'] = Rival(module, items, sizes.shape, batch, sizes.threads)
    seconds = interleave(runs, sizes.rounds)
  where = f'{items:,} items, batch {batch}'
  figures = []
  for name in runs:
    speed = Spread.of(tuple(tokens / s for s in seconds[name]))
    figures.append(Figure.of(f'{items}/{batch}/{name}', f'{where}: {name}', speed, unit='tokens/s'))
    speeds.setdefault(f'{name}, {items:,} items', {})[batch] = speed.median
  if module is not None:
    ratio = ratios(seconds['SASRec'], seconds['ours'])
    text = f'{where}: ours over SASRec'
    figures.insert(0, Figure.of(f'{items}/{batch}/ratio', text, ratio, at_least=ASKED.get(items)))
  return figures


def _ours(items: int, batch: int, sizes: TrainingSizes) -> Stepper:
  """Our step at the rival's shape, with the next-token loss, which is what the rival trains."""
  shape, rng = sizes.shape, np.random.default_rng(0)
  tower = TowerConfig(
    layers=shape.layers, width=shape.width, heads=shape.heads, mlp_ratio=1, output_width=shape.width,
    max_positions=shape.length,
  )  # fmt: skip
  tables = TableConfig(sub_tables=1, rows=items, width=shape.width)
  model = PinFMConfig(tables, tower, num_actions=_ACTIONS, num_surfaces=_SURFACES)
  pretrain = PretrainConfig(
    steps=1000, batch_segments=batch, segment_length=shape.length, max_columns=sizes.columns, mtl_weight=0.0,
    ftl_weight=0.0,
  )  # fmt: skip
  batches = [random_segments(rng, batch, shape.length, items, _ACTIONS, _SURFACES) for _ in range(4)]
  return Stepper(PretrainTask(model, pretrain, action_bits=0), make_mesh(MeshConfig()), batches)


def _module(rival: str | Path | None) -> ModuleType | None:
  """The rival's module, or None where there is none to drive; what is left out is said at once."""
  path = None if rival is None else find_rival(rival)
  if path is not None and torch_is_installed():
    return load_rival(path)
  print(_SKIPPED[rival is None], flush=True)
  return None


_SKIPPED = {
  True: 'Skipped: the comparison with SASRec; give a checkout of it with --rival DIR.',
  False: 'Skipped: the comparison with SASRec; PyTorch is not installed (pip install torch).',
}


def _notes(
  parts: tuple[str, ...], sizes: TrainingSizes, rival: str | Path | None, module: ModuleType | None
) -> list[str]:
  """What was measured, what differs between the two sides, and what was left out."""
  notes = []
  if 'tower' in parts:
    notes.append(
      "Tower: the decoder's step, forward and backward, against plain matmuls of the shapes of its matmuls, which do "
      'nothing else. The whole attention square counts on both sides, though the decoder skips what causality hides.'
    )
  if 'speed' in parts:
    notes.append(
      f'Ours: the whole pretraining step (ids hashed and deduplicated, {sizes.columns} in-batch negatives an anchor, '
      'AdamW, row-wise Adagrad on the rows touched, batch copied from the host) with phi_in, phi_out and psi, which '
      'the rival lacks; one sub-table with as many rows as there are items, an MLP as wide as that of the rival.'
    )
    notes.append(
      _SKIPPED[rival is None]
      if module is None
      else f'SASRec: {rival_commit(module)}, its published step (post-LN blocks, one negative a position, dense Adam '
      'over all parameters) without dropout and without its L2 term, which weighs 0. Both sides have uniform random '
      'items. Small batches favour ours, since the cost of a dense update does not depend on them.'
    )
  return notes


def _check(parts: tuple[str, ...], sizes: TrainingSizes) -> None:
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise UserError(f"--parts names '{unknown[0]}'; expected some of: {','.join(PARTS)}")
  shape = sizes.shape
  named: dict[str, Sequence[int]] = {
    '--width': (shape.width,), '--layers': (shape.layers,), '--heads': (shape.heads,), '--length': (shape.length,),
    '--batches': sizes.batches, '--items': sizes.items, '--columns': (sizes.columns,), '--rounds': (sizes.rounds,),
  }  # fmt: skip
  for name, values in named.items():
    if not values or min(values) < (2 if name == '--length' else 1):
      raise UserError(f'{name} is {",".join(map(str, values))}; expected numbers of at least 1 (--length: 2)')
  if shape.width % shape.heads:
    raise UserError(f'--width {shape.width} is not a multiple of --heads {shape.heads}')
