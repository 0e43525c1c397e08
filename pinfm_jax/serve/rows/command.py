"""The arguments of `pinfm serve-rows`."""

import argparse


def add_serve_rows(commands) -> None:
  """Adds `serve-rows` to the `pinfm` command."""
  command = commands.add_parser(
    'serve-rows',
    help="serve a bundle's table rows to scorers on other hosts",
    description='Serves packed table rows over HTTP, so that hosts with accelerators need no tables. Rows can be split '
    'over servers (--part), and several servers of one part are replicas.',
  )
  command.add_argument('bundle', metavar='BUNDLE', help='what `pinfm export` wrote')
  command.add_argument('--port', type=int, required=True, help='to listen on; 0 = any free one, which is printed')
  command.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s)')
  command.add_argument('--part', metavar='I/N', default='1/1', help='serve the I-th of N parts of the rows alone')
  command.set_defaults(function=_serve_rows)


def _serve_rows(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.rows.server import Part, serve_rows

  serve_rows(arguments.bundle, arguments.host, arguments.port, Part.parse(arguments.part))
