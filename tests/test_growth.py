"""Continued pretraining: what is learned goes on in grown vocabularies, on the new events."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from toy import EXPERIMENT, SIMULATOR, load_arrays

from pinfm_jax.cli import main
from pinfm_jax.config import DAY_MS, DataConfig
from pinfm_jax.data.append import append
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.new_events import earlier_partitions, new_segments
from pinfm_jax.data.pipeline import Segments
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.data.simulator import SimulatorConfig, simulate
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import from_dict
from pinfm_jax.stages.context import Run
from pinfm_jax.train.growth import EarlierRun, check_growth, grow_state
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.workdir import claim

START = SimulatorConfig().start_ms
SPLIT = START + 4 * DAY_MS  # the first data set holds four days, two more are appended
PRETRAIN = replace(EXPERIMENT.pretrain, positive_actions=())


class Grown:
  """A data set of four days, and the same with two more, in which there are a new surface and a new action."""

  def __init__(self, folder):
    events = pl.read_parquet(simulate(from_dict(SimulatorConfig, SIMULATOR), folder / 'raw').events)
    late = pl.col('timestamp') >= SPLIT
    old, new = events.filter(~late), events.filter(late)
    # A new name takes a part of an old one's rows: 'home' first in the alphabet shows that codes do not follow it.
    odd = pl.col('item_id') % 2 == 1
    surface = pl.when(odd & (pl.col('surface') == 'related')).then(pl.lit('boards')).otherwise('surface')
    actions = pl.when(odd).then(pl.concat_list('actions', pl.lit('buy'))).otherwise('actions')
    old.write_parquet(folder / 'old.parquet')
    new.with_columns(surface.alias('surface'), actions.alias('actions')).write_parquet(folder / 'new.parquet')
    prepare(PrepareConfig((folder / 'old.parquet',), folder / 'old'))
    prepare(PrepareConfig((folder / 'old.parquet',), folder / 'grown'))
    append(folder / 'grown', folder / 'new.parquet')
    self.folder = folder
    self.old, self.grown = (PreparedDataset.open(folder / name) for name in ('old', 'grown'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return Grown(tmp_path_factory.mktemp('grown'))


def _experiment(path, **pretrain):
  source = DataConfig(source='prepared', path=str(path))
  return replace(EXPERIMENT, data=source, arms=(), pretrain=replace(PRETRAIN, **pretrain))


def _pretrain(path, workdir, **settings):
  """The stage `pretrain` without its evaluation."""
  context = Run(_experiment(path, **settings), workdir)
  directory, config = context.pretrain_directory(0), context.experiment.pretrain
  claim(directory, context.pretrain_settings(0))
  pretrain(context.dataset, context.split.pretrain_until, context.model, config, context.mesh, directory, 0)
  return workdir


LEARN = {'steps': 60, 'checkpoint_every': 60, 'update': replace(PRETRAIN.update, learning_rate=1e-2)}
# Without learning, a state shows where the run began.
STAY = {'steps': 3, 'update': replace(PRETRAIN.update, learning_rate=0.0, table_learning_rate=0.0)}


@pytest.fixture(scope='module')
def first(data):
  """The workdir of the first days' run."""
  return _pretrain(data.folder / 'old', data.folder / 'first', **LEARN)


def _losses(workdir):
  lines = (workdir / 'seed0' / 'pretrain' / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


@pytest.fixture(scope='module')
def continued(data, first):
  """The workdir of a run that goes on from it."""
  return _pretrain(data.folder / 'grown', data.folder / 'continued', continue_from=str(first), **STAY)


def test_vocabularies_grew(data):
  assert data.old.info.surfaces == ('home', 'related', 'search')
  assert data.grown.info.surfaces == ('home', 'related', 'search', 'boards')
  assert data.grown.info.actions == (*data.old.info.actions, 'buy')


def test_a_continued_run_starts_where_the_earlier_ended(first, continued):
  old, new = (load_arrays(path / 'seed0' / 'pretrain' / 'checkpoints') for path in (first, continued))
  actions = len(old['params']['pinfm']['action_embedding']) - 1
  _same(old['params'], new['params'], actions)
  np.testing.assert_array_equal(new['tables']['rows'], old['tables']['rows'])
  assert np.all(new['tables']['accumulator'] >= old['tables']['accumulator'])
  assert np.any(old['tables']['accumulator'] > 0)
  assert int(new['opt_state']['count']) == 63
  assert int(new['step']) == 3


def _same(old, new, actions):
  for name, value in old.items():
    if isinstance(value, dict):
      _same(value, new[name], actions)
    elif name == 'action_embedding':
      np.testing.assert_array_equal(new[name][:actions], value[:-1])
      np.testing.assert_array_equal(new[name][-1], value[-1])
      assert new[name].shape[0] == actions + 2
      assert np.abs(new[name][actions]).max() > 0
    else:
      np.testing.assert_array_equal(new[name][: len(value)] if value.ndim else new[name], value)


def test_the_loss_goes_on_low(first, continued):
  losses, now = _losses(first), np.mean(_losses(continued))
  began, ended = np.mean(losses[:3]), np.mean(losses[-10:])
  assert ended < 0.9 * began
  assert now < ended + 0.4 * (began - ended)


def test_a_continued_run_resumes_from_its_own_checkpoint(data, first, continued):
  before = _losses(continued)
  _pretrain(data.folder / 'grown', continued, continue_from=str(first), **STAY)
  assert _losses(continued) == before
  longer = STAY | {'steps': 4}
  (continued / 'seed0' / 'pretrain' / 'settings.json').unlink()  # as for any change of the steps
  _pretrain(data.folder / 'grown', continued, continue_from=str(first), **longer)
  assert _losses(continued)[:3] == before


@pytest.mark.slow
def test_the_command_continues(data, first, tmp_path):
  launch = tmp_path / 'launch.py'
  launch.write_text(
    '"""The toy experiment on a prepared data set."""\n\nfrom dataclasses import replace\n\n'
    'from toy import EXPERIMENT\n\nexperiment = replace(EXPERIMENT, arms=())\n'
  )
  settings = [f'data.path={data.folder / "grown"}', 'data.source=prepared', f'pretrain.continue_from={first}']
  settings += ['pretrain.positive_actions=', 'pretrain.steps=2']
  assert (
    main(['run', str(launch), '--workdir', str(tmp_path / 'work'), '--stages', 'pretrain', '--set', *settings]) == 0
  )
  assert np.mean(_losses(tmp_path / 'work')) < np.mean(_losses(first)[:3])


def test_new_segments_are_those_with_an_event_not_read_before(data):
  for until in (SPLIT - DAY_MS, SPLIT, SPLIT + DAY_MS, None):
    everything = Segments.before(data.grown, None if until is None else START + 7 * DAY_MS, 16)
    found = new_segments(everything, 1, until)
    chosen = set(zip(found.user_row.tolist(), found.start.tolist(), found.stop.tolist(), strict=True))
    old_users = data.old.num_users
    for row, start, stop in zip(everything.user_row, everything.start, everything.stop, strict=True):
      row, start, stop = int(row), int(start), int(stop)
      times = data.grown.history(row).timestamp[start:stop]
      if until is None:
        known = len(data.old.history(row)) - 1 if row < old_users else 0
        new = stop > max(known, 0)
      else:
        new = bool(np.any(times >= until))
      assert ((row, start, stop) in chosen) == new
    assert 0 < len(found) <= len(everything)


def test_nothing_new_is_refused(data):
  segments = Segments.before(data.grown, SPLIT, 16)
  with pytest.raises(UserError, match='no event before the pretraining split that the earlier run has not read'):
    new_segments(segments, 1, SPLIT)


def test_what_is_new_to_a_run_that_spared_users_is_not_guessed(data, first, tmp_path):
  spared = tmp_path / 'spared'
  shutil.copytree(first, spared)
  path = spared / 'seed0' / 'pretrain' / 'settings.json'
  settings = json.loads(path.read_text())
  settings['data'] |= {'pretrain_overlap': True, 'pretrain_overlap_users': 'others'}
  path.write_text(json.dumps(settings))
  with pytest.raises(UserError, match='pretrain_overlap_users=others.*set pretrain.continue_on=all'):
    _pretrain(data.folder / 'grown', tmp_path / 'new', continue_from=str(spared), **STAY)
  _pretrain(data.folder / 'grown', tmp_path / 'all', continue_from=str(spared), continue_on='all', **STAY)


def test_the_earlier_run_must_be_of_an_earlier_state_of_the_data(data, first):
  assert earlier_partitions(data.grown, data.old.info.checksum) == 1
  assert earlier_partitions(data.grown, data.grown.info.checksum) == 2
  with pytest.raises(UserError, match='trained on other data'):
    earlier_partitions(data.old, data.grown.info.checksum)


def test_a_place_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='has no checkpoints'):
    EarlierRun.open(tmp_path, 0)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='has no checkpoint to continue from'):
    EarlierRun.open(tmp_path, 0)


def _models(old=(3, 2), new=(5, 4)):
  model = EXPERIMENT.model
  return (replace(model, num_actions=a, num_surfaces=s) for a, s in (old, new))


def _state(actions, surfaces, value, width=4):
  """A tree with every kind of array: the embeddings, a head over actions, and one that does not grow."""
  rng = np.random.default_rng(value)
  arrays = {
    'action_embedding': rng.normal(size=(actions + 1, width)),
    'surface_embedding': rng.normal(size=(surfaces, width)),
    'action_head': {'kernel': rng.normal(size=(width, actions)), 'bias': rng.normal(size=actions)},
    'other': rng.normal(size=(7, width)),
  }
  return {'params': jax.tree.map(np.float32, arrays)}


def test_old_rows_keep_their_values_and_new_ones_are_fresh():
  old_model, new_model = _models()
  old, fresh = _state(3, 2, 0)['params'], _state(5, 4, 1)['params']
  grown = grow_state({'params': old}, old_model, new_model, {'params': fresh})['params']
  expected = {
    'action_embedding': np.concatenate([old['action_embedding'][:3], fresh['action_embedding'][3:5],
                                        old['action_embedding'][3:]]),
    'surface_embedding': np.concatenate([old['surface_embedding'], fresh['surface_embedding'][2:]]),
    'other': old['other'],
  }  # fmt: skip
  for name, value in expected.items():
    np.testing.assert_array_equal(grown[name], value)
  kernel = np.concatenate([old['action_head']['kernel'], fresh['action_head']['kernel'][:, 3:]], axis=1)
  np.testing.assert_array_equal(grown['action_head']['kernel'], kernel)
  np.testing.assert_array_equal(grown['action_head']['bias'][:3], old['action_head']['bias'])


def test_as_many_surfaces_as_action_rows_are_not_mixed_up():
  old_model, new_model = _models((3, 4), (5, 6))
  old, fresh = _state(3, 4, 0)['params'], _state(5, 6, 1)['params']
  grown = grow_state({'params': old}, old_model, new_model, {'params': fresh})['params']
  np.testing.assert_array_equal(grown['surface_embedding'][:4], old['surface_embedding'])
  np.testing.assert_array_equal(grown['action_embedding'][-1], old['action_embedding'][-1])


def test_what_does_not_fit_is_refused():
  old_model, new_model = _models()
  old, fresh = _state(3, 2, 0), _state(5, 4, 1)
  wider = {'params': {**fresh['params'], 'other': jnp.zeros((9, 4))}}
  with pytest.raises(UserError, match=r'params/other of shape \(7, 4\), the model \(9, 4\)'):
    grow_state(old, old_model, new_model, wider)
  more = {'params': {**fresh['params'], 'gap': jnp.zeros(3)}}
  with pytest.raises(UserError, match='has no params/gap, which the model has'):
    grow_state(old, old_model, new_model, more)
  with pytest.raises(UserError, match='has params/other, which the model has not'):
    grow_state(old, old_model, new_model, {'params': {k: v for k, v in fresh['params'].items() if k != 'other'}})
  with pytest.raises(UserError, match='the data set has 3 actions, the run that is continued has 5'):
    check_growth(new_model, old_model)
  tables = replace(new_model, tables=replace(new_model.tables, hash_seed=9))
  with pytest.raises(UserError, match=r'model.tables.hash_seed is 9, the run that is continued has 0'):
    check_growth(old_model, tables)
