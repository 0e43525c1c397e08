"""Reading a prepared data set: random access, threads, pickling, and damage."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.errors import UserError

NUM_USERS = 50


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('dataset')
  rng = np.random.default_rng(0)
  users = np.concatenate([np.arange(NUM_USERS), rng.integers(0, NUM_USERS, 1950)])
  times = 1_700_000_000_000 + rng.permutation(2000) * 1000
  items = rng.integers(0, 30, 2000)
  log = pl.DataFrame({'user_id': users, 'timestamp': times, 'item_id': items})
  log.write_parquet(root / 'log.parquet')
  shown = log.with_columns(request_id=pl.Series(rng.integers(0, 300, 2000)), click=pl.Series(items % 2))
  shown.write_parquet(root / 'shown.parquet')
  config = PrepareConfig(
    (root / 'log.parquet',), root / 'data', impressions=(root / 'shown.parquet',), labels=('click',), shards=3
  )
  prepare(config)
  return root / 'data'


@pytest.fixture
def copy(folder, tmp_path) -> Path:
  for file in folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  return tmp_path


def test_rows_agree_with_the_tables(folder):
  dataset = PreparedDataset.open(folder)
  assert dataset.num_users == len(dataset.users) == NUM_USERS
  assert dataset.num_requests == len(dataset.requests) == dataset.info.counts.requests
  assert [len(dataset.history(row)) for row in range(NUM_USERS)] == dataset.users['events'].to_list()
  for row, history in enumerate(dataset.histories()):
    np.testing.assert_array_equal(history.item, dataset.history(row).item)
    assert np.all(np.diff(history.timestamp) > 0)
  requests = list(dataset.all_requests())
  assert [len(request) for request in requests] == dataset.requests['candidates'].to_list()
  assert [request.user_row for request in requests] == dataset.requests['user_row'].to_list()
  assert [request.timestamp[0] for request in requests] == dataset.requests['timestamp'].to_list()
  assert dataset.requests['timestamp'].is_sorted()
  assert dataset.users.schema['user_key'] == pl.UInt64
  assert 'users' in repr(dataset)


def test_rows_outside(folder):
  dataset = PreparedDataset.open(folder)
  for row in (-1, NUM_USERS):
    with pytest.raises(IndexError, match='outside'):
      dataset.history(row)


def test_threads_and_pickling(folder):
  dataset = pickle.loads(pickle.dumps(PreparedDataset.open(folder)))
  expected = [history.timestamp.tolist() for history in dataset.histories()]
  rows = np.random.default_rng(1).integers(0, NUM_USERS, 2000).tolist()
  fresh = pickle.loads(pickle.dumps(dataset))
  with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda row: fresh.history(row).timestamp.tolist(), rows))
  assert found == [expected[row] for row in rows]


def test_description_survives_its_file(folder, tmp_path):
  info = PreparedDataset.open(folder).info
  info.write(tmp_path / 'dataset.json')
  assert DatasetInfo.read(tmp_path / 'dataset.json') == info


def test_truncated_and_missing_files(copy):
  for file in sorted(copy.glob('*.array_record')) + sorted(copy.glob('*.parquet')):
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f'{file.name} is truncated'):
      PreparedDataset.open(copy)
    file.unlink()
    with pytest.raises(UserError, match=f'{file.name} is missing'):
      PreparedDataset.open(copy)
    file.write_bytes(data)
  PreparedDataset.open(copy).verify()


def test_damage_of_the_same_size(copy):
  shard = copy / 'histories-00001-of-00003.array_record'
  data = bytearray(shard.read_bytes())
  places = [i for i, byte in enumerate(data) if byte]
  for i in places[100:400]:
    data[i] ^= 0xFF
  shard.write_bytes(data)
  with pytest.raises(UserError, match='changed or damaged'):
    PreparedDataset.open(copy).verify()
  with pytest.raises(UserError, match='damaged'):
    list(PreparedDataset.open(copy).histories())


def test_another_record_count(copy):
  path = copy / 'dataset.json'
  document = json.loads(path.read_text())
  document['shards'][0]['records'] += 1
  path.write_text(json.dumps(document))
  with pytest.raises(UserError, match='records, expected'):
    PreparedDataset.open(copy)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'format': 'other'}, 'not the description'),
    ({'schema_version': 3}, 'schema version 3'),
    ({'counts': {}}, 'lacks or misspells'),
    ({'extra': 1}, 'lacks or misspells'),
  ],
)
def test_other_descriptions(copy, change, message):
  path = copy / 'dataset.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=message):
    PreparedDataset.open(copy)


def test_no_data_set(tmp_path):
  with pytest.raises(UserError, match='pinfm prepare'):
    PreparedDataset.open(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='no dataset.json'):
    PreparedDataset.open(tmp_path)
  (tmp_path / 'dataset.json').write_text('{')
  with pytest.raises(UserError, match='not valid JSON'):
    PreparedDataset.open(tmp_path)


def test_requests_of_a_data_set_without_impressions(tmp_path):
  (tmp_path / 'log.csv').write_text('user_id,timestamp,item_id\n1,1700000000,2\n')
  prepare(PrepareConfig((tmp_path / 'log.csv',), tmp_path / 'out', shards=4))
  dataset = PreparedDataset.open(tmp_path / 'out')
  assert (dataset.num_users, dataset.num_requests) == (1, 0)
  assert [len(history) for history in dataset.histories()] == [1]
  with pytest.raises(UserError, match='--impressions'):
    _ = dataset.requests
