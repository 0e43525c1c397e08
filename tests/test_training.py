"""Training runs: the loss falls, a resumed run is bit-identical, a broken one keeps its last good checkpoint."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from toy import load_arrays

from pinfm_jax.errors import UserError
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train import loop
from pinfm_jax.train.pretrain import PretrainTask, pretrain
from pinfm_jax.train.sharding import put_batch
from pinfm_jax.train.step import init_state, make_step


def _pretrain(run, directory, **changes):
  config = replace(run.experiment.pretrain, **changes)
  return pretrain(run.dataset, run.split.pretrain_until, run.model, config, run.mesh, directory, seed=0)


class _KilledError(Exception):
  pass


def _kill_at(monkeypatch, step):
  """Makes the data stream of the next run end with an exception before `step`."""
  original = loop.put_batch
  served = iter(range(step))

  def put(batch, mesh):
    if next(served, None) is None:
      raise _KilledError
    return original(batch, mesh)

  monkeypatch.setattr(loop, 'put_batch', put)


def _equal(a, b):
  a, b = jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
  assert [path for path, _ in a] == [path for path, _ in b]
  for (path, x), (_, y) in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_the_loss_falls_on_structured_data(toy_run, tmp_path):
  update = replace(toy_run.experiment.pretrain.update, learning_rate=1e-2)
  _pretrain(toy_run, tmp_path, steps=60, checkpoint_every=60, log_every=1, update=update)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  losses = [eval(line)['loss'] for line in lines]  # noqa: S307 (our own JSON of numbers)
  assert len(losses) == 60
  assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])


@pytest.mark.parametrize('killed_at', [2, 4])
def test_a_killed_and_resumed_run_is_bit_identical(toy_run, tmp_path, monkeypatch, killed_at):
  _pretrain(toy_run, tmp_path / 'whole')
  with monkeypatch.context() as patch:
    _kill_at(patch, killed_at)
    with pytest.raises(_KilledError):
      _pretrain(toy_run, tmp_path / 'killed')
  _pretrain(toy_run, tmp_path / 'killed')
  whole, resumed = (load_arrays(tmp_path / name / 'checkpoints') for name in ('whole', 'killed'))
  assert int(whole['step']) == 6
  _equal(whole, resumed)
  steps = [eval(line)['step'] for line in (tmp_path / 'killed' / 'metrics.jsonl').read_text().splitlines()]  # noqa: S307
  assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_run_again(toy_run, tmp_path, monkeypatch):
  first = _pretrain(toy_run, tmp_path)
  monkeypatch.setattr(loop, 'put_batch', None)  # would fail if a step ran
  _equal(first.params, _pretrain(toy_run, tmp_path).params)


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(toy_run, tmp_path):
  update = replace(toy_run.experiment.pretrain.update, learning_rate=float('inf'))
  _pretrain(toy_run, tmp_path, steps=3)
  with pytest.raises(UserError, match=r'loss became nan at step'):
    _pretrain(toy_run, tmp_path, steps=9, update=update)
  state = load_arrays(tmp_path / 'checkpoints')
  assert int(state['step']) == 3
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_a_checkpoint_of_other_data_or_seed_is_refused(toy_run, tmp_path):
  _pretrain(toy_run, tmp_path, steps=3)
  config = toy_run.experiment.pretrain
  with pytest.raises(UserError, match='seed'):
    pretrain(toy_run.dataset, toy_run.split.pretrain_until, toy_run.model, config, toy_run.mesh, tmp_path, seed=1)
  wider = replace(toy_run.model, tower=replace(toy_run.model.tower, width=32))
  with pytest.raises(UserError, match='does not fit'):
    pretrain(toy_run.dataset, toy_run.split.pretrain_until, wider, config, toy_run.mesh, tmp_path, seed=0)


@pytest.mark.parametrize(('part', 'changes'), [('tables', {'hash_seed': 3}), ('tower', {'heads': 4})])
def test_a_run_that_means_other_rows_or_heads_is_not_resumed(toy_run, tmp_path, part, changes):
  """Neither changes a shape, so only the position tells."""
  _pretrain(toy_run, tmp_path / 'first', steps=3)
  model = replace(toy_run.model, **{part: replace(getattr(toy_run.model, part), **changes)})
  config = replace(toy_run.experiment.pretrain, resume=str(tmp_path / 'first'))
  with pytest.raises(UserError, match='was written with'):
    pretrain(toy_run.dataset, toy_run.split.pretrain_until, model, config, toy_run.mesh, tmp_path / 'next', seed=0)


def test_the_tables_stay_in_place_over_steps(toy_run):
  task, batch = _task_and_batch(toy_run)
  with jax.set_mesh(toy_run.mesh):
    state, step = init_state(task, toy_run.mesh, 0)(), make_step(task)
    address = state.tables.rows_GE.unsafe_buffer_pointer()
    for _ in range(3):
      state, _ = step(state, put_batch(batch, toy_run.mesh))
    assert state.tables.rows_GE.unsafe_buffer_pointer() == address


def test_the_pretrained_ratio_scales_the_first_move_of_tower_and_tables(toy_run):
  task, batch = _task_and_batch(toy_run)
  moved = {}
  for ratio in (1.0, 0.1):
    update = replace(task.update, config=replace(task.config.update, pretrained_ratio=ratio), pretrained=('pinfm',))
    changed = _WithUpdate(task, update)
    with jax.set_mesh(toy_run.mesh):
      state = init_state(changed, toy_run.mesh, 0)()
      before = jax.tree.map(np.array, (state.params['pinfm'], state.tables.rows_GE))
      state, _ = make_step(changed)(state, put_batch(batch, toy_run.mesh))
      after = (state.params['pinfm'], state.tables.rows_GE)
      moved[ratio] = [np.abs(np.asarray(a) - b).max() for a, b in zip(*map(jax.tree.leaves, (after, before)))]  # noqa: B905
  np.testing.assert_allclose(np.array(moved[0.1]), 0.1 * np.array(moved[1.0]), rtol=2e-2, atol=1e-9)


def test_too_short_segments_for_the_future_loss_are_refused(toy_run, tmp_path):
  with pytest.raises(UserError, match='downstream_length'):
    _pretrain(toy_run, tmp_path, segment_length=8)


def test_segments_feed_the_model_as_they_are(toy_run):
  _, batch = _task_and_batch(toy_run)
  events = EventBatch(batch['item'], batch['surface'], batch['actions'], batch['mask'], batch['user'])
  assert events.mask_UL.shape == (8, 16)


class _WithUpdate:
  """A task with another update rule."""

  def __init__(self, task, update):
    self._task, self.update = task, update

  def __getattr__(self, name):
    return getattr(self._task, name)


def _task_and_batch(run):
  from pinfm_jax.data.pipeline import Segments, training_batches

  segments = Segments.before(run.dataset, run.split.pretrain_until, 16)
  return PretrainTask(run.model, run.experiment.pretrain, 0), next(training_batches(segments, 8, 0, 0))
