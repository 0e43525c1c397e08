"""Hashed tables: against a dense oracle, deduplicated, in place, with costs that do not grow with the rows."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy

from pinfm_jax.config import TableConfig
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.model.tables import (
  Tables,
  as_float32,
  gather_rows,
  init_rows,
  item_vectors,
  plan_rows,
  sum_duplicates,
  table_rows,
  update_rows,
)

CONFIG = TableConfig(sub_tables=3, rows=40, width=4)
BFLOAT16 = replace(CONFIG, dtype='bfloat16')


def _words(count, distinct, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, distinct, (count, 2), dtype=np.uint32))


def _step(config, learning_rate=0.1):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(tables, words, weight, salt=0):
    plan = plan_rows(words, config)
    gathered = as_float32(gather_rows(tables.rows_GE, plan.unique_K))
    grad = jax.grad(lambda rows: jnp.sum(item_vectors(rows, plan.inverse_MS) ** 2 * weight))(gathered)
    return update_rows(tables, plan.unique_K, grad, learning_rate, jnp.uint32(salt))

  return step


def _values(rows_GE):
  stored = np.asarray(rows_GE)
  return stored.view(ml_dtypes.bfloat16).astype(np.float64) if stored.dtype == np.uint16 else stored.astype(np.float64)


def test_vectors_are_the_concatenated_rows():
  tables, words = toy.tables(CONFIG), _words(50, 5)
  plan = plan_rows(words, CONFIG)
  got = item_vectors(gather_rows(tables.rows_GE, plan.unique_K), plan.inverse_MS)
  expected = np.asarray(tables.rows_GE)[hash_rows(np.asarray(words), 3, 40)].reshape(50, 12)
  np.testing.assert_array_equal(got, expected)


def test_plan_holds_each_row_once_and_an_unused_tail_beyond_the_tables():
  words = _words(50, 3)
  plan = plan_rows(words, CONFIG)
  used = np.asarray(plan.unique_K)[np.asarray(plan.unique_K) < 3 * 40]
  np.testing.assert_array_equal(used, np.unique(hash_rows(np.asarray(words), 3, 40)))
  assert len(np.unique(plan.unique_K)) == plan.unique_K.size
  assert np.all(np.diff(np.asarray(plan.unique_K)) > 0)


@pytest.mark.parametrize('accumulators', [True, False], ids=['adagrad', 'sgd'])
@pytest.mark.parametrize('distinct', [2, 6, 1000])
def test_update_equals_the_dense_rule_in_float64(distinct, accumulators):
  words = _words(60, distinct)
  weight = jax.random.normal(jax.random.key(2), (60, 12))
  tables = toy.tables(replace(CONFIG, init_scale=1.0))
  tables = tables if accumulators else Tables(tables.rows_GE, None)
  rows, accumulator, rate = np.asarray(tables.rows_GE, np.float64), np.zeros(120), 0.1 if accumulators else 1e-3
  step = _step(CONFIG, rate)
  for _ in range(3):
    tables = step(tables, words, weight)
    grad = np.zeros_like(rows)
    index = hash_rows(np.asarray(words), 3, 40)
    np.add.at(grad, index, 2 * rows[index] * np.asarray(weight, np.float64).reshape(60, 3, 4))
    accumulator += np.mean(grad**2, axis=1)
    rows -= rate * grad / ((np.sqrt(accumulator) + 1e-8)[:, None] if accumulators else 1)
  np.testing.assert_allclose(tables.rows_GE, rows, atol=1e-5)
  if accumulators:
    np.testing.assert_allclose(tables.accumulator_G, accumulator, rtol=1e-4)
  else:
    assert tables.accumulator_G is None


@pytest.mark.parametrize('config', [CONFIG, BFLOAT16], ids=lambda c: c.dtype)
def test_rows_outside_the_batch_stay_bit_identical(config):
  tables, words = toy.tables(config), _words(4, 1000)
  before = np.array(tables.rows_GE)
  after = np.asarray(_step(config)(tables, words, 1.0).rows_GE)
  touched = np.unique(hash_rows(np.asarray(words), 3, 40))
  untouched = np.setdiff1d(np.arange(120), touched)
  np.testing.assert_array_equal(after[untouched], before[untouched])
  assert np.all(np.any(after[touched] != before[touched], axis=1))


def test_rows_without_gradient_do_not_move():
  for config in (CONFIG, BFLOAT16):
    tables, words = toy.tables(config), _words(9, 1000)
    before = np.array(tables.rows_GE)
    np.testing.assert_array_equal(_step(config)(tables, words, 0.0, salt=7).rows_GE, before)


def test_sum_duplicates_adds_what_is_equal():
  rng = np.random.default_rng(0)
  row, grad = rng.integers(0, 9, 50).astype(np.int32), rng.normal(size=(50, 4)).astype(np.float32)
  unique, sums = sum_duplicates(jnp.asarray(row), jnp.asarray(grad))
  expected = np.zeros((9, 4))
  np.add.at(expected, row, grad.astype(np.float64))
  np.testing.assert_array_equal(unique[:9], np.arange(9))
  np.testing.assert_allclose(sums[:9], expected, atol=1e-5)
  assert np.all(np.asarray(unique[9:]) > 2**30)
  assert not np.any(sums[9:])


# --- storage as bfloat16


def _nudged(steps, gradient, stochastic_salt):
  """A bfloat16 row of ones after many steps of 1e-3 * gradient, far below the distance of its neighbours (2^-8)."""
  ones = jnp.asarray(np.ones((1, 256)), jnp.bfloat16)
  tables = Tables(jax.lax.bitcast_convert_type(ones, jnp.uint16), None)
  update = jax.jit(lambda tables, salt: update_rows(tables, jnp.zeros(1, jnp.int32), gradient, 1e-3, salt))
  for step in range(steps):
    tables = update(tables, jnp.uint32(step if stochastic_salt else 0))
  return _values(tables.rows_GE)


def test_small_steps_are_lost_by_rounding_to_nearest_and_kept_by_stochastic_rounding():
  gradient, steps = jnp.full((1, 256), -0.2), 100  # 100 steps of 2e-4 should bring 1 to 1.02
  nearest = jnp.bfloat16(1)
  for _ in range(steps):
    nearest = (nearest.astype(jnp.float32) + 2e-4).astype(jnp.bfloat16)
  assert float(nearest) == 1.0
  stochastic = _nudged(steps, gradient, True)
  # One element moves by 2^-7 with probability 2e-4 * 2^7 a step: the mean of 256 has a deviation of about 8e-4.
  assert abs(stochastic.mean() - 1.02) < 4e-3
  assert stochastic.std() > 0


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour():
  config = TableConfig(sub_tables=1, rows=2000, width=8, dtype='bfloat16')
  tables = toy.tables(config)
  rng = np.random.default_rng(0)
  move = rng.normal(0, 1e-4, (2000, 8)).astype(np.float32)
  before = _values(tables.rows_GE)
  exact = before + move.astype(np.float64)
  mean, count = np.zeros_like(exact), 64
  update = jax.jit(lambda t, salt: update_rows(t, jnp.arange(2000, dtype=jnp.int32), -jnp.asarray(move), 1.0, salt))
  for salt in range(count):
    found = _values(update(Tables(tables.rows_GE, None), jnp.uint32(salt)).rows_GE)
    distance = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    assert np.all(np.abs(found - exact) <= distance * 1.001 + 1e-12)
    mean += found / count
  # Averaged over draws and elements the error must vanish: its deviation is below half a distance / sqrt(n).
  error = (mean - exact) / distance
  assert abs(error.mean()) < 4 * 0.5 / np.sqrt(error.size * count)


def test_rounding_depends_on_the_row_of_the_whole_table_not_on_the_shard():
  config = TableConfig(sub_tables=1, rows=64, width=8, dtype='bfloat16')
  whole = toy.tables(config).rows_GE
  grad = jnp.asarray(np.random.default_rng(0).normal(0, 1e-3, (64, 8)), jnp.float32)
  expected = update_rows(Tables(whole, None), jnp.arange(64, dtype=jnp.int32), grad, 1.0, jnp.uint32(5)).rows_GE
  half = update_rows(Tables(whole[32:], None), jnp.arange(32, dtype=jnp.int32), grad[32:], 1.0, jnp.uint32(5), 32)
  np.testing.assert_array_equal(half.rows_GE, expected[32:])


# --- initial rows


@pytest.mark.parametrize('config', [CONFIG, BFLOAT16], ids=lambda c: c.dtype)
def test_initial_rows_have_the_scale_and_do_not_depend_on_the_split(config):
  config = replace(config, rows=50_000, init_scale=0.3)
  rows = table_rows(config, 256)
  whole = _values(jax.jit(lambda: init_rows(config, rows, jnp.uint32(3)))())
  assert whole.shape == (rows, 4)
  assert abs(whole.std() - 0.3) < 0.002
  assert abs(whole.mean()) < 0.003
  assert len(np.unique(whole[:, 0])) > 500
  part = jax.jit(lambda: init_rows(config, 1000, jnp.uint32(3), 70_000))()
  np.testing.assert_array_equal(_values(part), whole[70_000:71_000])
  other = _values(jax.jit(lambda: init_rows(config, rows, jnp.uint32(4)))())
  assert abs(np.corrcoef(whole.ravel(), other.ravel())[0, 1]) < 0.01
  assert abs(np.corrcoef(whole[:-1, 0], whole[1:, 0])[0, 1]) < 0.02


def test_initial_rows_are_made_a_block_at_a_time():
  config = TableConfig(sub_tables=1, rows=4_000_000, width=8, dtype='bfloat16')
  compiled = jax.jit(lambda salt: init_rows(config, config.rows, salt)).lower(jnp.uint32(0)).compile()
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes == 4_000_000 * 16
  assert memory.temp_size_in_bytes < 0.2 * memory.output_size_in_bytes


# --- in place


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_donated_tables_are_updated_in_place_and_temporaries_do_not_grow(dtype):
  temporaries = []
  for rows in (1000, 200_000):
    config = TableConfig(sub_tables=3, rows=rows, width=4, dtype=dtype)
    shapes = jax.eval_shape(lambda config=config: toy.tables(config))
    compiled = _step(config).lower(shapes, _words(50, 9), 1.0).compile()
    memory, bytes_a_row = compiled.memory_analysis(), 4 * shapes.rows_GE.dtype.itemsize + 4
    assert memory.alias_size_in_bytes == 3 * rows * bytes_a_row  # rows and accumulators, both aliased
    temporaries.append(memory.temp_size_in_bytes)
  assert temporaries[0] == temporaries[1]


@pytest.mark.parametrize('config', [CONFIG, BFLOAT16], ids=lambda c: c.dtype)
def test_the_buffer_stays_where_it_is(config):
  tables, words, step = toy.tables(config), _words(20, 9), _step(config)
  address = tables.rows_GE.unsafe_buffer_pointer()
  for _ in range(3):
    tables = step(tables, words, 1.0)
  assert tables.rows_GE.unsafe_buffer_pointer() == address
