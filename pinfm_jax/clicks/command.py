"""The arguments of `pinfm clicks`."""

import argparse
from dataclasses import replace
from pathlib import Path

from pinfm_jax.arguments import first_seeds


def add_clicks(commands) -> None:
  """Adds `clicks` to the `pinfm` command."""
  command = commands.add_parser(
    'clicks',
    help='train rankers on a click-through set (Criteo, Avazu, MovieLens)',
    description='Trains the arms of a click-through launch file, or of a grid, with several seeds, and compares AUC '
    'and logloss. What has finished is kept. Results: WORKDIR/SPLIT/results.md, results.json.',
  )
  command.add_argument('file', metavar='LAUNCH', help='a launch file, for example experiments/movielens_clicks.py')
  command.add_argument('--grid', metavar='KEY=A,B', nargs='+', action='extend', default=[],
                       help='ranker.* or training.* settings and their values, for every arm')  # fmt: skip
  command.add_argument('--only', metavar='NAME', nargs='+', action='extend', default=[],
                       help='only these arms of the file, and the baseline')  # fmt: skip
  command.add_argument('--seeds', type=int, metavar='N', help="seeds 0 to N-1 (default: the launch file's)")
  command.add_argument('--split', choices=('validation', 'test'), default='validation',
                       help='validation (default) while tuning, test once at the end')  # fmt: skip
  command.add_argument('--workdir', metavar='DIR', help='where everything is written (default: runs/NAME of LAUNCH)')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings, for all arms')  # fmt: skip
  command.set_defaults(function=_clicks)


def _clicks(arguments: argparse.Namespace) -> None:
  from pinfm_jax.clicks.compare import run_clicks
  from pinfm_jax.clicks.config import GROUPS, check_clicks, load_clicks
  from pinfm_jax.errors import UserError
  from pinfm_jax.overrides import parse_assignments
  from pinfm_jax.sweep.grid import grid_arms, parse_grid

  clicks = load_clicks(arguments.file, parse_assignments(arguments.assignments))
  if arguments.seeds is not None:
    clicks = replace(clicks, seeds=first_seeds(arguments.seeds))
  names = [arm.name for arm in clicks.arms]
  for name in arguments.only:
    if name not in names:
      raise UserError(f"--only got '{name}'; the arms are: {', '.join(names)}")
  arms = tuple(a for a in clicks.arms if not arguments.only or a.name in (*arguments.only, clicks.baseline))
  if arguments.grid:
    axes = parse_grid(arguments.grid, clicks, GROUPS)
    first = grid_arms([arm for arm in arms if arm.name == clicks.baseline], axes)[0]
    arms, clicks = grid_arms(arms, axes), replace(clicks, baseline=first.name)
  clicks = replace(clicks, arms=arms)
  check_clicks(clicks)
  run_clicks(clicks, Path(arguments.workdir or Path('runs') / clicks.name), arguments.split)
