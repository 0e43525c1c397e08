import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_bundle

from pinfm_jax.config import PinFMConfig
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import from_dict
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.jax_range import exported_range
from pinfm_jax.serve.manifest import MANIFEST, Manifest
from pinfm_jax.serve.quantize import dequantise, quantise

PROGRAMS = ['context', 'crossing', 'extend', 'items', 'pairs']
FILES = [MANIFEST, 'parameters.npz', *(f'programs/{name}.bin' for name in PROGRAMS), 'tables.bin', 'checksums.bin']


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def exported(toy, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', storage='int8')


@pytest.fixture
def copy(exported, tmp_path):
  return shutil.copytree(exported, tmp_path / 'copy')


@pytest.fixture
def no_lowering(monkeypatch):
  """Lowering takes seconds, and what is tested here is files."""
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})


def change_manifest(path, **fields):
  """Rewrites the manifest with a right checksum, as another version of the program could."""
  document = json.loads((path / MANIFEST).read_text()) | fields | {'checksum': ''}
  text = json.dumps(document)
  checksum = hashlib.sha256(text.encode()).hexdigest()
  (path / MANIFEST).write_text(text.replace('"checksum": ""', f'"checksum": "{checksum}"'))


def test_the_bundle_holds_what_went_in(toy, exported):
  bundle = load_bundle(exported)
  manifest = bundle.manifest
  assert (manifest.actions, manifest.surfaces, manifest.schema) == (
    toy_bundle.ACTIONS,
    toy_bundle.SURFACES,
    toy_bundle.SCHEMA,
  )
  assert (manifest.utility, manifest.run, manifest.id_type.item) == (toy_bundle.UTILITY, {'name': 'toy'}, 'string')
  assert from_dict(PinFMConfig, manifest.model) == toy_bundle.MODEL
  assert sorted([entry.name for entry in manifest.files] + [MANIFEST]) == sorted(FILES)
  assert sorted(p.relative_to(exported).as_posix() for p in exported.rglob('*') if p.is_file()) == sorted(FILES)
  unboxed = jax.tree.leaves(toy.params)
  for stored, given in zip(jax.tree.leaves(bundle.params), unboxed, strict=True):
    np.testing.assert_array_equal(stored, given)
  np.testing.assert_array_equal(bundle.stats['high'], toy.stats.high)
  table = np.fromfile(exported / 'tables.bin', np.uint8).reshape(100, manifest.tables.row_bytes)
  np.testing.assert_allclose(dequantise(table, 'int8'), toy.rows_GE, atol=0.02)


@pytest.mark.parametrize(('storage', 'clip'), [('int4', True), ('int4', False), ('float32', True)])
def test_how_rows_are_rounded(toy, tmp_path, no_lowering, storage, clip):
  path = toy.export(tmp_path / 'out', storage=storage, clip=clip)
  assert Manifest.read(path).tables.clip == (clip and storage != 'float32')
  packed = np.fromfile(path / 'tables.bin', np.uint8).reshape(100, -1)
  np.testing.assert_array_equal(packed, quantise(toy.rows_GE, storage, clip))


def test_golden_ids_have_the_rows_that_the_tables_are_read_at(exported):
  bundle = load_bundle(exported)
  for golden in bundle.manifest.golden:
    key = int(golden.key, 16)
    words = np.array([key & 0xFFFFFFFF, key >> 32], np.uint32)
    table = np.fromfile(exported / 'tables.bin', np.uint8).reshape(100, -1)
    np.testing.assert_array_equal(bundle.rows.rows(words), table[list(golden.rows)])


@pytest.mark.parametrize('name', FILES)
def test_a_flipped_byte_is_found_in_any_file(copy, name):
  content = bytearray((copy / name).read_bytes())
  for place in np.linspace(0, len(content) - 1, 12).astype(int):
    damaged = bytearray(content)
    damaged[place] ^= 0x20
    (copy / name).write_bytes(damaged)
    with pytest.raises(UserError, match=name) as error:
      load_bundle(copy)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', FILES)
def test_a_truncated_or_missing_file_is_found(copy, name):
  content = (copy / name).read_bytes()
  (copy / name).write_bytes(content[:-1])
  with pytest.raises(UserError, match=name):
    load_bundle(copy)
  (copy / name).unlink()
  with pytest.raises(UserError, match=name):
    load_bundle(copy)


def test_huge_tables_are_sampled(copy):
  load_bundle(copy, whole_below=0)
  content = bytearray((copy / 'tables.bin').read_bytes())
  content[-1] ^= 1
  (copy / 'tables.bin').write_bytes(content)
  with pytest.raises(UserError, match=r'tables.bin is damaged in its MiB 0'):
    load_bundle(copy, whole_below=0)


def test_versions_are_checked(copy, monkeypatch):
  monkeypatch.setattr(jax, '__version__', '0.99.1.dev3')
  with pytest.raises(UserError, match=r'runs on JAX >= 0\.\d+, < 0\.\d+; this is JAX 0.99.1.dev3: install one'):
    load_bundle(copy)
  monkeypatch.undo()
  change_manifest(copy, format_version=7)
  with pytest.raises(UserError, match='format version 7, this program reads 1 and 2'):
    load_bundle(copy)
  change_manifest(copy, format='something')
  with pytest.raises(UserError, match='not the manifest of a bundle'):
    load_bundle(copy)


def test_another_hash_is_refused(copy):
  golden = json.loads((copy / MANIFEST).read_text())['golden']
  change_manifest(copy, golden=[{**golden[0], 'rows': [0, 0]}])
  with pytest.raises(UserError, match="hashes the id 'a' to other rows"):
    load_bundle(copy)


def test_a_path_without_a_bundle(tmp_path):
  with pytest.raises(UserError, match='is not a bundle: it has no manifest.json'):
    load_bundle(tmp_path / 'nowhere')


def test_a_bundle_is_replaced_only_on_demand_and_only_by_a_whole_one(toy, copy, no_lowering):
  before = (copy / MANIFEST).read_bytes()
  with pytest.raises(UserError, match='exists already'):
    toy.export(copy)

  def breaking_off():
    yield toy.rows_GE[:60]
    raise RuntimeError('killed')

  with pytest.raises(RuntimeError, match='killed'):
    toy.export(copy, rows_GE=breaking_off(), overwrite=True)
  assert (copy / MANIFEST).read_bytes() == before
  load_bundle(copy)
  toy.export(copy, storage='float32', overwrite=True)
  assert Manifest.read(copy).tables.storage == 'float32'
  assert list(copy.parent.iterdir()) == [copy]


def test_nothing_but_a_bundle_is_replaced(toy, tmp_path, no_lowering):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(UserError, match='is no bundle, so it is not replaced'):
    toy.export(tmp_path, overwrite=True)
  assert (tmp_path / 'thesis.txt').exists()


def test_a_table_of_another_size_is_refused(toy, tmp_path, no_lowering):
  with pytest.raises(ValueError, match='got 99 table rows, expected 2 x 50'):
    toy.export(tmp_path / 'out', rows_GE=toy.rows_GE[:99])
  assert not list(tmp_path.iterdir())


def test_utility_weights_name_labels(toy, tmp_path):
  with pytest.raises(UserError, match=r"utility weights for \['clik'\], expected labels among \['click', 'hide'\]"):
    toy.export(tmp_path / 'out', utility={'clik': 1.0})


def test_scoring_loads_no_model_source(exported):
  program = (
    f'import sys; from pinfm_jax.serve.scorer import Scorer; Scorer.load({str(exported)!r}); '
    "print([m for m in sys.modules if m == 'flax' or m.startswith(('pinfm_jax.model.', 'pinfm_jax.train'))])"
  )
  result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "['pinfm_jax.model.hashing', 'pinfm_jax.model.tiles']"  # NumPy alone


def test_jax_range_of_a_release():
  assert dataclasses.astuple(exported_range('0.10.2')) == ('0.10.2', '0.10', '0.13')
