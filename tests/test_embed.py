"""Vectors of a bundle in Parquet are those of the Flax module."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import toy_bundle
from oracle_scorer import OpenedBundle, OracleScorer

from pinfm_jax.cli import main
from pinfm_jax.data.events import id_keys
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.offline import embed as module
from pinfm_jax.serve.offline.embed import embed_items, embed_pairs, embed_users
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 1, 7, 20, 40]


PLAIN = toy_bundle.MODEL
TOWER = replace(PLAIN.tower, time_gap_buckets=12)
MODELS = {'plain': PLAIN, 'options': replace(PLAIN, tower=TOWER, content=True, content_width=2, id_mask=0.3)}


@pytest.fixture(scope='module', params=list(MODELS))
def toy(request):
  return toy_bundle.make_toy(model=MODELS[request.param])


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', storage='float32')


@pytest.fixture(scope='module')
def oracle(toy, bundle):
  return OracleScorer(toy, load_bundle(bundle))


@pytest.fixture(scope='module')
def scorer(bundle):
  return Scorer.load(bundle)


@pytest.fixture(scope='module')
def documents():
  return list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(len(LENGTHS)), toy_bundle.LENGTH))


@pytest.fixture
def file(tmp_path, documents):
  path = tmp_path / 'requests.jsonl'
  path.write_text(''.join(json.dumps(document) + '\n' for document in documents))
  return path


@pytest.fixture(params=[False, True], ids=['one part', 'many parts'])
def parts(request, monkeypatch):
  if request.param:
    monkeypatch.setattr(module, '_PART_BYTES', 1)
    for name in ('_USERS', '_PAIRS', '_ITEMS'):
      monkeypatch.setattr(module, name, 2)


def test_users(scorer, oracle, documents, file, tmp_path, parts):
  out = tmp_path / 'users.parquet'
  assert embed_users(scorer, file, out) == len(LENGTHS)
  found = pl.read_parquet(out)
  assert found.schema == {'request_id': pl.String, 'vector': pl.Array(pl.Float32, 8)}
  assert found['request_id'].to_list() == [document['request_id'] for document in documents]
  expected = oracle.users([oracle.parse(document) for document in documents])
  np.testing.assert_allclose(found['vector'].to_numpy(), expected, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(found['vector'].to_numpy(), axis=1), [0, 1, 1, 1, 1], atol=1e-5)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['requests.jsonl', 'users.parquet']


def test_pairs(scorer, oracle, documents, file, tmp_path, parts):
  out = tmp_path / 'pairs.parquet'
  assert embed_pairs(scorer, file, out) == 5 * len(LENGTHS)
  found = pl.read_parquet(out)
  assert found.columns == ['request_id', 'item_id', 'vector']
  assert found['request_id'].to_list() == [d['request_id'] for d in documents for _ in d['candidates']]
  assert found['item_id'].to_list() == [c['item_id'] for d in documents for c in d['candidates']]
  expected = oracle.pairs([oracle.parse(document) for document in documents])
  np.testing.assert_allclose(found['vector'].to_numpy(), np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize('kind', ['target', 'id'])
def test_items(scorer, oracle, toy, tmp_path, kind, parts):
  names = [toy_bundle.item_name(i) for i in (3, 1, 2, 3, 99)]
  (tmp_path / 'items.txt').write_text('\n'.join(names))
  assert embed_items(scorer, tmp_path / 'items.txt', tmp_path / 'out.parquet', kind) == 5
  found = pl.read_parquet(tmp_path / 'out.parquet')
  assert found['item_id'].to_list() == names
  keys = id_keys(names, 'string')
  expected = oracle.items(keys)['target' if kind == 'target' else 'vector']
  if not toy.model.content:
    np.testing.assert_array_equal(oracle.items(keys)['vector'], oracle._rows(keys))
  np.testing.assert_allclose(found['vector'].to_numpy(), expected, atol=1e-5)


def test_request_ids_of_both_kinds_become_text(scorer, documents, tmp_path, parts):
  users = [{'history': d['history'], 'request_id': i} for i, d in zip([7, 8, 'x', 9, 2**70], documents, strict=True)]
  (tmp_path / 'u.jsonl').write_text('\n'.join(map(json.dumps, users)))
  embed_users(scorer, tmp_path / 'u.jsonl', tmp_path / 'u.parquet')
  assert pl.read_parquet(tmp_path / 'u.parquet')['request_id'].to_list() == ['7', '8', 'x', '9', str(2**70)]
  (tmp_path / 'v.jsonl').write_text('\n'.join(json.dumps(user) for user in users[:2]))
  embed_users(scorer, tmp_path / 'v.jsonl', tmp_path / 'v.parquet')
  assert pl.read_parquet(tmp_path / 'v.parquet')['request_id'].to_list() == [7, 8]


def test_bad_input_leaves_nothing(scorer, toy, file, tmp_path, monkeypatch):
  (tmp_path / 'empty.jsonl').write_text('\n')
  (tmp_path / 'bad.jsonl').write_text('{"history": []}\n{"history": [{"item_id": 5}]}\n')
  before = {path.name for path in tmp_path.iterdir()}
  for function, source, message in (
    (embed_users, 'empty.jsonl', 'is empty'),
    (embed_pairs, 'bad.jsonl', 'line 2: history event 0'),
    (embed_items, 'bad.jsonl', 'has no column item_id'),
    (embed_users, 'nothing.jsonl', 'no such file'),
  ):
    with pytest.raises(UserError, match=message) as error:
      function(scorer, tmp_path / source, tmp_path / 'out.parquet')
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='cannot be written'):
      function(scorer, file, tmp_path / 'no' / 'out.parquet')
  assert {path.name for path in tmp_path.iterdir()} == before
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'crossing': b'x'})
  path = toy_bundle.make_toy('none').export(tmp_path / 'none')
  without = OracleScorer(toy, OpenedBundle(path, Manifest.read(path)))
  with pytest.raises(UserError, match='ranker without PinFM'):
    embed_users(without, file, tmp_path / 'out.parquet')


def test_the_command(scorer, bundle, file, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('pinfm_jax.serve.scorer.Scorer.load', lambda *_: scorer)
  out = tmp_path / 'out.parquet'
  (tmp_path / 'ids.csv').write_text('item_id\na\nb\n')
  for flag, source, rows in (('--users', file, 5), ('--pairs', file, 25), ('--items', tmp_path / 'ids.csv', 2)):
    assert main(['embed', str(bundle), flag, str(source), '--out', str(out)]) == 0
    assert f'{out}: {rows} vectors' in capsys.readouterr().out
    assert pl.read_parquet(out).height == rows
  assert main(['embed', str(bundle), '--items', str(tmp_path / 'ids.csv'), '--kind', 'id', '--out', str(out)]) == 0
  assert pl.read_parquet(out).schema['vector'] == pl.Array(pl.Float32, 16)
  assert main(['embed', str(bundle), '--users', str(file), '--kind', 'id', '--out', str(out)]) == 2
  assert '--kind id belongs to --items' in capsys.readouterr().err


def test_rows_may_come_from_servers(scorer, bundle, file, tmp_path, monkeypatch):
  opened = []
  monkeypatch.setattr('pinfm_jax.serve.rows.remote.RemoteRows.connect', lambda *a: nullcontext(('remote', *a)))
  monkeypatch.setattr('pinfm_jax.serve.scorer.Scorer.load', lambda *a: opened.append(a) or scorer)
  arguments = ['embed', str(bundle), '--users', str(file), '--out', str(tmp_path / 'out.parquet')]
  assert main([*arguments, '--rows', 'http://a:1,http://b:2']) == 0
  assert main(arguments) == 0
  assert opened == [(str(bundle), ('remote', str(bundle), ['http://a:1', 'http://b:2'])), (str(bundle), None)]
