"""Hashed item tables outside the parameter tree: gather the rows that a batch needs, update just those rows.

The sub-tables lie one after another in one array of G = S * R rows, so one gather and one scatter serve all of them.
A step touches K distinct rows; its time and temporary memory depend on K and never on G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import TableConfig
from pinfm_jax.model.hashing import hash_rows

Array = jax.Array

_BEYOND = 2**31 - 1


class Tables(NamedTuple):
  """The rows [G, E] of all sub-tables and their row-wise Adagrad accumulators [G]."""

  rows_GE: Array
  accumulator_G: Array


class RowPlan(NamedTuple):
  """Which distinct rows a batch of M ids needs.

  Attributes:
    unique_K: int32, ascending distinct rows; the unused tail lies beyond any table (read as 0, dropped on update).
    inverse_MS: int32, for each id and sub-table the position of its row in unique_K.
  """

  unique_K: Array
  inverse_MS: Array


def table_rows(config: TableConfig, shards: int) -> int:
  """Rows of the array that holds all sub-tables: S * R, rounded up to divide over the shards."""
  return -(-config.sub_tables * config.rows // shards) * shards


def init_tables(key: Array, config: TableConfig, shards: int = 1) -> Tables:
  """Gaussian rows and zero accumulators; jit it with output shardings to build the tables where they live."""
  shape = (table_rows(config, shards), config.width)
  rows_GE = config.init_scale * jax.random.normal(key, shape, jnp.float32)
  return Tables(rows_GE, jnp.zeros(shape[:1], jnp.float32))


def plan_rows(words_M2: Array, config: TableConfig) -> RowPlan:
  """Hashes M ids to S rows each and removes duplicates, so that a row is read and updated once a step.

  Args:
    words_M2: uint32 [M, 2] ids (`hashing.key_words`); duplicates are expected.
    config: table sizes.
  """
  rows_MS = hash_rows(words_M2, config.sub_tables, config.rows, config.hash_seed)
  sorted_SM, order_SM = jax.lax.sort_key_val(
    rows_MS.T, jax.lax.broadcasted_iota(jnp.int32, rows_MS.T.shape, 1), dimension=1
  )
  # Sub-tables are disjoint ascending ranges, so S short sorts, read one after another, are one sorted list.
  sorted_K = sorted_SM.reshape(-1)
  first_K = jnp.concatenate([jnp.ones(1, bool), sorted_K[1:] != sorted_K[:-1]])
  position_K = jnp.cumsum(first_K) - 1
  count = sorted_K.shape[0]
  beyond_K = jnp.arange(count, dtype=jnp.int32) + np.int32(_BEYOND - count)
  unique_K = beyond_K.at[position_K].set(sorted_K, indices_are_sorted=True)
  inverse_SM = jnp.zeros(order_SM.shape, jnp.int32)
  inverse_SM = jax.vmap(lambda into, order, position: into.at[order].set(position, unique_indices=True))(
    inverse_SM, order_SM, position_K.reshape(order_SM.shape).astype(jnp.int32)
  )
  return RowPlan(unique_K, inverse_SM.T)


def gather_rows(rows_GE: Array, plan: RowPlan) -> Array:
  """The distinct rows of the plan, [K, E]: the array with respect to which gradients are taken."""
  return rows_GE.at[plan.unique_K].get(mode='fill', fill_value=0, indices_are_sorted=True)


def item_vectors(gathered_KE: Array, plan: RowPlan) -> Array:
  """Each id's vector: its S rows concatenated (PinFM section 2), [M, S * E]."""
  vectors_MSE = gathered_KE[plan.inverse_MS]
  return vectors_MSE.reshape(vectors_MSE.shape[0], -1)


def update_rows(tables: Tables, plan: RowPlan, grad_KE: Array, learning_rate: Array | float) -> Tables:
  """Row-wise Adagrad on the rows of the plan alone; with donated tables it happens in place.

  A row's accumulator grows by the mean square of its gradient; the row moves by
  -learning_rate * gradient / (sqrt(accumulator) + 1e-8). A row without gradient does not move.

  Args:
    tables: rows and accumulators.
    plan: the batch's rows.
    grad_KE: gradient with respect to `gather_rows`'s result.
    learning_rate: step size, schedule and ratio already applied.
  """
  accumulator_K = tables.accumulator_G.at[plan.unique_K].get(mode='fill', fill_value=0, indices_are_sorted=True)
  accumulator_K += jnp.mean(jnp.square(grad_KE), axis=-1)
  step_KE = -learning_rate * grad_KE / (jnp.sqrt(accumulator_K) + 1e-8)[:, None]
  # `set`, not `add`: the write then waits for the read, and XLA need not copy the whole accumulator.
  how = {'mode': 'drop', 'indices_are_sorted': True, 'unique_indices': True}
  accumulator_G = tables.accumulator_G.at[plan.unique_K].set(accumulator_K, **how)
  return Tables(tables.rows_GE.at[plan.unique_K].add(step_KE, **how), accumulator_G)
