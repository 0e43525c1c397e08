"""The arguments of `pinfm export`: from a finished run, or from a bundle."""

import argparse
from dataclasses import replace
from pathlib import Path

from pinfm_jax.errors import UserError


def add_export(commands) -> None:
  """Adds `export` to the `pinfm` command."""
  command = commands.add_parser(
    'export',
    help='convert a fine-tuned ranker or a pretrained tower to a serving bundle, or a bundle to another form',
    description='Writes the bundle of a fine-tuned ranker, or of the pretrained tower alone (--tower); an ONNX or '
    'TensorFlow form of it (--format); or a bundle again, for the JAX that is installed here (--refresh) or with other '
    'tables (--storage).',
  )
  command.add_argument('source', metavar='WORKDIR', help='of a finished run; or a bundle')
  command.add_argument('--out', metavar='DIR', required=True, help='the directory to make')
  command.add_argument('--format', choices=('bundle', 'onnx', 'savedmodel'), default='bundle', dest='form',
                       help='onnx needs the package onnx, savedmodel TensorFlow (default: bundle)')  # fmt: skip
  command.add_argument('--refresh', action='store_true', help="lower a bundle's programs again for this JAX")
  command.add_argument('--arm', metavar='NAME', help='which ranker (default: the last one with PinFM)')
  command.add_argument('--tower', action='store_true',
                       help='the pretrained tower without a ranker, with --arm the one it starts from')  # fmt: skip
  command.add_argument('--seed', type=int, help='of which seed (default: the first)')
  command.add_argument('--storage', choices=('int4', 'int8', 'float32'), help='of the tables')
  command.add_argument('--clip', action=argparse.BooleanOptionalAction, default=None,
                       help='round table rows with the least squared error, or from minimum to maximum')  # fmt: skip
  command.add_argument('--base', metavar='BUNDLE', help='write just what this earlier bundle has not, as a delta')
  command.add_argument('--overwrite', action='store_true', help='replace what an earlier export wrote to DIR')
  command.set_defaults(function=_export)


def _export(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.manifest import MANIFEST

  if (Path(arguments.source) / MANIFEST).is_file():
    _export_bundle(arguments)
    return
  if arguments.refresh:
    raise UserError(f'--refresh takes a bundle, and {arguments.source} has no {MANIFEST}; drop it to export a run')
  if arguments.base and arguments.form != 'bundle':
    raise UserError(f'a delta is made of bundles: drop --base, or --format {arguments.form}')
  from pinfm_jax.launch import saved_experiment
  from pinfm_jax.stages.context import Run
  from pinfm_jax.stages.export import export_arm

  run, a = Run(saved_experiment(arguments.source), Path(arguments.source)), arguments
  print(export_arm(run, a.out, a.arm, a.seed, a.storage, a.overwrite, a.base, a.clip, a.form, a.tower))


def _export_bundle(arguments: argparse.Namespace) -> None:
  """Writes a bundle again, in another way."""
  for name in ('arm', 'tower', 'seed', 'base'):
    if getattr(arguments, name) not in (None, False):
      raise UserError(f'--{name} belongs to a run, and {arguments.source} is a bundle: drop it, or give a workdir')
  from pinfm_jax.serve.bundle import export_bundle
  from pinfm_jax.serve.convert import ranker_of_bundle, refresh_bundle
  from pinfm_jax.serve.portable.export import export_portable

  bundle, out, storage, overwrite = arguments.source, arguments.out, arguments.storage, arguments.overwrite
  if arguments.refresh:
    if storage or arguments.clip is not None or arguments.form != 'bundle':
      raise UserError('--refresh keeps tables and form as they are: drop --storage, --clip and --format, or --refresh')
    print(refresh_bundle(bundle, out, overwrite))
    return
  if arguments.form == 'bundle' and storage is None:
    raise UserError(f'{bundle} is a bundle already; expected --refresh, --storage or --format to make another of it')
  ranker = ranker_of_bundle(bundle)
  if arguments.clip is not None:
    ranker = replace(ranker, clip=arguments.clip)
  storage = storage or (ranker.rows_GE.storage if ranker.rows_GE else 'int4')
  if arguments.form == 'bundle':
    print(export_bundle(out, ranker, storage, overwrite))
  else:
    print(export_portable(out, ranker, arguments.form, storage, overwrite))
