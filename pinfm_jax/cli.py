"""The `pinfm` command: one thin function a subcommand. A user's mistake ends in one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pinfm_jax import __version__
from pinfm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code (0 good, 2 the user's mistake, 130 interrupted)."""
  arguments = _parser().parse_args(argv)
  try:
    arguments.function(arguments)
  except UserError as error:
    print(f'pinfm: error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('\npinfm: interrupted; the same command resumes', file=sys.stderr)
    return 130
  except BrokenPipeError:
    return 0
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='pinfm', description='User-activity foundation models: prepare, pretrain, fine-tune, evaluate, serve.'
  )
  parser.add_argument('--version', action='version', version=f'pinfm_jax {__version__}')
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for add in (_add_run, _add_prepare, _add_download, _add_export, _add_score, _add_report):
    add(commands)
  return parser


def _add_run(commands) -> None:
  command = commands.add_parser('run', help='run or resume an experiment (a launch file)')
  command.add_argument('file', metavar='FILE', help='a launch file, for example experiments/quickstart.py')
  command.add_argument('--workdir', metavar='DIR', help='where everything is written (default: runs/NAME)')
  command.add_argument('--stages', metavar='A,B', help='only these stages (default: all)')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment, for example pretrain.steps=100')  # fmt: skip
  command.set_defaults(function=_run)


def _run(arguments: argparse.Namespace) -> None:
  from pinfm_jax.launch import load_experiment
  from pinfm_jax.overrides import parse_assignments
  from pinfm_jax.run import STAGES, run

  experiment = load_experiment(arguments.file, parse_assignments(arguments.assignments))
  stages = tuple(arguments.stages.split(',')) if arguments.stages else STAGES
  run(experiment, arguments.workdir or Path('runs') / experiment.name, stages)


def _add_report(commands) -> None:
  command = commands.add_parser('report', help='make one HTML page of a run')
  command.add_argument('workdir', metavar='WORKDIR')
  command.set_defaults(function=_report)


def _report(arguments: argparse.Namespace) -> None:
  from pinfm_jax.report import write_report

  print(write_report(Path(arguments.workdir)))


def _add_prepare(commands) -> None:
  pass


def _add_download(commands) -> None:
  pass


def _add_export(commands) -> None:
  pass


def _add_score(commands) -> None:
  pass


if __name__ == '__main__':
  sys.exit(main())
