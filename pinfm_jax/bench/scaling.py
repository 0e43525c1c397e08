"""`pinfm bench scaling FILE`: held-out pretraining loss against the number of table rows and the size of the tower."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from pinfm_jax.bench import plot
from pinfm_jax.bench.results import Figure, Findings, environment, make_directory, write_findings
from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Experiment, PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.launch import experiment_and_names
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.run import keep_compiled_programs, only_run
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.prepare import prepare_stage
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.workdir import claim, has_work, is_done, read_results, write_json


@dataclass(frozen=True)
class Scaling:
  """What a launch file varies, one thing at a time, around its experiment; it names this object `scaling`.

  Attributes:
    rows: of each sub-table, with the experiment's tower.
    towers: overrides of `model.tower`, with the experiment's tables.
    quick: overrides of the experiment for --quick, which shows that the command works and nothing else.
    quick_rows: `rows` of --quick.
  """

  rows: tuple[int, ...]
  towers: tuple[Mapping[str, Any], ...]
  quick: Mapping[str, Any] = field(default_factory=dict)
  quick_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Point:
  """One model to train; it may belong to both series."""

  name: str
  overrides: Mapping[str, Any]
  in_rows: bool
  in_towers: bool


def bench_scaling(file: str | Path, out: str | Path, quick: bool = False) -> Findings:
  """Trains every point for the same steps on the same users and measures the same held-out users.

  Finished points are kept, an interrupted one goes on from its checkpoint.

  Args:
    file: launch file that defines `experiment` and `scaling`.
    out: directory of the prepared data, the points, results.json, results.md and scaling.png.
    quick: tiny sizes.

  Raises:
    UserError: the file does not define what is needed, or the directory holds another run.
  """
  experiment, scaling = _load(file, quick)
  points = _points(experiment, scaling)
  directory = make_directory(out)
  with only_run(directory):
    machine = environment()
    keep_compiled_programs(directory / 'compiled')
    run = Run(experiment, directory)
    prepare_stage(run)
    found = {}
    for point in points:
      print(f'== {point.name}', flush=True)
      found[point.name] = _train(run, apply_overrides(experiment, point.overrides), directory / 'points' / point.name)
    findings = _findings(experiment, points, found, machine)
    write_findings(findings, directory)
    _plot(directory / 'scaling.png', points, found)
  return findings


def _load(file: str | Path, quick: bool) -> tuple[Experiment, Scaling]:
  experiment, names = experiment_and_names(file)
  scaling = names.get('scaling')
  if not isinstance(scaling, Scaling):
    raise UserError(f'{file} defines no `scaling`; expected `scaling = Scaling(rows=(...), towers=(...))`')
  if quick:
    experiment = apply_overrides(experiment, scaling.quick)
    check_experiment(experiment)
    scaling = Scaling(scaling.quick_rows or scaling.rows, scaling.towers)
  if not experiment.pretrain.eval_every:
    raise UserError(f'{file}: pretrain.eval_every is 0; the loss is measured on held-out users: set it, and eval_share')
  if experiment.pretrain.eval_ranking or not experiment.pretrain.ntl_weight:
    raise UserError(f'{file}: the points are compared by L_ntl; set pretrain.eval_ranking=False and an ntl_weight')
  return experiment, scaling


def _points(experiment: Experiment, scaling: Scaling) -> list[Point]:
  """The points of both series; one that both share is trained once."""
  points: dict[PinFMConfig, Point] = {}
  wanted = [({'model.tables.rows': rows}, True) for rows in scaling.rows]
  wanted += [({f'model.tower.{name}': value for name, value in t.items()}, False) for t in scaling.towers]
  for overrides, in_rows in wanted:
    changed = apply_overrides(experiment, overrides)
    check_experiment(changed)
    model = changed.model
    name = f'rows{model.tables.sub_tables}x{model.tables.rows}_tower{model.tower.layers}x{model.tower.width}'
    if model in points:
      points[model] = Point(name, overrides, True, True)
    elif any(name == point.name for point in points.values()):
      raise UserError(f'two towers of `scaling` are {name}; they must differ in layers or width')
    else:
      points[model] = Point(name, overrides, in_rows, not in_rows)
  return list(points.values())


def _train(run: Run, experiment: Experiment, directory: Path) -> dict[str, float]:
  """Trains one point, or reads what it found earlier."""
  point = Run(experiment, run.workdir)
  claim(directory, point.pretrain_settings(0), has_work(directory))
  if not is_done(directory):
    begin = time.monotonic()
    state = pretrain(
      run.dataset, None, point.model, experiment.pretrain, run.mesh, directory, 0, layout=experiment.mesh
    )
    found = _held_out(directory / 'metrics.jsonl')
    tables = experiment.model.tables
    found |= {
      'rows': tables.sub_tables * tables.rows,
      'tower_parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      'seconds': round(time.monotonic() - begin, 1),
    }
    write_json(directory / 'results.json', found)
  shutil.rmtree(directory / 'checkpoints', ignore_errors=True)  # of table size, and of no use to the result
  return read_results(directory)


def _held_out(path: Path) -> dict[str, float]:
  """The last measurement on held-out users."""
  rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
  last = [row for row in rows if 'eval/loss' in row][-1]
  return {'step': last['step'], 'loss': last['eval/loss'], 'ntl': last['eval/ntl']}


def _findings(
  experiment: Experiment, points: list[Point], found: Mapping[str, Mapping[str, float]], machine: Mapping[str, Any]
) -> Findings:
  figures = []
  for point in points:
    values = found[point.name]
    text = f'{values["rows"]:,} rows, tower of {values["tower_parameters"]:,} parameters'
    figures.append(Figure(f'{point.name}/loss', f'{text}: held-out loss', values['loss'], unit=''))
    figures.append(Figure(f'{point.name}/ntl', f'{text}: held-out L_ntl', values['ntl'], unit=''))
  pretrain = experiment.pretrain
  settings = {
    'steps': pretrain.steps, 'batch_segments': pretrain.batch_segments, 'segment_length': pretrain.segment_length,
    'row_width': experiment.model.tables.width, 'held_out_share': pretrain.eval_share, 'seeds': 1,
    'data': experiment.data.source, **dict(experiment.data.simulator),
  }  # fmt: skip
  notes = [
    'Every point trains for the same steps on the same users; the loss is that of users who never train, on the same '
    'batches with the same negatives. One seed: differences of neighbouring points include its chance.'
  ]
  return Findings('Scaling: held-out pretraining loss', settings, figures, notes, dict(machine))


def _plot(path: Path, points: list[Point], found: Mapping[str, Mapping[str, float]]) -> None:
  panels = []
  for title, label, axis, chosen in (
    ('Table rows', 'rows in all', 'rows', [p for p in points if p.in_rows]),
    ('Tower', 'parameters of the tower', 'tower_parameters', [p for p in points if p.in_towers]),
  ):
    values = sorted((found[p.name][axis], found[p.name]['loss']) for p in chosen)
    if values:
      panels.append((title, label, {'loss': tuple(zip(*values, strict=True))}))
  plot.lines(path, panels, 'held-out loss')
