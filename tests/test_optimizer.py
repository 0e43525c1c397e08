"""The update rule against plain NumPy: schedule, AdamW, row-wise Adagrad, one clipping norm, the pretrained ratio."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from pinfm_jax.config import TableConfig, UpdateConfig
from pinfm_jax.model.tables import Tables, plan_rows, update_rows
from pinfm_jax.train.optimizer import Update

TABLES = TableConfig(sub_tables=2, rows=20, width=3)
CONFIG = UpdateConfig(
  learning_rate=0.03, table_learning_rate=0.2, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, pretrained_ratio=0.1
)


def _schedule(config, steps, step):
  warmup = max(min(config.warmup_steps, max(steps // 2, 1)), 0)
  if step < warmup:
    return 1 / warmup + (1 - 1 / warmup) * step / warmup
  along = min((step - warmup) / (max(steps, 2) - warmup), 1)
  return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + np.cos(np.pi * along))


def _params(rng):
  return {
    'pinfm': {
      'block': {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)},
      'embedding': rng.normal(size=(5, 2)),
    },
    'ranker': {'heads': {'kernel': rng.normal(size=(3, 2)), 'bias': rng.normal(size=2)}},
    'log_temperature': rng.normal(size=()),
  }


def _float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


class _Oracle:
  """AdamW and row-wise Adagrad in float64, one leaf after another."""

  def __init__(self, config, steps, pretrained, params, tables):
    self._config, self._steps, self._pretrained = config, steps, pretrained
    self.params = dict(_leaves(params))
    self._moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in self.params.items()}
    self.rows, self.accumulator = (np.array(x, np.float64) for x in tables[:2])

  def step(self, grads, rows_grad, step):
    """`rows_grad`: row number -> gradient. Returns the norm before clipping."""
    config, shape = self._config, _schedule(self._config, self._steps, step)
    grads = dict(_leaves(grads))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in (*grads.values(), *rows_grad.values())))
    clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
    for name, param in self.params.items():
      g = grads[name] * clip
      m, v = self._moments[name]
      m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g * g
      self._moments[name] = (m, v)
      direction = m / (1 - config.beta1 ** (step + 1)) / (np.sqrt(v / (1 - config.beta2 ** (step + 1))) + 1e-8)
      if name[-1] == 'kernel':
        direction = direction + config.weight_decay * param
      ratio = config.pretrained_ratio if name[0] in self._pretrained else 1.0
      self.params[name] = param - config.learning_rate * shape * ratio * direction
    for row, g in rows_grad.items():
      self.accumulator[row] += np.mean(np.square(g * clip))
      move = config.table_learning_rate * config.pretrained_ratio * shape * g * clip
      self.rows[row] -= move / (np.sqrt(self.accumulator[row]) + 1e-8)
    return norm


def _leaves(tree):
  return [
    (tuple(k.key for k in path), np.asarray(x, np.float64)) for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]


@pytest.mark.parametrize('steps', [1, 2, 5, 40, 1000])
@pytest.mark.parametrize('warmup', [0, 1, 10, 100])
def test_schedule(steps, warmup):
  config = UpdateConfig(warmup_steps=warmup, final_ratio=0.2)
  step = np.unique(np.linspace(0, steps - 1, 50).astype(np.int32))
  found = jax.jit(jax.vmap(Update(config, steps).schedule))(jnp.asarray(step))
  np.testing.assert_allclose(found, [_schedule(config, steps, s) for s in step], rtol=1e-5)
  assert np.all(np.asarray(found) > 0)
  assert np.max(found) <= 1 + 1e-6


def test_the_schedule_rises_to_the_peak_and_falls_to_the_final_ratio():
  schedule = Update(UpdateConfig(warmup_steps=10, final_ratio=0.1), 100).schedule
  np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 55, 100)], [0.1, 0.55, 1.0, 0.55, 0.1], atol=1e-6)


@pytest.mark.parametrize('clip_norm', [0.0, 0.5, 1e9])
def test_against_numpy(clip_norm):
  config, steps, pretrained = replace(CONFIG, clip_norm=clip_norm), 8, ('pinfm', 'log_temperature')
  rng = np.random.default_rng(0)
  update = Update(config, steps, pretrained)
  params, tables = _float32(_params(rng)), toy.tables(TABLES)
  oracle = _Oracle(config, steps, pretrained, params, tables)
  apply, opt_state = _step_of(update), update.init(params)
  for step in range(steps):
    words = jnp.asarray(rng.integers(0, 6, (7, 2)), jnp.uint32)
    plan = plan_rows(words, TABLES)
    used = np.asarray(plan.unique_K) < 40
    grads = _float32(_params(rng))
    row_grad = jnp.asarray(rng.normal(size=(len(used), 3)) * used[:, None], jnp.float32)
    params, opt_state, tables, norm = apply(params, opt_state, grads, tables, plan, row_grad, jnp.int32(step))
    by_row = {int(r): np.asarray(g, np.float64) for r, g, u in zip(plan.unique_K, row_grad, used, strict=True) if u}
    expected_norm = oracle.step(grads, by_row, step)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-5)
  for name, value in _leaves(params):
    np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=1e-5, err_msg=str(name))
  np.testing.assert_allclose(tables.rows_GE, oracle.rows, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(tables.accumulator_G, oracle.accumulator, rtol=1e-4, atol=1e-7)


def _step_of(update):
  """Parameters and tables in one step, as `train.step` puts them together."""

  @jax.jit
  def step(params, opt_state, grads, tables, plan, row_grad, step):
    params, opt_state, rows, norm = update.apply(params, opt_state, grads, jnp.sum(jnp.square(row_grad)), step)
    tables = update_rows(tables, plan.unique_K, row_grad * rows.clip, rows.learning_rate, jnp.uint32(0))
    return params, opt_state, tables, norm

  return step


def _one_step(config, grads, row_scale, params, pretrained=()):
  """Tower and rows after one step from `params`; every row's gradient is `row_scale`."""
  update = Update(config, 10, pretrained)
  plan = plan_rows(jnp.arange(8, dtype=jnp.uint32).reshape(4, 2), TABLES)
  rows = jnp.where((plan.unique_K < 40)[:, None], row_scale, jnp.zeros((len(plan.unique_K), 3)))
  tables = Tables(jnp.zeros((40, 3)), jnp.zeros(40))
  return _step_of(update)(params, update.init(params), grads, tables, plan, rows, jnp.int32(0))


def test_only_kernels_decay():
  params = _float32(jax.tree.map(np.ones_like, _params(np.random.default_rng(0))))
  config = UpdateConfig(learning_rate=0.1, warmup_steps=1, weight_decay=0.5)
  after, *_ = _one_step(config, jax.tree.map(jnp.zeros_like, params), 0.0, params)
  for name, value in _leaves(after):
    np.testing.assert_allclose(value, 0.95 if name[-1] == 'kernel' else 1.0, rtol=1e-6, err_msg=str(name))


def test_the_clip_takes_tower_and_rows_together():
  params = {'tower': {'bias': jnp.zeros(4)}}
  config = UpdateConfig(warmup_steps=1, clip_norm=1.0)
  *_, tables, norm = _one_step(config, {'tower': {'bias': jnp.full(4, 30.0)}}, 40.0, params)
  touched = np.asarray(tables.accumulator_G) > 0
  row_norm = 40 * np.sqrt(3 * touched.sum())
  np.testing.assert_allclose(norm, np.hypot(60, row_norm), rtol=1e-6)
  # The accumulator holds the mean square of the clipped gradient, so the tower's gradient is seen in it.
  np.testing.assert_allclose(np.asarray(tables.accumulator_G)[touched], (40 / norm) ** 2, rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
  *_, tables, _ = _one_step(UpdateConfig(clip_norm=1.0), {'tower': {'bias': jnp.zeros(4)}}, 1e-3,
                            {'tower': {'bias': jnp.zeros(4)}})  # fmt: skip
  accumulator = np.asarray(tables.accumulator_G)
  np.testing.assert_allclose(accumulator[accumulator > 0], 1e-6, rtol=1e-5)


def test_the_pretrained_ratio_reaches_the_named_groups_and_the_tables():
  config = UpdateConfig(
    learning_rate=0.1, table_learning_rate=0.2, warmup_steps=1, weight_decay=0, pretrained_ratio=0.1
  )
  params = _float32(jax.tree.map(np.zeros_like, _params(np.random.default_rng(0))))
  grads = jax.tree.map(jnp.ones_like, params)
  after, _, tables, _ = _one_step(config, grads, 1.0, params, ('pinfm', 'log_temperature'))
  for name, value in _leaves(after):
    np.testing.assert_allclose(value, -0.1 if name[0] == 'ranker' else -0.01, rtol=1e-4, err_msg=str(name))
  rows = np.asarray(tables.rows_GE)
  np.testing.assert_allclose(rows[rows != 0], -0.02, rtol=1e-4)


def test_a_ratio_of_zero_freezes_bit_exactly():
  config = UpdateConfig(warmup_steps=1, pretrained_ratio=0.0)
  params = _float32(_params(np.random.default_rng(0)))
  after, _, tables, _ = _one_step(config, jax.tree.map(jnp.ones_like, params), 1.0, params, ('pinfm',))
  jax.tree.map(np.testing.assert_array_equal, after['pinfm'], params['pinfm'])
  assert not np.any(tables.rows_GE)
  assert np.all(np.asarray(after['ranker']['heads']['bias']) != np.asarray(params['ranker']['heads']['bias']))


def test_what_is_frozen_stays_bit_exactly_and_counts_in_no_norm():
  rng = np.random.default_rng(6)
  params, grads = _float32(_params(rng)), _float32(_params(rng))
  update = Update(replace(CONFIG, frozen=('tower',)), 10, ('pinfm', 'log_temperature'))
  moved, _, row_step, norm = update.apply(params, update.init(params), grads, 2.0, jnp.int32(4))
  for name in ('pinfm', 'log_temperature'):
    jax.tree.map(np.testing.assert_array_equal, moved[name], params[name])
  assert np.all(moved['ranker']['heads']['kernel'] != params['ranker']['heads']['kernel'])
  squares = sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads['ranker']))
  np.testing.assert_allclose(norm, np.sqrt(squares + 2.0), rtol=1e-6)
  assert row_step.learning_rate > 0


def test_a_model_without_tables():
  params = {'ranker': {'heads': {'kernel': jnp.ones((2, 2))}}}
  update = Update(UpdateConfig(warmup_steps=1, clip_norm=1.0), 10)
  after, _, _, norm = update.apply(
    params, update.init(params), jax.tree.map(lambda x: 5 * x, params), 0.0, jnp.int32(0)
  )
  np.testing.assert_allclose(norm, 10.0, rtol=1e-6)
  assert np.all(np.asarray(after['ranker']['heads']['kernel']) < 1)
