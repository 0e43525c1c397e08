"""Runs a click-through experiment: every arm with every seed once, and the table that compares them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pinfm_jax.clicks.config import ClickExperiment
from pinfm_jax.clicks.train import click_stats, measure_clicks, train_clicks
from pinfm_jax.config import Arm
from pinfm_jax.data.click_through import PARTS, ClickTable, load_click_table
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.overrides import apply_overrides, to_dict
from pinfm_jax.progress import duration
from pinfm_jax.run import hold_workdir, keep_compiled_programs
from pinfm_jax.study.recommend import Measured, difference
from pinfm_jax.study.tables import over_seeds
from pinfm_jax.sweep.grid import settings_text
from pinfm_jax.workdir import claim, is_done, read_json, read_results, write_json, write_text

_WEIGHTS = 'weights.npz'


@dataclass(frozen=True)
class ArmRun:
  """One arm with one seed: the figures of a part, and what its training took."""

  arm: str
  seed: int
  auc: float
  logloss: float
  epochs: float
  parameters: int
  seconds: float


def run_clicks(clicks: ClickExperiment, workdir: Path, split: str) -> tuple[ArmRun, ...]:
  """Trains what has not been trained, measures it on a part and writes WORKDIR/SPLIT/results.md and results.json.

  A run that was interrupted starts again; what has finished is kept. The test part is read with `split` 'test' alone.

  Args:
    clicks: what to run.
    workdir: where everything is written.
    split: 'validation' or 'test'.

  Raises:
    UserError: files that are not what they should be, a workdir of other settings or in use.
  """
  if not clicks.data.path:
    raise UserError(
      f'data.path is empty; give the folder of {clicks.data.source}: --set data.path=DIR, or, for the launch files of '
      'experiments/, the environment variable PINFM_DATA with the folder of all data sets'
    )
  with ExitStack() as lock:
    hold_workdir(workdir, lock)
    keep_compiled_programs(workdir / 'compiled')
    table = load_click_table(clicks.data.source, clicks.data.path, **clicks.data.options)
    runs = []
    for arm in clicks.arms:
      for seed in clicks.seeds:
        runs.append(_one(clicks, table, arm, seed, workdir / f'seed{seed}' / arm.directory, split))
    directory = workdir / split
    directory.mkdir(exist_ok=True)
    _write(clicks, table, runs, directory, split)
  return tuple(runs)


def _one(clicks: ClickExperiment, table: ClickTable, arm: Arm, seed: int, directory: Path, split: str) -> ArmRun:
  """Trains or reads an arm with a seed, and measures it."""
  own = apply_overrides(clicks, arm.overrides)
  claim(directory, _settings(own, table, seed), is_done(directory))
  measured = directory / f'{split}.json'
  if not is_done(directory):
    begin = time.monotonic()
    trained = train_clicks(table, own.ranker, own.training, seed, f'{arm.name}, seed {seed}')
    np.savez(directory / _WEIGHTS, **flatten_dict(trained.params, sep='/'))
    write_json(directory / 'results.json', {
      'steps': trained.steps,
      'best': dict(trained.looks[trained.best]),
      'looks': [dict(look) for look in trained.looks],
      'parameters': sum(value.size for value in flatten_dict(trained.params).values()),
      'seconds': time.monotonic() - begin,
    })  # fmt: skip
    measured.unlink(missing_ok=True)
  if not measured.exists():
    params = unflatten_dict(_weights(directory / _WEIGHTS), sep='/')
    write_json(measured, measure_clicks(table, own.ranker, params, click_stats(table), split))
  figures, results = read_json(measured), read_results(directory)
  print(
    f'{arm.name}, seed {seed}: {split} AUC {figures["auc"]:.4f} logloss {figures["logloss"]:.4f} after '
    f'{results["best"]["epochs"]:.3g} epochs ({duration(results["seconds"])})',
    flush=True,
  )
  epochs, size = results['best']['epochs'], int(results['parameters'])
  return ArmRun(arm.name, seed, figures['auc'], figures['logloss'], epochs, size, results['seconds'])


def comparison_table(runs: Sequence[ArmRun], clicks: ClickExperiment, split: str) -> Table:
  """Mean and standard deviation over seeds, and the difference to the baseline beside seed noise."""
  found: dict[str, list[ArmRun]] = {}
  for one in runs:
    found.setdefault(one.arm, []).append(one)
  base = _measured(found[clicks.baseline])
  paper, rows = {arm.name: arm.paper for arm in clicks.arms}, []
  for name, each in found.items():
    against = '' if name == clicks.baseline else difference(_measured(each), base).text()
    auc, logloss = over_seeds([one.auc for one in each]), over_seeds([one.logloss for one in each])
    epochs = f'{np.mean([one.epochs for one in each]):.3g}'
    rows.append((name, auc, logloss, against, epochs, f'{each[0].parameters:,}', paper[name]))
  header = ('', 'AUC', 'logloss', f'AUC against {clicks.baseline}', 'epochs', 'parameters', 'paper')
  return Table(f'Click-through, {split} part', header, tuple(rows))


def _measured(each: Sequence[ArmRun]) -> Measured:
  return Measured(each[0].arm, tuple(one.auc for one in each), 1.0, 1.0, 0.0)


def _write(clicks: ClickExperiment, table: ClickTable, runs: Sequence[ArmRun], directory: Path, split: str) -> None:
  counts = ', '.join(f'{len(table.rows_of(part)):,} {part}' for part in PARTS)
  seeds = ', '.join(map(str, clicks.seeds))
  unread = '' if split == 'test' else ' The test part was not read.'
  about = f'Data: {table.source}; rows: {counts}; seeds {seeds}.{unread} Terms of the data: {table.licence}.'
  settings = [f'{arm.name}: {settings_text(arm.overrides) or "as the launch file says"}.' for arm in clicks.arms]
  shown = comparison_table(runs, clicks, split)
  parts = [f'# {clicks.name}', about, shown.markdown().rstrip(), ' '.join(settings), ' '.join(table.notes)]
  write_text(directory / 'results.md', '\n\n'.join(part for part in parts if part) + '\n')
  write_json(directory / 'results.json', {'experiment': to_dict(clicks), 'runs': [asdict(one) for one in runs]})
  print(f'\n{about}\n\n{shown.text()}\n{directory / "results.md"}')


def _settings(own: ClickExperiment, table: ClickTable, seed: int) -> dict[str, Any]:
  """Everything that a run depends on; the data are told by their counts."""
  data = {
    'source': own.data.source,
    'options': dict(own.data.options),
    'rows': len(table),
    'clicks': int(table.label_N.sum()),
    'sizes': list(table.sparse_sizes),
  }
  return {'data': data, 'ranker': asdict(own.ranker), 'training': asdict(own.training), 'seed': seed}


def _weights(path: Path) -> dict[str, np.ndarray]:
  with np.load(path) as archive:
    return dict(archive)
