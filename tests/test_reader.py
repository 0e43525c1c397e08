"""The NumPy reader of tables agrees with the package, and needs nothing of it."""

import doctest
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.data.events import id_keys
from pinfm_jax.data.info import IdTypes
from pinfm_jax.model import hashing
from pinfm_jax.serve import reader as reader_module
from pinfm_jax.serve.manifest import Manifest, golden_ids
from pinfm_jax.serve.quantize import dequantise
from pinfm_jax.serve.reader import TableReader, hash_rows, id_key
from pinfm_jax.serve.rows.mapped import MappedRows


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module', params=['int4', 'int8', 'float32'])
def bundle(toy, tmp_path_factory, request):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
    return toy.export(tmp_path_factory.mktemp('bundles') / request.param, storage=request.param)


@pytest.fixture
def copy(bundle, tmp_path):
  return shutil.copytree(bundle, tmp_path / 'copy')


def expected(bundle, ids):
  """Vectors by way of the package's own code, from the file."""
  words = hashing.key_words(id_keys(ids, 'string'))
  manifest = json.loads((bundle / 'manifest.json').read_text())['tables']
  packed = np.fromfile(bundle / 'tables.bin', np.uint8).reshape(-1, manifest['row_bytes'])
  return dequantise(packed[hashing.hash_rows(words, 2, 50, 3)], manifest['storage']).reshape(len(ids), -1)


def test_vectors_are_those_of_the_package(bundle):
  ids = [toy_bundle.item_name(i) for i in range(200)] + ['ünïcode', 'a' * 512]
  reader = TableReader(bundle)
  found = reader.vectors(ids)
  assert (found.dtype, found.shape) == (np.float32, (202, reader.vector_width))
  np.testing.assert_array_equal(found, expected(bundle, ids))
  np.testing.assert_array_equal(reader.vectors_of_keys(reader.keys(ids)), found)
  assert reader.vectors([]).shape == (0, 16)
  reader.verify()


@pytest.mark.parametrize('sizes', [(1, 1, 0), (2, 50, 3), (8, 80_000_000, 0), (3, 715_827_882, 2**32 - 1), (5, 7, -2)])
def test_rows_are_those_of_the_package(sizes):
  keys = np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64)
  keys[:3] = 0, 2**64 - 1, 2**32
  np.testing.assert_array_equal(hash_rows(keys, *sizes), hashing.hash_rows(hashing.key_words(keys), *sizes))


@pytest.mark.parametrize('kind', ['integer', 'string'])
def test_golden_ids(kind):
  for golden in golden_ids(kind, None):
    assert id_key(golden.id) == int(golden.key, 16)
    assert tuple(hash_rows(np.array([id_key(golden.id)], np.uint64), 1, 1 << 30, 1)[0]) == golden.rows


def test_integer_ids(toy, tmp_path, monkeypatch):
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
  path = toy.export(tmp_path / 'integers', id_type=IdTypes('integer', 'integer'))
  reader, ids = TableReader(path), [5, -1, 2**63 - 1, -(2**63)]
  np.testing.assert_array_equal(reader.keys(ids), id_keys(np.array(ids), 'integer'))
  for same in (np.array(ids), [str(i) for i in ids], [np.int64(i) for i in ids]):
    np.testing.assert_array_equal(reader.keys(same), reader.keys(ids))
  for wrong in (1.5, 'a', 2**63, None, True, '1_000', ' 5', '٣'):
    with pytest.raises(ValueError):
      reader.keys([wrong])


def test_ids_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='of 0 bytes'):
    id_key('')
  with pytest.raises(ValueError, match='of 514 bytes'):
    id_key('ü' * 257)
  with pytest.raises(ValueError, match='64-bit'):
    id_key(2**63)


def test_the_written_example():
  assert doctest.testmod(reader_module) == (0, 3)


@pytest.mark.skipif(shutil.which('cc') is None, reason='no C compiler')
def test_the_written_c_is_right(tmp_path):
  """The C of the docstring, compiled as it stands."""
  text = reader_module.__doc__
  mix = text[text.index('  u32 mix') : text.index('  u32 low')]
  body = text[text.index('  u32 low') : text.index('**A packed row')]
  (tmp_path / 'hash.c').write_text(f"""
#include <stdio.h>
#include <stdlib.h>
#include <stdint.h>
typedef uint32_t u32;
typedef uint64_t u64;
{mix}
int main(int n, char **words) {{
  u64 S = 8, R = 80000000, row[8];
  long long hash_seed = -7;
  for (int i = 1; i < n; ++i) {{
    u64 key = strtoull(words[i], 0, 10);
    {body}
    for (int s = 0; s < 8; ++s) printf("%llu ", (unsigned long long)row[s]);
  }}
}}
""")
  subprocess.run(['cc', '-o', 'hash', 'hash.c'], cwd=tmp_path, check=True)
  keys = np.random.default_rng(0).integers(0, 2**64, 200, np.uint64)
  result = subprocess.run([tmp_path / 'hash', *map(str, keys)], capture_output=True, text=True, check=True)
  found = np.array(result.stdout.split(), np.int64).reshape(200, 8)
  np.testing.assert_array_equal(found, hash_rows(keys, 8, 80_000_000, -7))


def test_a_copy_of_the_file_works_alone(bundle, tmp_path):
  """In an empty folder, with nothing but NumPy: neither JAX nor the package is imported."""
  shutil.copy(reader_module.__file__, tmp_path / 'tables_reader.py')
  program = (
    'import sys; from tables_reader import TableReader; import numpy as np\n'
    f'np.save("found.npy", TableReader({str(bundle)!r}).vectors(["item/1", "item/2"]))\n'
    'assert not [m for m in sys.modules if m.split(".")[0] in ("jax", "pinfm_jax", "ml_dtypes", "polars", "flax")]'
  )
  subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True, env={'PYTHONPATH': str(tmp_path)})
  np.testing.assert_array_equal(np.load(tmp_path / 'found.npy'), expected(bundle, ['item/1', 'item/2']))


def test_importing_it_from_the_package_loads_no_jax():
  program = "import sys, pinfm_jax.serve.reader; print([m for m in ('jax', 'flax', 'polars') if m in sys.modules])"
  assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout == '[]\n'


def change(path, **fields):
  document = json.loads((path / 'manifest.json').read_text())
  (path / 'manifest.json').write_text(json.dumps(document | fields))


def test_what_it_cannot_read_is_refused(copy, tmp_path):
  golden = json.loads((copy / 'manifest.json').read_text())['golden']
  change(copy, golden=[{**golden[0], 'rows': [0, 0]}])
  with pytest.raises(ValueError, match="the id 'a' hashes to other rows"):
    TableReader(copy)
  change(copy, format_version=99)
  with pytest.raises(ValueError, match="'pinfm-bundle', version 99, expected"):
    TableReader(copy)
  change(copy, format_version=1, tables=None)
  with pytest.raises(ValueError, match='has no tables'):
    TableReader(copy)
  with pytest.raises(FileNotFoundError):
    TableReader(tmp_path / 'nowhere')


def test_damage_is_found(copy):
  content = bytearray((copy / 'tables.bin').read_bytes())
  content[3] ^= 1
  (copy / 'tables.bin').write_bytes(content)
  with pytest.raises(ValueError, match='is damaged'):
    TableReader(copy).verify()
  (copy / 'tables.bin').write_bytes(content[:-1])
  with pytest.raises(ValueError, match='expected 100 rows'):
    TableReader(copy)


def test_the_packages_reader_of_rows_agrees(bundle):
  # Both memory-map the same file; the package's one is what scores.
  rows = TableReader(bundle)
  mapped = MappedRows(bundle / 'tables.bin', Manifest.read(bundle).tables)
  keys = rows.keys(['item/3', 'b'])
  packed = mapped.rows(hashing.key_words(keys))
  np.testing.assert_array_equal(dequantise(packed, rows.storage).reshape(2, -1), rows.vectors_of_keys(keys))
