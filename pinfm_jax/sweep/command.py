"""The arguments of `pinfm sweep`."""

import argparse
from dataclasses import replace
from pathlib import Path

from pinfm_jax.arguments import first_seeds, folder_name


def add_sweep(commands) -> None:
  """Adds `sweep` to the `pinfm` command."""
  command = commands.add_parser(
    'sweep',
    help='compare many settings of an experiment',
    description='Trains the arms of a file (--arms) or of a grid (--grid) with several seeds and compares them. '
    'Prepared data, pretraining and finished runs are shared with `pinfm run`; the same command goes on where it '
    'stopped, and runs again what failed. Results: WORKDIR/sweeps/NAME/results.md, results.json, runs.csv.',
  )
  command.add_argument('file', metavar='LAUNCH', help='a launch file, for example experiments/kuairand.py')
  command.add_argument('--arms', metavar='FILE', help='a file of arms, for example experiments/ablations/fusion.py')
  command.add_argument('--grid', metavar='KEY=A,B', nargs='+', action='extend', default=[],
                       help='settings and their values; each combination is an arm; tuples: (a,b),(c,d)')  # fmt: skip
  command.add_argument('--only', metavar='NAME', nargs='+', action='extend', default=[],
                       help='only these arms, and the baseline')  # fmt: skip
  command.add_argument('--seeds', type=int, metavar='N', help="seeds 0 to N-1 (default: the launch file's)")
  command.add_argument('--jobs', type=int, metavar='N', default=1,
                       help='runs at the same time (default: 1): each is bound to its share of the cores, or has a GPU '
                       'of its own, and needs its own memory')  # fmt: skip
  command.add_argument('--split', choices=('validation', 'test'), default='validation',
                       help='what is measured: validation (default) while tuning, test once at the end')  # fmt: skip
  command.add_argument('--name', metavar='NAME', help="of the results' folder (default: by the arms or the grid)")
  command.add_argument('--workdir', metavar='DIR', help='where everything is written (default: runs/NAME of LAUNCH)')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment; what an arm sets itself stays')  # fmt: skip
  command.set_defaults(function=_sweep)


def _sweep(arguments: argparse.Namespace) -> None:
  import jax

  from pinfm_jax.errors import UserError
  from pinfm_jax.launch import load_experiment
  from pinfm_jax.overrides import parse_assignments
  from pinfm_jax.sweep.arms_file import load_arms
  from pinfm_jax.sweep.grid import parse_grid
  from pinfm_jax.sweep.sweep import Sweep, run_sweep

  jax.config.update('jax_platforms', 'cpu')  # of this process alone: accelerators and their memory are for the runs
  settings = parse_assignments(arguments.assignments)
  if 'evaluate.split' in settings:
    raise UserError(
      'evaluate.split is given by --set; a sweep has an option for it: --split validation or --split test'
    )
  experiment = load_experiment(arguments.file, settings)
  if arguments.seeds is not None:
    experiment = replace(experiment, seeds=first_seeds(arguments.seeds))
  experiment = replace(experiment, evaluate=replace(experiment.evaluate, split=arguments.split))
  if not arguments.arms and not arguments.grid:
    raise UserError('nothing to compare: give --arms FILE, --grid KEY=A,B, or both')
  axes = parse_grid(arguments.grid, experiment)
  for axis in axes:
    if axis.key in settings:
      raise UserError(f'{axis.key} is given by --set and by --grid; drop one')
  name = arguments.name or _name(
    arguments.arms,
    [axis.key for axis in axes],
    arguments.split if experiment.arms or experiment.data.held_out_events > 1 else 'test',
  )
  file = load_arms(arguments.arms) if arguments.arms else None
  sweep = Sweep(experiment, folder_name(name), file, axes, tuple(arguments.only), arguments.jobs, tuple(settings))
  if not run_sweep(sweep, Path(arguments.workdir or Path('runs') / experiment.name)):
    raise SystemExit(1)


def _name(arms: str | None, keys: list[str], split: str) -> str:
  parts = [Path(arms).stem] if arms else []
  parts += ['_'.join(key.split('.')[-1] for key in keys)] if keys else []
  return '_'.join([*parts, *([] if split == 'test' else [split])])
