"""A delta and its base give the bundle that a full export gives, and nothing else is accepted."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.serve import delta as delta_module
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.delta import DELTA, NUMBERS, RESULT, DeltaManifest, apply_delta, export_delta
from pinfm_jax.serve.manifest import MANIFEST, Manifest, document_checksum

CHANGED = [0, 7, 8, 55, 99]


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def rows_GE(toy):  # noqa: N802
  rows = toy.rows_GE.copy()
  rows[CHANGED] += 0.5 + np.arange(8)
  return rows


@pytest.fixture
def no_lowering(monkeypatch):
  """Lowering takes seconds, and what is tested here is files."""
  programs = {'context': b'c', 'crossing': b'x'}
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: programs)
  return programs


@pytest.fixture
def bundles(toy, rows_GE, tmp_path, no_lowering):
  """A base, a full export of the next day, and the delta between them."""
  base = toy.export(tmp_path / 'base')
  no_lowering['crossing'] = b'another'
  full = toy.export(tmp_path / 'full', rows_GE=rows_GE, actions=('click', 'save', 'hide'), run={'day': 2})
  about = export_delta(tmp_path / 'delta', base, toy.trained(rows_GE=rows_GE, run={'day': 2}), 'int4')
  return base, full, tmp_path / 'delta', about


def _files(directory):
  return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob('*') if p.is_file()}


def test_the_result_is_the_full_export(bundles, tmp_path):
  base, full, delta, about = bundles
  result, expected = _files(apply_delta(base, delta, tmp_path / 'new')), _files(full)
  assert result.keys() == expected.keys()
  for name in expected.keys() - {MANIFEST}:  # which has the time of the export
    assert result[name] == expected[name], name
  manifests = [Manifest.read(tmp_path / name) for name in ('new', 'full')]
  assert manifests[0].files == manifests[1].files
  assert manifests[0].run == {'day': 2}
  assert np.fromfile(delta / NUMBERS, '<u4').tolist() == CHANGED
  assert about.rows == len(CHANGED)


def test_a_delta_holds_what_changed(bundles):
  base, full, delta, about = bundles
  names = set(_files(delta))
  assert names == {
    DELTA, RESULT, 'parameters.npz', 'programs/crossing.bin', 'checksums.bin', 'rows.bin', 'row_numbers.bin',
  }  # fmt: skip
  assert (delta / 'rows.bin').stat().st_size == len(CHANGED) * 8
  assert about.bytes == sum(len(content) for name, content in _files(delta).items() if name != DELTA)
  assert about.full_bytes == pytest.approx(sum(map(len, _files(full).values())), abs=80)
  assert f'5 of 100 table rows changed; {about.bytes} bytes, the full bundle has' in about.text()
  assert DeltaManifest.read(delta) == about


def test_deltas_follow_one_another(toy, rows_GE, bundles, tmp_path):
  base, _, delta, _ = bundles
  second = apply_delta(base, delta, tmp_path / 'second')
  about = export_delta(tmp_path / 'delta2', second, toy.trained(), 'int4')
  assert about.rows == len(CHANGED)
  third = apply_delta(second, tmp_path / 'delta2', tmp_path / 'third')
  assert (third / 'tables.bin').read_bytes() == (base / 'tables.bin').read_bytes()


def test_nothing_changed(toy, bundles, tmp_path):
  base = bundles[0]
  assert export_delta(tmp_path / 'none', base, toy.trained(), 'int4').rows == 0
  new = apply_delta(base, tmp_path / 'none', tmp_path / 'new')
  assert (new / 'tables.bin').read_bytes() == (base / 'tables.bin').read_bytes()


def test_rows_that_are_rounded_otherwise_are_no_delta(toy, bundles, tmp_path):
  with pytest.raises(UserError, match=r'as int4, hash seed 3, the ranker .* as int4 \(clipped\), hash seed 3'):
    export_delta(tmp_path / 'clipped', bundles[0], toy.trained(clip=True), 'int4')


def test_another_base_is_refused(bundles, tmp_path):
  _, full, delta, _ = bundles
  with pytest.raises(UserError, match='was exported against another bundle'):
    apply_delta(full, delta, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_damage_on_either_side_is_found(bundles, tmp_path):
  base, _, delta, _ = bundles
  sides = [(delta, name) for name in _files(delta)]
  sides += [(base, name) for name in ('tables.bin', 'programs/context.bin', MANIFEST)]
  for side, name in sides:
    path = side / name
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 0x20
    path.write_bytes(damaged)
    with pytest.raises(UserError) as caught:
      apply_delta(base, delta, tmp_path / 'new')
    assert '\n' not in str(caught.value)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError):
      apply_delta(base, delta, tmp_path / 'new')
    path.unlink()
    with pytest.raises(UserError):
      apply_delta(base, delta, tmp_path / 'new')
    path.write_bytes(content)
    assert not (tmp_path / 'new').exists()
  apply_delta(base, delta, tmp_path / 'new')


def test_a_damaged_base_makes_no_delta(toy, bundles, tmp_path):
  base = bundles[0]
  damaged = bytearray((base / 'tables.bin').read_bytes())
  damaged[3] ^= 1
  (base / 'tables.bin').write_bytes(damaged)
  with pytest.raises(UserError, match=r'tables.bin is damaged'):
    export_delta(tmp_path / 'other', base, toy.trained(), 'int4')
  assert not (tmp_path / 'other').exists()


def test_other_tables_are_refused(toy, bundles, tmp_path):
  with pytest.raises(UserError, match='as int4, hash seed 3, the ranker 2 x 50 rows of 8 as int8'):
    export_delta(tmp_path / 'other', bundles[0], toy.trained(), 'int8')


def test_only_a_delta_is_replaced(toy, bundles, tmp_path):
  base, full, delta, _ = bundles
  with pytest.raises(UserError, match='exists already'):
    export_delta(delta, base, toy.trained(), 'int4')
  export_delta(delta, base, toy.trained(), 'int4', overwrite=True)
  with pytest.raises(UserError, match='is no delta, so it is not replaced'):
    export_delta(full, base, toy.trained(), 'int4', overwrite=True)


def test_another_version_is_refused(bundles, tmp_path):
  base, full, delta, _ = bundles
  document = json.loads((delta / DELTA).read_text()) | {'format_version': 9}
  del document['checksum']
  document['checksum'] = document_checksum(document)
  (delta / DELTA).write_text(json.dumps(document))
  with pytest.raises(UserError, match='format version 9, this program reads 1'):
    apply_delta(base, delta, tmp_path / 'new')
  with pytest.raises(UserError, match='is not a delta'):
    apply_delta(base, full, tmp_path / 'new')


def test_the_table_is_never_in_memory(toy, no_lowering, tmp_path, monkeypatch):
  """Eight times as many rows, the same peak: writing, comparing and patching work in blocks."""
  monkeypatch.setattr(delta_module, '_BLOCK_ROWS', 1000)
  peaks = {}
  for rows in (4_000, 32_000):
    config = toy_bundle.MODEL
    tables = config.tables.__class__(sub_tables=2, rows=rows, width=8, hash_seed=3)
    config = config.__class__(tables, config.tower, config.num_actions, config.num_surfaces)
    folder = tmp_path / str(rows)

    def blocks(day, rows=rows):
      for start in range(0, 2 * rows, 1000):
        block = np.sin(np.arange(8000.0) + start).reshape(1000, 8).astype(np.float32)
        block[:: 7 + day] += day
        yield block

    toy.export(folder / 'base', model_config=config, rows_GE=blocks(0))
    tracemalloc.start()
    export_delta(folder / 'delta', folder / 'base', toy.trained(model_config=config, rows_GE=blocks(1)), 'int4')
    apply_delta(folder / 'base', folder / 'delta', folder / 'new')
    peaks[rows] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shutil.rmtree(folder / 'base')
  assert peaks[32_000] < 1.5 * peaks[4_000]


@pytest.mark.slow
def test_unchanged_programs_are_left_out_and_the_result_can_be_loaded(toy, rows_GE, tmp_path):
  base = toy.export(tmp_path / 'base')
  export_delta(tmp_path / 'delta', base, toy.trained(rows_GE=rows_GE), 'int4')
  assert not list((tmp_path / 'delta' / 'programs').iterdir())
  assert main(['apply-delta', str(base), str(tmp_path / 'delta'), '--out', str(tmp_path / 'new')]) == 0
  bundle = load_bundle(tmp_path / 'new')
  full = load_bundle(toy.export(tmp_path / 'full', rows_GE=rows_GE))
  words = np.arange(40, dtype=np.uint32).reshape(20, 2)
  np.testing.assert_array_equal(bundle.rows.rows(words), full.rows.rows(words))
