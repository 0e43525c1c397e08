"""The arguments of the commands that take a bundle and files: `pinfm recommend`, `pinfm embed`, `pinfm demo`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from pinfm_jax.serve.scorer import Scorer

_ITEMS = '.parquet, .csv, .tsv or .jsonl with a column item_id, or .txt with one id a line'


def add_recommend(commands) -> None:
  """Adds `recommend` to the `pinfm` command."""
  command = commands.add_parser(
    'recommend',
    help='rank a whole catalogue for users, with the user representation',
    description='For each user the items of the catalogue with the highest product of user and item representation.',
  )
  _add_bundle(command)
  command.add_argument('--history', metavar='FILE', required=True,
                       help='users, one JSON object with a "history" a line (as `pinfm score` takes them)')  # fmt: skip
  command.add_argument('--top', type=int, default=20, metavar='N', help='items for each user (default: 20)')
  command.add_argument('--catalogue', metavar='FILE', help=f'items to rank: {_ITEMS} (default: those of the bundle)')
  command.add_argument('--exclude-seen', action='store_true', help='leave out the items of the history given')
  command.add_argument('--out', metavar='FILE', help='one result a line, same order (default: standard output)')
  command.set_defaults(function=_recommend)


def _recommend(arguments: argparse.Namespace) -> None:
  from pinfm_jax.serve.offline.recommend import recommend_file

  a = arguments
  catalogue, out = (None if name is None else Path(name) for name in (a.catalogue, a.out))
  with _scorer(a) as scorer:
    users = recommend_file(scorer, Path(a.history), a.top, catalogue, a.exclude_seen, out)
  if out is not None:
    print(f'{out}: recommendations for {users} users')


def add_embed(commands) -> None:
  """Adds `embed` to the `pinfm` command."""
  command = commands.add_parser(
    'embed',
    help='write vectors of users, items, or users x candidates',
    description='Vectors of a bundle as Parquet, for an index, another ranker, or another framework.',
  )
  _add_bundle(command)
  what = command.add_mutually_exclusive_group(required=True)
  what.add_argument('--users', metavar='FILE', help='users with their histories, one JSON object a line')
  what.add_argument('--items', metavar='FILE', help=f'items: {_ITEMS}')
  what.add_argument('--pairs', metavar='FILE', help='ranking requests: a vector for each candidate')
  kind_help = 'of --items: target = z, which users are compared with (default); id = E, what the towers read of an item'
  command.add_argument('--kind', choices=('target', 'id'), help=kind_help)
  command.add_argument('--out', metavar='FILE', required=True, help='the Parquet file to make')
  command.set_defaults(function=_embed)


def _embed(arguments: argparse.Namespace) -> None:
  from pinfm_jax.errors import UserError
  from pinfm_jax.serve.offline.embed import embed_items, embed_pairs, embed_users

  a = arguments
  if a.kind and not a.items:
    raise UserError(f'--kind {a.kind} belongs to --items; leave it out')
  out = Path(a.out)
  with _scorer(a) as scorer:
    if a.items:
      count = embed_items(scorer, Path(a.items), out, a.kind or 'target')
    else:
      count = (embed_users if a.users else embed_pairs)(scorer, Path(a.users or a.pairs), out)
  print(f'{out}: {count} vectors')


def _add_bundle(command: argparse.ArgumentParser) -> None:
  command.add_argument('bundle', metavar='BUNDLE', help='what `pinfm export` wrote')
  command.add_argument('--rows', metavar='URL,URL', help='row servers (`pinfm serve-rows`); no tables are needed here')


@contextmanager
def _scorer(arguments: argparse.Namespace) -> 'Iterator[Scorer]':
  """The bundle's scorer, over its own tables or row servers."""
  from pinfm_jax.serve.rows.remote import RemoteRows
  from pinfm_jax.serve.scorer import Scorer

  a = arguments
  with RemoteRows.connect(a.bundle, a.rows.split(',')) if a.rows is not None else nullcontext() as rows:
    yield Scorer.load(a.bundle, rows)


def add_demo(commands) -> None:
  """Adds `demo` to the `pinfm` command."""
  command = commands.add_parser(
    'demo',
    help='score example requests with a small bundle, in seconds',
    description='A small bundle of the simulated feed scores requests, beside the probabilities that are true.',
  )
  which = command.add_mutually_exclusive_group()
  which.add_argument('--folder', metavar='DIR', help='a demo folder (default: the one of this installation)')
  which.add_argument('--run', metavar='WORKDIR', help='of a finished `pinfm run experiments/demo.py`')
  command.add_argument('--save', metavar='DIR', help='with --run: keep the demo folder here')
  command.add_argument('--requests', type=int, default=3, metavar='N', help='requests shown (default: 3)')
  command.add_argument('--top', type=int, default=5, metavar='N', help='candidates shown of each (default: 5)')
  command.set_defaults(function=_demo)


def _demo(arguments: argparse.Namespace) -> None:
  import tempfile

  from pinfm_jax.errors import UserError
  from pinfm_jax.serve.offline.demo import demo, demo_folder

  a = arguments
  if a.save and not a.run:
    raise UserError('--save keeps the demo of a run; give --run WORKDIR too')
  if not a.run:
    print(demo(demo_folder(a.folder), a.requests, a.top))
    return
  from pinfm_jax.launch import saved_experiment
  from pinfm_jax.stages.context import Run
  from pinfm_jax.stages.demo import make_demo

  with tempfile.TemporaryDirectory() as scratch:
    run = Run(saved_experiment(a.run), Path(a.run))
    print(demo(make_demo(run, Path(a.save) if a.save else Path(scratch) / 'demo'), a.requests, a.top))
