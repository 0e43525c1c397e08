"""Hashed item tables outside the parameter tree: gather the rows that a batch needs, update just those rows.

The sub-tables lie one after another in one array of G = S * R rows, so one gather and one scatter serve all of them.
A step touches K distinct rows; its time and temporary memory depend on K and never on G. Everything here works on one
device's rows; `train.exchange` spreads them over a mesh.

bfloat16 tables are stored as uint16 bits: XLA on CPU would widen a whole bfloat16 table to float32 in a scatter, and
bits of the rows that were gathered cost nothing to reinterpret.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pinfm_jax.config import TableConfig
from pinfm_jax.model.hashing import hash_rows, hash_uniform

Array = jax.Array

_BEYOND = 2**31 - 1
_INIT_ROWS = 1 << 16
# Standard deviation of the sum of four independent uniform bytes.
_BYTES_STD = (4 * (256**2 - 1) / 12) ** 0.5


class Tables(NamedTuple):
  """The rows of all sub-tables and their optimizer state.

  Attributes:
    rows_GE: float32, or bfloat16 as uint16 bits.
    accumulator_G: float32 row-wise Adagrad accumulators; None where rows learn by another rule.
    moments_G2E: float32 means of the rows' gradients and of their squares; None but for Adam.
  """

  rows_GE: Array
  accumulator_G: Array | None
  moments_G2E: Array | None = None


class AdamStep(NamedTuple):
  """What Adam takes from a step, float32 scalars: the decay of both moments, and what corrects them (1 - decay^t)."""

  beta1: Array
  beta2: Array
  correction1: Array
  correction2: Array


class RowPlan(NamedTuple):
  """Which distinct rows a batch of M ids needs.

  Attributes:
    unique_K: int32, ascending distinct rows; the unused tail lies beyond any table (read as 0, dropped on update).
    inverse_MS: int32, for each id and sub-table the position of its row in unique_K.
  """

  unique_K: Array
  inverse_MS: Array


def table_rows(config: TableConfig, multiple: int) -> int:
  """Rows of the array that holds all sub-tables: S * R, rounded up to a multiple of what it is divided into."""
  return -(-config.sub_tables * config.rows // multiple) * multiple


def storage_dtype(config: TableConfig) -> jnp.dtype:
  """Type of the stored rows: float32, or uint16 for the bits of bfloat16."""
  return jnp.dtype(jnp.uint16 if config.dtype == 'bfloat16' else jnp.float32)


def init_rows(config: TableConfig, rows: int, salt: Array, first_row: Array | int = 0) -> Array:
  """Near-Gaussian rows of standard deviation `config.init_scale`, made a block at a time.

  A value is the sum of the four bytes of a hash of (salt, row, column), shifted and scaled: whole numbers until the
  last product, so every mesh and every kind of device starts with the same rows.

  Args:
    config: width, scale and storage.
    rows: G, how many to make.
    salt: uint32 scalar, the seed.
    first_row: number of the first one in the whole table.

  Returns:
    [G, E] in the storage type.
  """
  block = min(rows, _INIT_ROWS)
  column_E = jnp.arange(config.width, dtype=jnp.uint32)

  def fill(i: Array, rows_GE: Array) -> Array:
    start = jnp.minimum(i * block, rows - block)  # the last block may overlap the one before: same values
    row_B = (first_row + start + jnp.arange(block, dtype=jnp.int32)).astype(jnp.uint32)
    bits_BE = _hash_cells(row_B, column_E, salt)
    total_BE = sum((bits_BE >> shift) & jnp.uint32(0xFF) for shift in (0, 8, 16, 24)).astype(jnp.int32) - 510
    values_BE = total_BE.astype(jnp.float32) * np.float32(config.init_scale / _BYTES_STD)
    return jax.lax.dynamic_update_slice(rows_GE, _store(values_BE, rows_GE.dtype, None), (start, 0))

  return jax.lax.fori_loop(0, -(-rows // block), fill, jnp.zeros((rows, config.width), storage_dtype(config)))


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
  unique_K, position_K = _distinct(sorted_SM.reshape(-1))
  inverse_SM = jnp.zeros(order_SM.shape, jnp.int32)
  inverse_SM = jax.vmap(lambda into, order, position: into.at[order].set(position, unique_indices=True))(
    inverse_SM, order_SM, position_K.reshape(order_SM.shape)
  )
  return RowPlan(unique_K, inverse_SM.T)


def gather_rows(rows_GE: Array, unique_K: Array) -> Array:
  """Ascending distinct rows as they are stored, [K, E]; rows beyond the table are 0."""
  return rows_GE.at[unique_K].get(mode='fill', fill_value=0, indices_are_sorted=True)


def as_float32(stored: Array) -> Array:
  """Values of stored rows: float32 as they are, uint16 as the bits of bfloat16."""
  if stored.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16).astype(jnp.float32)
  return stored


def item_vectors(gathered_KE: Array, inverse_MS: Array) -> Array:
  """Each id's vector: its S rows concatenated (PinFM section 2), [M, S * E]."""
  vectors_MSE = gathered_KE[inverse_MS]
  return vectors_MSE.reshape(vectors_MSE.shape[0], -1)


def sum_duplicates(row_K: Array, grad_KE: Array) -> tuple[Array, Array]:
  """Adds the gradients of equal rows.

  Args:
    row_K: int32 rows in any order, with duplicates; those beyond the table count for nothing.
    grad_KE: their gradients.

  Returns:
    Ascending distinct rows (see `RowPlan.unique_K`) and the sum of each one's gradients, added in the order given.
  """
  sorted_K, order_K = jax.lax.sort_key_val(row_K, jnp.arange(row_K.size, dtype=jnp.int32), is_stable=True)
  unique_K, position_K = _distinct(sorted_K)
  sums_KE = jnp.zeros_like(grad_KE).at[position_K].add(grad_KE[order_K], indices_are_sorted=True)
  return unique_K, sums_KE


def update_rows(
  tables: Tables, unique_K: Array, grad_KE: Array, learning_rate: Array | float, salt: Array, first_row: Array | int = 0
) -> Tables:
  """Moves some rows against their gradients; with donated tables it happens in place.

  Row-wise Adagrad: a row's accumulator grows by the mean square of its gradient, and the row moves by
  -learning_rate * gradient / (sqrt(accumulator) + 1e-8). Without accumulators, plain SGD: -learning_rate * gradient.
  A row without gradient does not move. bfloat16 rows are rounded stochastically: the new value is one of its two
  neighbours, with probabilities that make it right on average, so that steps smaller than a neighbour's distance are
  not lost.

  Args:
    tables: rows and accumulators.
    unique_K: ascending distinct rows; those beyond the table are dropped.
    grad_KE: their gradients.
    learning_rate: step size, schedule and ratio already applied.
    salt: uint32 scalar, differs from step to step: seeds the rounding, together with (row, column).
    first_row: number of this device's first row in the whole table, so that every mesh rounds alike.
  """
  how = {'mode': 'drop', 'indices_are_sorted': True, 'unique_indices': True}
  accumulator_G = tables.accumulator_G
  step_KE = -learning_rate * grad_KE
  if accumulator_G is not None:
    accumulator_K = accumulator_G.at[unique_K].get(mode='fill', fill_value=0, indices_are_sorted=True)
    accumulator_K += jnp.mean(jnp.square(grad_KE), axis=-1)
    step_KE /= (jnp.sqrt(accumulator_K) + 1e-8)[:, None]
    # `set`, not `add`: the write then waits for the read, and XLA need not copy the whole accumulator.
    accumulator_G = accumulator_G.at[unique_K].set(accumulator_K, **how)
  if tables.rows_GE.dtype == jnp.float32:
    return Tables(tables.rows_GE.at[unique_K].add(step_KE, **how), accumulator_G)
  moved_KE = as_float32(gather_rows(tables.rows_GE, unique_K)) + step_KE
  bits_KE = _hash_cells((unique_K + first_row).astype(jnp.uint32), jnp.arange(grad_KE.shape[1], dtype=jnp.uint32), salt)
  return Tables(tables.rows_GE.at[unique_K].set(_store(moved_KE, jnp.uint16, bits_KE), **how), accumulator_G)


def add_rows(sums_GE: Array, unique_K: Array, grad_KE: Array) -> Array:
  """Adds the gradients of ascending distinct rows to a table of sums; rows beyond it are dropped."""
  return sums_GE.at[unique_K].add(grad_KE, mode='drop', indices_are_sorted=True, unique_indices=True)


def adam_rows(tables: Tables, grad_GE: Array, learning_rate: Array | float, adam: AdamStep) -> Tables:
  """Adam over all rows, those without a gradient too: their moments fade, and as long as they last the rows move.

  Args:
    tables: float32 rows and their moments.
    grad_GE: the gradient of every row.
    learning_rate: step size, schedule and ratio already applied.
    adam: decays and corrections.
  """
  mean_GE = adam.beta1 * tables.moments_G2E[:, 0] + (1 - adam.beta1) * grad_GE
  square_GE = adam.beta2 * tables.moments_G2E[:, 1] + (1 - adam.beta2) * jnp.square(grad_GE)
  step_GE = mean_GE / adam.correction1 / (jnp.sqrt(square_GE / adam.correction2) + 1e-8)
  rows_GE = tables.rows_GE - learning_rate * step_GE
  return Tables(rows_GE, tables.accumulator_G, jnp.stack([mean_GE, square_GE], axis=1))


def _distinct(sorted_K: Array) -> tuple[Array, Array]:
  """The distinct values of an ascending list, with a tail beyond any table, and each entry's place among them."""
  count = sorted_K.shape[0]
  first_K = jnp.concatenate([jnp.ones(1, bool), sorted_K[1:] != sorted_K[:-1]])
  position_K = jnp.cumsum(first_K, dtype=jnp.int32) - 1
  beyond_K = jnp.arange(count, dtype=jnp.int32) + np.int32(_BEYOND - count)
  return beyond_K.at[position_K].set(sorted_K, indices_are_sorted=True), position_K


def _hash_cells(row_K: Array, column_E: Array, salt: Array) -> Array:
  """Uniform uint32 bits [K, E] as a function of (salt, row, column)."""
  return hash_uniform(hash_uniform(row_K, salt)[:, None] + column_E, salt)


def _store(values: Array, dtype: jnp.dtype, random_bits: Array | None) -> Array:
  """float32 values as they are stored; to bfloat16 rounded to nearest, or stochastically by the 16 lower bits given."""
  if dtype == jnp.float32:
    return values
  if random_bits is None:
    return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + (random_bits & jnp.uint32(0xFFFF))
  return (bits >> jnp.uint32(16)).astype(jnp.uint16)
