"""The hash family: golden vectors, NumPy == JAX, uniform, independent between sub-tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.model.hashing import fold_seed, hash_rows, hash_uniform, key_words


def test_key_words_split_and_restore_64_bits():
  keys = np.array([0, 1, 2**32, 2**63 + 5, 2**64 - 1], np.uint64)
  words = key_words(keys)
  restored = words[:, 0].astype(np.uint64) | (words[:, 1].astype(np.uint64) << np.uint64(32))
  np.testing.assert_array_equal(restored, keys)


def test_golden_rows_never_change():
  # Rows of trained checkpoints: a change here makes every stored table worthless.
  keys = np.array([0, 1, 123456789, 2**40 + 7, 2**64 - 1], np.uint64)
  rows = hash_rows(key_words(keys), 3, 80_000_000)
  golden = [
    [75644181, 114447599, 199769968],
    [31679259, 88489737, 166266913],
    [27987871, 111684419, 213607049],
    [62179858, 141742547, 181067891],
    [46988033, 106630817, 202370235],
  ]
  np.testing.assert_array_equal(rows, golden)


@pytest.mark.parametrize('rows', [1, 7, 1000, 2**20, 80_000_000])
def test_numpy_and_jax_agree_and_stay_in_range(rows):
  rng = np.random.default_rng(0)
  words = rng.integers(0, 2**32, (5000, 2), dtype=np.uint32)
  host = hash_rows(words, 8, rows, seed=3)
  device = jax.jit(lambda w: hash_rows(w, 8, rows, seed=3))(jnp.asarray(words))
  np.testing.assert_array_equal(host, np.asarray(device))
  within = host - np.arange(8) * rows
  assert within.min() >= 0
  assert within.max() < rows


def test_multiply_high_is_exact():
  rng = np.random.default_rng(1)
  words = rng.integers(0, 2**32, (2000, 2), dtype=np.uint32)
  # With R rows the row is floor(h * R / 2^64) for one 64-bit h: R = 2^16 and R = 2^30 must agree on the high bits.
  coarse, fine = hash_rows(words, 1, 2**16), hash_rows(words, 1, 2**30)
  np.testing.assert_array_equal(coarse, fine >> 14)


@pytest.mark.parametrize('keys', [np.arange(100_000), np.arange(100_000) << 32, np.arange(100_000) * 4096])
def test_uniform_and_independent(keys):
  rows = hash_rows(key_words(keys.astype(np.uint64)), 4, 400) - np.arange(4) * 400
  for s in range(4):
    assert _chi_square(rows[:, s], 400) < _limit(399)
  for a, b in ((0, 1), (1, 2), (0, 3)):
    joint = (rows[:, a] // 20) * 20 + rows[:, b] // 20
    assert _chi_square(joint, 400) < _limit(399)


def test_seed_changes_the_family():
  words = key_words(np.arange(1000, dtype=np.uint64))
  same = np.mean(hash_rows(words, 2, 10_000, seed=0) == hash_rows(words, 2, 10_000, seed=1))
  assert same < 0.01


def test_too_many_rows_are_refused():
  with pytest.raises(ValueError, match='int32'):
    hash_rows(key_words(np.zeros(1, np.uint64)), 8, 2**29)


def test_hash_uniform_is_uniform_over_counters_and_seeds():
  counter = jnp.arange(100_000, dtype=jnp.uint32)
  for seed in (0, 1, 17):
    assert _chi_square(np.asarray(hash_uniform(counter, seed)) >> 24, 256) < _limit(255)
  seeds = jax.vmap(lambda seed: hash_uniform(jnp.uint32(5), seed))(counter)
  assert _chi_square(np.asarray(seeds) >> 24, 256) < _limit(255)


def _chi_square(values, bins):
  counts = np.bincount(values, minlength=bins)
  expected = len(values) / bins
  return np.sum((counts - expected) ** 2 / expected)


def _limit(degrees):
  return degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


def test_seeds_are_folded_apart_and_any_whole_number_is_a_seed():
  found = {int(fold_seed(seed, step, purpose)) for seed in range(8) for step in range(50) for purpose in range(3)}
  assert len(found) == 8 * 50 * 3
  assert int(fold_seed(1, 2)) != int(fold_seed(2, 1))
  assert int(fold_seed(-1, 0)) == int(fold_seed(2**32 - 1, 0))
  assert int(fold_seed(3, 4)) == int(fold_seed(jnp.uint32(3), jnp.int32(4)))
