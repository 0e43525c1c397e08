"""`pinfm bench pretrain`: tokens/s of a pretraining step, alone and against a published PyTorch rival in one run."""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from pinfm_jax.bench import plot
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.bench.rival import Rival, Shape, load_rival, rival_commit, torch_is_installed
from pinfm_jax.bench.segments import Stepper, random_segments
from pinfm_jax.bench.timing import Spread, interleave, ratios
from pinfm_jax.config import MeshConfig, PinFMConfig, PretrainConfig, TableConfig, TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.pretrain import PretrainTask
from pinfm_jax.train.sharding import make_mesh

_ACTIONS, _SURFACES = 2, 2

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
  """

  shape: Shape = Shape(width=64, layers=2, heads=1, length=200)
  batches: tuple[int, ...] = (16, 128)
  items: tuple[int, ...] = (12_000, 1_000_000)
  columns: int = 256
  rounds: int = 9
  threads: int = 2


FULL = TrainingSizes()
QUICK = TrainingSizes(Shape(width=8, layers=1, heads=1, length=16), (4,), (60, 600), columns=8, rounds=2, threads=1)


def bench_pretrain(out: str | Path, rival: str | Path | None = None, sizes: TrainingSizes = FULL) -> Findings:
  """Measures our step for each catalogue size and batch, interleaved with the rival's where there is one.

  Args:
    out: directory of results.json, results.md and pretrain.png.
    rival: checkout of the rival (see `rival.load_rival`), or None to measure our step alone.
    sizes: what is measured.

  Raises:
    UserError: no rival in that directory, sizes that do not fit, or a directory that cannot be made.
  """
  _check(sizes)
  notes = [
    f'Ours: the whole pretraining step (ids hashed and deduplicated, {sizes.columns} in-batch negatives an anchor, '
    'AdamW, row-wise Adagrad on the rows touched, batch copied from the host) with phi_in, phi_out and psi, which the '
    'rival lacks; one sub-table with as many rows as there are items, an MLP as wide as the rival\'s.',
  ]  # fmt: skip
  module = _module(rival, notes)
  directory = make_directory(out)
  machine = environment(('torch',) if module else ())
  figures: list[Figure] = []
  speeds: dict[str, dict[int, float]] = {}
  for items in sizes.items:
    for batch in sizes.batches:
      print(f'== {items:,} items, {batch} sequences of {sizes.shape.length} a step', flush=True)
      figures += _compare(items, batch, module, sizes, speeds)
      gc.collect()
  settings = {**asdict(sizes), 'shape': asdict(sizes.shape), 'rival': rival_commit(module) if module else 'none'}
  findings = Findings('Pretraining: tokens a second', settings, figures, notes, machine)
  write_findings(findings, directory)
  series = {name: (list(points), list(points.values())) for name, points in speeds.items()}
  plot.lines(directory / 'pretrain.png', [('Full training step', 'sequences a step', series)], 'tokens/s', log_y=True)
  return findings


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
  return Stepper(PretrainTask(model, pretrain, 0), make_mesh(MeshConfig()), batches)


def _module(rival: str | Path | None, notes: list[str]) -> ModuleType | None:
  """The rival's module, or None with a note that says what is left out and why."""
  if rival is None:
    notes.append('Skipped: the comparison with SASRec; give a checkout of it with --rival DIR.')
  elif not torch_is_installed():
    notes.append('Skipped: the comparison with SASRec; PyTorch is not installed (pip install torch).')
  else:
    module = load_rival(rival)
    notes.append(
      f'SASRec: {rival_commit(module)}, its published step (post-LN blocks, one negative a position, dense Adam over '
      'all parameters) without dropout and without its L2 term, which weighs 0. Both sides have uniform random items.'
    )
    return module
  print(notes[-1], flush=True)
  return None


def _check(sizes: TrainingSizes) -> None:
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
