"""The Beam preparation writes the bytes of the local one, whatever the number of files and parts."""

import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest
import test_append as logs
from test_append import T0

from pinfm_jax.cli import main
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.preparation import features as features_module
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.errors import UserError

pytest.importorskip('apache_beam', reason="apache-beam is not installed: pip install '.[beam]'")

# Beam's own warnings on import and shutdown are not ours.
pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.slow]


@pytest.fixture(scope='module')
def beam():
  from pinfm_jax.data.beam.pipeline import prepare_with_beam

  return prepare_with_beam


@pytest.fixture(scope='module')
def days(tmp_path_factory):
  return logs.Days(tmp_path_factory.mktemp('days') / 'logs')


def _bytes(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'dataset.json'}


def _same(tmp_path, beam, **settings):
  local, distributed = tmp_path / 'local', tmp_path / 'beam'
  expected = prepare(PrepareConfig(out=local, **settings))
  found = beam(PrepareConfig(out=distributed, **settings), ['--runner=DirectRunner'])
  left, right = _bytes(local), _bytes(distributed)
  assert left.keys() == right.keys()
  for name, content in left.items():
    assert right[name] == content, name
  part = dataclasses.replace(found.partitions[0], created=expected.created)
  assert dataclasses.replace(found, created=expected.created, partitions=(part,)) == expected
  PreparedDataset.open(distributed).verify()
  return found


@pytest.mark.parametrize(('partitions', 'shards', 'cap'), [(1, None, 16_000), (7, 3, 20), (5000, 2, 5)])
def test_impressions_features_and_items(days, tmp_path, beam, partitions, shards, cap):
  settings = {'items': days.items[1], 'partitions': partitions, 'shards': shards, 'cap': cap, **logs.SHOWN}
  info = _same(tmp_path, beam, logs=tuple(days.events), impressions=tuple(days.shown), **settings)
  assert info.counts.requests == 77
  assert info.content_width == 2


def test_events_alone_in_every_format(days, tmp_path, beam):
  frames = [pl.read_parquet(path) for path in days.events]
  paths = (tmp_path / 'a.csv', tmp_path / 'b.jsonl', tmp_path / 'c.parquet')
  frames[0].write_csv(paths[0])
  frames[1].write_ndjson(paths[1])
  frames[2].write_parquet(paths[2], row_group_size=50)
  _same(tmp_path, beam, logs=paths, partitions=3)


def test_a_log_without_times(days, tmp_path, beam):
  paths = []
  for day in range(2):
    paths.append(tmp_path / f'{day}.csv')
    pl.read_parquet(days.events[day]).select('user_id', 'item_id', 'action').write_csv(paths[-1])
  _same(tmp_path, beam, logs=tuple(paths), partitions=4, cap=12)


def test_malformed_rows_fixed_names_and_hashed_features(days, tmp_path, beam, monkeypatch):
  monkeypatch.setattr(features_module, 'VOCABULARY_LIMIT', 1)
  log = tmp_path / 'log.csv'
  rows = pl.read_parquet(days.events[0]).to_dicts()
  text = ['user_id,timestamp,item_id,surface,action'] + [','.join(str(v) for v in row.values()) for row in rows]
  text[5], text[9] = 'u1,,3,feed,click', 'broken'
  log.write_text('\n'.join(text))
  settings = {'actions': ('hide', 'click', 'act9', 'never'), 'max_rejected_share': 0.1, **logs.SHOWN}
  info = _same(tmp_path, beam, logs=(log,), impressions=(days.shown[0],), partitions=3, **settings)
  assert info.counts.events.rejected == 2
  assert info.features.sparse[0].kind == 'hashed'
  assert info.actions == settings['actions']
  lines = [json.loads(line) for line in (tmp_path / 'beam' / 'rejected.jsonl').read_text().splitlines()]
  assert [line['line'] for line in lines] == [6, 10]


def test_errors_are_one_line_and_leave_nothing(days, tmp_path, beam):
  bad = tmp_path / 'bad.csv'
  bad.write_text('user_id,timestamp,item_id\n' + ',1700000000,1\n' * 3 + '1,1700000000,1\n')
  seconds, milliseconds = tmp_path / 's.csv', tmp_path / 'ms.csv'
  seconds.write_text('user_id,timestamp,item_id\n1,1700000000,1\n')
  milliseconds.write_text('user_id,timestamp,item_id\n1,1700000000000,1\n')
  empty = tmp_path / 'empty.csv'
  empty.write_text('user_id,timestamp,item_id\n')
  nothing = tmp_path / 'nothing.csv'
  nothing.write_text('user_id,timestamp,item_id\n,1700000000,1\n')
  for paths, settings, message in (
    ((bad,), {}, '3 of 4 rows of the events are malformed'),
    ((seconds, milliseconds), {}, 'like ms in .* but like s in'),
    ((empty,), {}, 'has no rows'),
    ((nothing,), {'max_rejected_share': 1.0}, 'every row of the events is malformed'),
    ((tmp_path / 'no.csv',), {}, 'does not exist'),
    ((seconds,), {'columns': {'user_id': 'userid'}}, "did you mean 'user_id'"),
  ):
    with pytest.raises(UserError, match=message) as caught:
      beam(PrepareConfig(paths, tmp_path / 'out', **settings))
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()
    assert not list(tmp_path.glob('out.partial*'))


def test_workers_in_processes_of_their_own(days, tmp_path, beam):
  runner = ['--runner=DirectRunner', '--direct_running_mode=multi_processing', '--direct_num_workers=2']
  settings = {'logs': tuple(days.events), 'impressions': tuple(days.shown), 'partitions': 3, **logs.SHOWN}
  local = prepare(PrepareConfig(out=tmp_path / 'local', **settings))
  assert beam(PrepareConfig(out=tmp_path / 'beam', **settings), runner).checksum == local.checksum
  for name, time in (('s', T0 // 1000), ('ms', T0)):
    (tmp_path / f'{name}.csv').write_text(f'user_id,timestamp,item_id\n1,{time},1\n')
  with pytest.raises(UserError, match='like ms in .* but like s in') as caught:
    beam(PrepareConfig((tmp_path / 's.csv', tmp_path / 'ms.csv'), tmp_path / 'out'), runner)
  assert '\n' not in str(caught.value)


def test_the_command(days, tmp_path, capsys):
  logs_given = [str(path) for path in days.events]
  arguments = ['prepare-beam', *logs_given, '--out', str(tmp_path / 'out'), '--partitions', '2']
  assert main([*arguments, '--', '--runner=DirectRunner']) == 0
  assert 'events: 660 read' in capsys.readouterr().out
  local = prepare(PrepareConfig(tuple(days.events), tmp_path / 'local'))
  assert PreparedDataset.open(tmp_path / 'out').info.checksum == local.checksum
