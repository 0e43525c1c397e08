"""The arguments of `pinfm import-tables`."""

import argparse
from pathlib import Path


def add_import_tables(commands) -> None:
  """Adds `import-tables` to the `pinfm` command."""
  command = commands.add_parser(
    'import-tables',
    help='make table rows of pretrained item vectors, for a run to start from',
    description='Reads one vector an item and writes the table rows that reproduce them best; '
    'pretrain.start_from=DIR then starts a run with these rows. All other rows start as usual.',
  )
  command.add_argument('vectors', metavar='FILE', help='Parquet with item_id and vector, or .npy with [items, width]')
  command.add_argument('--ids', metavar='NPY', help='for vectors in .npy: the items, integers or text')
  command.add_argument('--out', metavar='DIR', required=True, help='the directory to make')
  command.add_argument('--experiment', metavar='FILE', required=True,
                       help='launch file of the run that will start from it, or workdir of an earlier run')  # fmt: skip
  command.add_argument('--set', metavar='KEY=VALUE', nargs='+', action='extend', default=[], dest='assignments',
                       help='change settings of the experiment')  # fmt: skip
  command.add_argument('--id-column', metavar='NAME', default='item_id', help='of Parquet (default: item_id)')
  command.add_argument('--vector-column', metavar='NAME', default='vector', help='of Parquet (default: vector)')
  command.add_argument('--id-type', choices=('integer', 'string'), help='of the data set, if the file has another')
  command.add_argument('--rms', type=float, metavar='X',
                       help='scale the vectors to this root mean square of their values (fresh rows have '
                       'model.tables.init_scale; default: as they are)')  # fmt: skip
  command.add_argument('--overwrite', action='store_true', help='replace what an earlier import wrote to DIR')
  command.set_defaults(function=_import_tables)


def _import_tables(arguments: argparse.Namespace) -> None:
  import math

  from pinfm_jax.checks import check_experiment
  from pinfm_jax.data.item_vectors import open_item_vectors
  from pinfm_jax.errors import UserError
  from pinfm_jax.launch import load_experiment, saved_experiment
  from pinfm_jax.overrides import apply_overrides, parse_assignments
  from pinfm_jax.serve.import_tables import import_tables

  a, overrides = arguments, parse_assignments(arguments.assignments)
  if a.rms is not None and not 0 < a.rms < math.inf:
    raise UserError(f'--rms is {a.rms}; expected a positive number')
  if Path(a.experiment).is_dir():
    experiment = apply_overrides(saved_experiment(a.experiment), overrides)
    check_experiment(experiment)
  else:
    experiment = load_experiment(a.experiment, overrides)
  vectors = open_item_vectors(a.vectors, a.ids, a.id_column, a.vector_column, a.id_type)
  print(import_tables(a.out, vectors, experiment.model.tables, a.rms, overwrite=a.overwrite).text())
  print(f'start from it: pretrain.start_from={a.out}')
