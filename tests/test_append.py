"""Appending a day equals preparing all days at once, keeps what is stored, and is whole or absent."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest

from pinfm_jax.cli import main
from pinfm_jax.data.append import append
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.data.preparation import features as features_module
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.errors import UserError

T0, DAY = 1_700_006_400_000, 86_400_000
SHOWN = {'labels': ('save', 'hide'), 'dense': ('price',), 'sparse': ('country',), 'embedding': ('vector',)}


def _events(seed: int, day: int, users=range(14), n=220) -> list[dict]:
  """A day's log with merges and duplicates; every day has names of its own."""
  rng = random.Random(seed)
  return [
    {
      'user_id': f'u{rng.choice(users)}',
      'timestamp': T0 + day * DAY + rng.randrange(200) * 1000,
      'item_id': rng.randrange(9 + 3 * day),
      'surface': rng.choice(['feed', 'search', f'a{day}']),
      'action': rng.choice(['click', 'hide', f'act{9 - day}']),
    }
    for _ in range(n)
  ]


def _impressions(seed: int, day: int, users=range(16), n=120) -> list[dict]:
  rng = random.Random(seed)
  rows = []
  for _ in range(n):
    request = rng.randrange(40)
    rows.append(
      {
        'request_id': f'd{day}r{request}',
        'user_id': f'u{users[request % len(users)]}',
        'timestamp': T0 + day * DAY + request * 5000 + rng.randrange(4) * 1000,
        'item_id': rng.randrange(12 + 3 * day),
        'surface': rng.choice(['feed', f'b{day}']),
        'save': rng.randrange(2),
        'hide': rng.randrange(2),
        'price': rng.choice([None, 1.5, -2.0]),
        'country': rng.choice([None, 'fr', f'c{5 - day}']),
        'vector': [rng.randrange(8) / 4 for _ in range(3)],
      }
    )
  return rows


def _write(path, rows):
  pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
  return path


class Days:
  """Three days of logs; of the last one there are events alone."""

  def __init__(self, folder):
    self.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    users = (range(14), range(8, 22), range(5, 30))
    self.rows = [_events(day, day, users[day]) for day in range(3)]
    self.events = [_write(folder / f'events{day}.parquet', rows) for day, rows in enumerate(self.rows)]
    shown = [_impressions(10 + day, day, users[day]) for day in range(2)]
    self.shown = [_write(folder / f'shown{day}.parquet', rows) for day, rows in enumerate(shown)]
    items = [{'item_id': i, 'created_at': T0 - i * DAY, 'content': [i / 4, -i / 8]} for i in range(20)]
    self.items = [_write(folder / 'items0.parquet', items[:12]), _write(folder / 'items1.parquet', items)]

  def appended(self, out, cap=16_000, **settings) -> PreparedDataset:
    first = PrepareConfig(
      (self.events[0],), out, impressions=(self.shown[0],), items=self.items[0], cap=cap, shards=2, **SHOWN, **settings
    )
    prepare(first)
    append(out, self.events[1], impressions=(self.shown[1],), items=self.items[1], shards=3)
    append(out, self.events[2])
    return PreparedDataset.open(out)

  def at_once(self, out, cap=16_000) -> PreparedDataset:
    items = _write(self.folder / 'items.parquet', _rows_of(self.items))
    prepare(PrepareConfig(tuple(self.events), out, impressions=tuple(self.shown), items=items, cap=cap, **SHOWN))
    return PreparedDataset.open(out)


def _rows_of(paths):
  return pl.concat(map(pl.read_parquet, paths)).unique('item_id', keep='first').sort('item_id').to_dicts()


def _named(codes, names):
  return [names[code] for code in codes.tolist()]


def _seen(dataset):
  """Everything a model sees, by names instead of rows and codes."""
  info, users = dataset.info, dataset.users['user_id'].to_list()
  histories = {}
  for user, history in zip(users, dataset.histories(), strict=True):
    actions = [frozenset(a for bit, a in enumerate(info.actions) if m >> bit & 1) for m in history.actions.tolist()]
    events = zip(history.timestamp.tolist(), history.item.tolist(), strict=True)
    histories[user] = list(zip(events, _named(history.surface, info.surfaces), actions, strict=True))
  (country,) = info.features.sparse
  values = (None, *country.values)
  requests = []
  for row, (name, user_row) in enumerate(dataset.requests.select('request_id', 'user_row').iter_rows()):
    request = dataset.request(row)
    assert request.user_row == user_row
    columns = (request.timestamp, request.item, request.created_at, request.labels, request.dense, request.embedding)
    named = (_named(request.surface, info.surfaces), _named(request.sparse[:, 0], values))
    content = [column.tobytes() for column in columns]
    requests.append((name, users[user_row], request.history_end, content, named))
  return histories, requests


@pytest.fixture(scope='module')
def days(tmp_path_factory):
  return Days(tmp_path_factory.mktemp('days') / 'logs')


@pytest.fixture(scope='module')
def grown(days):
  return days.appended(days.folder.parent / 'grown')


@pytest.fixture
def copy(grown, tmp_path):
  return shutil.copytree(grown.path, tmp_path / 'copy')


@pytest.mark.parametrize('cap', [16_000, 40, 7])
def test_appending_equals_preparing_at_once(days, tmp_path, cap):
  appended, whole = days.appended(tmp_path / 'appended', cap), days.at_once(tmp_path / 'whole', cap)
  (histories, requests), (expected, expected_requests) = _seen(appended), _seen(whole)
  assert histories == expected
  assert requests == expected_requests
  assert max(map(len, histories.values())) == min(cap, max(map(len, expected.values())))
  assert dict(appended.users.select('user_id', 'events').iter_rows()) == {u: len(h) for u, h in expected.items()}
  names = ['item_key', 'item_id', 'first_seen', 'created_at', 'content']
  assert appended.items.select(names).equals(whole.items.select(names))
  assert appended.info.time_range_ms == whole.info.time_range_ms
  assert appended.info.counts.items == whole.info.counts.items == appended.items.height
  assert appended.info.counts.users == whole.info.counts.users == appended.num_users
  assert appended.info.counts.requests == whole.info.counts.requests == appended.num_requests
  if cap == 16_000:
    assert appended.items['events'].equals(whole.items['events'])
    for kind in ('events', 'impressions'):
      assert getattr(appended.info.counts, kind) == getattr(whole.info.counts, kind)
  appended.verify()


def test_codes_and_rows_that_are_stored_stay(days, grown, tmp_path):
  prepare(PrepareConfig((days.events[0],), tmp_path / 'out', impressions=(days.shown[0],), **SHOWN))
  first = PreparedDataset.open(tmp_path / 'out')
  assert first.info.actions == ('act9', 'click', 'hide')
  assert grown.info.actions == ('act9', 'click', 'hide', 'act8', 'act7')
  assert grown.info.surfaces[: len(first.info.surfaces)] == first.info.surfaces
  assert grown.info.features.sparse[0].values == ('c5', 'fr', 'c4')
  assert grown.info.features.sparse[0].size == 4
  assert grown.users['user_id'][: first.num_users].equals(first.users['user_id'])
  for row in range(first.num_users):
    np.testing.assert_array_equal(grown.history(row).item[: len(first.history(row))], first.history(row).item)
  for row in range(first.num_requests):
    assert grown.request(row).history_end == first.request(row).history_end


def test_every_partition_is_accounted_for(days, grown):
  info = grown.info
  assert [part.directory for part in info.partitions] == ['', 'partition-00001', 'partition-00002']
  for number, part in enumerate(info.partitions):
    counts = part.counts.events
    assert counts.read == len(days.rows[number])
    times = [row['timestamp'] for row in days.rows[number]]
    assert part.time_range_ms[0] <= min(times) <= max(times) <= part.time_range_ms[1]
    stored = [file.records for file in info.shard_files('histories', number)]
    assert sum(stored) == part.counts.users
    assert (grown.path / part.directory / 'rejected.jsonl').read_text() == ''
  assert info.partitions[-1].checksum == info.checksum
  assert info.counts.events.kept == sum(part.counts.events.kept for part in info.partitions)
  assert json.loads((grown.path / 'dataset.json').read_text())['schema_version'] == 2


def test_a_reader_of_the_old_version_stays_valid_and_nothing_stored_changes(days, tmp_path):
  prepare(PrepareConfig((days.events[0],), tmp_path / 'out', impressions=(days.shown[0],), **SHOWN))
  old = PreparedDataset.open(tmp_path / 'out')
  before = _seen(old)
  files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir() if path.name != 'dataset.json'}
  append(tmp_path / 'out', days.events[1], impressions=days.shown[1])
  assert _seen(old) == before
  old.verify()
  assert all(path.read_bytes() == content for path, content in files.items())


def test_an_append_reads_no_stored_event(days, copy, monkeypatch):
  def fail(*_):
    raise AssertionError('a stored history was read')

  monkeypatch.setattr('pinfm_jax.data.partitions.decode_history', fail)
  append(copy, _write(copy.parent / 'next.parquet', _events(7, 5)))


class _KilledError(BaseException):
  pass


@pytest.mark.parametrize('where', ['pinfm_jax.data.append.build', 'pinfm_jax.data.append.os.replace'])
def test_a_killed_append_leaves_the_old_data_set(days, copy, monkeypatch, where):
  before = (copy / 'dataset.json').read_bytes()
  day = _write(copy.parent / 'next.parquet', _events(7, 5))

  def kill(*_):
    raise _KilledError

  with monkeypatch.context() as patch:
    patch.setattr(where, kill)
    with pytest.raises(_KilledError):
      append(copy, day)
  assert (copy / 'dataset.json').read_bytes() == before
  PreparedDataset.open(copy).verify()
  info = append(copy, day)
  assert len(info.partitions) == 4
  PreparedDataset.open(copy).verify()
  assert not list(copy.glob('*.partial*'))


def test_late_rows_are_malformed_with_the_reason(days, copy):
  rows = _events(7, 5, n=40)
  ends = DatasetInfo.read(copy / 'dataset.json').time_range_ms[1]
  rows[3]['timestamp'], rows[4]['timestamp'] = ends, T0
  rows[5]['timestamp'] = ends + 1
  day = _write(copy.parent / 'next.parquet', rows)
  with pytest.raises(UserError, match='2 of 40 rows of the events are malformed .* late: not after the end'):
    append(copy, day)
  info = append(copy, day, max_rejected_share=0.1)
  assert info.partitions[-1].counts.events.rejected == 2
  (reason,) = info.partitions[-1].counts.rejected_by_reason
  assert reason.startswith('late: ')
  lines = [json.loads(line) for line in (copy / 'partition-00003' / 'rejected.jsonl').read_text().splitlines()]
  assert [line['line'] for line in lines] == [4, 5]


def test_a_log_without_times_goes_on_counting(tmp_path):
  rng = random.Random(3)
  logs = [[{'user_id': rng.randrange(5 + day), 'item_id': rng.randrange(9)} for _ in range(60)] for day in range(2)]
  paths = [_write(tmp_path / f'{day}.parquet', rows) for day, rows in enumerate(logs)]
  prepare(PrepareConfig((paths[0],), tmp_path / 'grown', cap=11))
  append(tmp_path / 'grown', paths[1])
  prepare(PrepareConfig(tuple(paths), tmp_path / 'whole', cap=11))
  found, expected = (PreparedDataset.open(tmp_path / name) for name in ('grown', 'whole'))
  pairs = [dict(zip(d.users['user_id'].to_list(), d.histories(), strict=True)) for d in (found, expected)]
  assert pairs[0].keys() == pairs[1].keys()
  for user, history in pairs[0].items():
    np.testing.assert_array_equal(history.timestamp, pairs[1][user].timestamp)
    np.testing.assert_array_equal(history.item, pairs[1][user].item)
  with pytest.raises(UserError, match='has an order but no times'):
    append(tmp_path / 'grown', _write(tmp_path / 'timed.parquet', _events(0, 0)))


def test_a_full_vocabulary_counts_new_values_as_unknown(days, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(features_module, 'VOCABULARY_LIMIT', 2)
  dataset = days.appended(tmp_path / 'out')
  assert dataset.info.features.sparse[0].values == ('c5', 'fr')
  assert 'country: 1 or more new values count as unknown' in capsys.readouterr().err
  codes = Counter(int(code) for request in dataset.all_requests() for code in request.sparse[:, 0])
  assert set(codes) == {0, 1, 2}


def test_a_hashed_feature_stays_hashed(days, tmp_path, monkeypatch):
  monkeypatch.setattr(features_module, 'VOCABULARY_LIMIT', 1)
  dataset = days.appended(tmp_path / 'out')
  assert dataset.info.features.sparse[0].kind == 'hashed'
  whole = days.at_once(tmp_path / 'whole')
  for row in range(whole.num_requests):
    np.testing.assert_array_equal(dataset.request(row).sparse, whole.request(row).sparse)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'cap': 5}, r'got cap 5, but .* has 16000'),
    ({'item_id_type': 'string'}, "got item_id_type 'string'"),
    ({'labels': ('save',)}, r"got labels \('save',\)"),
    ({'overwrite': True}, 'got overwrite while appending'),
    ({'actions': ('click', 'hide')}, 'expected them to begin with those of'),
    ({'time_unit': 'order'}, "has times and .* has time unit 'order'"),
    ({'columns': {'user': 'user_id'}}, "did you mean 'user_id'"),
    ({'impressions': 'SHOWN', 'reference_columns': {'save': 'price'}}, 'have no true probabilities; leave out'),
    ({'impressions': 'SHOWN', 'dense': ('cost',)}, r"got dense \('cost',\), but .* has \('price',\)"),
  ],
)
def test_what_does_not_fit_is_one_clear_line(days, copy, settings, message):
  before = (copy / 'dataset.json').read_bytes()
  day = _write(copy.parent / 'next.parquet', _events(7, 5))
  shown = _impressions(8, 5)
  for row in shown:
    row['price'] = 0.5
  if 'impressions' in settings:
    settings = settings | {'impressions': _write(copy.parent / 'shown.parquet', shown)}
  with pytest.raises(UserError, match=message) as caught:
    append(copy, day, **settings)
  assert '\n' not in str(caught.value)
  assert (copy / 'dataset.json').read_bytes() == before


def test_other_inputs_that_do_not_fit(days, copy, tmp_path):
  with pytest.raises(UserError, match='is not a prepared data set, so nothing can be appended'):
    append(tmp_path / 'nothing', days.events[0])
  prepare(PrepareConfig((days.events[0],), tmp_path / 'events'))
  with pytest.raises(UserError, match='prepared without impressions'):
    append(tmp_path / 'events', days.events[1], impressions=days.shown[1])
  items = _write(tmp_path / 'items.parquet', [{'item_id': i, 'content': [0.5, 1.5, 2.5]} for i in range(30)])
  day = _write(tmp_path / 'next.parquet', _events(7, 5))
  with pytest.raises(UserError, match='contents of the width 3, .* has the width 2'):
    append(copy, day, items=items)
  wide = [{**row, 'vector': [1.0]} for row in _impressions(8, 5)]
  with pytest.raises(UserError, match='vector has not the width 3'):
    append(copy, day, impressions=_write(tmp_path / 'wide.parquet', wide))


def test_two_appends_at_a_time_are_refused(days, copy, monkeypatch):
  def second(*_):
    append(copy, days.events[1])

  monkeypatch.setattr('pinfm_jax.data.append.build', second)
  with pytest.raises(UserError, match='another append is writing'):
    append(copy, days.events[1])


def test_the_command_appends(days, copy, capsys):
  day = _write(copy.parent / 'next.parquet', _events(7, 5))
  assert main(['prepare', str(day), '--append', str(copy)]) == 0
  assert 'events: 220 read' in capsys.readouterr().out
  assert main(['prepare', str(day), '--append', str(copy), '--source', 'globo']) == 2
  assert len(DatasetInfo.read(copy / 'dataset.json').partitions) == 4


def test_a_data_set_written_before_partitions_is_read_and_appended_to(days, tmp_path):
  out = tmp_path / 'out'
  prepare(PrepareConfig((days.events[0],), out))
  document = json.loads((out / 'dataset.json').read_text())
  del document['partitions']
  (out / 'dataset.json').write_text(json.dumps(document))
  old = PreparedDataset.open(out)
  assert old.info.partitions[0].checksum == old.info.checksum
  append(out, days.events[1])
  assert PreparedDataset.open(out).num_users > old.num_users
