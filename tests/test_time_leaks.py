"""Cutting the log after a moment changes nothing that a request knew before it; planted leaks are found."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from clicks import START_MS, random_clicks, write_clicks
from test_click_requests import OPTIONS, click_log
from test_sources import write_kuairand_csv

from pinfm_jax.config import DAY_MS, HOUR_MS
from pinfm_jax.data.audit import TimeAudit, audit_times, check_times, future_dependent
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import item_age_hours
from pinfm_jax.data.info import SparseFeature
from pinfm_jax.data.prepare import PrepareConfig, prepare
from pinfm_jax.data.public.click_requests import make_requests
from pinfm_jax.data.simulator import SimulatorConfig, simulate, simulated_prepare_config
from pinfm_jax.data.sources import prepare_source
from pinfm_jax.errors import UserError

CANDIDATE = ('request_id', 'item_id')
MAY_MS = 1_651_363_200_000


@pytest.fixture(scope='module')
def clicks() -> pl.DataFrame:
  return random_clicks(seed=3)


@pytest.fixture(scope='module')
def globo(clicks, tmp_path_factory) -> PreparedDataset:
  folder = tmp_path_factory.mktemp('globo')
  return prepare_globo(write_clicks(folder / 'raw', clicks), folder / 'out')


def prepare_globo(raw, out) -> PreparedDataset:
  times = {'impressions_from': '2017-10-15', 'impressions_until': '2017-10-16'}
  return prepare_source('globo', raw, out, requests=True, candidates=5, **times)


def known_at_request(dataset: PreparedDataset, until_ms: int) -> pl.DataFrame:
  """One row a candidate of the requests before a time, with all that a ranker sees of it; codes as their values."""
  features, rows = dataset.info.features, []
  table, ids = dataset.requests, dict(dataset.items.select('item_key', 'item_id').iter_rows())
  for row in range(dataset.num_requests):
    if table['timestamp'][row] >= until_ms:
      continue
    request = dataset.request(row)
    history = dataset.history(request.user_row)
    seen = [history.timestamp, history.item, history.surface, history.actions]
    seen = [column[: request.history_end].tolist() for column in seen]
    seen[2] = [dataset.info.surfaces[code] for code in seen[2]]
    for c, item in enumerate(request.item.tolist()):
      sparse = [text(f, code) for f, code in zip(features.sparse, request.sparse[c].tolist(), strict=True)]
      made = {'request_id': str(table['request_id'][row]), 'item_id': ids[item], 'place': c}
      made |= {'timestamp': int(request.timestamp[c]), 'created_at': int(request.created_at[c])}
      made |= {'surface': dataset.info.surfaces[request.surface[c]], 'labels': request.labels[c].tolist()}
      made |= {'dense': str(request.dense[c].tolist()), 'sparse': str(sparse), 'history': str(seen)}
      rows.append(made | {'embedding': str(request.embedding[c].tolist())})
  return pl.DataFrame(rows)


def text(feature: SparseFeature, code: int) -> str | int | None:
  return code if feature.values is None else feature.values[code - 1] if code else None


@pytest.mark.parametrize('hours', [24.7, 31.01, 40.0, 46.5])
def test_requests_made_of_clicks_do_not_change_when_the_log_is_cut_after_them(clicks, hours):
  moment = START_MS + int(hours * HOUR_MS)
  full = make_requests(click_log(clicks), OPTIONS).impressions.filter(pl.col('timestamp') < moment)
  past = clicks.filter(pl.col('click_timestamp') < moment)
  assert 0 < past.height < clicks.height
  cut = make_requests(click_log(past), OPTIONS).impressions
  assert cut.height > 50
  assert cut.equals(full)
  assert future_dependent(full, cut, CANDIDATE) == {}


def test_a_feature_that_counts_to_the_end_of_the_log_is_caught(clicks):
  moment = START_MS + 36 * HOUR_MS

  def leaky(log: pl.DataFrame) -> pl.DataFrame:
    made = make_requests(click_log(log), OPTIONS).impressions.filter(pl.col('timestamp') < moment)
    all_clicks = log.group_by('click_article_id').agg(total=pl.len().cast(pl.Int64))
    made = made.join(all_clicks, left_on='item_id', right_on='click_article_id', how='left', maintain_order='left')
    return made.with_columns(clicks_before=pl.col('total')).drop('total')

  found = future_dependent(leaky(clicks), leaky(clicks.filter(pl.col('click_timestamp') < moment)), CANDIDATE)
  assert set(found) == {'clicks_before'}
  assert found['clicks_before'] > 50


def test_rows_that_come_and_go_with_the_future_are_caught():
  rows = pl.DataFrame({'request_id': [1, 1, 2], 'item_id': [7, 8, 7], 'x': [0.5, None, 1.0]})
  assert future_dependent(rows, rows, CANDIDATE) == {}
  assert future_dependent(rows, rows[:2], CANDIDATE) == {'rows': 1}
  changed = rows.with_columns(x=pl.Series([0.5, 2.0, 1.0]))
  assert future_dependent(rows, changed, CANDIDATE) == {'x': 1}


def test_a_prepared_globo_does_not_change_when_the_log_is_cut(clicks, globo, tmp_path):
  moment = START_MS + 33 * HOUR_MS
  past = write_clicks(tmp_path / 'raw', clicks.filter(pl.col('click_timestamp') < moment))
  cut = known_at_request(prepare_globo(past, tmp_path / 'out'), moment)
  assert cut.height > 100
  assert (cut['created_at'] > 0).all()  # every candidate was read before: ages are those of the first event
  assert future_dependent(known_at_request(globo, moment), cut, CANDIDATE) == {}


def test_kuairand_does_not_change_when_the_log_is_cut(tmp_path):
  moment = MAY_MS + 2 * DAY_MS  # a request is a user's day: whole days are compared
  prepared = []
  for name, until in (('full', MAY_MS + 4 * DAY_MS), ('cut', moment)):
    raw = write_kuairand_csv(tmp_path / name)
    file = raw / 'KuaiRand-Tiny' / 'data' / 'log_standard_4_22_to_5_08_tiny.csv'
    rng, lines = np.random.default_rng(0), file.read_text().splitlines()[:1]
    for _ in range(300):
      user, video, time = rng.integers(1, 6), rng.integers(10, 30), MAY_MS + int(rng.integers(4 * DAY_MS))
      marks, seconds = ','.join(map(str, rng.integers(0, 2, 7))), rng.integers(1, 9)
      if time < until:
        lines.append(f'{user},{video},20220501,900,{time},{marks},5,{seconds}000,0,0,0,0,1')
    file.write_text('\n'.join(lines) + '\n')
    prepared.append(prepare_source('kuairand', raw, tmp_path / f'{name}_data'))
  full, cut = (known_at_request(dataset, moment) for dataset in prepared)
  assert cut.height > 100
  assert cut['created_at'].n_unique() > 10  # both upload dates and first impressions
  assert future_dependent(full, cut, CANDIDATE) == {}
  assert check_times(prepared[0]).late_history == 0


def test_the_simulated_feed_does_not_change_when_the_log_is_cut(tmp_path):
  settings = SimulatorConfig(users=60, items=120, days=4, topics=5, content_width=4, sessions_a_day=1.0)
  feed = simulate(settings, tmp_path / 'raw')
  config = simulated_prepare_config(feed, tmp_path / 'full')
  full = PreparedDataset.open(tmp_path / 'full') if prepare(config) else None
  times = full.requests['timestamp'].to_numpy()
  # Requests last seconds: a moment at which none is going on.
  ends = np.array([full.request(row).timestamp.max() for row in range(len(times))])
  row = next(r for r in range(len(times) // 2, len(times)) if ends[:r].max() < times[r])
  moment = int(times[row])
  for path in (feed.events, feed.impressions):
    pl.read_parquet(path).filter(pl.col('timestamp') < moment).write_parquet(path)
  prepare(replace(config, out=tmp_path / 'cut'))
  cut = known_at_request(PreparedDataset.open(tmp_path / 'cut'), moment)
  assert cut.height > 100
  assert future_dependent(known_at_request(full, moment), cut, CANDIDATE) == {}


def test_the_audit_finds_nothing_in_honest_sets(globo, toy_run):
  for dataset in (globo, toy_run.dataset):
    found = check_times(dataset)
    assert found == TimeAudit(dataset.num_requests)
    assert audit_times(dataset, sample=10).requests == 10


class Planted(PreparedDataset):
  """A data set with a leak in its requests."""

  leak = None

  def request(self, row):
    return self.leak(super().request(row))


def test_a_history_that_ends_one_event_too_late_is_caught(globo):
  dataset = Planted(globo.path, globo.info)
  dataset.leak = lambda request: replace(request, history_end=request.history_end + 1)
  with pytest.raises(UserError, match='leaks the future: of .* have events in their history that are not before'):
    check_times(dataset)
  found = audit_times(dataset)
  assert found.late_history == found.requests == globo.num_requests


def test_an_age_that_counts_from_the_request_itself_is_caught(globo):
  dataset = Planted(globo.path, globo.info)
  dataset.leak = lambda request: replace(request, created_at=request.timestamp)
  with pytest.raises(UserError, match="take an item's age from an event that is not before the request"):
    check_times(dataset)


def test_a_stated_creation_time_after_the_request_is_counted_but_no_leak(toy_run):
  dataset = Planted(toy_run.dataset.path, toy_run.dataset.info)
  dataset.leak = lambda request: replace(request, created_at=request.timestamp + 1)
  found = check_times(dataset)
  assert found.late_item == found.requests


def test_an_items_own_first_impression_has_no_age_and_later_ones_count_from_it(tmp_path):
  log = pl.DataFrame({'user_id': [1, 2, 1], 'timestamp': [1_700_000_000, 1_700_003_600, 1_700_007_200], 'item_id': 5})
  log.write_parquet(tmp_path / 'log.parquet')
  shown = log.with_columns(request_id=pl.int_range(3), click=pl.lit(1))
  shown = pl.concat([shown, shown.tail(1).with_columns(item_id=pl.lit(6))])  # 6: never an event
  for stated in (False, True):
    extra = {'item_created_at': pl.when(pl.col('item_id') == 5).then(1_699_996_400)} if stated else {}
    shown.with_columns(**extra).write_parquet(tmp_path / 'shown.parquet')
    out = tmp_path / f'data{stated}'
    prepare(
      PrepareConfig((tmp_path / 'log.parquet',), out, impressions=(tmp_path / 'shown.parquet',), labels=('click',))
    )
    dataset = PreparedDataset.open(out)
    ages = [item_age_hours(r.timestamp, r.created_at) for r in (dataset.request(row) for row in range(3))]
    expected = [[1.0], [2.0], [3.0, np.nan]] if stated else [[np.nan], [1.0], [2.0, np.nan]]
    for age, hours in zip(ages, expected, strict=True):
      np.testing.assert_allclose(age, hours)
    again = [r.created_at.tolist() for r in dataset.all_requests()]
    assert again == [dataset.request(row).created_at.tolist() for row in range(3)]
    assert check_times(dataset).late_first_seen == 0


def test_without_known_times_nothing_has_an_age(tmp_path):
  log = pl.DataFrame({'user_id': [1, 1], 'timestamp': [0, 1], 'item_id': [5, 5]})
  log.with_columns(request_id=pl.int_range(2), click=pl.lit(1)).write_parquet(tmp_path / 'log.parquet')
  file = tmp_path / 'log.parquet'
  config = PrepareConfig((file,), tmp_path / 'data', impressions=(file,), labels=('click',), time_unit='order')
  prepare(replace(config, impression_time_unit='order'))
  dataset = PreparedDataset.open(tmp_path / 'data')
  assert dataset.request(1).created_at.tolist() == [-1]
