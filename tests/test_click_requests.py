"""Requests from a click log: their candidates, their features, and who is left out, against plain loops."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from clicks import START_MS, random_clicks, write_clicks

from pinfm_jax.config import DAY_MS, HOUR_MS
from pinfm_jax.data.events import NO_SURFACE
from pinfm_jax.data.public.click_log import ClickLog
from pinfm_jax.data.public.click_requests import RequestOptions, make_requests, mix
from pinfm_jax.data.public.globo import DENSE, load_globo, time_ms
from pinfm_jax.data.public.readers import WIDTH, ReaderVectors, user_vectors
from pinfm_jax.data.sources import load_source, prepare_source
from pinfm_jax.errors import UserError

OPTIONS = RequestOptions(START_MS + 24 * HOUR_MS, START_MS + 48 * HOUR_MS, START_MS + 24 * HOUR_MS, candidates=5)


@pytest.fixture(scope='module')
def clicks() -> pl.DataFrame:
  return random_clicks().sort('click_timestamp', 'user_id', 'session_id', 'click_article_id')


def click_log(clicks: pl.DataFrame) -> ClickLog:
  names = {'user': 'user_id', 'session': 'session_id', 'timestamp': 'click_timestamp', 'item': 'click_article_id'}
  names |= {
    'environment': 'click_environment',
    'device': 'click_deviceGroup',
    'os': 'click_os',
    'country': 'click_country',
    'region': 'click_region',
    'referrer': 'click_referrer_type',
  }
  return ClickLog.of(clicks.select(**names))


@pytest.fixture(scope='module')
def log(clicks) -> ClickLog:
  return click_log(clicks)


@pytest.fixture(scope='module')
def made(log) -> pl.DataFrame:
  return make_requests(log, OPTIONS).impressions


def test_a_request_is_a_click_against_distinct_unread_articles_of_the_window(clicks, made):
  rows = list(zip(*(clicks[n].to_list() for n in ('user_id', 'click_article_id', 'click_timestamp')), strict=True))
  requests = made.group_by('request_id', maintain_order=True).agg(pl.all())
  assert requests.height > 100
  for user, item, time, label in zip(
    *(requests[n].to_list() for n in ('user_id', 'item_id', 'timestamp', 'click')), strict=True
  ):
    user, time = user[0], time[0]
    assert sum(label) == 1
    assert (user, item[label.index(1)], time) in rows
    assert len(set(item)) == len(item) == 5
    pool = {i for _, i, t in rows if time - HOUR_MS <= t < time}
    read = {i for u, i, t in rows if u == user and t < time}
    assert set(item) <= pool - read
  assert made.select('user_id', 'timestamp').unique().height == requests.height


def test_features_count_what_came_strictly_before(clicks, made):
  user, item, time, session = (
    clicks[n].to_numpy() for n in ('user_id', 'click_article_id', 'click_timestamp', 'session_id')
  )
  positive = made.filter(pl.col('click') == 1)
  own = {(u, i, t): s for u, i, t, s in zip(user.tolist(), item.tolist(), time.tolist(), session.tolist(), strict=True)}
  clicked = dict(zip(positive['request_id'].to_list(), positive['item_id'].to_list(), strict=True))
  for row in made.sample(300, seed=1).iter_rows(named=True):
    now, mine = row['timestamp'], item == row['item_id']
    past = time < now
    assert row['clicks_1h'] == np.sum(mine & past & (time >= now - HOUR_MS))
    assert row['clicks_24h'] == np.sum(mine & past & (time >= now - DAY_MS))
    assert row['clicks_before'] == np.sum(mine & past)
    assert row['hours_since_click'] == pytest.approx((now - time[mine & past].max()) / HOUR_MS)
    assert row['user_clicks'] == np.sum((user == row['user_id']) & past)
    number = own[row['user_id'], clicked[row['request_id']], now]
    assert row['session_clicks'] == np.sum((session == number) & past)
    first = clicks.filter(pl.col('session_id') == number).row(0, named=True)
    # The referrer of a session's first click belongs to that click: it is not known when it is asked for.
    referrer = str(first['click_referrer_type']) if row['session_clicks'] else None
    assert (row['referrer'], row['surface']) == (referrer, referrer or NO_SURFACE)
    assert row['region'] == str(first['click_region'])


def test_without_a_click_that_makes_a_request_a_limit_changes_nothing_but_the_message(clicks, tmp_path):
  clicks.write_parquet(tmp_path / 'clicks.parquet')
  options = {'requests': 'true', 'impressions_from': '2001-01-01', 'impressions_until': '2001-01-02'}
  with pytest.raises(UserError, match='no click makes a request'):
    load_source('globo', tmp_path, **options, max_requests='5')


def test_options_are_read_by_their_types(clicks, tmp_path):
  clicks.write_parquet(tmp_path / 'clicks.parquet')
  assert load_source('globo', tmp_path, requests='false').impressions is None
  with pytest.raises(UserError, match="setting 'candidates' got 'ten'; expected a value of type int"):
    load_source('globo', tmp_path, requests='true', candidates='ten')


def test_draws_come_up_as_often_as_articles_are_clicked():
  """Two articles, one clicked nine times as often: the draw is of clicks."""
  rng, rows = np.random.default_rng(0), []
  for user in range(3000):
    item = 1 if rng.random() < 0.9 else 2
    rows.append((user, user, START_MS + user * 1000, item, *[1] * 6))
  for user in range(3000, 4000):
    rows.append((user, user, START_MS + 3_000_000 + user * 100, 3, *[1] * 6))
  frame = pl.DataFrame(rows, schema=['user', 'session', 'timestamp', 'item', *_CONTEXT], orient='row')
  begin = START_MS + 3_000_000
  options = RequestOptions(begin, begin + 10 * HOUR_MS, begin, candidates=2, window_hours=0.99)
  made = make_requests(ClickLog.of(frame), options).impressions
  others = made.filter(pl.col('click') == 0)['item_id'].to_numpy()
  assert len(others) == 999  # the first click on article 3 is on an article that nobody had read
  assert 0.86 < np.mean(others == 1) < 0.94
  first = made.group_by('request_id', maintain_order=True).agg(pl.col('click').first())['click']
  assert 0.4 < first.mean() < 0.6  # the clicked article stands at no particular place


_CONTEXT = ('environment', 'device', 'os', 'country', 'region', 'referrer')


def test_every_click_of_the_range_is_accounted_for(clicks, log):
  result = make_requests(log, OPTIONS)
  in_range = clicks.filter(pl.col('click_timestamp').is_between(OPTIONS.begin_ms, OPTIONS.end_ms, closed='left'))
  assert f'{result.impressions.height // 5:,} requests of {in_range.height:,} clicks' in result.note
  left = result.note.split('left out: ')[1].split(')')[0]
  counts = [int(part.strip().split()[0].replace(',', '')) for part in left.split(', ') if part.strip()[0].isdigit()]
  assert sum(counts) + result.impressions.height // 5 == in_range.height


def test_the_days_limit_takes_whole_users_and_leaves_their_requests_as_they_are(log, made):
  some = make_requests(log, replace(OPTIONS, max_requests=60)).impressions
  assert 0 < some.height // 5 <= 60
  same = made.filter(pl.col('request_id').is_in(some['request_id'].implode()))
  assert same.equals(some)
  assert made.filter(pl.col('user_id').is_in(some['user_id'].unique().implode())).height == some.height
  other = make_requests(log, replace(OPTIONS, max_requests=60, seed=1)).impressions
  assert set(other['user_id']) != set(some['user_id'])


def test_requests_do_not_depend_on_the_order_of_the_file(clicks, made):
  assert make_requests(click_log(clicks.reverse()), OPTIONS).impressions.equals(made)


def test_a_readers_vector_is_the_mean_of_those_who_read_it_before_the_hour(log):
  until = OPTIONS.vectors_until_ms
  vectors, known = user_vectors(log, until)
  assert known.sum() == len(np.unique(log.user[log.timestamp < until]))
  assert not vectors[~known].any()
  readers = ReaderVectors.of(log, until)
  rng = np.random.default_rng(2)
  items, times = rng.integers(0, len(log.item_ids), 200), rng.integers(OPTIONS.begin_ms, OPTIONS.end_ms, 200)
  found = readers.at(items, times)
  for item, time, vector in zip(items, times, found, strict=True):
    before = (log.item == item) & (log.timestamp < time // HOUR_MS * HOUR_MS)
    who = np.unique(log.user[before])
    who = who[known[who]]
    expected = vectors[who].mean(axis=0) if len(who) else np.zeros(WIDTH)
    np.testing.assert_allclose(vector, expected, atol=2e-6)
  assert np.any(found)
  assert not np.any(readers.at(items[:1], np.array([START_MS])))


def test_users_who_read_alike_have_alike_vectors():
  """Two crowds with articles of their own: vectors agree within a crowd and differ between the two."""
  rng, rows = np.random.default_rng(0), []
  for user in range(200):
    for item in rng.choice(20, 8, replace=False) + 20 * (user % 2):
      rows.append((user, user, START_MS + len(rows), int(item), *[1] * 6))
  frame = pl.DataFrame(rows, schema=['user', 'session', 'timestamp', 'item', *_CONTEXT], orient='row')
  vectors, known = user_vectors(ClickLog.of(frame), START_MS + len(rows))
  assert known.all()
  similar = vectors[:, :24] @ vectors[:, :24].T
  same = np.arange(200)[:, None] % 2 == np.arange(200) % 2
  assert similar[same].mean() > similar[~same].mean() + 0.2


def test_hashes_differ_by_seed_and_stream_and_look_uniform():
  values = np.arange(20_000)
  share = (mix(values, 0, 1) >> np.uint64(11)) / 2.0**53
  assert abs(share.mean() - 0.5) < 0.01
  assert not np.any(mix(values, 0, 1) == mix(values, 1, 1))
  assert not np.any(mix(values, 0, 1) == mix(values, 0, 2))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'candidates': 1}, 'candidates is 1; expected at least 2'),
    ({'max_requests': -1}, 'max_requests is -1'),
    ({'window_hours': 0}, 'window_hours is 0'),
    ({'impressions_from': '2017-10-20'}, 'not before impressions_until'),
    ({'impressions_from': 'Monday'}, "impressions_from is 'Monday'; expected a date"),
    ({'vectors_until': '2017-10-16'}, 'vectors_until is later than impressions_from'),
    ({'impressions_from': '2016-01-01', 'impressions_until': '2016-01-02'}, 'no click makes a request'),
  ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, clicks, options, message):
  with pytest.raises(UserError, match=message):
    load_globo(write_clicks(tmp_path, clicks), requests=True, **options)


def test_without_the_option_there_are_events_alone(tmp_path, clicks):
  log = load_globo(write_clicks(tmp_path, clicks))
  assert log.impressions is None
  assert log.dense == log.labels == ()
  assert time_ms('2017-10-14T15', 'x') - time_ms('2017-10-14', 'x') == 15 * HOUR_MS


def test_the_prepared_set_has_the_features_and_the_vectors(tmp_path, clicks, made):
  dataset = prepare_source(
    'globo', write_clicks(tmp_path / 'raw', clicks), tmp_path / 'out', requests=True, candidates=5,
    impressions_from='2017-10-15', impressions_until='2017-10-16',
  )  # fmt: skip
  info = dataset.info
  assert (info.features.dense, tuple(f.name for f in info.features.sparse)) == (DENSE, _CONTEXT)
  assert [(f.name, f.width) for f in info.features.embedding] == [('readers', WIDTH)]
  assert dataset.num_requests == made.height // 5
  wanted = {row['request_id']: row for row in made.group_by('request_id').agg(pl.all()).iter_rows(named=True)}
  for row, number in enumerate(dataset.requests['request_id'].to_list()):
    request, expected = dataset.request(row), wanted[number]
    np.testing.assert_array_equal(request.labels[:, 0], expected['click'])
    np.testing.assert_array_equal(request.dense[:, 0], expected['clicks_1h'])
    np.testing.assert_array_equal(request.embedding, np.array(expected['readers'], np.float32))
    assert request.history_end <= expected['user_clicks'][0]  # equal events are merged
