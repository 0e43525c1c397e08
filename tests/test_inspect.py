"""`pinfm inspect`: what it says of bundles and deltas, and that it finds every damage."""

import json
import shutil

import jax
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.serve.delta import export_delta
from pinfm_jax.serve.inspect import damaged_files, inspect
from pinfm_jax.serve.manifest import MANIFEST


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  """Nothing here runs a program, and lowering takes seconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'program'})
    return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle')


@pytest.fixture
def copy(bundle, tmp_path):
  return shutil.copytree(bundle, tmp_path / 'copy')


def test_it_says_what_a_bundle_is(bundle, toy, capsys):
  assert main(['inspect', str(bundle)]) == 0
  text = capsys.readouterr().out
  lines = {line.split()[0]: line for line in text.splitlines()}
  assert text.startswith(f'{bundle}: bundle\n')
  assert '2 x 50 rows x 8, int4: 800 bytes, 50.00 % of float16; hash seed 3' in lines['tables']
  leaves = jax.tree.leaves_with_path(toy.params)
  counts = [sum(leaf.size for path, leaf in leaves if (path[0].key == 'pinfm') == inside) for inside in (True, False)]
  assert f'{counts[0]:,} of PinFM, {counts[1]:,} of the ranker, 800 in tables' in lines['parameters']
  assert 'gpt2 of 2 layers, width 16, 2 heads, float32, output 8, 21 positions' in lines['model']
  assert f'this JAX, {jax.__version__}, runs it' in lines['JAX']
  assert lines['utility'].endswith('1 x click, -3 x hide')
  assert 'item_age_hours, history_events' in lines['dense']
  for name in ('parameters.npz', 'tables.bin', 'checksums.bin', 'programs/crossing.bin'):
    assert f'{(bundle / name).stat().st_size:,}  {name}' in text


def test_the_facts_as_json(bundle, capsys):
  assert main(['inspect', str(bundle), '--json', '--verify']) == 0
  facts = json.loads(capsys.readouterr().out)
  manifest = json.loads((bundle / MANIFEST).read_text())
  for name in set(manifest) - {'format', 'checksum'}:
    assert facts[name] == manifest[name]
  assert (facts['kind'], facts['runs_on_this_jax'], facts['damaged']) == ('bundle', True, {})
  assert facts['parameters']['tables'] == 800


def test_a_jax_that_cannot_run_it(bundle, monkeypatch):
  monkeypatch.setattr(jax, '__version__', '0.99.0')
  found = inspect(bundle)
  assert not found.facts['runs_on_this_jax']
  assert f'this JAX, 0.99.0, cannot run it: pinfm export {bundle} --refresh --out NEW' in found.text(bundle)


@pytest.mark.parametrize('name', ['tables.bin', 'parameters.npz', 'checksums.bin', 'programs/crossing.bin'])
def test_every_damage_is_found(copy, name, capsys):
  octets = bytearray((copy / name).read_bytes())
  octets[len(octets) // 2] ^= 4
  (copy / name).write_bytes(octets)
  assert main(['inspect', str(copy), '--verify']) == 2
  out, err = capsys.readouterr()
  assert f'{copy / name} is damaged' in out
  assert '1 of 4 files damaged or missing' in err
  assert name in err


def test_all_damaged_files_are_named_and_where(copy, capsys):
  (copy / 'programs/crossing.bin').unlink()
  (copy / 'parameters.npz').write_bytes(b'short')
  octets = bytearray((copy / 'tables.bin').read_bytes())
  octets[7] ^= 1
  (copy / 'tables.bin').write_bytes(octets)
  assert main(['inspect', str(copy), '--verify', '--json']) == 2
  damaged = json.loads(capsys.readouterr().out)['damaged']
  assert sorted(damaged) == ['parameters.npz', 'programs/crossing.bin', 'tables.bin']
  assert 'is missing' in damaged['programs/crossing.bin']
  assert 'has 5 bytes' in damaged['parameters.npz']
  assert damaged['tables.bin'].endswith('in its MiB 0')


def test_large_files_are_read_in_parts_and_damage_is_located(tmp_path, monkeypatch):
  from pinfm_jax.serve import checksums
  from pinfm_jax.serve.bundle import CHECKSUMS, TABLES

  monkeypatch.setattr(checksums, 'BLOCK', 64)
  (tmp_path / TABLES).write_bytes(bytes(range(256)) * 4)
  entry, digests = checksums.describe(tmp_path, TABLES)
  (tmp_path / CHECKSUMS).write_bytes(digests)
  assert damaged_files(tmp_path, [entry]) == {}
  octets = bytearray((tmp_path / TABLES).read_bytes())
  octets[70] ^= 1
  octets[1000] ^= 1
  (tmp_path / TABLES).write_bytes(octets)
  assert damaged_files(tmp_path, [entry])[TABLES].endswith('in its MiB 1, 15')


def test_a_delta(bundle, toy, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'program'})
  rows_GE = toy.rows_GE.copy()
  rows_GE[5] += 1
  export_delta(tmp_path / 'delta', bundle, toy.trained(rows_GE=rows_GE), 'int4')
  assert main(['inspect', str(tmp_path / 'delta'), '--verify']) == 0
  text = capsys.readouterr().out
  assert text.startswith(f'{tmp_path / "delta"}: delta\n')
  assert '1 of 100 table rows changed' in text
  (tmp_path / 'delta' / 'rows.bin').write_bytes(b'')
  assert main(['inspect', str(tmp_path / 'delta'), '--verify']) == 2


def test_what_is_no_bundle(tmp_path):
  with pytest.raises(UserError, match='is not a bundle: it has no manifest.json'):
    inspect(tmp_path)
  (tmp_path / MANIFEST).write_text('{')
  with pytest.raises(UserError, match='is damaged'):
    inspect(tmp_path)
