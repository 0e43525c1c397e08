"""Stage `prepare`: the prepared data set, from the simulator or a public source's files."""

import os

from pinfm_jax.data.audit import check_times
from pinfm_jax.data.prepare import prepare
from pinfm_jax.data.simulator import SimulatorConfig, simulate, simulated_prepare_config
from pinfm_jax.data.sources import prepare_source
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import from_dict
from pinfm_jax.stages.context import Run
from pinfm_jax.train.distributed import on_first
from pinfm_jax.workdir import claim


def prepare_stage(run: Run) -> None:
  """Makes the prepared data set; one that stands already is kept, if it was made with the same settings.

  Raises:
    UserError: no path for a public source, a request that knows the future, or see `prepare`.
  """
  on_first('prepare', lambda: _prepare(run))
  counts = run.dataset.info.counts
  print(f'data: {counts.users} users, {counts.items} items, {counts.events.kept} events, {counts.requests} requests')


def _prepare(run: Run) -> None:
  data = run.experiment.data
  if data.source != 'prepared':
    settings = {
      'source': data.source,
      'path': os.path.abspath(data.path) if data.path else '',
      'simulator': dict(data.simulator),
    }
    if data.options:
      settings['options'] = dict(data.options)
    made = (run.data_directory / 'dataset.json').exists()
    claim(run.workdir / 'prepare', {'data': settings}, started=made)  # a failed try binds nobody to its settings
    if not made:
      _make(run)
  check_times(run.dataset)  # also of one that was prepared elsewhere


def _make(run: Run) -> None:
  data = run.experiment.data
  if data.source == 'simulator':
    feed = simulate(from_dict(SimulatorConfig, data.simulator), run.workdir / 'raw')
    prepare(simulated_prepare_config(feed, run.data_directory))
    return
  if not data.path:
    raise UserError(
      f'data.path is empty; set it to the folder of the {data.source} files: --set data.path=DIR, or, for the launch '
      'files of experiments/, the environment variable PINFM_DATA to the folder of all data sets'
    )
  prepare_source(data.source, data.path, run.data_directory, **data.options)
