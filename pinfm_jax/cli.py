"""The `pinfm` command: one thin function a subcommand. A user's mistake ends in one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from pinfm_jax import __version__
from pinfm_jax.bench.command import add_bench
from pinfm_jax.clicks.command import add_clicks
from pinfm_jax.errors import ERROR, UserError
from pinfm_jax.huge_pages import with_huge_pages
from pinfm_jax.serve.import_command import add_import_tables
from pinfm_jax.serve.inspect_command import add_inspect
from pinfm_jax.serve.offline.command import add_demo, add_embed, add_recommend
from pinfm_jax.serve.rows.command import add_serve_rows
from pinfm_jax.serve.server import add_serve
from pinfm_jax.stages.export_command import add_export
from pinfm_jax.study.command import add_study
from pinfm_jax.sweep.command import add_sweep

_TRAINING = ('run', 'sweep', 'study', 'clicks')
_RESUMED = (*_TRAINING, 'download')


def command() -> int:
  """The installed command `pinfm`: `main`, and of what trains in memory with huge pages."""
  if sys.argv[1:2] and sys.argv[1] in _TRAINING:
    with_huge_pages()
  return main()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code (0 good, 2 the user's mistake, 130 interrupted)."""
  argv = list(sys.argv[1:] if argv is None else argv)
  runner: list[str] = []
  if argv[:1] == ['prepare-beam'] and '--' in argv:  # what follows belongs to Beam
    argv, runner = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
  arguments = _parser().parse_args(argv)
  arguments.runner = runner
  try:
    arguments.function(arguments)
  except UserError as error:
    print(f'{ERROR}{error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    again = '; the same command resumes' if arguments.command in _RESUMED else ''
    print(f'\npinfm: interrupted{again}', file=sys.stderr)
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
  for add in (
    _add_run,
    add_sweep,
    add_study,
    add_clicks,
    _add_prepare,
    _add_prepare_beam,
    _add_download,
    add_export,
    _add_apply_delta,
    add_inspect,
    add_import_tables,
    _add_score,
    add_serve_rows,
    add_serve,
    _add_report,
    _add_plan,
    add_bench,
    add_recommend,
    add_embed,
    add_demo,
  ):
    add(commands)
  return parser


def _add_run(commands) -> None:
  command = commands.add_parser('run', help='run or resume an experiment (a launch file)')
  command.add_argument('file', metavar='FILE', help='a launch file, for example experiments/quickstart.py')
  command.add_argument('--workdir', metavar='DIR', help='where everything is written (default: runs/NAME)')
  command.add_argument('--stages', metavar='A,B', help='only these stages (default: all)')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment, for example pretrain.steps=100')  # fmt: skip
  command.add_argument('--profile', metavar='A:B', help='trace steps A to B of the training stages, for example 20:25')
  _add_processes(command)
  command.set_defaults(function=_run)


def _add_processes(command) -> None:
  several = command.add_argument_group('several processes', 'start the same command in each; the workdir is shared')
  several.add_argument('--distributed', metavar='WHERE', default='none', dest='method',
                       help='auto, slurm, ompi, kubernetes, gke, tpu or none (default)')  # fmt: skip
  several.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0, where nothing tells it')
  several.add_argument('--process-id', type=int, metavar='I', help="this process's number, from 0")
  several.add_argument('--num-processes', type=int, metavar='N', help='how many processes there are')
  for name, default, text in (
    ('init-timeout', 300, 'seconds that processes wait for each other at start and end'),
    ('heartbeat-timeout', 100, 'seconds after which a silent process counts as dead'),
    ('stage-timeout', 86_400, 'seconds that the others wait for what process 0 does alone'),
  ):
    place = f'{name.replace("-", "_")}_s'
    several.add_argument(f'--{name}', type=int, metavar='S', default=default, dest=place, help=f'{text} ({default})')


def _run(arguments: argparse.Namespace) -> None:
  from pinfm_jax.launch import load_experiment
  from pinfm_jax.overrides import parse_assignments
  from pinfm_jax.run import STAGES, run
  from pinfm_jax.train.distributed import Launch, session
  from pinfm_jax.train.profiling import Window

  profile = None if arguments.profile is None else Window.parse(arguments.profile)
  experiment = load_experiment(arguments.file, parse_assignments(arguments.assignments))
  stages = tuple(STAGES) if arguments.stages is None else tuple(arguments.stages.split(','))
  with session(Launch(**{field.name: getattr(arguments, field.name) for field in fields(Launch)})):
    run(experiment, arguments.workdir or Path('runs') / experiment.name, stages, profile)


def _add_report(commands) -> None:
  command = commands.add_parser('report', help='make one HTML page of a run')
  command.add_argument('workdir', metavar='WORKDIR')
  command.set_defaults(function=_report)


def _report(arguments: argparse.Namespace) -> None:
  from pinfm_jax.report import write_report

  print(write_report(Path(arguments.workdir)))


def _add_prepare(commands) -> None:
  command = commands.add_parser(
    'prepare',
    help='prepare raw activity logs',
    description='Reads CSV, JSONL (also .gz) and Parquet logs and writes a prepared data set, or adds a partition to '
    'one (--append). Malformed rows go to rejected.jsonl with their reason.',
  )
  command.add_argument('logs', metavar='LOG', nargs='+', help='event files; with --source the folder as published')
  target = command.add_mutually_exclusive_group(required=True)
  target.add_argument('--out', metavar='DIR', help='the data set to make')
  target.add_argument('--append', metavar='DATASET', help='add later events and impressions to a prepared data set')
  command.add_argument('--source', metavar='NAME', help='a public set: kuairand, globo, movielens or amazon')
  command.add_argument('--option', metavar='KEY=VALUE', nargs='+', action='extend', default=[],
                       help='an option of --source, for example category=Beauty')  # fmt: skip
  _add_prepare_settings(command)
  command.set_defaults(function=_prepare)


def _add_prepare_beam(commands) -> None:
  command = commands.add_parser(
    'prepare-beam',
    help='prepare raw activity logs with Apache Beam',
    description='What `prepare` does, as an Apache Beam pipeline. Options of the pipeline stand after --, for example '
    '-- --runner=FlinkRunner.',
  )
  command.add_argument('logs', metavar='LOG', nargs='+', help='event files, on paths that all workers share')
  command.add_argument('--out', metavar='DIR', required=True, help='the data set to make, likewise')
  _add_prepare_settings(command)
  command.set_defaults(function=_prepare_beam)


def _add_prepare_settings(command: argparse.ArgumentParser) -> None:
  for name, text in (
    (
      'columns',
      'user_id=uid,timestamp=ts,...: names of the log; canonical: user_id timestamp item_id surface action actions',
    ),
    ('action-columns', 'is_click=click,...: 0/1 columns of the log that are actions'),
    ('impression-columns', 'names of the impressions: request_id, user_id, timestamp, item_id, surface, labels, ...'),
    ('item-columns', 'names of the item file: item_id, created_at, content, features'),
    ('user-columns', 'names of the user file: user_id, features'),
    ('reference-columns', 'save=true_save,...: true probabilities, of simulated logs'),
  ):
    command.add_argument(f'--{name}', metavar='A=B,...', help=text)
  for name, text in (
    ('impressions', 'files of impressions: ranking requests with labels and features'),
    ('labels', '0/1 columns of the impressions that are predicted'),
    ('dense', 'numeric features'),
    ('sparse', 'categorical features'),
    ('embedding', 'vector features'),
    ('actions', 'a fixed action vocabulary: other names are malformed'),
    ('surfaces', 'a fixed surface vocabulary'),
  ):
    command.add_argument(f'--{name}', metavar='A,B', help=text)
  command.add_argument('--items', metavar='FILE', help='item file: item_id, created_at, content, item features')
  command.add_argument('--users', metavar='FILE', help='user file: user_id, user features')
  command.add_argument('--request-by', choices=('request_id', 'user_day'), help="a request's impressions share this")
  units = ('auto', 's', 'ms', 'iso', 'order')
  command.add_argument('--time-unit', choices=units, help='of the log (default: auto)')
  command.add_argument('--impression-time-unit', choices=units, help='of the impressions (default: auto)')
  command.add_argument('--user-id-type', choices=('auto', 'integer', 'string'), help='(default: auto)')
  command.add_argument('--item-id-type', choices=('auto', 'integer', 'string'), help='(default: auto)')
  command.add_argument('--cap', type=int, help='newest events kept of a user (default: 16000)')
  command.add_argument('--max-rejected-share', type=float, help='more malformed rows stop it (default: 0.01)')
  command.add_argument('--shards', type=int, help='record files (default: by size)')
  command.add_argument('--partitions', type=int, help='parts the users are processed in (default: by size)')
  command.add_argument('--overwrite', action='store_true', default=None, help='replace a data set at DIR')


_MAPPINGS = (
  'columns', 'action_columns', 'impression_columns', 'item_columns', 'user_columns', 'reference_columns',
)  # fmt: skip
_LISTS = ('impressions', 'labels', 'dense', 'sparse', 'embedding', 'actions', 'surfaces')
_COMMAND_ONLY = ('command', 'function', 'logs', 'out', 'append', 'source', 'option', 'runner')


def _prepare(arguments: argparse.Namespace) -> None:
  from pinfm_jax.data.append import append
  from pinfm_jax.data.prepare import PrepareConfig, prepare
  from pinfm_jax.data.sources import prepare_source
  from pinfm_jax.overrides import literal, parse_assignments

  settings = _prepare_settings(arguments)
  if arguments.append and arguments.source:
    raise UserError('--append takes logs, not a public set: drop --source, or give --out')
  if arguments.source:
    if len(arguments.logs) > 1:
      raise UserError(f'--source takes one folder or file, got {len(arguments.logs)}')
    options = {k: literal(v) for k, v in parse_assignments(arguments.option, '--option').items()}
    for name in sorted(settings.keys() & options.keys()):
      raise UserError(f'--option {name} and --{name.replace("_", "-")} are the same setting; give one of them')
    info = prepare_source(arguments.source, arguments.logs[0], arguments.out, **settings, **options).info
  else:
    if arguments.option:
      raise UserError('--option belongs to --source; name the public set, or drop it')
    if arguments.append:
      _print_counts(arguments.append, append(arguments.append, arguments.logs, **settings).partitions[-1].counts)
      return
    info = prepare(PrepareConfig(logs=tuple(arguments.logs), out=arguments.out, **settings))
  _print_counts(arguments.out, info.counts)


def _prepare_settings(arguments: argparse.Namespace) -> dict[str, Any]:
  from pinfm_jax.overrides import parse_assignments

  settings = {k: v for k, v in vars(arguments).items() if v is not None and k not in _COMMAND_ONLY}
  for name in _MAPPINGS:
    if name in settings:
      settings[name] = parse_assignments(settings[name].split(','), f'--{name.replace("_", "-")}')
  for name in _LISTS:
    if name in settings:
      settings[name] = tuple(settings[name].split(','))
  return settings


def _prepare_beam(arguments: argparse.Namespace) -> None:
  from pinfm_jax.data.preparation.config import PrepareConfig

  try:
    from pinfm_jax.data.beam.pipeline import prepare_with_beam
  except ModuleNotFoundError as error:
    if error.name != 'apache_beam':
      raise
    raise UserError("apache-beam is not installed: pip install 'pinfm_jax[beam]'") from None
  config = PrepareConfig(logs=tuple(arguments.logs), out=arguments.out, **_prepare_settings(arguments))
  _print_counts(arguments.out, prepare_with_beam(config, arguments.runner).counts)


def _print_counts(where: str, counts) -> None:
  print(f'{where}: {counts.users} users, {counts.items} items, {counts.requests} requests')
  for kind in ('events', 'impressions'):
    rows = getattr(counts, kind)
    if rows.read:
      print(f'  {kind}: {rows.read} read = {rows.kept} kept + {rows.rejected} rejected + {rows.merged} merged + '
            f'{rows.duplicates} duplicates + {rows.cut} cut by the cap')  # fmt: skip


def _add_download(commands) -> None:
  command = commands.add_parser('download', help='fetch a public data set, with checksum and resume')
  command.add_argument('name', metavar='NAME', help='for example movielens-1m or kuairand-pure; "list" names all')
  command.add_argument('--out', metavar='DIR', help='where to put it (default: data/NAME)')
  command.add_argument('--base-url', metavar='URL', help='a mirror of the files')
  command.set_defaults(function=_download)


def _download(arguments: argparse.Namespace) -> None:
  from pinfm_jax.data.download import DATASETS, download

  if arguments.name == 'list':
    for dataset in DATASETS:
      print(f'{dataset.name:24} pinfm prepare --source {dataset.source:10} {dataset.terms}')
    return
  print(download(arguments.name, arguments.out or Path('data') / arguments.name, arguments.base_url))


def _add_apply_delta(commands) -> None:
  command = commands.add_parser('apply-delta', help='make a bundle from an earlier one and what has changed')
  command.add_argument('base', metavar='BASE', help='the bundle that the delta was exported against')
  command.add_argument('delta', metavar='DELTA', help='what `pinfm export --base BASE` wrote')
  command.add_argument('--out', metavar='BUNDLE', required=True, help='the directory to make')
  command.add_argument('--overwrite', action='store_true', help='replace a bundle at BUNDLE')
  command.set_defaults(function=_apply_delta)


def _apply_delta(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.delta import apply_delta

  print(apply_delta(arguments.base, arguments.delta, arguments.out, arguments.overwrite))


def _add_score(commands) -> None:
  command = commands.add_parser('score', help='score ranking requests with a bundle')
  command.add_argument('bundle', metavar='BUNDLE', help='what `pinfm export` wrote')
  command.add_argument('requests', metavar='REQUESTS.jsonl', help='one request a line, or one JSON list')
  command.add_argument('--out', metavar='SCORES.jsonl', required=True, help='one result a line, same order')
  command.add_argument('--rows', metavar='URL,URL', help='row servers (`pinfm serve-rows`); no tables are needed here')
  command.set_defaults(function=_score)


def _score(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.rows.remote import RemoteRows
  from pinfm_jax.serve.scorer import score_file

  a = arguments
  with RemoteRows.connect(a.bundle, a.rows.split(',')) if a.rows is not None else nullcontext() as rows:
    print(f'{a.out}: {score_file(a.bundle, a.requests, a.out, rows)} requests scored')


def _add_plan(commands) -> None:
  command = commands.add_parser(
    'plan',
    help='what pretraining needs on N devices, before it is started',
    description='Memory of a device by part, FLOPs, traffic and an estimate of time of the pretraining of a launch '
    'file. Compiles the real step for N devices that need not be there; nothing is allocated and no data are read.',
  )
  command.add_argument('file', metavar='FILE', help='a launch file, for example experiments/pinfm_20b.py')
  command.add_argument('--devices', type=int, required=True, metavar='N', help='chips (GPUs, TPU chips)')
  command.add_argument('--mesh', metavar='D,F,M', help="sizes of data, fsdp and model (default: the launch file's)")
  command.add_argument('--platform', metavar='NAME', help="cpu, cuda or tpu (default: the chip's)")
  command.add_argument('--chip', metavar='NAME', help='H100 (default), H200, A100-80GB, B200, v4, v5e, v5p, v6e')
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment')  # fmt: skip
  command.set_defaults(function=_plan)


def _plan(arguments: argparse.Namespace) -> None:
  from pinfm_jax.plan.command import plan

  plan(arguments.file, arguments.devices, arguments.mesh, arguments.platform, arguments.chip, arguments.assignments)


if __name__ == '__main__':
  sys.exit(main())
