"""The arguments of `pinfm bench`."""

import argparse
from dataclasses import replace


def add_bench(commands) -> None:
  """Adds `bench` with its subcommands to the `pinfm` command."""
  command = commands.add_parser('bench', help='measure tables, training, DCAT, serving and repair on this machine')
  kinds = command.add_subparsers(dest='kind', required=True, metavar='KIND')
  _add_tables(kinds)
  _add_pretrain(kinds)
  _add_scaling(kinds)
  _add_dcat(kinds)
  _add_serving(kinds)
  _add_repair(kinds)


def _add_tables(kinds) -> None:
  command = kinds.add_parser(
    'tables',
    help='cost against the number of table rows',
    description='Times a pretraining step and the tables alone with many and with few rows, and against dense '
    'gradients, in one process, interleaved.',
  )
  _add_common(command, 'tables')
  command.add_argument('--parts', metavar='A,B', help='only these: step, alone, dense, traffic (default: all)')
  command.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the stored rows')
  command.set_defaults(function=_tables)


def _tables(arguments: argparse.Namespace) -> None:
  _threads(arguments)
  from pinfm_jax.bench.tables import FULL, PARTS, QUICK, bench_tables

  sizes = replace(QUICK if arguments.quick else FULL, dtype=arguments.dtype)
  bench_tables(arguments.out, _parts(arguments, PARTS), sizes)


def _add_pretrain(kinds) -> None:
  command = kinds.add_parser(
    'pretrain',
    help='tokens/s of pretraining, also against a PyTorch SASRec',
    description='Times the whole pretraining step; with --rival, interleaved with the training step of a checkout of '
    'github.com/pmixer/SASRec.pytorch at equal width, depth, heads, length and batch. Needs PyTorch for that.',
  )
  _add_common(command, 'pretrain')
  command.add_argument('--parts', metavar='A,B', help='only these: speed, tower (default: both)')
  command.add_argument('--rival', metavar='DIR', help='a checkout of github.com/pmixer/SASRec.pytorch')
  for name, text in (
    ('width', 'of items and transformer'), ('layers', 'blocks'), ('heads', 'of the attention'),
    ('length', 'of sequences'), ('columns', 'negatives of our anchors'), ('rounds', 'timed rounds'),
  ):  # fmt: skip
    command.add_argument(f'--{name}', type=int, help=text)
  command.add_argument('--batches', type=_numbers, metavar='A,B', help='sequences a step')
  command.add_argument('--items', type=_numbers, metavar='A,B', help='catalogue sizes')
  command.set_defaults(function=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> None:
  threads = _threads(arguments)
  from pinfm_jax.bench.training import FULL, PARTS, QUICK, bench_pretrain

  given = {name: value for name, value in vars(arguments).items() if value is not None}
  sizes = replace(QUICK if arguments.quick else FULL, threads=threads)
  shape = replace(sizes.shape, **{k: given[k] for k in ('width', 'layers', 'heads', 'length') if k in given})
  rest = {k: given[k] for k in ('columns', 'rounds', 'batches', 'items') if k in given}
  bench_pretrain(arguments.out, arguments.rival, _parts(arguments, PARTS), replace(sizes, shape=shape, **rest))


def _add_scaling(kinds) -> None:
  command = kinds.add_parser(
    'scaling',
    help='held-out loss against table rows and tower size',
    description='Trains the points of a launch file and measures the loss of held-out users. Resumable.',
  )
  command.add_argument('file', metavar='FILE', help='a launch file with `scaling`: experiments/scaling_law.py')
  _add_common(command, 'scaling')
  command.set_defaults(function=_scaling)


def _scaling(arguments: argparse.Namespace) -> None:
  _threads(arguments)
  from pinfm_jax.bench.scaling import bench_scaling

  bench_scaling(arguments.file, arguments.out, arguments.quick)


def _add_dcat(kinds) -> None:
  command = kinds.add_parser(
    'dcat',
    help="candidates/s of DCAT, of the paper's forms and of the history re-run per candidate",
    description='Times the forms of the candidate pass, serving and training, and the cost against candidates and '
    'length, in one process, interleaved.',
  )
  _add_common(command, 'dcat')
  command.add_argument('--parts', metavar='A,B', help='only these: serving, training, curve (default: all)')
  command.set_defaults(function=_dcat)


def _dcat(arguments: argparse.Namespace) -> None:
  _threads(arguments)
  from pinfm_jax.bench.dcat import FULL, PARTS, QUICK, bench_dcat

  bench_dcat(arguments.out, _parts(arguments, PARTS), QUICK if arguments.quick else FULL)


def _add_serving(kinds) -> None:
  command = kinds.add_parser(
    'serving',
    help="requests/s with kept users, a server under load, huge tables, int4's quality",
    description='Measures serving. cache: requests/s with the keys and values of users kept, against none. load: a '
    'server process at half and at twice the rate that it can answer. rows: a bundle of 20.48 B parameters, 13 GB of '
    'disk. int4: the change of AUC of a finished run (--workdir).',
  )
  _add_common(command, 'serving')
  command.add_argument('--parts', metavar='A,B', help='some of: cache, load, rows, int4 (default: cache, load)')
  command.add_argument('--workdir', metavar='DIR', help='of a finished run, for the part int4')
  command.add_argument('--keep', action='store_true', help='leave the bundle of the part rows in --out')
  command.set_defaults(function=_serving)


def _serving(arguments: argparse.Namespace) -> None:
  _threads(arguments)
  from pinfm_jax.bench.serving import bench_serving

  parts = None if arguments.parts is None else tuple(arguments.parts.split(','))
  bench_serving(arguments.out, parts, arguments.quick, arguments.workdir, arguments.keep)


def _add_repair(kinds) -> None:
  command = kinds.add_parser(
    'repair',
    help='time of a test-time repair over that of its forward-backward passes',
    description='Repairs 1,000 images by all three tasks in 40 steps, a batch at a time, in turns with the same '
    'passes of the task networks alone.',
  )
  _add_common(command, 'repair')
  command.set_defaults(function=_repair)


def _repair(arguments: argparse.Namespace) -> None:
  _threads(arguments)
  from pinfm_jax.bench.repair import FULL, QUICK, bench_repair

  bench_repair(arguments.out, QUICK if arguments.quick else FULL)


def _add_common(command: argparse.ArgumentParser, name: str) -> None:
  command.add_argument('--out', metavar='DIR', default=f'runs/bench/{name}', help='(default: %(default)s)')
  command.add_argument('--quick', action='store_true', help='tiny sizes, to see that it works')
  command.add_argument('--threads', type=int, help='processors to use (default: all)')


def _threads(arguments: argparse.Namespace) -> int:
  """Binds the process before JAX starts; returns the number of processors."""
  import os

  from pinfm_jax.bench.timing import use_threads

  threads = len(os.sched_getaffinity(0)) if arguments.threads is None else arguments.threads
  use_threads(threads)
  return threads


def _parts(arguments: argparse.Namespace, known: tuple[str, ...]) -> tuple[str, ...]:
  return known if arguments.parts is None else tuple(arguments.parts.split(','))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))
