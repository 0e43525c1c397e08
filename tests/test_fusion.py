"""Variants of fine-tuning: fusion, what is frozen, the losses that are off by default, towers that arms share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_ranker import _apply, _toy, batch, item_vectors  # noqa: F401 (batch is a fixture)

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Arm, PretrainConfig
from pinfm_jax.data.pipeline import training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.stages.finetune import finetune_stage
from pinfm_jax.stages.pretrain import needed_towers, pretrain_stage
from pinfm_jax.train.exchange import read_vectors
from pinfm_jax.train.finetune import dense_stats, ranking_batch
from pinfm_jax.train.losses import sequence_losses
from pinfm_jax.train.step import init_state, make_step


def _context(model, batch, **changes):  # noqa: F811
  events = batch.events._replace(**changes)
  vectors = item_vectors(model.rows_GE, batch._replace(events=events))[0]
  return model.module.apply({'params': model.params}, vectors, events, method='context'), vectors, events


@pytest.mark.parametrize('fusion', ['mean', 'last'])
def test_late_fusion_represents_a_user_by_its_history_alone(batch, fusion):  # noqa: F811
  model = _toy(fusion=fusion)
  context, vectors, events = _context(model, batch)
  h_ULO = np.asarray(_apply(model, batch, need_history_output=True).h_ULO)
  for u, count in enumerate(np.asarray(events.mask_UL).sum(axis=1)):
    expected = {'mean': h_ULO[u, :count].mean(axis=0), 'last': h_ULO[u, count - 1]}[fusion] if count else np.zeros(8)
    np.testing.assert_allclose(context.user_UO[u], expected, atol=1e-6)
  pairs = model.module.apply(
    {'params': model.params}, item_vectors(model.rows_GE, batch)[1], context, batch.candidates, method='pairs'
  )
  np.testing.assert_array_equal(pairs, np.broadcast_to(context.user_UO[:, None], pairs.shape))


def test_the_modules_own_head_tells_candidates_apart_in_late_fusion(batch):  # noqa: F811
  logits_UCT = np.asarray(_apply(_toy(fusion='last'), batch).module_logits_UCT)
  users = np.asarray(batch.events.mask_UL).any(axis=1)
  assert np.ptp(logits_UCT[users], axis=1).min() > 1e-4


@pytest.mark.parametrize('bidirectional', [False, True])
def test_a_bidirectional_history_sees_later_events(batch, bidirectional):  # noqa: F811
  """Another action of a user's last event changes the keys of the events before it, or does not."""
  model = _toy(bidirectional=bidirectional)
  actions = np.array(batch.events.actions_UL)
  last = np.asarray(batch.events.mask_UL)[3].sum() - 1
  actions[3, last] ^= 1
  before, after = (_context(model, batch, actions_UL=jnp.asarray(a))[0] for a in (batch.events.actions_UL, actions))
  moved = np.abs(np.asarray(after.kv.key - before.kv.key)).max(axis=(3, 4))  # [N, U, L]
  assert moved[1, 3, last] > 1e-4  # the event itself
  assert (moved[1, 3, :last].min() > 1e-7) == bidirectional
  np.testing.assert_array_equal(moved[:, :3], 0)


def test_padding_means_nothing_to_a_bidirectional_history(batch):  # noqa: F811
  model = _toy(bidirectional=True)
  noise = np.where(batch.events.mask_UL, batch.events.actions_UL, 5).astype(np.uint32)
  plain, padded = (_context(model, batch, actions_UL=jnp.asarray(a))[0] for a in (batch.events.actions_UL, noise))
  np.testing.assert_array_equal(plain.user_UO, padded.user_UO)


@pytest.fixture(scope='module')
def inputs(toy_run):
  requests = toy_run.requests('finetune')
  return next(training_batches(requests, 8, 0, 0)), dense_stats(requests)


def _task(toy_run, **changes):
  return replace(toy_run, experiment=toy_run.of_arm(Arm('x', changes)).experiment).task(5)


def _loss(task, inputs, step=3):
  batch, stats = inputs  # noqa: F811
  tables = toy.tables(task.tables)
  params = init_state(task, toy_mesh(), 0)().params

  @jax.jit
  def compute(params, batch):  # noqa: F811
    vectors = read_vectors(tables.rows_GE, task.ids(batch, jnp.int32(step)), task.tables, ('data', 'fsdp', 'model'))
    return *task.loss(params, vectors, batch, jnp.int32(step), jax.random.key(0), stats), vectors

  with jax.set_mesh(toy_mesh()):
    return params, *compute(params, batch)


def toy_mesh():
  from pinfm_jax.config import MeshConfig
  from pinfm_jax.train.sharding import make_mesh

  return make_mesh(MeshConfig())


def test_the_multi_token_loss_is_that_of_pretraining(toy_run, inputs):
  task = _task(toy_run, **{'finetune.mtl_weight': 0.3, 'finetune.mtl_window': 3, 'finetune.mtl_pairs': 2})
  params, total, figures, vectors = _loss(task, inputs)
  config = task.config
  parts = {'ranking': 1, 'module': config.module_weight, 'tie': config.tie_weight, 'ntl': config.ntl_weight, 'mtl': 0.3}
  np.testing.assert_allclose(total, sum(weight * figures[name] for name, weight in parts.items()), rtol=1e-6)
  rows = ranking_batch(inputs[0])
  weights = {'params': {name: value for name, value in params.items() if name != 'log_temperature'}}
  settings = PretrainConfig(ftl_weight=0, window=3, pairs=2, max_columns=config.ntl_columns)
  seed = fold_seed(0, jnp.int32(3))

  @jax.jit
  def expect():
    z_ULO = task.module.apply(weights, vectors[0], rows.events, method='targets')
    h_ULO = task.module.apply(weights, *vectors, rows, inputs[1], need_history_output=True).h_ULO
    return sequence_losses(
      h_ULO, z_ULO, params['log_temperature'], rows.events, settings, task.action_bits, seed, rows.index_U
    )[1]

  with jax.set_mesh(toy_mesh()):
    expected = expect()
  np.testing.assert_allclose(figures['mtl'], expected['mtl'], rtol=1e-5)


def test_a_bidirectional_history_has_no_sequence_loss(toy_run, inputs):
  """Its events see the next one, so a loss that asks for it would teach to copy."""
  _, _, figures, _ = _loss(_task(toy_run, **{'ranker.bidirectional': True, 'finetune.mtl_weight': 0.3}), inputs)
  assert set(figures) == {'ranking', 'module', 'tie'}


def test_the_alignment_is_the_mean_cosine_distance_of_known_candidates(toy_run, inputs):
  task = _task(toy_run, **{'ranker.candidate_content': True, 'finetune.align_weight': 0.5,
                           'finetune.cold_start.randomise': 0.4})  # fmt: skip
  params, _, figures, vectors = _loss(task, inputs)
  batch = inputs[0]  # noqa: F811
  ids = np.asarray(task.ids(batch, jnp.int32(3))[1])
  kept = (ids == batch['candidate_item']).all(axis=-1) & batch['candidate_mask']
  assert 0.4 < kept.sum() / batch['candidate_mask'].sum() < 0.8
  content = batch['candidate_embedding'][..., -task.schema.content_width :].astype(np.float64)
  content /= np.maximum(np.linalg.norm(content, axis=-1, keepdims=True), 1e-9)
  kept &= (content != 0).any(axis=-1)
  projected, item = content @ np.asarray(params['candidate_content'], np.float64), np.asarray(vectors[1], np.float64)
  lengths = np.linalg.norm(projected, axis=-1) * np.linalg.norm(item, axis=-1)
  expected = (1 - (projected * item).sum(axis=-1)[kept] / lengths[kept]).mean()
  np.testing.assert_allclose(figures['align'], expected, rtol=1e-4)


@pytest.mark.parametrize(
  'frozen', [('tower',), pytest.param(('tables',), marks=pytest.mark.slow), ('tower', 'tables')], ids=' '.join
)
def test_what_is_frozen_does_not_move(toy_run, inputs, frozen):
  batch, stats = inputs  # noqa: F811
  task, mesh = _task(toy_run, **{'finetune.update.frozen': frozen}), toy_mesh()
  with jax.set_mesh(mesh):
    state = init_state(task, mesh, 0, stats)()
    before = jax.tree.map(np.array, (state.params, state.tables))
    state, _ = make_step(task)(state, batch)
  same = jax.tree.map(np.array_equal, before, (state.params, state.tables))
  assert all(jax.tree.leaves(same[1])) == ('tables' in frozen)
  assert all(jax.tree.leaves(same[0]['pinfm'])) == ('tower' in frozen)
  assert not any(jax.tree.leaves(same[0]['ranker']['heads']))


@pytest.mark.slow
def test_arms_with_the_same_pretraining_share_a_tower(tmp_path):
  steps = {'pretrain.steps': 2}
  arms = (
    Arm('none', {'ranker.sequence': 'none'}),
    Arm('own'),
    Arm('short', steps),
    Arm('short too', {**steps, 'finetune.epochs': 0.1}),
    Arm('scratch', {**steps, 'finetune.init': 'scratch', 'model.tables.rows': 300}),
  )
  from pinfm_jax.stages.context import Run
  from pinfm_jax.stages.prepare import prepare_stage

  experiment = replace(toy.EXPERIMENT, arms=arms, baseline='none')
  check_experiment(experiment)
  run = Run(experiment, tmp_path)
  prepare_stage(run)
  own = {arm.name: run.of_arm(arm).pretrain_directory(0) for arm in arms}
  assert own['none'] == own['own'] == tmp_path / 'seed0' / 'pretrain'
  assert own['short'] == own['short too'] != own['own']
  assert len(needed_towers(run)) == 2
  pretrain_stage(run)
  assert {path.name for path in (tmp_path / 'seed0').iterdir()} == {own['own'].name, own['short'].name}
  finetune_stage(run)
  assert all((run.measured_directory(0, arm) / 'predictions.npz').exists() for arm in arms)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'ranker.fusion': 'mean', 'ranker.learnable_token': True}, 'has no candidate in the sequence'),
    ({'ranker.fusion': 'late'}, "ranker.fusion is 'late'; expected one of: early, mean, last"),
    ({'ranker.bidirectional': True, 'model.tower.backbone': 'hstu'}, "model.tower.backbone is 'hstu'; set"),
    ({'ranker.bidirectional': True, 'model.tower.attention': 'flash'}, "model.tower.attention is 'flash'; set"),
    ({'finetune.update.frozen': ('towers',)}, "some of 'tower', 'tables'"),
    ({'pretrain.update.frozen': ('tower',)}, 'pretraining trains all of it'),
    ({'finetune.init': 'scratch', 'finetune.update.frozen': ('tower',)}, 'that would never learn'),
    ({'ranker.transact.heads': 5}, 'ranker.transact.width 32'),
    ({'finetune.cold_start.age_edges_hours': (6.0, 1.0)}, 'hours that ascend'),
  ],
)
def test_settings_that_cannot_work_are_refused(overrides, message):
  arms = (*toy.EXPERIMENT.arms, Arm('other', overrides))
  with pytest.raises(UserError, match=message):
    check_experiment(replace(toy.EXPERIMENT, arms=arms))
