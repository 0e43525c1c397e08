"""Impressions become requests whose candidates, labels, features and history ends match plain Python."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pinfm_jax.data.dataset import PreparedDataset, Request
from pinfm_jax.data.events import id_key
from pinfm_jax.data.info import SparseFeature
from pinfm_jax.data.preparation import features as features_module
from pinfm_jax.data.preparation.features import encode_sparse
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.errors import UserError

T0 = 1_700_000_000_000
DAY = 86_400_000


def _log(seed: int, n=300) -> list[dict]:
  rng = random.Random(seed)
  rows = [(rng.randrange(9), T0 + rng.randrange(200) * 1000, rng.randrange(10)) for _ in range(n)]
  return [{'user_id': u, 'timestamp': t, 'item_id': i} for u, t, i in dict.fromkeys(rows)]


def _shown(seed: int, n=300) -> list[dict]:
  rng = random.Random(seed)
  rows = []
  for _ in range(n):
    request = rng.randrange(60)
    rows.append(
      {
        'request_id': f'r{request}',
        'user_id': request % 12,  # users 9, 10 and 11 have no events
        'timestamp': T0 + request * 3000 + rng.randrange(5) * 1000,
        'item_id': rng.randrange(14),
        'surface': rng.choice(['feed', 'related']),
        'item_created_at': rng.choice([None, T0 - rng.randrange(1000) * 1000]),
        'save': rng.randrange(2),
        'hide': rng.randrange(2),
        'price': rng.choice([None, 1.5, -2.0]),
        'country': rng.choice([None, 'de', 'fr', 'jp']),
        'vector': [rng.randrange(8) / 4 for _ in range(3)],
        'p_save': rng.randrange(5) / 4,
      }
    )
  return rows


def _write(path: Path, rows: list[dict]) -> Path:
  frame = pl.DataFrame(rows, infer_schema_length=None)
  if path.suffix == '.parquet':
    frame.write_parquet(path)
  elif path.suffix == '.jsonl':
    frame.write_ndjson(path)
  else:
    lists = [pl.col(n).cast(pl.List(pl.String)).list.join('|') for n, t in frame.schema.items() if t == pl.List]
    frame.with_columns(lists).write_csv(path)
  return path


SETTINGS = {
  'labels': ('save', 'hide'),
  'dense': ('price',),
  'sparse': ('country',),
  'embedding': ('vector',),
  'reference_columns': {'save': 'p_save'},
}


def _prepare(log: Path, shown: Path, out: Path, **settings) -> PreparedDataset:
  prepare(PrepareConfig((log,), out, impressions=(shown,), **settings))
  return PreparedDataset.open(out)


def _oracle(log: list[dict], shown: list[dict], cap: int) -> dict:
  """Requests by (user, request id), as the candidates' values; plain Python."""
  times = defaultdict(list)
  for row in log:
    times[row['user_id']].append(row['timestamp'])
  seen = {i: min(r['timestamp'] for r in log + shown if r['item_id'] == i) for i in range(14)}
  grouped = defaultdict(list)
  for i, row in enumerate(shown):
    grouped[row['user_id'], row['request_id']].append((row['timestamp'], i, row))
  requests = {}
  for (user, request), rows in grouped.items():
    candidates = {}
    for _, _, row in sorted(rows, key=lambda r: r[:2]):
      first = candidates.setdefault(row['item_id'], dict(row))
      first['save'] |= row['save']
      first['hide'] |= row['hide']
    begin = min(row[0] for row in rows)
    for item, row in candidates.items():  # without a stated time, the item's first event or impression before
      if row['item_created_at'] is None and seen[item] < begin:
        row['item_created_at'] = seen[item]
    stored = sorted(times[user])[-cap:]
    start = min(row[0] for row in rows)
    end = sum(time < start for time in stored)
    requests[user, request] = (end, (start, min(r[1] for r in rows if r[0] == start)), list(candidates.values()))
  return requests


def _assert_candidates(request: Request, expected: list[dict], dataset: PreparedDataset):
  item_ids = dict(dataset.items.select('item_key', 'item_id').iter_rows())
  country = dataset.info.features.sparse[0]
  assert [item_ids[item] for item in request.item.tolist()] == [row['item_id'] for row in expected]
  assert request.timestamp.tolist() == [row['timestamp'] for row in expected]
  created = [-1 if row['item_created_at'] is None else row['item_created_at'] for row in expected]
  assert request.created_at.tolist() == created
  assert [dataset.info.surfaces[code] for code in request.surface] == [row['surface'] for row in expected]
  np.testing.assert_array_equal(request.labels, [[row['save'], row['hide']] for row in expected])
  dense = [math.nan if row['price'] is None else row['price'] for row in expected]
  np.testing.assert_array_equal(request.dense[:, 0], np.array(dense, np.float32))
  assert request.sparse[:, 0].tolist() == [encode_sparse(country, row['country']) for row in expected]
  np.testing.assert_array_equal(request.embedding, np.array([row['vector'] for row in expected], np.float32))
  truth = np.array([[row['p_save'], np.nan] for row in expected], np.float32)
  np.testing.assert_array_equal(request.reference, truth)


@pytest.mark.parametrize('cap', [16_000, 4])
@pytest.mark.parametrize('kind', ['parquet', 'csv', 'jsonl'])
def test_requests_match_plain_python(tmp_path, kind, cap):
  log, shown = _log(0), _shown(1)
  files = _write(tmp_path / 'log.csv', log), _write(tmp_path / f'shown.{kind}', shown)
  dataset = _prepare(*files, tmp_path / 'out', cap=cap, partitions=5, shards=2, **SETTINGS)
  expected = _oracle(log, shown, cap)
  users = dataset.users['user_id'].to_list()
  order = []
  for row, (request_id, user_row) in enumerate(dataset.requests.select('request_id', 'user_row').iter_rows()):
    request = dataset.request(row)
    end, start, candidates = expected.pop((users[user_row], request_id))
    assert (request.user_row, request.history_end) == (user_row, end)
    _assert_candidates(request, candidates, dataset)
    order.append(start)
  assert not expected
  assert order == sorted(order)
  counts = dataset.info.counts.impressions
  assert counts.read == len(shown) == counts.kept + counts.merged + counts.duplicates
  assert counts.kept == dataset.requests['candidates'].sum()
  assert counts.merged
  assert {user: len(dataset.history(row)) for row, user in enumerate(users) if user >= 9} == {9: 0, 10: 0, 11: 0}
  assert dataset.info.surfaces == ('feed', 'none', 'related')
  unseen = dataset.items.filter(pl.col('item_id') >= 10)
  assert unseen['events'].to_list() == [0] * 4
  first = {i: min(r['timestamp'] for r in shown if r['item_id'] == i) for i in range(10, 14)}
  assert dict(unseen.select('item_id', 'first_seen').iter_rows()) == first


def test_same_bytes_from_every_format_and_partition_count(tmp_path):
  log = _write(tmp_path / 'log.csv', _log(2))
  checksums = set()
  for kind, partitions in (('parquet', 1), ('csv', 7), ('jsonl', None)):
    shown = _write(tmp_path / f'shown.{kind}', _shown(3))
    dataset = _prepare(log, shown, tmp_path / kind, partitions=partitions, **SETTINGS)
    checksums.add((dataset.info.checksum, dataset.info.features))
  assert len(checksums) == 1


def test_duplicates_and_merges_are_counted(tmp_path):
  log = _write(tmp_path / 'log.csv', _log(4))
  row = _shown(5, 1)[0]
  rows = [row, row, {**row, 'timestamp': row['timestamp'] + 1, 'price': 9.0}, {**row, 'item_id': 99}]
  dataset = _prepare(log, _write(tmp_path / 'shown.parquet', rows), tmp_path / 'out', **SETTINGS)
  counts = dataset.info.counts.impressions
  assert (counts.read, counts.kept, counts.merged, counts.duplicates) == (4, 2, 1, 1)
  assert dataset.request(0).timestamp.tolist() == [row['timestamp']] * 2


def test_requests_by_user_and_day(tmp_path):
  log = _write(tmp_path / 'log.csv', _log(6))
  midnight = T0 // DAY * DAY + DAY
  shown = [{'user_id': u, 'timestamp': midnight + d, 'item_id': 1, 'save': 1} for u in (1, 2) for d in (-1, 0, 5)]
  shown = _write(tmp_path / 'shown.csv', shown)
  dataset = _prepare(log, shown, tmp_path / 'out', request_by='user_day', labels=('save',))
  assert dataset.requests.select('request_id', 'candidates').rows() == [
    ('1:2023-11-14', 1), ('2:2023-11-14', 1), ('1:2023-11-15', 1), ('2:2023-11-15', 1)
  ]  # fmt: skip
  assert dataset.info.counts.impressions.merged == 2


def test_integer_request_ids(tmp_path):
  shown = [{'request_id': r, 'user_id': 1, 'timestamp': T0 - r, 'item_id': 1} for r in (-5, 7)]
  dataset = _prepare(_write(tmp_path / 'log.csv', _log(7)), _write(tmp_path / 'shown.csv', shown), tmp_path / 'out')
  assert dataset.requests['request_id'].to_list() == [7, -5]
  request = dataset.request(0)
  assert request.labels.shape == (1, 0)
  assert request.reference is None
  assert request.created_at.tolist() == [-1]


def test_positions_are_not_compared_with_times(tmp_path):
  log = tmp_path / 'log.csv'
  log.write_text('user_id,item_id,timestamp\n1,5,0\n1,6,1\n1,5,2\n')
  shown = _write(tmp_path / 's.csv', [{'request_id': 1, 'user_id': 1, 'timestamp': T0, 'item_id': 5}])
  with pytest.raises(UserError, match='no times'):
    _prepare(log, shown, tmp_path / 'out', time_unit='order')
  log.write_text('user_id,item_id\n1,5\n1,6\n1,5\n')
  with pytest.raises(UserError, match='no times'):
    _prepare(log, shown, tmp_path / 'out')
  shown = _write(tmp_path / 'o.csv', [{'request_id': 1, 'user_id': 1, 'timestamp': 2, 'item_id': 5}])
  dataset = _prepare(log, shown, tmp_path / 'out', impression_time_unit='order')
  assert dataset.request(0).history_end == 2
  assert (dataset.info.time_known.histories, dataset.info.time_known.impressions) == (False, False)


def test_nan_in_a_dense_feature_is_missing(tmp_path):
  log, shown = _write(tmp_path / 'log.csv', _log(17)), pl.DataFrame(_shown(18, 6)).drop('price')
  for kind, prices in (('parquet', [math.nan, None]), ('csv', ['nan', ''])):
    path = tmp_path / f'nan.{kind}'
    frame = shown.drop('vector').with_columns(price=pl.Series(prices * 3))
    getattr(frame, f'write_{kind}')(path)
    dataset = _prepare(log, path, tmp_path / kind, dense=('price',))
    assert dataset.info.counts.impressions.rejected == 0
    assert all(np.isnan(request.dense).all() for request in dataset.all_requests())


def test_impression_files_agree_on_the_time_unit(tmp_path):
  log = _write(tmp_path / 'log.csv', _log(19))
  row = {'request_id': 1, 'user_id': 1, 'item_id': 1, 'item_created_at': None}
  files = [_write(tmp_path / f'{n}.csv', [{**row, 'timestamp': t}]) for n, t in (('a', T0), ('b', T0 // 1000))]
  with pytest.raises(UserError, match=r'looks like s in .*b\.csv but like ms in .*a\.csv'):
    prepare(PrepareConfig((log,), tmp_path / 'out', impressions=tuple(files)))
  created = [None, T0 // 1000 - 5, T0]
  rows = [{**row, 'timestamp': T0, 'item_id': i, 'item_created_at': c} for i, c in enumerate(created)]
  dataset = _prepare(log, _write(tmp_path / 'c.csv', rows), tmp_path / 'out', max_rejected_share=0.5)
  (reason,) = dataset.info.counts.rejected_by_reason
  assert reason.startswith('item_created_at is too')


def test_late_keys_of_json_impressions_are_read(tmp_path):
  rows = [{'request_id': 1, 'user_id': 1, 'timestamp': T0, 'item_id': i} for i in range(1001)]
  rows[-1] |= {'surface': 'feed', 'item_created_at': T0 - 7}
  (tmp_path / 's.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  request = _prepare(_write(tmp_path / 'log.csv', _log(20)), tmp_path / 's.jsonl', tmp_path / 'out').request(0)
  assert (request.created_at[0], request.created_at[-1]) == (-1, T0 - 7)
  assert len(set(request.surface.tolist())) == 2


def test_features_of_item_and_user_files(tmp_path):
  log, shown = _log(8), _shown(9)
  for row in shown:
    del row['price'], row['country'], row['vector'], row['item_created_at']
  items = [
    {'item_id': i, 'made': T0 - i, 'price': i / 2, 'vector': [float(i), 0.0, 1.0], 'content': [0.5, float(i)]}
    for i in range(5)
  ]
  items.append({**items[0], 'price': 99.0})
  people = [{'user_id': u, 'country': 'de' if u < 3 else 'fr'} for u in range(6)]
  dataset = _prepare(
    _write(tmp_path / 'log.csv', log),
    _write(tmp_path / 'shown.parquet', shown),
    tmp_path / 'out',
    items=_write(tmp_path / 'items.jsonl', items),
    item_columns={'created_at': 'made'},
    users=_write(tmp_path / 'users.csv', people),
    **SETTINGS,
  )
  assert dataset.info.content_width == 2
  stored = dataset.items.sort('item_id')
  assert stored['created_at'].to_list() == [T0 - i for i in range(5)] + [None] * 9
  assert stored['content'].to_list() == [[0.5, i] for i in range(5)] + [None] * 9
  users = dataset.users['user_id'].to_list()
  seen = {i: min(row['timestamp'] for row in log + shown if row['item_id'] == i) for i in range(14)}
  for request in dataset.all_requests():
    user = users[request.user_row]
    code = 0 if user >= 6 else encode_sparse(dataset.info.features.sparse[0], 'de' if user < 3 else 'fr')
    assert set(request.sparse[:, 0].tolist()) == {code}
    for item, created, dense, vector in zip(
      request.item.tolist(), request.created_at, request.dense[:, 0], request.embedding, strict=True
    ):
      known = item < 5
      first = seen[item] if seen[item] < request.timestamp.min() else -1
      assert created == (T0 - item if known else first)
      np.testing.assert_array_equal(dense, np.float32(item / 2 if known else np.nan))
      assert vector.tolist() == ([item, 0, 1] if known else [0, 0, 0])


def test_sparse_values_beyond_the_vocabulary_are_hashed(tmp_path, monkeypatch):
  monkeypatch.setattr(features_module, 'VOCABULARY_LIMIT', 2)
  dataset = _prepare(
    _write(tmp_path / 'log.csv', _log(10)), _write(tmp_path / 'shown.parquet', _shown(11)), tmp_path / 'out', **SETTINGS
  )
  feature = dataset.info.features.sparse[0]
  assert (feature.kind, feature.size, feature.values) == ('hashed', features_module.HASH_BUCKETS, None)
  found = {int(code) for request in dataset.all_requests() for code in request.sparse[:, 0]}
  assert found == {encode_sparse(feature, value) for value in (None, 'de', 'fr', 'jp')}


def test_encode_sparse():
  feature = SparseFeature('f', 'vocabulary', 5, ('1.5', '3', 'é', 'true'))
  feature = SparseFeature('f', 'vocabulary', 5, tuple(sorted(feature.values)))
  values = {text: place + 1 for place, text in enumerate(feature.values)}
  assert [encode_sparse(feature, v) for v in (3, '3', True, 1.5, 'é')] == [
    values['3'], values['3'], values['true'], values['1.5'], values['é']
  ]  # fmt: skip
  assert [encode_sparse(feature, v) for v in (None, '', math.nan, 'other')] == [0] * 4
  hashed = SparseFeature('f', 'hashed', 100)
  codes = {encode_sparse(hashed, i) for i in range(2000)}
  assert codes == set(range(1, 100))
  assert encode_sparse(hashed, 'a') == 1 + id_key('a', 'string') % 99


def test_column_and_scalar_encodings_agree(tmp_path):
  """A typed column is encoded as serving encodes the same Python value."""
  values = [3, 10, None, -1]
  floats = [1.0, 2.5, None, 1e20]
  flags = [True, False, None, True]
  shown = pl.DataFrame({'a': values, 'b': floats, 'c': flags}).with_columns(
    request_id=1, user_id=1, timestamp=T0, item_id=pl.int_range(4)
  )
  shown.write_parquet(tmp_path / 'shown.parquet')
  log = _write(tmp_path / 'log.csv', _log(12))
  dataset = _prepare(log, tmp_path / 'shown.parquet', tmp_path / 'out', sparse=('a', 'b', 'c'))
  found = dataset.request(0).sparse
  for column, given in enumerate((values, floats, flags)):
    assert found[:, column].tolist() == [encode_sparse(dataset.info.features.sparse[column], v) for v in given]
    assert np.count_nonzero(found[:, column]) == 3


BAD = [
  ({'request_id': None}, 'missing request_id'),
  ({'timestamp': -5}, 'negative timestamp'),
  ({'save': 2}, 'save is neither 0 nor 1'),
  ({'hide': None}, 'hide is neither 0 nor 1'),
  ({'price': 'cheap'}, 'price is not a number'),
  ({'price': 'inf'}, 'infinite price'),
  ({'price': '1e39'}, 'infinite price'),
  ({'vector': '1|2'}, 'vector has not the width 3'),
  ({'vector': '1|2|x'}, 'vector holds a missing or infinite number'),
  ({'vector': '1|2|inf'}, 'vector holds a missing or infinite number'),
  ({'vector': '1|2|nan'}, 'vector holds a missing or infinite number'),
  ({'p_save': 1.5}, 'the probability of save is no probability'),
  ({'p_save': None}, 'the probability of save is no probability'),
  ({'item_created_at': -7}, 'negative item_created_at'),
]


def test_malformed_impressions(tmp_path):
  good = [{**row, 'vector': '|'.join(map(str, row['vector']))} for row in _shown(13, 100)]
  rows = good + [{**good[0], **change} for change, _ in BAD]
  text = [{name: None if value is None else str(value) for name, value in row.items()} for row in rows]
  shown = _write(tmp_path / 'shown.csv', text)
  log = _write(tmp_path / 'log.csv', _log(14))
  dataset = _prepare(log, shown, tmp_path / 'out', max_rejected_share=0.2, **SETTINGS)
  rejected = [json.loads(line) for line in (tmp_path / 'out' / 'rejected.jsonl').read_text().splitlines()]
  assert [(r['line'], r['reason']) for r in rejected] == [(i + 102, reason) for i, (_, reason) in enumerate(BAD)]
  counts = dataset.info.counts.impressions
  assert (counts.read, counts.rejected) == (len(rows), len(BAD))
  with pytest.raises(UserError, match='of the impressions are malformed'):
    _prepare(log, shown, tmp_path / 'other', **SETTINGS)
  assert (tmp_path / 'other.rejected.jsonl').exists()
  assert not (tmp_path / 'other').exists()


def test_bad_settings(tmp_path):
  log = _write(tmp_path / 'log.csv', _log(15))
  shown = _write(tmp_path / 'shown.parquet', _shown(16))
  items = _write(tmp_path / 'items.csv', [{'item_id': 1, 'colour': 'red'}])
  cases = [
    ({'labels': ('saved',)}, "did you mean 'save'"),
    ({'labels': tuple(f'l{i}' for i in range(33))}, 'at most 32'),
    ({'sparse': ('color',), 'items': items}, "did you mean 'colour'"),
    ({'dense': ('price',), 'sparse': ('price',)}, 'listed twice'),
    ({'request_by': 'session'}, 'expected one of'),
    ({'request_by': 'user_day', 'impression_time_unit': 'order'}, 'needs times'),
    ({'reference_columns': {'save': 'p_save'}}, 'not among the labels'),
    ({'embedding': ('request_id',)}, 'request_id holds a missing or infinite number'),
    ({'impression_columns': {'request': 'r'}}, "did you mean 'request_id'"),
  ]
  for settings, message in cases:
    with pytest.raises(UserError) as caught:
      _prepare(log, shown, tmp_path / 'out', **settings)
    assert message in str(caught.value), settings
    assert '\n' not in str(caught.value)
