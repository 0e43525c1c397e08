import hashlib

import numpy as np
import polars as pl
import pytest

from pinfm_jax.config import DAY_MS
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.prepare import prepare
from pinfm_jax.data.simulation.world import GroupSampler, drift, make_users, sample_rows
from pinfm_jax.data.simulator import (
  DENSE_FEATURES,
  SPARSE_FEATURES,
  SimulatedFeed,
  SimulatorConfig,
  simulate,
  simulated_prepare_config,
)
from pinfm_jax.errors import UserError

ACTIONS = ('click', 'closeup', 'save', 'hide', 'share')


@pytest.fixture(scope='module')
def feed(tmp_path_factory) -> SimulatedFeed:
  return simulate(SimulatorConfig.preset('tiny', users=600, days=8), tmp_path_factory.mktemp('feed'))


@pytest.fixture(scope='module')
def events(feed) -> pl.DataFrame:
  return pl.read_parquet(feed.events)


@pytest.fixture(scope='module')
def impressions(feed) -> pl.DataFrame:
  return pl.read_parquet(feed.impressions)


def area_under_curve(label: np.ndarray, score: np.ndarray) -> float:
  rank = pl.Series(score).rank().to_numpy()
  positive = label.astype(bool)
  n = positive.sum()
  return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))


def save_hit3(frame: pl.DataFrame, score: str) -> float:
  ordered = frame.sort('request_id', score, descending=[False, True]).group_by('request_id', maintain_order=True)
  requests = ordered.agg(pl.len(), any=pl.col('save').max(), top=pl.col('save').head(3).max())
  return requests.filter((pl.col('len') > 3) & (pl.col('any') == 1))['top'].mean()


def test_the_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path):
  config = SimulatorConfig.preset('tiny', users=40, days=2)

  def digests(name, changed):
    made = simulate(changed, tmp_path / name)
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in (made.events, made.impressions, made.items)]

  first = digests('a', config)
  assert digests('b', config) == first
  assert not set(digests('c', SimulatorConfig.preset('tiny', users=40, days=2, seed=1))) & set(first)


def test_columns_are_what_the_documentation_says(feed, events, impressions):
  assert events.columns == ['user_id', 'timestamp', 'item_id', 'surface', 'actions']
  head = ['request_id', 'user_id', 'timestamp', 'item_id', 'surface', 'item_created_at']
  assert impressions.columns == head + [*ACTIONS, *DENSE_FEATURES, *SPARSE_FEATURES] + [f'true_{a}' for a in ACTIONS]
  items = pl.read_parquet(feed.items)
  assert items.schema['content'] == pl.Array(pl.Float32, 8)
  np.testing.assert_allclose(np.linalg.norm(items['content'].to_numpy(), axis=1), 1.0, rtol=1e-5)
  assert events['actions'].list.len().min() >= 1


def test_popularity_and_activity_are_heavy_tailed(events):
  items = events.group_by('item_id').len()['len'].sort(descending=True).to_numpy()
  assert items[: len(items) // 10].sum() > 0.4 * items.sum()
  users = events.group_by('user_id').len()['len'].to_numpy()
  assert np.percentile(users, 95) > 3 * np.median(users)


@pytest.mark.parametrize('action', ACTIONS)
def test_labels_occur_as_often_as_their_true_probability_says(impressions, action):
  # In every tenth of the true probability, the count of positives is within four standard errors.
  table = impressions.select(y=action, p=f'true_{action}').sort('p').to_numpy().astype(float)
  for part in np.array_split(table, 10):
    y, p = part.T
    assert abs(y.sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum()) + 1e-9


def test_nothing_happens_before_its_item_exists_nor_outside_the_log(feed, events, impressions):
  created = pl.read_parquet(feed.items).select('item_id', 'created_at')
  for frame in (events, impressions):
    joined = frame.join(created, on='item_id', how='left')
    assert joined['created_at'].null_count() == 0
    assert (joined['created_at'] <= joined['timestamp']).all()
    assert frame['timestamp'].is_sorted()
    days = (frame['timestamp'] - feed.config.start_ms) / DAY_MS
    assert days.min() >= 0
    assert days.max() < feed.config.days


def test_candidates_are_distinct_and_as_many_as_configured(feed, impressions):
  requests = impressions.group_by('request_id').agg(
    pl.len(), pl.col('item_id').n_unique().alias('items'), pl.col('user_id').n_unique().alias('users')
  )
  assert (requests['len'] == requests['items']).all()
  assert (requests['users'] == 1).all()
  assert requests['len'].max() <= feed.config.max_candidates
  assert 7 < requests['len'].mean() < feed.config.max_candidates


def test_every_engaged_impression_is_an_event_of_the_same_actions_shortly_after(events, impressions):
  engaged = impressions.filter(pl.any_horizontal([pl.col(a) == 1 for a in ACTIONS])).select(
    'user_id',
    'item_id',
    'surface',
    shown='timestamp',
    want=pl.concat_list([pl.when(pl.col(a) == 1).then(pl.lit(a)) for a in ACTIONS]).list.drop_nulls(),
  )
  pairs = engaged.join(events, on=['user_id', 'item_id', 'surface'])
  match = pairs.filter(
    (pl.col('timestamp') - pl.col('shown')).is_between(1, 10_000) & (pl.col('want') == pl.col('actions'))
  )
  assert match.unique(['user_id', 'item_id', 'shown']).height == engaged.height


def test_counts_in_the_features_hold_nothing_of_the_request_itself_or_later(impressions):
  # Before anything was shown all counts are zero, and a rate is the prior.
  first = impressions.filter(pl.col('timestamp') < impressions['timestamp'][0] + 3_600_000)
  assert first['item_impressions'].max() == 0
  assert first['item_save_rate'].n_unique() == 1
  # Later, an item's count is the number of its impressions up to the last step boundary.
  step = 6 * 3_600_000
  row = impressions.filter(pl.col('item_impressions') > 20).row(-1, named=True)
  earlier = impressions.filter(
    (pl.col('item_id') == row['item_id']) & (pl.col('timestamp') < row['timestamp'] // step * step)
  )
  assert row['item_impressions'] == earlier.height
  assert row['item_save_rate'] == pytest.approx((earlier['save'].sum() + 1) / (earlier.height + 20), rel=1e-5)


def test_the_last_days_show_items_born_after_training_and_old_ones(feed, impressions):
  late = impressions.filter(pl.col('timestamp') >= feed.config.start_ms + (feed.config.days - 2) * DAY_MS)
  age = ((late['timestamp'] - late['item_created_at']) / DAY_MS).to_numpy()
  assert (age < 2).mean() > 0.15
  assert (age > 7).mean() > 0.15
  assert age.max() > 28


def test_a_history_tells_what_the_plain_features_do_not(events, impressions, feed):
  # Taste guessed from the content of what a user saved before the last two days, against counts of the item.
  split = feed.config.start_ms + (feed.config.days - 2) * DAY_MS
  items = pl.read_parquet(feed.items)
  content = dict(zip(items['item_id'].to_list(), items['content'].to_numpy(), strict=True))
  saved = events.filter((pl.col('timestamp') < split) & pl.col('actions').list.contains('save'))
  taste = {}
  for user, item in saved.select('user_id', 'item_id').iter_rows():
    taste[user] = taste.get(user, 0) + content[item]
  late = impressions.filter((pl.col('timestamp') >= split) & pl.col('user_id').is_in(list(taste)))
  score = [float(taste[u] @ content[i] / np.linalg.norm(taste[u])) for u, i in late['user_id', 'item_id'].iter_rows()]
  late = late.with_columns(history=pl.Series(score))
  label = late['save'].to_numpy()
  by_history = area_under_curve(label, late['history'].to_numpy())
  by_counts = area_under_curve(label, late['item_save_rate'].to_numpy())
  best = area_under_curve(label, late['true_save'].to_numpy())
  assert 0.5 < by_counts < by_history < best
  assert by_history > 0.65
  assert save_hit3(late, 'item_save_rate') + 0.1 < save_hit3(late, 'true_save')


def test_interests_drift_slowly_and_stay_distributions():
  rng = np.random.default_rng(0)
  start = make_users(300, 16, 0.5, rng).interests
  now, cosine = start, []
  for _ in range(20):
    now = drift(now, 0.12, 0.03, rng)
    norms = np.linalg.norm(start, axis=1) * np.linalg.norm(now, axis=1)
    cosine.append(float(np.mean((start * now).sum(1) / norms)))
  np.testing.assert_allclose(now.sum(1), 1.0, rtol=1e-5)
  assert cosine[0] > 0.95
  assert cosine[-1] < 0.85
  assert np.all(np.diff(cosine) < 0.02)


def test_samplers_draw_in_proportion_and_fall_back_on_all_items():
  rng = np.random.default_rng(0)
  drawn = sample_rows(np.tile([0.0, 3.0, 1.0], (20_000, 1)), rng)
  assert np.bincount(drawn, minlength=3)[0] == 0
  assert (drawn == 1).mean() == pytest.approx(0.75, abs=0.015)
  sampler = GroupSampler(np.array([2, 0, 2, 0]), np.array([1.0, 5.0, 3.0, 0.5]), groups=3)
  in_two = sampler.draw(np.full(20_000, 2), rng)
  assert set(in_two.tolist()) == {0, 2}
  assert (in_two == 2).mean() == pytest.approx(0.75, abs=0.015)
  assert set(sampler.draw(np.ones(1_000, np.int64), rng).tolist()) == {0, 1, 2, 3}


def test_a_log_with_hardly_anybody_in_it_is_written_too(tmp_path):
  feed = simulate(SimulatorConfig.preset('tiny', users=1, days=2, sessions_a_day=0.01), tmp_path)
  assert pl.read_parquet(feed.impressions).schema['timestamp'] == pl.Int64
  assert pl.read_parquet(feed.events).schema['actions'] == pl.List(pl.String)


def test_the_prepared_feed_keeps_labels_features_and_true_probabilities(feed, impressions, events, tmp_path):
  prepare(simulated_prepare_config(feed, tmp_path / 'data'))
  dataset = PreparedDataset.open(tmp_path / 'data')
  info = dataset.info
  assert 'SIMULATED' in info.notes
  assert (info.actions, info.labels, info.surfaces) == (ACTIONS, ACTIONS, feed.config.surfaces)
  assert info.content_width == feed.config.content_width
  assert dataset.num_requests == impressions['request_id'].n_unique()
  assert info.counts.impressions.kept == impressions.height
  assert info.counts.events.rejected == info.counts.impressions.rejected == 0
  row = dataset.num_requests - 1
  request_id = dataset.requests['request_id'][row]
  rows = impressions.filter(pl.col('request_id') == request_id)
  request = dataset.request(row)
  np.testing.assert_array_equal(request.item, rows['item_id'].to_numpy())
  np.testing.assert_array_equal(request.labels, rows.select(ACTIONS).to_numpy())
  np.testing.assert_allclose(request.dense, rows.select(DENSE_FEATURES).to_numpy(), rtol=1e-6)
  np.testing.assert_allclose(request.reference, rows.select(f'true_{a}' for a in ACTIONS).to_numpy(), rtol=1e-6)
  assert (request.sparse > 0).all()
  user = rows['user_id'][0]
  before = events.filter((pl.col('user_id') == user) & (pl.col('timestamp') < rows['timestamp'].min()))
  assert request.history_end == before.unique(['timestamp', 'item_id', 'surface']).height


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'users': 0}, 'users is 0'),
    ({'max_candidates': 3}, 'max_candidates is 3'),
    ({'surfaces': ('home',)}, '1 surfaces'),
    ({'surfaces': ('a', 'b'), 'surface_share': (0.5, 0.5)}, 'surface terms'),
    ({'actions': ()}, 'click, hide, save'),
    ({'user': 3}, "no option 'user'"),
  ],
)
def test_bad_configurations_are_refused_in_one_line(changes, message):
  with pytest.raises(UserError, match=message) as error:
    SimulatorConfig.preset('tiny', **changes)
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='tiny, quickstart'):
    SimulatorConfig.preset('huge')
