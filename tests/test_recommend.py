"""Recommendations are the best items of the whole catalogue, by brute force."""

import json

import numpy as np
import polars as pl
import pytest
import toy_bundle
from oracle_scorer import OracleScorer

from pinfm_jax.cli import main
from pinfm_jax.data.events import id_key, id_keys
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.catalogue import CATALOGUE, ItemFile
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.offline import recommend as module
from pinfm_jax.serve.offline.recommend import Best, best_items, recommend_file
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 1, 7, 20, 40]
WIDTH = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(module, '_CHUNK', 8)
  monkeypatch.setattr(module, '_TILE', 3)


def write_ids(path, keys):
  path.write_text('\n'.join(str(int(key)) for key in keys.astype(np.int64)) + '\n')
  return ItemFile(path, 'integer')


def by_hand(user_QO, seen, keys, encode, top):
  """Sorts every distinct item of the file by score, then by its first place."""
  first = {}
  for row, key in enumerate(keys.tolist()):
    first.setdefault(key, row)
  z = encode(np.array(list(first), np.uint64))
  found = []
  for user_O, barred in zip(user_QO, seen, strict=True):
    scores = z @ user_O
    ranked = sorted((-score, row, key) for score, (key, row) in zip(scores, first.items(), strict=True)
                    if key not in set(barred.tolist()))  # fmt: skip
    found.append([(row, -score) for score, row, _ in ranked[:top]])
  return found


@pytest.mark.parametrize('top', [1, 5, 20, 100])
@pytest.mark.parametrize('seed', [0, 1])
def test_it_is_the_brute_force_ranking(tmp_path, top, seed):
  rng = np.random.default_rng(seed)
  pool = rng.integers(0, 2**63, 50).astype(np.uint64)
  keys = rng.choice(pool, 83)  # items stand in the file again and again, in one chunk and in others
  table = rng.integers(-2, 3, (97, WIDTH)).astype(np.float32)  # small integers: exact sums, many ties
  user_QO = rng.integers(-2, 3, (7, WIDTH)).astype(np.float32)
  seen = [rng.choice(pool, rng.integers(0, 30)) for _ in user_QO]

  def encode(keys):
    return table[(keys % np.uint64(97)).astype(int)]

  progress = []
  best = best_items(user_QO, seen, write_ids(tmp_path / 'ids.txt', keys), encode, top, progress.append)
  for found, score, expected in zip(best.row_Qk, best.score_Qk, by_hand(user_QO, seen, keys, encode, top), strict=True):
    assert [(row, s) for row, s in zip(found, score, strict=True) if row >= 0] == expected
    assert np.all(np.isneginf(score[found < 0]))
  assert progress[-1] == len(keys)
  assert progress == sorted(progress)


def test_a_tie_over_chunks_goes_to_the_first():
  a = Best(np.array([[2.0, 1.0]]), np.array([[7, 8]], np.uint64), np.array([[0, 1]]))
  b = Best(np.array([[2.0, 1.0]]), np.array([[9, 7]], np.uint64), np.array([[5, 6]]))
  merged = a.merged(b)
  assert merged.row_Qk.tolist() == [[0, 5]]
  again = merged.merged(Best(np.array([[2.0, 2.0]]), np.array([[9, 0]], np.uint64), np.array([[10, 11]])))
  assert again.row_Qk.tolist() == [[0, 5]]
  empty = Best.none(1, 2).merged(Best(np.array([[-np.inf, -np.inf]]), np.zeros((1, 2), np.uint64), np.full((1, 2), -1)))
  assert empty.row_Qk.tolist() == [[-1, -1]]


@pytest.fixture(scope='module')
def toy():
  return toy_bundle.make_toy()


@pytest.fixture(scope='module')
def items():
  names = sorted((toy_bundle.item_name(i) for i in range(60)), key=lambda name: id_key(name, 'string'))
  return pl.DataFrame({'item_key': id_keys(names, 'string'), 'item_id': names})


@pytest.fixture(scope='module')
def bundle(toy, items, tmp_path_factory):
  return toy.export(tmp_path_factory.mktemp('bundles') / 'bundle', storage='float32', catalogue=items)


@pytest.fixture(scope='module')
def documents():
  return list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(len(LENGTHS)), toy_bundle.LENGTH))


@pytest.fixture(scope='module')
def oracle(toy, bundle):
  return OracleScorer(toy, load_bundle(bundle))


@pytest.fixture(scope='module')
def scorer(bundle):
  return Scorer.load(bundle)


def users_file(path, documents):
  path.write_text(''.join(json.dumps(document) + '\n' for document in documents))
  return path


def results(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def check(found, oracle, document, names, top, exclude_seen=False):
  """The user's items are the best ones, best first, but for the order of scores closer than float32 tells apart."""
  request = oracle.parse(document)
  z, h = oracle.items(id_keys(names, 'string'))['target'], oracle.users([request])[0]
  scores = dict(zip(names, z.astype(np.float64) @ h.astype(np.float64), strict=True))
  barred = set(request.history.item.tolist()) if exclude_seen else set()
  allowed = [name for name in names if id_key(name, 'string') not in barred]
  given = [item['item_id'] for item in found['items']]
  assert len(given) == len(set(given)) == min(top, len(allowed))
  assert set(given) <= set(allowed)
  mine = [scores[name] for name in given]
  np.testing.assert_allclose([item['score'] for item in found['items']], mine, atol=1e-5)
  np.testing.assert_allclose(mine, sorted((scores[name] for name in allowed), reverse=True)[:top], atol=1e-5)


@pytest.mark.parametrize('exclude_seen', [False, True])
@pytest.mark.parametrize('top', [3, 80])
def test_the_bundle_s_catalogue_is_ranked(scorer, oracle, documents, items, tmp_path, top, exclude_seen):
  history, out = users_file(tmp_path / 'users.jsonl', documents), tmp_path / 'out.jsonl'
  assert recommend_file(scorer, history, top, None, exclude_seen, out) == len(LENGTHS)
  found = results(out)
  assert [result['request_id'] for result in found] == [document['request_id'] for document in documents]
  assert found[0]['items'] == []  # a user without events
  for result, document in zip(found[1:], documents[1:], strict=True):
    check(result, oracle, document, items['item_id'].to_list(), top, exclude_seen)


def test_another_catalogue_and_a_history_alone(scorer, oracle, documents, tmp_path):
  names = ['item/3', 'new thing', 'item/1', 'item/3']
  (tmp_path / 'items.csv').write_text('item_id\n' + '\n'.join(names))
  users = [{'history': document['history']} for document in documents[1:]]
  history = tmp_path / 'users.json'
  history.write_text(json.dumps(users, indent=2))
  recommend_file(scorer, history, 20, tmp_path / 'items.csv', False, tmp_path / 'out.jsonl')
  found = results(tmp_path / 'out.jsonl')
  assert [result['request_id'] for result in found] == [1, 2, 3, 4]
  for result in found:
    assert sorted(item['item_id'] for item in result['items']) == ['item/1', 'item/3', 'new thing']
  for result, document in zip(found, documents[1:], strict=True):
    check(result, oracle, document, names[:3], 20)


def test_passes_over_the_catalogue_give_the_same(scorer, documents, tmp_path, monkeypatch):
  history = users_file(tmp_path / 'users.jsonl', documents)
  recommend_file(scorer, history, 5, out=tmp_path / 'a.jsonl')
  monkeypatch.setattr(module, '_USERS', 2)
  recommend_file(scorer, history, 5, out=tmp_path / 'b.jsonl')
  for a, b in zip(results(tmp_path / 'a.jsonl'), results(tmp_path / 'b.jsonl'), strict=True):
    assert [i['item_id'] for i in a['items']] == [i['item_id'] for i in b['items']]


def test_bad_input_is_refused_in_one_line(scorer, documents, tmp_path):
  out, history = tmp_path / 'out.jsonl', tmp_path / 'users.jsonl'
  for text, message in (
    ('{"history": []}\n{"history": 5}\n', 'line 2: got history 5, expected a list'),
    ('{"history": []}\n{"history"\n', 'line 2: not valid JSON'),
    ('[{"history": []}, {"histroy": []}]', "element 2: got the field 'histroy'"),
    ('{"history"', 'line 1: not valid JSON'),
    ('7\n', 'line 1: got 7, expected a request'),
  ):
    history.write_text(text)
    with pytest.raises(UserError, match=message) as error:
      recommend_file(scorer, history, out=out)
    assert '\n' not in str(error.value)
    assert not out.exists()
  users_file(history, documents)
  for arguments, message in (
    ({'top': 0}, 'got --top 0, expected 1 to 10000'),
    ({'top': 10_001}, 'got --top 10001, expected 1 to 10000'),
    ({'catalogue': tmp_path / 'none.csv'}, 'does not exist'),
    ({'out': history}, 'holds the input'),
    ({'out': tmp_path / 'no' / 'out'}, 'cannot be written'),
  ):
    with pytest.raises(UserError, match=message):
      recommend_file(scorer, history, **{'out': out, **arguments})
  with pytest.raises(UserError, match='no such file'):
    recommend_file(scorer, tmp_path / 'nobody.jsonl', out=out)
  assert {path.name for path in tmp_path.iterdir()} == {'users.jsonl'}


def test_a_bundle_without_a_catalogue_says_so(toy, documents, tmp_path, monkeypatch):
  monkeypatch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {'context': b'c', 'crossing': b'x'})
  for sequence, message in (('pinfm', 'has no catalogue .*give --catalogue FILE'), ('none', 'ranker without PinFM')):
    path = toy_bundle.make_toy(sequence).export(tmp_path / sequence)
    from oracle_scorer import OpenedBundle

    from pinfm_jax.serve.manifest import Manifest

    with pytest.raises(UserError, match=message):
      module.catalogue_of(OpenedBundle(path, Manifest.read(path)), None)


def test_the_command(scorer, bundle, documents, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('pinfm_jax.serve.scorer.Scorer.load', lambda *_: scorer)
  history = users_file(tmp_path / 'users.jsonl', documents)
  assert main(['recommend', str(bundle), '--history', str(history), '--top', '2', '--exclude-seen']) == 0
  printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  out = tmp_path / 'out.jsonl'
  arguments = ['recommend', str(bundle), '--history', str(history), '--top', '2', '--exclude-seen', '--out', str(out)]
  assert main([*arguments, '--catalogue', str(bundle / CATALOGUE)]) == 0
  assert results(out) == printed
  assert f'{out}: recommendations for 5 users' in capsys.readouterr().out
