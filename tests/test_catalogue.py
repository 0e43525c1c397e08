"""The catalogue of a bundle and files of item ids."""

import gzip
import json

import numpy as np
import polars as pl
import pytest
import toy_bundle

from pinfm_jax.data.events import id_key, id_keys
from pinfm_jax.errors import UserError
from pinfm_jax.serve import catalogue as catalogue_module
from pinfm_jax.serve.bundle import MODEL_CARD, carried_over, load_bundle
from pinfm_jax.serve.catalogue import CATALOGUE, ItemFile
from pinfm_jax.serve.delta import apply_delta, export_delta
from pinfm_jax.serve.manifest import Manifest


def catalogue(count=40):
  names = sorted((toy_bundle.item_name(i) for i in range(count)), key=lambda name: id_key(name, 'string'))
  return pl.DataFrame({'item_key': id_keys(names, 'string'), 'item_id': names, 'events': 1})


@pytest.fixture
def no_lowering(monkeypatch):
  programs = {'context': b'c', 'crossing': b'x'}
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: programs)


def ids_of(file):
  return [i for _, ids in file.blocks() for i in ids.to_list()]


def test_the_bundle_carries_it_with_a_checksum(tmp_path, no_lowering):
  toy = toy_bundle.make_toy()
  path = toy.export(tmp_path / 'bundle', catalogue=catalogue(), card='# The card\n')
  assert {CATALOGUE, MODEL_CARD} <= {entry.name for entry in Manifest.read(path).files}
  assert (path / MODEL_CARD).read_text() == '# The card\n'
  file = ItemFile(path / CATALOGUE, 'string', keyed=True)
  (block,) = file.blocks()
  np.testing.assert_array_equal(block[0], catalogue()['item_key'].to_numpy())
  assert block[1].to_list() == catalogue()['item_id'].to_list()
  assert pl.read_parquet(path / CATALOGUE).columns == ['item_key', 'item_id']
  again = toy.export(tmp_path / 'again', **carried_over(path, Manifest.read(path)))
  for name in (CATALOGUE, MODEL_CARD):
    assert (again / name).read_bytes() == (path / name).read_bytes()
  for name in (CATALOGUE, MODEL_CARD):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + b'?')
    with pytest.raises(UserError, match=f'{name} is damaged'):
      load_bundle(path)
    (path / name).write_bytes(content)


def test_without_pinfm_there_is_none(tmp_path, no_lowering):
  path = toy_bundle.make_toy('none').export(tmp_path / 'bundle', catalogue=catalogue())
  assert CATALOGUE not in {entry.name for entry in Manifest.read(path).files}
  assert carried_over(path, Manifest.read(path)) == {'catalogue': None, 'card': ''}


def test_a_delta_carries_a_new_one_and_leaves_out_an_old_one(tmp_path, no_lowering):
  toy = toy_bundle.make_toy()
  base = toy.export(tmp_path / 'base', catalogue=catalogue(30), card='# Monday\n')
  for count, carried in ((30, False), (40, True)):
    delta, out = tmp_path / f'delta{count}', tmp_path / f'new{count}'
    export_delta(delta, base, toy.trained(catalogue=catalogue(count), card='# Tuesday\n'), 'int4')
    assert (delta / CATALOGUE).exists() == carried
    apply_delta(base, delta, out)
    assert pl.read_parquet(out / CATALOGUE).height == count
    assert (out / MODEL_CARD).read_text() == '# Tuesday\n'


IDS = [5, -3, 2**62, 5, 0]


def write(path, ids):
  kind = path.suffixes[0]
  if kind == '.parquet':
    pl.DataFrame({'x': 1, 'item_id': ids}).write_parquet(path)
    return path
  lines = {
    '.txt': [str(i) for i in ids],
    '.csv': ['a,item_id', *(f'1,{i}' for i in ids)],
    '.tsv': ['a\titem_id', *(f'1\t{i}' for i in ids)],
    '.jsonl': [json.dumps({'item_id': i, 'b': 1}) for i in ids],
  }[kind]
  text = ('\n'.join(lines) + '\n\n').encode()
  path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)
  return path


@pytest.mark.parametrize('name', ['a.txt', 'a.csv', 'a.tsv', 'a.jsonl', 'a.jsonl.gz', 'a.parquet'])
@pytest.mark.parametrize('kind', ['integer', 'string'])
def test_every_kind_of_file_gives_the_same_ids(tmp_path, monkeypatch, name, kind):
  monkeypatch.setattr(catalogue_module, '_TEXT_LINES', 2)  # several blocks
  ids = IDS if kind == 'integer' else [f'ä/{i}' for i in IDS]
  file = ItemFile(write(tmp_path / name, ids), kind)
  assert ids_of(file) == ids
  keys = np.concatenate([keys for keys, _ in file.blocks()])
  assert keys.tolist() == [id_key(i, kind) for i in ids]
  for rows in ([], [0], [1, 2, 4], [0, 1, 2, 3, 4]):
    assert file.ids(np.array(rows, np.int64)) == [ids[i] for i in rows]


def test_a_large_file_passes_in_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr('pinfm_jax.data.preparation.reading.PARQUET_ROWS', 7)
  file = ItemFile(write(tmp_path / 'a.parquet', list(range(100, 150))), 'integer')
  assert [len(keys) for keys, _ in file.blocks()] == [7] * 7 + [1]
  assert file.count() == 50
  assert file.ids(np.array([0, 6, 7, 30, 49])) == [100, 106, 107, 130, 149]
  assert ids_of(file) == list(range(100, 150))


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('a.txt', '1\n\n2.5\n', r"line 3: got item_id '2.5', expected a 64-bit integer"),
    ('a.csv', 'item_id\n1\n99999999999999999999\n', r"line 3: got item_id '99999999999999999999'"),
    ('a.csv', 'pin\n1\n', r'has no column item_id \(columns: pin\)'),
    ('a.jsonl', '{"item_id": 1}\n{"item_id": null}\n', r'line 2: got item_id None'),
    ('a.jsonl', '{"item_id": 1}\n{"item_id"\n', r'line 2: not a JSON object'),
    ('a.xlsx', '', 'unknown kind'),
    ('none.txt', None, 'cannot be read'),
  ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, text, message):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    ids_of(ItemFile(tmp_path / name, 'integer'))
  assert '\n' not in str(error.value)


def test_ids_of_another_type_are_refused(tmp_path):
  pl.DataFrame({'item_id': [1, 2]}).write_parquet(tmp_path / 'a.parquet')
  with pytest.raises(UserError, match=r'line 1: got item_id 1, expected a string'):
    ids_of(ItemFile(tmp_path / 'a.parquet', 'string'))
  pl.DataFrame({'item_id': [1.0, 2.0]}).write_parquet(tmp_path / 'b.parquet')
  with pytest.raises(UserError, match=r'line 1: got item_id 1.0, expected a 64-bit integer'):
    ids_of(ItemFile(tmp_path / 'b.parquet', 'integer'))
