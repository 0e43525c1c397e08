"""Users who are kept out of pretraining: who they are, that they never train, and what is measured on them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.checks import check_experiment
from pinfm_jax.data.pipeline import Segments, action_bits
from pinfm_jax.errors import UserError
from pinfm_jax.report import write_report
from pinfm_jax.train import heldout, loop
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.heldout import held_out_loss, held_out_users, split_segments
from pinfm_jax.train.pretrain import PretrainTask, for_measuring, pretrain
from pinfm_jax.train.restore import stored_state
from pinfm_jax.train.sharding import put_batch


@pytest.fixture(scope='module')
def config(toy_run):
  return replace(toy_run.experiment.pretrain, steps=4, checkpoint_every=4, eval_every=2, eval_share=0.3, eval_batches=2)


@pytest.fixture(scope='module')
def parts(toy_run, config):
  return split_segments(Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16), config)


@pytest.mark.parametrize('share', [0.01, 0.2, 0.9])
def test_the_share_is_met_and_users_that_are_appended_move_nobody(share):
  out = held_out_users(np.arange(200_000), share)
  assert abs(out.mean() - share) < 4 * np.sqrt(share * (1 - share) / 200_000)
  np.testing.assert_array_equal(held_out_users(np.arange(1000), share), out[:1000])
  half = out.reshape(-1, 1000).mean(axis=1)  # spread over the rows, not one end of them
  assert half.std() < 2 * np.sqrt(share * (1 - share) / 1000)


def test_every_segment_is_on_one_side_and_no_user_on_both(toy_run, parts):
  train, out = parts
  assert len(train) + len(out) == len(Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16))
  assert set(train.user_row) & set(out.user_row) == set()
  assert held_out_users(out.user_row, 0.3).all()


def test_too_few_held_out_segments_are_refused(toy_run, config):
  segments = Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16)
  for share in (1e-4, 0.99999):
    with pytest.raises(UserError, match=rf'pretrain.eval_share {share} leaves .*pretrain.batch_segments 8'):
      split_segments(segments, replace(config, eval_share=share))


@pytest.mark.slow
def test_held_out_users_never_train_and_their_loss_is_logged(toy_run, tmp_path, monkeypatch, config, parts):
  trained, put = set(), loop.put_batch

  def spy(batch, mesh):
    trained.update(batch['user'].ravel().tolist())
    return put(batch, mesh)

  monkeypatch.setattr(loop, 'put_batch', spy)
  directory = tmp_path / 'seed0' / 'pretrain'
  state = pretrain(
    toy_run.dataset, toy_run.split.pretrain_until, toy_run.model, config, toy_run.mesh, directory, seed=0
  )
  assert trained
  assert not held_out_users(np.array(sorted(trained)), 0.3).any()
  rows = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
  found = {row['step']: row for row in rows if 'eval/loss' in row}
  assert sorted(found) == [2, 4]
  assert {'eval/loss', 'eval/ntl', 'eval/mtl', 'eval/ftl'} <= found[4].keys()

  # The same state measured again gives the same figures, and they are the task's own on the same batches.
  dropping = replace(config, item_dropout=0.5)
  task = for_measuring(PretrainTask(toy_run.model, dropping, action_bits(config, toy_run.dataset.info.actions)))
  with jax.set_mesh(toy_run.mesh):
    evaluate = held_out_loss(task, parts[1], config, toy_run.mesh)
    assert evaluate(state) == evaluate(state)
    one = held_out_loss(task, parts[1], replace(config, eval_batches=1), toy_run.mesh)(state)
    batches = []
    monkeypatch.setattr(heldout, 'put_batch', lambda batch, mesh: batches.append(batch) or put_batch(batch, mesh))
    assert evaluate(state) != one
    assert len(batches) == 2
    assert held_out_users(batches[0]['user'][:, 0], 0.3).all()
    loss = _loss(task, state, batches[0])
  np.testing.assert_allclose(one['loss'], loss, rtol=1e-5)
  (tmp_path / 'experiment.json').write_text('{"name": "toy"}')
  page = write_report(tmp_path).read_text()
  assert 'held-out loss' in page


def _loss(task, state, batch):
  batch = {name: jnp.asarray(value) for name, value in batch.items()}
  vectors = read_vectors(state.tables.rows_GE, task.ids(batch, 0), task.tables)
  return task.loss(state.params, vectors, batch, jnp.int32(0), jax.random.key(0), None)[0]


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'eval_share': 0.0}, 'eval_share is 0.0; expected a share'),
    ({'eval_share': 1.0}, 'eval_share is 1.0'),
    ({'eval_batches': 0}, 'eval_batches is 0; expected at least 1'),
    ({'keep_last': 0}, 'keep_last is 0; expected at least 1'),
    ({'keep_best': 1}, 'nothing is measured .pretrain.eval_every=0'),
    ({'use_checkpoint': 'best'}, 'no best checkpoint is kept'),
    ({'use_checkpoint': 'last'}, "use_checkpoint is 'last'; expected one of: newest, best"),
  ],
)
def test_settings_that_cannot_work_are_refused(toy_run, settings, words):
  experiment = toy_run.experiment
  with pytest.raises(UserError, match=words):
    check_experiment(replace(experiment, pretrain=replace(experiment.pretrain, **settings)))
  good = replace(experiment.pretrain, eval_every=5, keep_best=1, use_checkpoint='best')
  check_experiment(replace(experiment, pretrain=good))


@pytest.mark.slow
@pytest.mark.parametrize(('metric', 'best'), [('ndcg@10', 2), ('hr@10', 4)])
def test_the_chosen_metric_of_the_ranking_decides(toy_run, tmp_path, config, metric, best):
  measured = iter([{'ndcg@10': 0.3, 'hr@10': 0.1, 'mrr': 0.2}, {'ndcg@10': 0.2, 'hr@10': 0.4, 'mrr': 0.2}])
  ranked = {'eval_ranking': True, 'eval_metric': metric, 'checkpoint_every': 2}
  config = replace(config, **ranked, keep_last=1, keep_best=1, use_checkpoint='best')
  arguments = (toy_run.dataset, toy_run.split.pretrain_until, toy_run.model, config, toy_run.mesh, tmp_path / 'run')
  state = pretrain(*arguments, seed=0, rank=lambda _: next(measured))
  assert int(state.step) == best
  rows_GE = stored_state(tmp_path / 'run', 'best').table(toy_run.model.tables)
  np.testing.assert_array_equal(rows_GE, np.asarray(state.tables.rows_GE)[: len(rows_GE)])
