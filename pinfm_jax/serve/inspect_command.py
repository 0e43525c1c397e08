"""The arguments of `pinfm inspect`."""

import argparse
import json

from pinfm_jax.errors import UserError


def add_inspect(commands) -> None:
  """Adds `inspect` to the `pinfm` command."""
  command = commands.add_parser('inspect', help='what a bundle (or a delta, or an ONNX export) is, and if it is whole')
  command.add_argument('path', metavar='BUNDLE', help='what `pinfm export` wrote')
  command.add_argument('--verify', action='store_true', help='read every file and compare it with its checksum')
  command.add_argument('--json', action='store_true', help='print all facts of the manifest as JSON')
  command.set_defaults(function=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.inspect import damaged_files, inspect

  found = inspect(arguments.path)
  damaged = damaged_files(arguments.path, found.files) if arguments.verify else {}
  if arguments.json:
    print(json.dumps({**found.facts, **({'damaged': damaged} if arguments.verify else {})}, indent=1))
  else:
    print('\n'.join([found.text(arguments.path), *damaged.values()]))
    if arguments.verify and not damaged:
      print('every file has its checksum')
  if damaged:
    count, all_ = len(damaged), len(found.files)
    raise UserError(
      f'{arguments.path}: {count} of {all_} files damaged or missing ({", ".join(damaged)}); '
      'copy it again or export it again'
    )
