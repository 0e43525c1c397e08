"""The fine-tuning task: its losses, its inputs, the warm start, and the order of predictions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import meta

from pinfm_jax.config import Arm, ColdStartConfig, FinetuneConfig
from pinfm_jax.data.pipeline import evaluation_batches, training_batches
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.predict import predict, predictions_of
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run
from pinfm_jax.train import restore
from pinfm_jax.train.checkpoint import described, plain
from pinfm_jax.train.exchange import Exchange, read_vectors
from pinfm_jax.train.finetune import (
  FinetuneTask,
  dense_stats,
  finetune,
  ranking_batch,
  ranking_loss,
  training_steps,
  without_randomness,
)
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.train.restore import WarmStart, fresh_state
from pinfm_jax.train.step import init_state


@pytest.fixture(scope='module')
def task(toy_run):
  """The task with its losses' randomness (age dropout, randomised ids) left on."""
  return toy_run.task(5)


@pytest.fixture(scope='module')
def requests(toy_run):
  return toy_run.requests('finetune')


@pytest.fixture(scope='module')
def stats(requests):
  return dense_stats(requests)


@pytest.fixture(scope='module')
def batch(requests):
  """A batch in which some candidates and some events are padding."""
  found = next(training_batches(requests, 8, 0, 0))
  assert not found['candidate_mask'].all()
  assert not found['history_mask'].all()
  return found


@pytest.fixture(scope='module')
def loss_and_gradients(task, stats):
  """batch -> loss, figures, gradients of parameters and of table rows."""
  tables = toy.tables(task.tables)
  exchange = Exchange(task.tables, tables.rows_GE.shape[0])

  @jax.jit
  def compute(params, batch):
    ids = task.ids(batch, jnp.int32(3))
    plan = exchange.plan(ids)

    def loss(params, rows_KE):
      vectors = exchange.vectors(rows_KE, plan, ids)
      return task.loss(params, vectors, batch, jnp.int32(3), jax.random.key(0), stats)

    (value, figures), (grads, row_grad_KE) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      params, exchange.lookup(tables.rows_GE, plan)
    )
    dense = jnp.zeros_like(tables.rows_GE).at[plan.rows.unique_K].set(row_grad_KE, mode='drop')
    return value, figures, grads, dense

  params = _random_params(task)
  return lambda batch: compute(params, {name: jnp.asarray(value) for name, value in batch.items()})


def _random_params(task):
  """Weights large enough that every input changes the scores; made without compiling an initialisation."""
  shapes = meta.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)


def _warm_started(task, run, stats, pretrained):
  create, abstract = fresh_state(task, run.mesh, 5, stats)
  return restore.warm_started(create, abstract, WarmStart(pretrained))


def test_the_ranking_loss_is_the_weighted_cross_entropy_of_real_candidates():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(0, 3, (4, 5, 3)), rng.integers(0, 2, (4, 5, 3))
  mask, weight = rng.random((4, 5)) < 0.6, np.array([1.0, 0.0, 2.5])
  total = 0.0
  for u, c in np.argwhere(mask):
    for t in range(3):
      p = 1 / (1 + np.exp(-logits[u, c, t]))
      total -= weight[t] * np.log(p if labels[u, c, t] else 1 - p)
  found = ranking_loss(*(jnp.asarray(x, jnp.float32) for x in (logits, labels)), jnp.asarray(mask), jnp.asarray(weight))
  np.testing.assert_allclose(found, total / mask.sum(), rtol=1e-5)


def test_the_ranking_loss_is_finite_for_extreme_logits_and_no_candidates():
  logits = jnp.array([[[500.0], [-500.0]]])
  found = ranking_loss(logits, jnp.array([[[0.0], [1.0]]]), jnp.ones((1, 2), bool), jnp.ones(1))
  np.testing.assert_allclose(found, 500)
  assert ranking_loss(logits, logits * 0, jnp.zeros((1, 2), bool), jnp.ones(1)) == 0


def test_label_weights_of_the_configuration_reach_the_loss(task, stats, batch):
  """A label's weight, found by its name, scales that label's share of the loss."""
  plain = replace(task, ranker=replace(task.ranker, sequence='none'))
  params, labels = _random_params(plain), task.schema.labels
  arguments = (params, None, {name: jnp.asarray(value) for name, value in batch.items()}, jnp.int32(0))

  def value(weights):
    weighted = replace(plain, config=replace(plain.config, label_weights=weights))
    return float(jax.jit(weighted.loss)(*arguments, jax.random.key(0), stats)[0])

  whole, part = value({}), value(dict.fromkeys(labels[1:], 0.0))
  assert 0 < part < whole
  np.testing.assert_allclose(value({labels[0]: 3.0}), whole + 2 * part, rtol=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts(task, loss_and_gradients, batch):
  value, figures, *_ = loss_and_gradients(batch)
  config = task.config
  assert set(figures) == {'ranking', 'module', 'tie', 'ntl'}
  expected = figures['ranking'] + config.module_weight * figures['module'] + config.tie_weight * figures['tie']
  np.testing.assert_allclose(value, expected + config.ntl_weight * figures['ntl'], rtol=1e-6)
  assert all(float(f) > 0 for f in figures.values())


def test_every_parameter_and_the_rows_get_a_finite_gradient(loss_and_gradients, batch):
  _, _, grads, rows = loss_and_gradients(batch)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(grad)), path
    assert np.any(np.asarray(grad) != 0), path
  assert np.all(np.isfinite(rows))
  assert np.any(np.asarray(rows) != 0)


def test_padding_changes_neither_loss_nor_gradients(task, loss_and_gradients, batch):
  """Whatever stands in padded candidates and padded events; only which rows are read may change."""
  rng = np.random.default_rng(0)
  garbage = {name: np.array(value) for name, value in batch.items()}
  padded, gone = ~batch['candidate_mask'], ~batch['history_mask']
  for name in ('item', 'age_hours', 'dense', 'sparse', 'embedding', 'labels'):
    column = garbage[f'candidate_{name}']
    noise = rng.integers(0, 2, column.shape) if name in ('sparse', 'labels') else rng.integers(0, 900, column.shape)
    column[padded] = noise[padded].astype(column.dtype)
  garbage['history_item'][gone] = rng.integers(0, 900, garbage['history_item'].shape)[gone]
  garbage['history_surface'][gone] = 1
  garbage['history_actions'][gone] = 3
  assert any(np.any(garbage[name] != batch[name]) for name in batch)
  expected, found = loss_and_gradients(batch), loss_and_gradients(garbage)
  for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (expected, found)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_dense_stats_against_numpy(requests):
  stats = dense_stats(requests)
  rows = [np.asarray(requests[i]['candidate_dense'][requests[i]['candidate_mask']]) for i in range(len(requests))]
  x = np.concatenate(rows).astype(np.float64)
  for f in range(x.shape[1]):
    column = x[:, f][np.isfinite(x[:, f])]
    low, high = np.quantile(column, [0.001, 0.999])
    column = np.clip(column, low, high) - low
    column = np.log1p(column) if high - low > 2 else column
    expected = (low, high, column.mean(), 1 / column.std() if column.std() > 1e-6 else 0)
    found = [float(getattr(stats, name)[f]) for name in ('low', 'high', 'mean', 'scale')]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  normal = np.asarray(stats.apply(jnp.asarray(x, jnp.float32)))
  np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-3)
  varies = np.asarray(stats.scale) > 0
  assert varies.any()
  np.testing.assert_allclose(np.nanstd(np.where(np.isnan(x), np.nan, normal), axis=0)[varies], 1, atol=1e-3)


class _FewRequests:
  """Requests of one candidate with given dense features."""

  def __init__(self, dense):
    self._dense = np.asarray(dense, np.float32)

  def __len__(self):
    return len(self._dense)

  def __getitem__(self, index):
    padded = np.stack([self._dense[index], np.full(self._dense.shape[1], 1e9)])  # a padded candidate behind it
    return {'candidate_dense': padded, 'candidate_mask': np.array([True, False])}


def test_dense_stats_of_odd_columns():
  """Missing everywhere, constant, infinite: 0 for every candidate, and nothing warns."""
  columns = np.stack([np.full(50, np.nan), np.full(50, 7.0), np.arange(50.0), np.arange(50.0)], axis=1)
  columns[3, 2], columns[4, 3], columns[5, 3] = np.inf, -np.inf, np.nan
  stats = dense_stats(_FewRequests(columns))
  assert all(np.all(np.isfinite(getattr(stats, name))) for name in ('low', 'high', 'mean', 'scale'))
  np.testing.assert_array_equal(np.asarray(stats.scale) > 0, [False, False, True, True])
  assert float(stats.high[2]) <= 49
  x = np.asarray(stats.apply(jnp.asarray(columns, jnp.float32)))
  assert np.all(np.isfinite(x))
  assert not x[:, :2].any()


def test_a_sample_of_the_requests_is_taken_evenly():
  stats = dense_stats(_FewRequests(np.arange(1000.0)[:, None]), sample=11)
  assert float(stats.low[0]) < 10
  assert float(stats.high[0]) > 990


@pytest.fixture(scope='module')
def pretrained(toy_run, tmp_path_factory):
  directory = tmp_path_factory.mktemp('pretrained')
  config = toy_run.experiment.pretrain
  pretrain(toy_run.dataset, toy_run.split.pretrain_until, toy_run.model, config, toy_run.mesh, directory, seed=0)
  return directory


def test_the_warm_start_copies_every_pretrained_array_bit_exactly(toy_run, task, stats, pretrained):
  before = init_state(task, toy_run.mesh, 5, stats)()
  state = _warm_started(task, toy_run, stats, pretrained)
  source = toy.load_arrays(pretrained / 'checkpoints')
  for name in ('pinfm', 'log_temperature'):
    jax.tree.map(np.testing.assert_array_equal, state.params[name], source['params'][name])
  np.testing.assert_array_equal(state.tables.rows_GE, source['tables']['rows'])
  np.testing.assert_array_equal(state.tables.accumulator_G, source['tables']['accumulator'])
  assert np.any(source['tables']['accumulator'] > 0)
  assert set(state.params) == {'pinfm', 'log_temperature', 'ranker', 'project_output', 'project_item', 'module_head'}
  for name in set(state.params) - {'pinfm', 'log_temperature'}:
    jax.tree.map(np.testing.assert_array_equal, state.params[name], before.params[name])
  jax.tree.map(np.testing.assert_array_equal, (state.step, state.rng, state.opt_state),
               (before.step, before.rng, before.opt_state))  # fmt: skip


@pytest.mark.parametrize(
  'change', [{'tower': {'width': 32}}, {'tower': {'max_positions': 30}}, {'tables': {'rows': 2000}}], ids=str
)
def test_the_warm_start_refuses_other_shapes(toy_run, task, stats, pretrained, change):
  ((part, fields),) = change.items()
  model = replace(task.model, **{part: replace(getattr(task.model, part), **fields)})
  with pytest.raises(UserError, match=r'holds \S+ as float32\[.* where the model has .*finetune\.init=scratch'):
    _warm_started(replace(task, model=model), toy_run, stats, pretrained)


def test_the_warm_start_refuses_a_model_with_other_options(toy_run, task, stats, pretrained):
  gaps = replace(task.model, tower=replace(task.model.tower, time_gap_buckets=4))
  with pytest.raises(UserError, match=r'holds params/pinfm/gap_embedding as None where the model has'):
    _warm_started(replace(task, model=gaps), toy_run, stats, pretrained)
  create, abstract = fresh_state(task, toy_run.mesh, 5, stats)
  fewer = {name: value for name, value in abstract.params['pinfm'].items() if name != 'psi'}  # as if it were optional
  abstract = abstract.replace(params={**abstract.params, 'pinfm': fewer})
  with pytest.raises(UserError, match=r'holds params/pinfm/psi/\S+, which the model does not have; fine-tune with'):
    restore.warm_started(create, abstract, WarmStart(pretrained))


def test_the_warm_start_draws_no_table_that_it_then_overwrites(toy_run, task, stats):
  big = replace(task, model=replace(task.model, tables=replace(task.model.tables, rows=100_000)))
  create, abstract = fresh_state(big, toy_run.mesh, 0, stats)
  names = {name: '' for name in described(plain(abstract)) if name.startswith(('tables/', 'params/pinfm/'))}
  compiled = restore.rest_of(create, plain(abstract), names).lower().compile()
  table = abstract.tables.rows_GE.size * 4
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < table / 10
  assert jax.jit(create).lower().compile().memory_analysis().output_size_in_bytes > table


def test_a_missing_pretraining_is_named(toy_run, task, stats, tmp_path):
  with pytest.raises(UserError, match='has no checkpoints; run the stage that trains it first'):
    _warm_started(task, toy_run, stats, tmp_path)


def test_ids_and_vectors_belong_together(task, batch):
  still = replace(task, config=without_randomness(task.config))
  tables = toy.tables(task.tables)
  found = read_vectors(tables.rows_GE, still.ids(batch, jnp.int32(0)), task.tables)
  rows, sizes = np.asarray(tables.rows_GE), (task.tables.sub_tables, task.tables.rows, task.tables.hash_seed)
  for vectors, name in zip(found, ('history_item', 'candidate_item'), strict=True):
    expected = rows[hash_rows(batch[name], *sizes)].reshape(*batch[name].shape[:2], -1)
    np.testing.assert_array_equal(vectors, expected)


def test_randomised_candidates_are_not_in_the_history(task, batch):
  config = replace(task.config, cold_start=ColdStartConfig(randomise=1.0))
  history, candidate = replace(task, config=config).ids(batch, jnp.int32(0))
  np.testing.assert_array_equal(history, batch['history_item'])
  assert not np.any(np.all(candidate == batch['candidate_item'], axis=-1))


def test_the_seed_of_the_run_reaches_what_the_task_draws(task, requests, batch, toy_run, tmp_path, monkeypatch):
  ids = [np.asarray(replace(task, seed=seed).ids(batch, jnp.int32(0))[1]) for seed in (0, 1, 0)]
  assert np.any(ids[0] != ids[1])
  np.testing.assert_array_equal(ids[0], ids[2])
  seen = []
  monkeypatch.setattr('pinfm_jax.train.finetune.train', lambda task, *_: seen.append(task))
  finetune(task, requests, toy_run.mesh, tmp_path, 7, None)
  assert seen[0] == replace(task, seed=7)


def test_predictions_stand_beside_what_happened(toy_run):
  """Requests of more than C candidates are scored in parts and come back whole, in order."""
  config = replace(toy_run.experiment.finetune, candidates=4)
  experiment = replace(toy_run.experiment, finetune=config)
  requests = replace(toy_run, experiment=experiment).requests('test')
  assert len(requests) > len(np.unique(requests.request_row))
  rows = np.unique(requests.request_row)
  whole = [toy_run.dataset.request(int(row)) for row in rows]
  count, labels = sum(len(r) for r in whole), len(requests.schema.labels)
  scores = np.linspace(0, 1, count * labels, dtype=np.float32).reshape(count, labels)
  found = predictions_of(requests, scores)
  np.testing.assert_array_equal(found.scores_MT, scores)
  np.testing.assert_array_equal(found.request_M, np.repeat(rows, [len(r) for r in whole]))
  np.testing.assert_array_equal(found.item_key_M, np.concatenate([r.item for r in whole]))
  np.testing.assert_array_equal(found.labels_MT, np.concatenate([r.labels for r in whole]))
  np.testing.assert_array_equal(found.reference_MT, np.concatenate([r.reference for r in whole]).astype(np.float32))
  np.testing.assert_array_equal(found.user_M, np.concatenate([np.full(len(r), r.user_row) for r in whole]))
  age = np.concatenate([(r.timestamp - r.created_at) / 3_600_000 for r in whole])
  np.testing.assert_allclose(found.age_hours_M, np.maximum(age, 0), rtol=1e-6)
  assert found.label_names == requests.schema.labels
  assert found.unseen_M is None  # not told apart
  read = [history.item[history.timestamp < toy_run.split.pretrain_until] for history in toy_run.dataset.histories()]
  known = set(np.concatenate(read).tolist())
  np.testing.assert_array_equal(toy_run.pretrained_items, sorted(known))
  unseen_M = predictions_of(requests, scores, toy_run.pretrained_items).unseen_M
  np.testing.assert_array_equal(unseen_M, [key not in known for key in found.item_key_M.tolist()])
  assert 0 < unseen_M.sum() < len(unseen_M)


def test_predict_scores_each_candidate_in_its_place(toy_run, task, stats):
  """One example after another through the module gives the rows of `predict`, whose last batch is padded."""
  requests = toy_run.requests('test')
  task = replace(task, config=replace(task.config, batch_requests=60))
  assert len(requests) % 60
  params, rows_GE = _random_params(task), 20 * toy.tables(task.tables).rows_GE
  found = predict(task, params, rows_GE, stats, requests, 'test')
  weights = {'params': {name: value for name, value in params.items() if name != 'log_temperature'}}
  rows, sizes = np.asarray(rows_GE), (task.tables.sub_tables, task.tables.rows, task.tables.hash_seed)

  @jax.jit
  def score(vectors, inputs):
    return jax.nn.sigmoid(task.module.apply(weights, *vectors, inputs, stats).logits_UCT)

  place = 0
  for number, (batch, _) in enumerate(evaluation_batches(requests, 1)):
    mask = batch['candidate_mask'][0]
    here = slice(place, place + mask.sum())
    place = here.stop
    np.testing.assert_array_equal(key_words(found.item_key_M[here]), batch['candidate_item'][0][mask])
    if number % 20 == 0 or number == len(requests) - 1:
      names = ('history_item', 'candidate_item')
      vectors = [jnp.asarray(rows[hash_rows(batch[n], *sizes)].reshape(*batch[n].shape[:2], -1)) for n in names]
      inputs = ranking_batch({name: jnp.asarray(value) for name, value in batch.items()})
      np.testing.assert_allclose(found.scores_MT[here], score(vectors, inputs)[0][mask], atol=2e-6)
  assert place == len(found.scores_MT)
  assert found.scores_MT.std(axis=0).min() > 0.01


def test_training_steps():
  assert training_steps(FinetuneConfig(epochs=2.0, batch_requests=10), 101) == 20
  assert training_steps(FinetuneConfig(epochs=0.001, batch_requests=10), 100) == 1


def test_a_history_that_leaves_no_place_for_the_candidate_is_refused(toy_run, requests, tmp_path):
  model = replace(toy_run.model, tower=replace(toy_run.model.tower, max_positions=8))
  task = FinetuneTask(model, toy_run.experiment.ranker, toy_run.experiment.finetune, requests.schema, 2)
  with pytest.raises(UserError, match='make it at least 9'):
    finetune(task, requests, toy_run.mesh, tmp_path, 0, None)


def test_the_temperature_is_that_of_pretraining(toy_run, task):
  assert np.exp(task.init(jax.random.key(0))['log_temperature']) == pytest.approx(0.05)
  fixed = {'pretrain.temperature': 1.0, 'pretrain.fixed_temperature': True}
  arm = Arm('scratch', {'ranker.sequence': 'pinfm', 'finetune.init': 'scratch'})
  launch = Run(apply_overrides(toy_run.experiment, fixed), toy_run.workdir)
  run = launch.of_arm(arm)
  warm = run.task(2)
  assert np.exp(warm.init(jax.random.key(0))['log_temperature']) == pytest.approx(1)
  assert warm.pretrained.fixed_temperature
  assert run.finetune_settings(0)['pretrain'].items() >= {'temperature': 1.0, 'fixed_temperature': True}.items()
  baseline = launch.of_arm(Arm('none', {'ranker.sequence': 'none'}))
  for settings in (toy_run.of_arm(arm).finetune_settings(0), baseline.finetune_settings(0)):
    assert settings['pretrain'].keys() == {'positive_actions'}  # work from before goes on


def test_a_fixed_temperature_does_not_learn(task, stats, batch):
  params, columns = _random_params(task), {name: jnp.asarray(value) for name, value in batch.items()}
  shapes = [(*ids.shape[:2], task.tables.item_width) for ids in task.ids(columns, jnp.int32(0))]
  vectors = tuple(jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32) for shape in shapes)

  def gradient(one):
    loss = lambda t: one.loss(params | {'log_temperature': t}, vectors, columns, jnp.int32(0), jax.random.key(0), stats)
    return float(jax.jit(jax.grad(lambda t: loss(t)[0]))(jnp.float32(0)))

  assert gradient(task) != 0
  assert gradient(replace(task, pretrained=replace(task.pretrained, fixed_temperature=True))) == 0


def test_without_randomness_turns_every_technique_off(task):
  config = without_randomness(task.config)
  assert config.cold_start.randomise == 0
  assert not any(config.cold_start.age_dropout)
  assert replace(config, cold_start=task.config.cold_start) == task.config


def test_stats_are_a_pytree(stats):
  assert isinstance(jax.tree.map(lambda x: x, stats), DenseStats)
  assert len(jax.tree.leaves(stats)) == 4
