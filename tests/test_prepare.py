"""Event logs of every kind become the same data set, and malformed rows are told apart."""

import gzip
import json
import random
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.events import id_key
from pinfm_jax.data.preparation import assemble
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.errors import UserError

T0 = 1_700_000_000_000
ACTIONS = ('click', 'hide', 'save')


def _rows(seed: int, users=12, n=400) -> list[dict]:
  """A random log with ties, merges and exact duplicates; times in ms."""
  rng = random.Random(seed)
  return [
    {
      'user_id': rng.randrange(users) - 3,
      'timestamp': T0 + rng.randrange(25) * 1000,
      'item_id': rng.randrange(6),
      'surface': rng.choice(['feed', 'search']),
      'action': rng.choice(ACTIONS),
    }
    for _ in range(n)
  ]


def _oracle(rows: list[dict], cap: int) -> tuple[dict, dict]:
  """Histories by user id as (time, item, surface, action set), and the fate of the rows, in plain Python."""
  groups, order, fate = defaultdict(set), {}, defaultdict(int)
  for i, row in enumerate(rows):
    key = (row['user_id'], row['timestamp'], row['item_id'], row['surface'])
    if key in groups:
      fate['duplicates' if row['action'] in groups[key] else 'merged'] += 1
    groups[key].add(row['action'])
    order.setdefault(key, i)
  histories = defaultdict(list)
  for key in sorted(groups, key=lambda k: (k[1], order[k])):
    histories[key[0]].append((*key[1:], frozenset(groups[key])))
  fate['cut'] = sum(max(0, len(events) - cap) for events in histories.values())
  kept = {user: events[-cap:] for user, events in histories.items()}
  return kept, {**fate, 'kept': sum(map(len, kept.values())), 'read': len(rows)}


def _histories(dataset: PreparedDataset) -> dict:
  """What a data set holds, in the oracle's form."""
  item_ids = dict(dataset.items.select('item_key', 'item_id').iter_rows())
  info, result = dataset.info, {}
  for user, history in zip(dataset.users['user_id'].to_list(), dataset.histories(), strict=True):
    result[user] = [
      (t, item_ids[item], info.surfaces[s], frozenset(a for bit, a in enumerate(info.actions) if mask >> bit & 1))
      for t, item, s, mask in zip(
        history.timestamp.tolist(),
        history.item.tolist(),
        history.surface.tolist(),
        history.actions.tolist(),
        strict=True,
      )
    ]
  return result


def _csv(path: Path, rows: list[dict], header: list[str] | None = None) -> Path:
  header = header or list(rows[0])
  lines = [','.join(header)] + [','.join(str(row[name]) for name in header) for row in rows]
  path.write_text('\n'.join(lines) + '\n')
  return path


def _prepare(log: Path | tuple, out: Path, **settings) -> PreparedDataset:
  prepare(PrepareConfig(logs=log if isinstance(log, tuple) else (log,), out=out, **settings))
  return PreparedDataset.open(out)


def _rejected(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / 'rejected.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(('seed', 'cap'), [(0, 16_000), (1, 5), (2, 1)])
def test_random_log_matches_plain_python(tmp_path, seed, cap):
  rows = _rows(seed)
  dataset = _prepare(_csv(tmp_path / 'log.csv', rows), tmp_path / 'out', cap=cap, shards=3)
  histories, fate = _oracle(rows, cap)
  assert _histories(dataset) == histories
  counts = dataset.info.counts.events
  assert {name: getattr(counts, name) for name in fate} == fate
  assert counts.merged
  assert counts.duplicates
  assert counts.read == counts.kept + counts.rejected + counts.merged + counts.duplicates + counts.cut
  seen = {item: min(r['timestamp'] for r in rows if r['item_id'] == item) for item in {r['item_id'] for r in rows}}
  assert dict(dataset.items.select('item_id', 'first_seen').iter_rows()) == seen
  stored = defaultdict(int)
  for events in histories.values():
    for event in events:
      stored[event[1]] += 1
  assert dict(dataset.items.filter(pl.col('events') > 0).select('item_id', 'events').iter_rows()) == stored
  assert dataset.users['events'].to_list() == [len(histories[user]) for user in dataset.users['user_id'].to_list()]
  assert dataset.items['item_key'].is_sorted()
  dataset.verify()


def _iso(ms: int, style: int) -> str:
  moment = datetime.fromtimestamp(ms / 1000, UTC)
  return [moment.isoformat(), moment.strftime('%Y-%m-%d %H:%M:%S'), moment.strftime('%Y-%m-%dT%H:%M:%SZ')][style % 3]


def _variants(tmp_path: Path, rows: list[dict]) -> dict[str, tuple[Path, dict]]:
  frame = pl.DataFrame(rows)
  made = {'csv': (_csv(tmp_path / 'a.csv', rows), {})}
  made['tsv'] = (tmp_path / 'a.tsv', {})
  frame.write_csv(made['tsv'][0], separator='\t')
  made['quoted'] = (tmp_path / 'quoted.csv', {})
  frame.with_columns(note=pl.lit('a, "b"')).write_csv(made['quoted'][0], quote_style='always')
  made['crlf'] = (tmp_path / 'crlf.csv', {})
  made['crlf'][0].write_bytes(b'\xef\xbb\xbf' + made['csv'][0].read_bytes().replace(b'\n', b'\r\n\r\n'))
  made['parquet'] = (tmp_path / 'a.parquet', {})
  frame.with_columns(pl.col('user_id').cast(pl.Int32)).write_parquet(made['parquet'][0], row_group_size=37)
  made['jsonl'] = (tmp_path / 'a.jsonl', {})
  frame.write_ndjson(made['jsonl'][0])
  for name in ('csv', 'jsonl'):
    packed = tmp_path / f'packed.{name}.gz'
    packed.write_bytes(gzip.compress(made[name][0].read_bytes()))
    made[f'{name}.gz'] = (packed, {})
  seconds = frame.with_columns(when=pl.col('timestamp') / 1000).drop('timestamp')
  made['seconds'] = (tmp_path / 's.parquet', {'columns': {'timestamp': 'when'}})
  seconds.write_parquet(made['seconds'][0])
  iso = [{**row, 'timestamp': _iso(row['timestamp'], i)} for i, row in enumerate(rows)]
  made['iso'] = (_csv(tmp_path / 'iso.csv', iso), {})
  made['datetime'] = (tmp_path / 'd.parquet', {})
  frame.with_columns(pl.from_epoch('timestamp', 'ms').dt.replace_time_zone('UTC')).write_parquet(made['datetime'][0])
  made['floats'] = (tmp_path / 'floats.parquet', {})
  frame.with_columns(pl.col('user_id', 'item_id').cast(pl.Float64)).write_parquet(made['floats'][0])
  made['flags'] = (tmp_path / 'flags.csv', {'action_columns': {f'is_{a}': a for a in ACTIONS}})
  flags = [pl.col('action').eq(a).cast(pl.Int8).alias(f'is_{a}') for a in ACTIONS]
  frame.with_columns(flags).drop('action').write_csv(made['flags'][0])
  lists = frame.with_columns(actions=pl.concat_list('action')).drop('action')
  made['list'] = (tmp_path / 'list.parquet', {})
  lists.write_parquet(made['list'][0])
  made['marked'] = (tmp_path / 'marked.jsonl', {})
  made['marked'][0].write_bytes(b'\xef\xbb\xbf' + made['jsonl'][0].read_bytes())
  made['json list'] = (tmp_path / 'list.jsonl', {})
  lists.write_ndjson(made['json list'][0])
  renamed = frame.rename({'user_id': 'u', 'item_id': 'i', 'surface': 's', 'action': 'a', 'timestamp': 't'})
  names = {'user_id': 'u', 'item_id': 'i', 'surface': 's', 'action': 'a', 'timestamp': 't'}
  made['renamed'] = (tmp_path / 'renamed.parquet', {'columns': names})
  renamed.write_parquet(made['renamed'][0])
  return made


def test_every_format_gives_the_same_bytes(tmp_path, monkeypatch):
  monkeypatch.setattr('pinfm_jax.data.preparation.reading.BLOCK_BYTES', 700)
  monkeypatch.setattr('pinfm_jax.data.preparation.reading.PARQUET_ROWS', 90)
  rows = _rows(5, n=200)
  checksums = {}
  for name, (path, settings) in _variants(tmp_path, rows).items():
    dataset = _prepare(path, tmp_path / f'out {name}', **settings)
    checksums[name] = (dataset.info.checksum, dataset.info.actions, dataset.info.surfaces)
    assert dataset.info.counts.events.read == len(rows), name
  assert set(checksums.values()) == {checksums['csv']}, checksums


def test_result_does_not_depend_on_partitions_batches_or_file_boundaries(tmp_path, monkeypatch):
  rows = _rows(6)
  whole = _csv(tmp_path / 'log.csv', rows)
  halves = (_csv(tmp_path / '1.csv', rows[:150]), _csv(tmp_path / '2.csv', rows[150:], list(rows[0])[::-1]))
  checksums = {_prepare(whole, tmp_path / f'p{p}', shards=2, partitions=p).info.checksum for p in (None, 1, 7, 5000)}
  checksums.add(_prepare(halves, tmp_path / 'halves', shards=2).info.checksum)
  monkeypatch.setattr('pinfm_jax.data.preparation.spool._RUN_BYTES', 1000)
  monkeypatch.setattr('pinfm_jax.data.preparation.reading.BLOCK_BYTES', 500)
  monkeypatch.setattr(assemble, '_PART_BYTES', 2000)
  monkeypatch.setattr('pinfm_jax.data.preparation.item_table._FOLD_ROWS', 5)
  checksums.add(_prepare(whole, tmp_path / 'small', shards=2).info.checksum)
  assert len(checksums) == 1


def test_actions_are_sets(tmp_path):
  log = tmp_path / 'log.csv'
  log.write_text(
    'user_id,timestamp,item_id,actions\n1,1700000000,5,click|save\n1,1700000001,5,\n1,1700000002,6,["hide"]\n'
  )
  log.write_text(log.read_text().replace('["hide"]', '"[""hide""]"'))
  dataset = _prepare(log, tmp_path / 'out')
  assert [event[3] for event in _histories(dataset)[1]] == [{'click', 'save'}, set(), {'hide'}]
  assert dataset.info.surfaces == ('none',)


def test_given_vocabularies_keep_their_order(tmp_path):
  log = _csv(tmp_path / 'log.csv', _rows(7, n=50))
  dataset = _prepare(log, tmp_path / 'out', actions=('save', 'hide', 'click', 'other'), surfaces=('search', 'feed'))
  assert dataset.info.actions == ('save', 'hide', 'click', 'other')
  assert _histories(dataset) == _oracle(_rows(7, n=50), 16_000)[0]


def test_order_only_log(tmp_path):
  log = tmp_path / 'log.csv'
  log.write_text('user_id,item_id\n1,7\n2,9\n1,7\n1,8\n')
  dataset = _prepare(log, tmp_path / 'out')
  assert not dataset.info.time_known.histories
  assert {user: [event[:2] for event in events] for user, events in _histories(dataset).items()} == {
    1: [(0, 7), (1, 7), (2, 8)],
    2: [(0, 9)],
  }


def test_positions_as_order(tmp_path):
  log = tmp_path / 'log.csv'
  log.write_text('user_id,item_id,pos\n1,7,2\n1,8,0\n')
  columns = {'timestamp': 'pos'}
  with pytest.raises(UserError, match='looks like a position'):
    _prepare(log, tmp_path / 'out', columns=columns)
  dataset = _prepare(log, tmp_path / 'out', columns=columns, time_unit='order')
  assert dataset.history(0).timestamp.tolist() == [0, 2]
  assert not dataset.info.time_known.histories


def test_string_ids(tmp_path):
  rows = [{**row, 'user_id': f'u-{row["user_id"]}é', 'item_id': f'0{row["item_id"]}'} for row in _rows(8)]
  dataset = _prepare(_csv(tmp_path / 'log.csv', rows), tmp_path / 'out')
  assert (dataset.info.id_type.user, dataset.info.id_type.item) == ('string', 'string')
  assert _histories(dataset) == _oracle(rows, 16_000)[0]
  for key, name in dataset.users.select('user_key', 'user_id').iter_rows():
    assert key == id_key(name, 'string')


MALFORMED = [
  ('x,1700000000000,1,feed,click', 'user_id is not a 64-bit integer'),
  ('99999999999999999999,1700000000000,1,feed,click', 'user_id is not a 64-bit integer'),
  (',1700000000000,1,feed,click', 'missing user_id'),
  ('1,,1,feed,click', 'missing timestamp'),
  ('1,soon,1,feed,click', 'timestamp is not a number'),
  ('1,nan,1,feed,click', 'timestamp is not a number'),
  ('1,inf,1,feed,click', 'timestamp after the year 9999'),
  ('1,-5,1,feed,click', 'negative timestamp'),
  ('1,1700000000000000000,1,feed,click', 'timestamp after the year 9999'),
  ('1,1700000000000,,feed,click', 'missing item_id'),
  ('1,1700000000000,1.5,feed,click', 'item_id is not a 64-bit integer'),
  ('1,1700000000000,1,,click', 'missing surface'),
  ('1,1700000000000,1,billboard,click', 'unknown surface'),
  ('1,1700000000000,1,feed,', 'missing action'),
  ('1,1700000000000,1,feed,[click', 'unparsable action'),
  ('1,1700000000000,1,feed,frown', 'unknown action'),
  ('1,1700000000000,1,feed', '4 fields instead of 5'),
  ('1,1700000000000,1,feed,click,more', '6 fields instead of 5'),
  ('1,1700000000000,"1,feed,click', 'unbalanced quote (a field that spans lines is not supported)'),
  ('1,1700000000000,1,feed,\xff', 'not UTF-8'),
]


@pytest.mark.parametrize('quotes', [True, False])
def test_malformed_csv_rows(tmp_path, quotes):
  rows = _rows(9, n=60)
  bad = [(line, reason) for line, reason in MALFORMED if quotes or '"' not in line]
  log = _csv(tmp_path / 'log.csv', rows)
  log.write_bytes(log.read_bytes() + b''.join(line.encode('latin-1') + b'\n' for line, _ in bad))
  settings = {'actions': ACTIONS, 'surfaces': ('feed', 'search'), 'user_id_type': 'integer', 'item_id_type': 'integer'}
  dataset = _prepare(log, tmp_path / 'out', max_rejected_share=0.5, **settings)
  rejected = _rejected(tmp_path / 'out')
  assert [(entry['line'], entry['reason']) for entry in rejected] == [(i + 62, bad[i][1]) for i in range(len(bad))]
  assert {entry['file'] for entry in rejected} == {str(log)}
  assert rejected[0]['row'] == dict(zip(rows[0], bad[0][0].split(','), strict=True))
  assert dataset.info.counts.events.rejected == len(bad)
  assert sum(dataset.info.counts.rejected_by_reason.values()) == len(bad)
  assert _histories(dataset) == _oracle(rows, 16_000)[0]


def test_malformed_json_rows(tmp_path):
  good = [json.dumps(row) for row in _rows(10, n=40)]
  bad = ['{"user_id": 1', '[1]', 'null', '{"user_id": 1}', '{"user_id": NaN}', good[0] + good[1]]
  lines = good[:20] + bad[:3] + [''] + good[20:] + bad[3:]
  (tmp_path / 'log.jsonl').write_text('\n'.join(lines))
  dataset = _prepare(tmp_path / 'log.jsonl', tmp_path / 'out', max_rejected_share=0.5)
  rejected = [(entry['line'], entry['reason']) for entry in _rejected(tmp_path / 'out')]
  no_json = 'not a JSON object'
  assert rejected == [
    (21, no_json),
    (22, no_json),
    (23, no_json),
    (45, 'missing item_id'),
    (46, no_json),
    (47, no_json),
  ]
  assert _histories(dataset) == _oracle(_rows(10, n=40), 16_000)[0]


def test_late_json_keys_are_read(tmp_path):
  rows = [{'user_id': 1, 'timestamp': T0 + i, 'item_id': i} for i in range(1002)]
  rows[-2] |= {'surface': 'feed', 'actions': ['save']}
  rows[-1] |= {'surface': 'feed', 'action': 'click'}
  log = tmp_path / 'log.jsonl'
  log.write_text('\n'.join(map(json.dumps, rows)))
  dataset = _prepare(log, tmp_path / 'out')
  assert dataset.info.counts.events.kept == len(rows)
  events = [event[2:] for event in _histories(dataset)[1]]
  assert events == [('none', frozenset())] * 1000 + [('feed', {'save'}), ('feed', {'click'})]
  with pytest.raises(UserError, match="name 'none'"):
    _prepare(log, tmp_path / 'other', surfaces=('feed',))


def test_a_late_json_timestamp_is_malformed(tmp_path):
  rows = [{'user_id': 1, 'item_id': i} for i in range(1000)] + [{'user_id': 1, 'item_id': 1, 'timestamp': T0}]
  (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  dataset = _prepare(tmp_path / 'log.jsonl', tmp_path / 'out')
  assert dataset.info.counts.rejected_by_reason == {'timestamp in a log whose first rows have none': 1}


def test_files_agree_on_the_time_unit(tmp_path):
  rows = _rows(15, n=20)
  seconds = _csv(tmp_path / 's.csv', [{**row, 'timestamp': row['timestamp'] // 1000} for row in rows])
  for other in (_csv(tmp_path / 'ms.csv', rows), _variants(tmp_path, rows)['iso'][0]):
    with pytest.raises(UserError, match='like s in') as caught:
      _prepare((seconds, other), tmp_path / 'out')
    assert str(other) in str(caught.value)
  assert _histories(_prepare((seconds,), tmp_path / 'out')) == _oracle(rows, 16_000)[0]


@pytest.mark.parametrize(('scale', 'wrong', 'reason'), [(1, T0 // 1000, 'too small for ms'), (1000, T0, 'too large')])
def test_a_row_in_another_time_unit_is_malformed(tmp_path, scale, wrong, reason):
  rows = [{**row, 'timestamp': row['timestamp'] // scale} for row in _rows(16, n=20)]
  log = _csv(tmp_path / 'log.csv', [*rows, {**rows[0], 'timestamp': wrong}])
  _prepare(log, tmp_path / 'out', max_rejected_share=0.1)
  (entry,) = _rejected(tmp_path / 'out')
  assert entry['line'] == 22
  assert reason in entry['reason']
  if scale == 1:
    assert _prepare(log, tmp_path / 'ms', time_unit='ms').info.counts.events.rejected == 0


def test_deep_brackets_are_malformed(tmp_path):
  deep, good = '[' * 100_000, f'1,{T0},1'
  (tmp_path / 'log.csv').write_text(f'user_id,timestamp,item_id,actions\n{good},click\n{good},{deep}\n')
  (tmp_path / 'log.jsonl').write_text(json.dumps({'user_id': 1, 'timestamp': T0, 'item_id': 1}) + f'\n{deep}\n')
  for kind, reason in (('csv', 'unparsable actions'), ('jsonl', 'not a JSON object')):
    dataset = _prepare(tmp_path / f'log.{kind}', tmp_path / kind, max_rejected_share=0.5)
    assert dataset.info.counts.rejected_by_reason == {reason: 1}


def test_long_ids_are_rejected(tmp_path):
  rows = [{'user_id': 'u', 'timestamp': T0, 'item_id': 'a' * n} for n in (1, 512, 513)]
  dataset = _prepare(_csv(tmp_path / 'log.csv', rows), tmp_path / 'out', max_rejected_share=0.5)
  assert dataset.info.counts.rejected_by_reason == {'item_id is longer than 512 bytes': 1}


def test_too_many_malformed_rows_stop(tmp_path):
  log = tmp_path / 'log.csv'
  log.write_text('user_id,timestamp,item_id\n' + '1,1700000000,1\n' * 98 + '1,,1\n1,,1\n')
  with pytest.raises(UserError, match=r'2 of 100 rows .* most often: missing timestamp \(2 times\)'):
    _prepare(log, tmp_path / 'out')
  assert [entry['line'] for entry in map(json.loads, (tmp_path / 'out.rejected.jsonl').read_text().splitlines())] == [
    100,
    101,
  ]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['log.csv', 'out.rejected.jsonl']
  _prepare(log, tmp_path / 'out', max_rejected_share=0.02)


def _bad_input(tmp_path: Path) -> dict[str, tuple[Path, dict, str]]:
  good = _csv(tmp_path / 'good.csv', _rows(11, n=20))
  files = {
    'empty.csv': b'',
    'header.csv': b'user_id,timestamp,item_id\n',
    'bad.parquet': b'PAR1 nonsense',
    'cut.csv.gz': gzip.compress(good.read_bytes())[:-20],
    'log.xlsx': b'',
    'twice.csv': b'a,a\n1,2\n',
    'all.csv': b'user_id,timestamp,item_id\n,1700000000,1\n',
  }
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  many = [{'user_id': 1, 'timestamp': T0, 'item_id': i, 'action': f'a{i}'} for i in range(33)]
  _csv(tmp_path / 'actions.csv', many)
  return {
    'missing': (tmp_path / 'no.csv', {}, 'does not exist'),
    'folder': (tmp_path, {}, 'is a directory'),
    'empty': (tmp_path / 'empty.csv', {}, 'is empty'),
    'header only': (tmp_path / 'header.csv', {}, 'has no rows'),
    'parquet': (tmp_path / 'bad.parquet', {}, 'cannot be read as Parquet'),
    'gzip': (tmp_path / 'cut.csv.gz', {}, 'cannot be read as gzip'),
    'kind': (tmp_path / 'log.xlsx', {}, 'unknown kind'),
    'twice': (tmp_path / 'twice.csv', {}, 'two columns'),
    'column': (good, {'columns': {'user_id': 'userid'}}, "did you mean 'user_id'"),
    'canonical': (good, {'columns': {'user': 'user_id'}}, "did you mean 'user_id'"),
    'flag column': (good, {'action_columns': {'acton': 'click'}}, "did you mean 'action'"),
    'flag action': (good, {'actions': ('click',), 'action_columns': {'item_id': 'like'}}, "to 'like', expected one"),
    'actions': (tmp_path / 'actions.csv', {}, 'at most 32'),
    'unit': (good, {'time_unit': 'minutes'}, 'expected one of'),
    'cap': (good, {'cap': 0}, 'at least 1'),
    'labels': (good, {'labels': ('click',)}, 'needs impressions'),
    'all bad': (tmp_path / 'all.csv', {'max_rejected_share': 1.0}, 'every row'),
    'surfaces': (tmp_path / 'actions.csv', {'surfaces': ('feed',)}, "name 'none'"),
  }


def test_bad_input_is_one_clear_line(tmp_path):
  for name, (path, settings, message) in _bad_input(tmp_path).items():
    with pytest.raises(UserError) as caught:
      _prepare(path, tmp_path / 'out', **settings)
    assert message in str(caught.value), name
    assert '\n' not in str(caught.value), name
    assert not list(tmp_path.glob('out*[!l]')), name


def test_failure_leaves_nothing_and_stale_folders_go(tmp_path, monkeypatch):
  log = _csv(tmp_path / 'log.csv', _rows(12))
  stale = tmp_path / 'out.partial-0123abcd'
  (stale / 'spill').mkdir(parents=True)
  with monkeypatch.context() as patch:
    patch.setattr(assemble.Assembler, '_write_users', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      _prepare(log, tmp_path / 'out')
  assert [p.name for p in tmp_path.iterdir()] == ['log.csv']


def test_a_run_killed_while_replacing_loses_nothing(tmp_path):
  log = _csv(tmp_path / 'log.csv', _rows(14))
  first = _prepare(log, tmp_path / 'out')
  (tmp_path / 'out').rename(tmp_path / 'out.partial-0123abcd.old')
  with pytest.raises(UserError, match='exists already'):
    _prepare(log, tmp_path / 'out')
  assert PreparedDataset.open(tmp_path / 'out').info == first.info


def test_existing_directory(tmp_path):
  log = _csv(tmp_path / 'log.csv', _rows(13))
  first = _prepare(log, tmp_path / 'out')
  with pytest.raises(UserError, match='exists already'):
    _prepare(log, tmp_path / 'out')
  again = _prepare(log, tmp_path / 'out', cap=1, overwrite=True)
  assert again.info.checksum != first.info.checksum
  assert sorted(p.name for p in tmp_path.iterdir()) == ['log.csv', 'out']
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'file').write_text('x')
  with pytest.raises(UserError, match='is no prepared data set, so it is not replaced'):
    _prepare(log, tmp_path / 'mine', overwrite=True)
  assert (tmp_path / 'mine' / 'file').exists()
