"""Bundles made again: for another JAX, in another storage, from another format version."""

import json
import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
import toy_bundle
from test_bundle import change_manifest

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import export_bundle, load_bundle
from pinfm_jax.serve.convert import ranker_of_bundle, refresh_bundle
from pinfm_jax.serve.manifest import FORMAT_VERSION, MANIFEST, Manifest
from pinfm_jax.serve.quantize import dequantise
from pinfm_jax.serve.scorer import Scorer

PLAIN = toy_bundle.MODEL
INPUTS = replace(PLAIN, tower=replace(PLAIN.tower, time_gap_buckets=12), content=True, content_width=2, id_mask=0.3)
ARCHIVE = Path(__file__).parent / 'golden' / 'bundle_v1.tar.xz'


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy(model=INPUTS)


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  keys = toy.tokens.items.keys_V
  catalogue = pl.DataFrame({'item_key': keys, 'item_id': [f'name/{i}' for i in range(len(keys))]})
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', catalogue=catalogue, card='# A toy\n')


@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
  folder = tmp_path_factory.mktemp('v1')
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter='data')
  return folder / 'bundle_v1'


@pytest.fixture
def no_lowering(monkeypatch):
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'program'})


def without(manifest, *names):
  return {name: value for name, value in json.loads((manifest / MANIFEST).read_text()).items() if name not in names}


def test_a_bundle_survives_the_round_trip(toy, bundle, tmp_path):
  """Byte for byte, the codes of int4 included, but for the time of export."""
  again = export_bundle(tmp_path / 'again', ranker_of_bundle(bundle))
  names = [entry.name for entry in Manifest.read(bundle).files]
  assert {'items/catalogue.parquet', 'MODEL_CARD.md', 'items/known.bin', 'tables.bin'} <= set(names)
  for entry in Manifest.read(bundle).files:
    assert (again / entry.name).read_bytes() == (bundle / entry.name).read_bytes(), entry.name
  assert without(again, 'created', 'checksum') == without(bundle, 'created', 'checksum')
  ranker = ranker_of_bundle(again)
  assert jax.tree.structure(ranker.params) == jax.tree.structure(toy.params)
  for found, given in zip(jax.tree.leaves(ranker.params), jax.tree.leaves(toy.params), strict=True):
    np.testing.assert_array_equal(found, given)
  assert (ranker.model_config, ranker.ranker_config) == (toy.model, toy.ranker)


def test_another_storage(toy, bundle, tmp_path, no_lowering):
  assert main(['export', str(bundle), '--out', str(tmp_path / 'float32'), '--storage', 'float32']) == 0
  table = np.fromfile(tmp_path / 'float32' / 'tables.bin', np.float32).reshape(100, 8)
  packed = np.fromfile(bundle / 'tables.bin', np.uint8).reshape(100, 8)
  np.testing.assert_array_equal(table, dequantise(packed, 'int4'))


def test_the_tables_pass_in_blocks(bundle):
  rows = ranker_of_bundle(bundle).rows_GE
  parts = list(replace(rows.parts, block_rows=7))
  assert [len(part) for part in parts] == [7] * 14 + [2]
  np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(list(rows.parts)))


def test_a_past_jax_range_is_refreshed(bundle, tmp_path):
  bundle = shutil.copytree(bundle, tmp_path / 'old')
  change_manifest(bundle, jax={'exported_with': '0.4.30', 'at_least': '0.4', 'below': '0.7'})
  with pytest.raises(UserError, match=rf'or lower it again: pinfm export {bundle} --refresh --out NEW'):
    load_bundle(bundle)
  assert main(['export', str(bundle), '--refresh', '--out', str(tmp_path / 'new')]) == 0
  new = load_bundle(tmp_path / 'new')
  assert new.manifest.jax.exported_with == jax.__version__
  for name in ('tables.bin', 'checksums.bin'):
    assert os.stat(tmp_path / 'new' / name).st_ino == os.stat(bundle / name).st_ino
  assert (tmp_path / 'new' / 'items/keys.bin').read_bytes() == (bundle / 'items/keys.bin').read_bytes()


def test_tables_are_copied_where_links_cannot_be(bundle, tmp_path, monkeypatch, no_lowering):
  def refuse(*_):
    raise OSError('another device')

  monkeypatch.setattr(os, 'link', refuse)
  new = refresh_bundle(bundle, tmp_path / 'new')
  assert (new / 'tables.bin').read_bytes() == (bundle / 'tables.bin').read_bytes()
  assert os.stat(new / 'tables.bin').st_ino != os.stat(bundle / 'tables.bin').st_ino


@pytest.mark.parametrize('name', ['plain', 'inputs', 'none'])
def test_an_older_format_is_refreshed_and_scores_alike(earlier, name, tmp_path):
  new = refresh_bundle(earlier / name, tmp_path / 'new')
  assert Manifest.read(new).format_version == FORMAT_VERSION
  requests = [json.loads(line) for line in (earlier / f'{name}.requests.jsonl').read_text().splitlines()]
  expected = [json.loads(line) for line in (earlier / f'{name}.scores.jsonl').read_text().splitlines()]
  for found, wanted in zip(Scorer.load(new).score(requests), expected, strict=True):
    assert found['request_id'] == wanted['request_id']
    for a, b in zip(found['scores'], wanted['scores'], strict=True):
      assert a.keys() == b.keys()
      np.testing.assert_allclose([a['click'], a['hide']], [b['click'], b['hide']], atol=1e-5)


def test_a_damaged_bundle_is_not_refreshed(earlier, tmp_path):
  path = earlier / 'plain' / 'tables.bin'
  octets = bytearray(path.read_bytes())
  octets[3] ^= 1
  path.write_bytes(octets)
  with pytest.raises(UserError, match=r'tables.bin is damaged'):
    refresh_bundle(earlier / 'plain', tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


BAD = [
  (['--refresh', '--storage', 'int8'], '--refresh keeps tables and form as they are'),
  (['--arm', 'x'], '--arm belongs to a run, and .* is a bundle'),
  (['--base', 'x'], '--base belongs to a run, and .* is a bundle'),
  ([], 'is a bundle already; expected --refresh, --storage or --format'),
]


@pytest.mark.parametrize(('arguments', 'message'), BAD)
def test_bad_arguments(bundle, tmp_path, arguments, message, capsys):
  assert main(['export', str(bundle), '--out', str(tmp_path / 'new'), *arguments]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert re.search(message, error)


def test_only_a_bundle_is_refreshed(tmp_path, capsys):
  assert main(['export', str(tmp_path), '--refresh', '--out', str(tmp_path / 'new')]) == 2
  assert '--refresh takes a bundle' in capsys.readouterr().err
