"""Hashed tables: against a dense oracle, deduplicated, in place, with costs that do not grow with the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import TableConfig
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.model.tables import Tables, gather_rows, init_tables, item_vectors, plan_rows, update_rows

CONFIG = TableConfig(sub_tables=3, rows=40, width=4)


def _words(count, distinct, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, distinct, (count, 2), dtype=np.uint32))


def _step(config, learning_rate=0.1):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(tables, words, weight):
    plan = plan_rows(words, config)
    gathered = gather_rows(tables.rows_GE, plan)
    grad = jax.grad(lambda rows: jnp.sum(item_vectors(rows, plan) ** 2 * weight))(gathered)
    return update_rows(tables, plan, grad, learning_rate)

  return step


def test_vectors_are_the_concatenated_rows():
  tables, words = init_tables(jax.random.key(0), CONFIG), _words(50, 5)
  plan = plan_rows(words, CONFIG)
  got = item_vectors(gather_rows(tables.rows_GE, plan), plan)
  expected = np.asarray(tables.rows_GE)[hash_rows(np.asarray(words), 3, 40)].reshape(50, 12)
  np.testing.assert_array_equal(got, expected)


def test_plan_holds_each_row_once_and_an_unused_tail_beyond_the_tables():
  words = _words(50, 3)
  plan = plan_rows(words, CONFIG)
  used = np.asarray(plan.unique_K)[np.asarray(plan.unique_K) < 3 * 40]
  np.testing.assert_array_equal(used, np.unique(hash_rows(np.asarray(words), 3, 40)))
  assert len(np.unique(plan.unique_K)) == plan.unique_K.size
  assert np.all(np.diff(np.asarray(plan.unique_K)) > 0)


@pytest.mark.parametrize('distinct', [2, 6, 1000])
def test_update_equals_dense_row_wise_adagrad_in_float64(distinct):
  words = _words(60, distinct)
  weight = jax.random.normal(jax.random.key(2), (60, 12))
  tables = init_tables(jax.random.key(1), CONFIG)
  rows, accumulator = np.asarray(tables.rows_GE, np.float64), np.zeros(120)
  step = _step(CONFIG)
  for _ in range(3):
    tables = step(tables, words, weight)
    grad = np.zeros_like(rows)
    index = hash_rows(np.asarray(words), 3, 40)
    np.add.at(grad, index, 2 * rows[index] * np.asarray(weight, np.float64).reshape(60, 3, 4))
    accumulator += np.mean(grad**2, axis=1)
    rows -= 0.1 * grad / (np.sqrt(accumulator) + 1e-8)[:, None]
  np.testing.assert_allclose(tables.rows_GE, rows, atol=2e-6)
  np.testing.assert_allclose(tables.accumulator_G, accumulator, rtol=1e-4)


def test_rows_outside_the_batch_stay_bit_identical():
  tables, words = init_tables(jax.random.key(1), CONFIG), _words(4, 1000)
  before = np.array(tables.rows_GE)
  after = np.asarray(_step(CONFIG)(tables, words, 1.0).rows_GE)
  touched = np.unique(hash_rows(np.asarray(words), 3, 40))
  untouched = np.setdiff1d(np.arange(120), touched)
  np.testing.assert_array_equal(after[untouched], before[untouched])
  assert np.all(np.any(after[touched] != before[touched], axis=1))


def test_donated_tables_are_updated_in_place_and_temporaries_do_not_grow():
  temporaries = []
  for rows in (1000, 200_000):
    config = TableConfig(sub_tables=3, rows=rows, width=4)
    tables = Tables(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(
      lambda config=config: init_tables(jax.random.key(0), config))))  # fmt: skip
    compiled = _step(config).lower(tables, _words(50, 9), 1.0).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 3 * rows * (4 + 1)  # rows and accumulators, both aliased
    temporaries.append(memory.temp_size_in_bytes)
  assert temporaries[0] == temporaries[1]


def test_the_buffer_stays_where_it_is():
  tables, words, step = init_tables(jax.random.key(1), CONFIG), _words(20, 9), _step(CONFIG)
  address = tables.rows_GE.unsafe_buffer_pointer()
  for _ in range(3):
    tables = step(tables, words, 1.0)
  assert tables.rows_GE.unsafe_buffer_pointer() == address
