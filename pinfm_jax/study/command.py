"""The arguments of `pinfm study`."""

import argparse
from dataclasses import replace
from pathlib import Path

from pinfm_jax.arguments import first_seeds, folder_name


def add_study(commands) -> None:
  """Adds `study` to the `pinfm` command."""
  command = commands.add_parser(
    'study',
    help='compare interaction blocks and recommend one under limits',
    description='Tunes every interaction block of a file with one budget, trains it with several seeds, measures what '
    'it costs in training memory, step time and serving latency beside the baseline, and recommends one under limits. '
    'The same command goes on where it stopped. Results: WORKDIR/studies/NAME/SPLIT/results.md, results.json, '
    'latency.svg, memory.svg.',
  )
  command.add_argument('file', metavar='LAUNCH', help='a launch file, for example experiments/kuairand.py')
  command.add_argument('--blocks', metavar='FILE', help='the blocks (default: homefeed_interactions.py beside LAUNCH)')
  command.add_argument('--only', metavar='NAME', nargs='+', action='extend', default=[],
                       help='only these blocks, and the baseline')  # fmt: skip
  command.add_argument('--seeds', type=int, metavar='N', help="seeds 0 to N-1 (default: the launch file's)")
  command.add_argument('--jobs', type=int, metavar='N', default=1, help='runs at the same time (default: 1)')
  command.add_argument('--split', choices=('validation', 'test'), default='validation',
                       help='measured in the end (default: validation); tuning reads validation alone')  # fmt: skip
  command.add_argument('--quick', action='store_true', help="the file's few quick blocks, one seed, no tuning")
  command.add_argument('--tune', metavar='KEY=A,B', nargs='+', action='extend', default=[],
                       help="what every block tries instead of the file's `tune`; --tune none: no tuning")  # fmt: skip
  _add_decision(command)
  _add_costs(command)
  command.add_argument('--name', metavar='NAME', help="of the study's folder (default: the name of the blocks' file)")
  command.add_argument('--workdir', metavar='DIR', help='where everything is written (default: runs/NAME of LAUNCH)')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment, for all blocks')  # fmt: skip
  command.set_defaults(function=_study)


def _add_decision(command: argparse.ArgumentParser) -> None:
  group = command.add_argument_group('the decision')
  group.add_argument('--metric', choices=('auc', 'hit@3', 'logloss'), default='auc',
                     help='of the main label: tuning and recommendation go by it (default: auc)')  # fmt: skip
  group.add_argument('--max-memory', metavar='P', default='+5%',
                     help='peak training memory against the baseline (+5%%; less: --max-memory=-5%%)')  # fmt: skip
  group.add_argument('--max-latency', metavar='P', default='+0%', help='serving latency, likewise (default: +0%%)')
  group.add_argument('--device-memory', metavar='SIZE', default='80GB', help='of the device (default: 80GB)')
  group.add_argument('--memory-line', metavar='P', default='60%', help='share of it that training may take (60%%)')
  group.add_argument('--segments', metavar='A,B', help='new users have fewer than A events, heavy ones B or more '
                     '(default: thirds)')  # fmt: skip


def _add_costs(command: argparse.ArgumentParser) -> None:
  group = command.add_argument_group('costs')
  group.add_argument('--rounds', type=int, metavar='N', default=25, help='interleaved repetitions (default: 25)')
  group.add_argument('--memory-requests', type=int, metavar='N', default=0,
                     help="of the batch whose training memory is counted (default: the launch file's)")  # fmt: skip


def _study(arguments: argparse.Namespace) -> None:
  import jax

  from pinfm_jax.study.blocks_file import default_blocks, load_blocks
  from pinfm_jax.study.study import Study, run_study

  jax.config.update('jax_platforms', 'cpu')  # of this process alone: accelerators and their memory are for the runs
  file = load_blocks(arguments.blocks or default_blocks(arguments.file))
  experiment = _experiment(arguments, file.settings)
  name = arguments.name or file.arms.path.stem + ('_quick' if arguments.quick else '')
  file = _tuned(arguments, file, experiment)
  only = tuple(arguments.only) or (file.quick if arguments.quick else ())
  study = Study(experiment, file, folder_name(name), _decision(arguments), _costs(arguments), only, arguments.jobs)
  if not run_study(study, Path(arguments.workdir or Path('runs') / experiment.name)):
    raise SystemExit(1)


def _experiment(arguments: argparse.Namespace, settings):
  """The launch file's, with the settings of the blocks' file beneath those of --set."""
  from pinfm_jax.launch import load_experiment
  from pinfm_jax.overrides import parse_assignments

  experiment = load_experiment(arguments.file, {**settings, **parse_assignments(arguments.assignments)})
  seeds = 1 if arguments.quick and arguments.seeds is None else arguments.seeds
  if seeds is not None:
    experiment = replace(experiment, seeds=first_seeds(seeds))
  return replace(experiment, evaluate=replace(experiment.evaluate, split=arguments.split))


def _tuned(arguments: argparse.Namespace, file, experiment):
  """The file with what --tune and --quick say of its tuning."""
  from pinfm_jax.sweep.grid import parse_grid

  if arguments.tune == ['none'] or (arguments.quick and not arguments.tune):
    return file.without_tuning()
  if arguments.tune:
    return replace(file, tune={axis.key: axis.values for axis in parse_grid(arguments.tune, experiment)})
  return file


def _decision(arguments: argparse.Namespace):
  from pinfm_jax.study.recommend import Limits, parse_bytes, parse_numbers, parse_percent
  from pinfm_jax.study.rows import Decision

  limits = Limits(
    parse_percent(arguments.max_memory, '--max-memory', signed=True),
    parse_percent(arguments.max_latency, '--max-latency', signed=True),
    parse_percent(arguments.memory_line, '--memory-line', signed=False),
  )
  device = parse_bytes(arguments.device_memory, '--device-memory')
  segments = parse_numbers(arguments.segments, '--segments') if arguments.segments else ()
  return Decision(arguments.metric, limits, device, arguments.device_memory, segments)


def _costs(arguments: argparse.Namespace):
  from pinfm_jax.errors import UserError
  from pinfm_jax.study.costs import CostOptions

  for option, value, least in (('--rounds', arguments.rounds, 1), ('--memory-requests', arguments.memory_requests, 0)):
    if value < least:
      raise UserError(f'{option} is {value}; expected at least {least}')
  return CostOptions(rounds=arguments.rounds, memory_requests=arguments.memory_requests)
