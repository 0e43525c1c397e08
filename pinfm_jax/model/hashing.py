"""The hash family of the item tables: one uniform row of each sub-table for a 64-bit id, on host and device alike.

An id is two uint32 words (low, high), since JAX would silently cut an int64. The arithmetic below is unsigned 32-bit
only and is written once for NumPy and JAX, so both give the same rows.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXACT_ROWS = -1  # the seed that stands for no hashing

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive sub-tables get far-apart seeds


def key_words(keys: np.ndarray) -> np.ndarray:
  """Splits 64-bit keys into the two words a device can hold.

  Args:
    keys: uint64 [...].

  Returns:
    uint32 [..., 2]: low word, high word.
  """
  keys = np.asarray(keys, np.uint64)
  return np.stack([keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32)], axis=-1).astype(np.uint32)


def hash_rows(words: Any, sub_tables: int, rows: int, seed: int = 0) -> Any:
  """Row of each sub-table for each id (PinFM section 2: one hash function a sub-table).

  Each sub-table mixes both words with its own two seeds into 64 bits and maps them to [0, rows) by the high half of
  the product with `rows`, which favours no row by more than rows / 2^64.

  Args:
    words: uint32 [..., 2] (see `key_words`), a NumPy or a JAX array.
    sub_tables: S.
    rows: R, rows of one sub-table.
    seed: changes the whole family. `EXACT_ROWS` = no hashing: ids below R - 1 are their own row, so that no two items
      share one, and all other ids read the last row.

  Returns:
    int32 [..., S] rows counted over the sub-tables laid one after another: sub-table s holds s * R to (s + 1) * R.

  Raises:
    ValueError: S * R does not fit an int32.
  """
  if sub_tables * rows >= 2**31:
    raise ValueError(f'{sub_tables} sub-tables of {rows} rows: rows are numbered by int32, at most {2**31 - 1} in all')
  xp = jnp if isinstance(words, jax.Array) else np
  low, high = words[..., 0, None], words[..., 1, None]
  first_S = np.arange(sub_tables, dtype=np.uint32) * np.uint32(rows)
  if seed == EXACT_ROWS:
    last = np.uint32(rows - 1)
    return (xp.where((high == 0) & (low < last), low, last) + first_S).astype(xp.int32)
  salts = np.arange(1, sub_tables + 1, dtype=np.uint64) + np.uint64(seed & 0xFFFFFFFF) * np.uint64(1_000_003)
  salt_low = ((salts * np.uint64(_GOLDEN)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
  salt_high = ((salts * np.uint64(0xC2B2AE3D)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
  a = _mix(low ^ salt_low, xp)
  b = _mix(high ^ salt_high ^ a, xp)
  a = _mix(a + b * np.uint32(_GOLDEN), xp)  # both halves now depend on both words
  row = _multiply_high(a, b, rows) if xp is jnp else _multiply_high_64(a, b, rows)
  return (row + first_S).astype(xp.int32)


def hash_uniform(counter: Any, seed: Any) -> jax.Array:
  """Uniform uint32 bits as a function of (counter, seed): the same numbers on any mesh, in any order.

  Args:
    counter: uint32 [...].
    seed: uint32 that broadcasts with it, most often a scalar.
  """
  return _mix(_mix(counter.astype(jnp.uint32) ^ (jnp.uint32(seed) * jnp.uint32(_GOLDEN)), jnp) + jnp.uint32(seed), jnp)


def fold_seed(seed: Any, *parts: Any) -> jax.Array:
  """The uint32 seed of one purpose: a hash of the run's seed and, one after another, of the step, the purpose, ..."""
  folded = jnp.uint32(seed & 0xFFFFFFFF if isinstance(seed, int) else seed)
  for part in parts:
    folded = hash_uniform(jnp.asarray(part).astype(jnp.uint32), folded)
  return folded


def permute_words(words: Any, seed: Any) -> tuple[jax.Array, jax.Array]:
  """A random permutation of the 64-bit ids: two ids give equal words if and only if they are equal.

  A Feistel network: each round changes one word by a hash of the other, which can be undone, so nothing collides.
  To sort by the result is to shuffle the ids and to bring equal ids together at once.

  Args:
    words: uint32 [..., 2].
    seed: uint32 scalar; another seed, another permutation.

  Returns:
    The more and the less significant word, uint32 [...] each.
  """
  left, right = words[..., 0], words[..., 1]
  for turn in range(4):
    left, right = right, left ^ hash_uniform(right, fold_seed(seed, turn))
  return left, right


def _mix(h: Any, xp: ModuleType) -> Any:
  """Bijective 32-bit finaliser with MurmurHash3's constants: an input bit flips each output bit half the time."""
  h = h ^ (h >> np.uint32(16))
  h = h * np.uint32(0x85EBCA6B)
  h = h ^ (h >> np.uint32(13))
  h = h * np.uint32(0xC2B2AE35)
  return (h ^ (h >> np.uint32(16))).astype(xp.uint32)


def _multiply_high_64(high: np.ndarray, low: np.ndarray, rows: int) -> np.ndarray:
  """`_multiply_high` where there are 64-bit integers: on the host, in half the time."""
  rows = np.uint64(rows)
  carry = low.astype(np.uint64) * rows >> np.uint64(32)
  return (high.astype(np.uint64) * rows + carry >> np.uint64(32)).astype(np.uint32)


def _multiply_high(high: Any, low: Any, rows: int) -> Any:
  """floor((high * 2^32 + low) * rows / 2^64) in 32-bit arithmetic."""
  top, bottom = _multiply_32(high, rows)
  carry, _ = _multiply_32(low, rows)
  total = bottom + carry
  return top + (total < carry).astype(np.uint32)


def _multiply_32(x: Any, y: int) -> tuple[Any, Any]:
  """The 64-bit product of two uint32 as (high word, low word), by 16-bit limbs."""
  x0, x1 = x & np.uint32(0xFFFF), x >> np.uint32(16)
  y0, y1 = np.uint32(y & 0xFFFF), np.uint32(y >> 16)
  p00, p01, p10, p11 = x0 * y0, x0 * y1, x1 * y0, x1 * y1
  middle = (p00 >> np.uint32(16)) + (p01 & np.uint32(0xFFFF)) + (p10 & np.uint32(0xFFFF))
  low = (p00 & np.uint32(0xFFFF)) | (middle << np.uint32(16))
  high = p11 + (p01 >> np.uint32(16)) + (p10 >> np.uint32(16)) + (middle >> np.uint32(16))
  return high, low
