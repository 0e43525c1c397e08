"""Memory-mapped rows: those of the file whatever the batch, by several readers at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.serve.manifest import TableLayout
from pinfm_jax.serve.rows import mapped as rows_module
from pinfm_jax.serve.rows.mapped import MappedRows

LAYOUT = TableLayout('int4', 3, 10_000, 32, 20, 5)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
  path = tmp_path_factory.mktemp('tables') / 'tables.bin'
  packed = np.random.default_rng(0).integers(0, 256, (30_000, 20), np.uint8)
  packed.tofile(path)
  return path, packed


def ids(count, seed=0):
  return key_words(np.random.default_rng(seed).integers(0, 2**64, count, np.uint64))


@pytest.mark.parametrize('shape', [(), (1,), (0,), (4, 0), (7, 11), (2000,), (100, 300)])
def test_rows_are_those_of_the_file(table, shape):
  path, packed = table
  words = ids(int(np.prod(shape))).reshape(*shape, 2)
  found = MappedRows(path, LAYOUT).rows(words)
  assert found.shape == (*shape, 3, 20)
  np.testing.assert_array_equal(found, packed[hash_rows(words, 3, 10_000, 5)])


def test_words_may_lie_anyhow_in_memory(table):
  path, packed = table
  words = np.asfortranarray(ids(5000).reshape(50, 100, 2)[::2, ::-1])
  np.testing.assert_array_equal(MappedRows(path, LAYOUT).rows(words), packed[hash_rows(words, 3, 10_000, 5)])


@pytest.mark.parametrize('count', [0, 1, 511, 512, 513, 100_000])
def test_rows_by_number(table, count):
  path, packed = table
  numbers = np.random.default_rng(1).integers(0, 30_000, count)
  np.testing.assert_array_equal(MappedRows(path, LAYOUT).numbered(numbers), packed[numbers])


def test_every_row_is_copied_by_one_reader(table, monkeypatch):
  """Parts that overlapped, or left something out, would still give right rows where memory happens to hold them."""
  rows, parts = MappedRows(table[0], LAYOUT), []
  for count in (1, 100, 171, 5000, 300_001):
    parts.clear()
    rows._in_parts(count, 3, parts.append)
    parts.sort(key=lambda part: part.start)
    covered = np.concatenate([np.arange(part.start, min(part.stop, count)) for part in parts])
    np.testing.assert_array_equal(covered, np.arange(count))
    assert all(3 * (part.stop - part.start) <= rows_module._MOST_ROWS for part in parts)


def test_several_threads_may_ask(table):
  path, packed = table
  rows = MappedRows(path, LAYOUT)
  with ThreadPoolExecutor(6) as pool:
    found = list(pool.map(lambda seed: rows.rows(ids(3000, seed)), range(12)))
  for seed, each in enumerate(found):
    np.testing.assert_array_equal(each, packed[hash_rows(ids(3000, seed), 3, 10_000, 5)])


def test_a_file_of_another_size_is_refused(table, tmp_path):
  short = tmp_path / 'tables.bin'
  short.write_bytes(table[0].read_bytes()[:-1])
  with pytest.raises(UserError, match='has 599999 bytes, expected 30000 rows of 20'):
    MappedRows(short, LAYOUT)
