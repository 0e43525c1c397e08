import gzip
import json
import os
from pathlib import Path

import polars as pl
import pytest

from pinfm_jax.data.public.globo import load_globo
from pinfm_jax.data.public.kuairand import SIGNALS, earlier_events, load_kuairand, place_marks
from pinfm_jax.data.public.schema import find_files, k_core
from pinfm_jax.data.public.sequences import load_amazon, load_movielens
from pinfm_jax.data.sources import prepare_source
from pinfm_jax.errors import UserError

DATA = os.environ.get('PINFM_DATA')
needs_data = pytest.mark.skipif(
  not DATA, reason='the real public data sets are not here: set PINFM_DATA to their folder'
)

USER_COLUMNS = [
  'user_id', 'user_active_degree', 'is_lowactive_period', 'is_live_streamer', 'is_video_author', 'follow_user_num',
  'follow_user_num_range', 'fans_user_num', 'fans_user_num_range', 'friend_user_num', 'friend_user_num_range',
  'register_days', 'register_days_range', *(f'onehot_feat{i}' for i in range(18)),
]  # fmt: skip


def write_kuairand_csv(folder: Path) -> Path:
  """The published layout, with two users and three videos."""
  data = folder / 'KuaiRand-Tiny' / 'data'
  data.mkdir(parents=True)
  header = (
    'user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,'
    'play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n'
  )
  may = 1_651_363_200_000  # 1 May 2022, 00:00 UTC
  (data / 'log_standard_4_08_to_4_21_tiny.csv').write_text(
    header + f'1,10,20220420,900,{may - 11 * 86_400_000},1,1,0,0,0,0,1,9000,8000,0,0,0,0,1\n'
  )
  (data / 'log_standard_4_22_to_5_08_tiny.csv').write_text(
    header
    + f'1,11,20220501,900,{may + 5},0,0,0,0,0,1,0,0,7000,0,0,0,0,4\n'
    + f'2,12,20220501,900,{may + 9},0,0,0,0,0,0,0,1,6000,0,0,0,0,1\n'
  )
  (data / 'log_random_4_22_to_5_08_tiny.csv').write_text(
    header + f'2,10,20220502,900,{may + 86_400_000},1,0,0,0,0,0,0,5,8000,0,0,1,1,0\n'
  )
  users = [[1, 'high_active', 0, -124, 0, 5, '"(0,10]"', 0, '0', 2, '"[1,5)"', 400, '366-730', *[0] * 12, *['1.0'] * 6]]
  rows = [','.join(map(str, row)) for row in users]
  (data / 'user_features_tiny.csv').write_text('\n'.join([','.join(USER_COLUMNS), *rows]) + '\n')
  (data / 'video_features_basic_tiny.csv').write_text(
    'video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,'
    'music_id,music_type,tag\n'
    '10,100,NORMAL,2022-04-10,Web,1.0,8000.0,1,1,5,9.0,"39,2"\n11,101,AD,2022-05-03,Web,1.0,,1,1,5,,\n'
  )
  return folder


def test_kuairand_csv_gives_events_and_impressions_with_features_but_no_outcomes(tmp_path):
  log = load_kuairand(write_kuairand_csv(tmp_path))
  events, shown = log.events.collect(), log.impressions.collect()
  assert log.time_known
  assert log.actions == log.labels == tuple(SIGNALS)
  assert events['actions'].to_list() == [['click', 'like', 'long_view'], ['hate'], [], ['click', 'profile_enter']]
  assert events['surface'].to_list() == ['1', '4', '1', '0']
  assert shown.select('user_id', 'item_id').rows() == [(1, 10), (1, 11), (2, 12), (2, 10)]
  users, items = log.users.collect(), log.items.collect()
  features = {*shown.columns, *users.columns, *items.columns}
  assert features >= {*log.labels, *log.dense, *log.sparse}
  assert not features & {'play_time_ms', 'profile_stay_time', 'comment_stay_time'}
  user, item = users.to_dicts()[0], items.to_dicts()[0]
  assert (user['user_active_degree'], user['fans_user_num_range'], user['onehot_feat17']) == ('high_active', '0', '1')
  assert user['follow_user_num'] == 5
  assert (item['tag'], item['music_type'], item['author_id'], item['video_duration']) == ('39', '9', '100', 8000)
  assert item['created_at'] == 1_649_548_800_000 - 8 * 3_600_000  # 10 April, midnight in China
  assert shown['duration_ms'].to_list() == [8000, 7000, 6000, 8000]
  assert shown.select('long_view', 'hate', 'click').rows() == [(1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 0, 1)]


def test_kuairand_impressions_can_begin_later_than_events(tmp_path):
  log = load_kuairand(write_kuairand_csv(tmp_path), impressions_from='2022-05-02')
  assert log.events.collect().height == 4
  assert log.impressions.collect()['item_id'].to_list() == [10]
  with pytest.raises(UserError, match='expected a date'):
    load_kuairand(tmp_path, impressions_from='May')


def test_kuairand_refuses_two_editions_and_missing_parts(tmp_path):
  one = write_kuairand_csv(tmp_path / 'a').parent
  (one / 'a' / 'KuaiRand-Tiny' / 'data' / 'user_features_tiny.csv').unlink()
  with pytest.raises(UserError, match='user_features'):
    load_kuairand(one)
  write_kuairand_csv(tmp_path / 'b')
  with pytest.raises(UserError, match='several editions'):
    load_kuairand(tmp_path)


@pytest.mark.parametrize(
  ('watched', 'marked', 'places'),
  [
    ([1, 2, 3], [2], [1]),
    ([5, 5, 5], [5, 5], [2, 1]),  # repeats: the last ones
    ([1, 2, 1], [1, 2], [1, 0]),  # the order of the marks decides: 1 was liked before 2
    ([1, 2, 3], [9, 3], [2]),  # 9 was watched before the list begins
    ([3, 2, 3], [3, 9, 3], [2]),  # so was the 3 before it: it must not take the first place
    ([1], [], []),
    ([], [1], []),
  ],
)
def test_marks_are_placed_from_the_end(watched, marked, places):
  assert place_marks(watched, marked) == places


def test_earlier_events_have_ordinal_times_before_the_log():
  histories = pl.DataFrame(
    {
      'user_id': [7, 8],
      'last_time_ms': [1000, 2000],
      'watch_seq': [[1, 2, 3], [4, 4]],
      'like_seq': [[2], []],
      'long_watch_seq': [[9, 2, 3], [4]],
    }
  )
  first = pl.DataFrame({'user_id': [8], 'first': [1500]})
  events, note = earlier_events(histories, first)
  assert events['timestamp'].to_list() == [998, 999, 1000, 1498, 1499]
  assert events['item_id'].to_list() == [1, 2, 3, 4, 4]
  assert events['actions'].to_list() == [[], ['like', 'long_view'], ['long_view'], [], ['long_view']]
  assert '5 earlier events' in note
  assert '0 of 1 like marks and 1 of 4 long_view marks' in note


def test_globo_csv_hours_are_one_log_and_metadata_gives_creation_times(tmp_path):
  clicks = tmp_path / 'clicks' / 'clicks'
  clicks.mkdir(parents=True)
  header = (
    'user_id,session_id,session_start,session_size,click_article_id,click_timestamp,click_environment,'
    'click_deviceGroup,click_os,click_country,click_region,click_referrer_type\n'
  )
  (clicks / 'clicks_hour_000.csv').write_text(header + '0,1,1506825423000,2,157541,1506826828020,4,3,20,1,20,2\n')
  (clicks / 'clicks_hour_001.csv').write_text(header + '3,2,1506825423000,2,68866,1506829999000,4,3,20,1,20,7\n')
  log = load_globo(tmp_path)
  assert log.events.collect().rows() == [
    (0, 1_506_826_828_020, 157_541, '2', ['click']),
    (3, 1_506_829_999_000, 68_866, '7', ['click']),
  ]
  assert log.items is None
  (tmp_path / 'articles_metadata.csv').write_text(
    'article_id,category_id,created_at_ts,publisher_id,words_count\n157541,0,1506000000000,0,5\n'
  )
  assert load_globo(tmp_path).items.collect().rows() == [(157_541, 1_506_000_000_000)]


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('u.data', '1\t20\t5\t100\n1\t21\t2\t101\n'),
    ('ratings.dat', '1::20::5::100\n1::21::2::101\n'),
    ('ratings.csv', 'userId,movieId,rating,timestamp\n1,20,4.5,100\n1,21,2.0,101\n'),
  ],
)
def test_movielens_layouts_give_the_same_events(tmp_path, name, text):
  (tmp_path / 'ml').mkdir()
  (tmp_path / 'ml' / name).write_text(text)
  log = load_movielens(tmp_path)
  assert log.events.select('user_id', 'timestamp', 'item_id', 'actions').collect().rows() == [
    (1, 100_000, 20, ['save']),
    (1, 101_000, 21, ['hide']),
  ]
  assert log.time_known
  assert 'half stars' in ' '.join(log.notes)
  assert load_movielens(tmp_path, actions='none').events.collect_schema().names() == ['user_id', 'timestamp', 'item_id']
  with pytest.raises(UserError, match="expected 'stars' or 'none'"):
    load_movielens(tmp_path, actions='all')


def test_amazon_lines_are_orders_without_actions_or_times(tmp_path):
  (tmp_path / 'Beauty.txt').write_text('1 5 6 5\n2 7\n\n')
  log = load_amazon(tmp_path)
  assert log.events.collect().rows() == [(1, 0, 5), (1, 1, 6), (1, 2, 5), (2, 0, 7)]
  assert not log.time_known
  assert log.actions == ()
  with pytest.raises(UserError, match='has no stars'):
    load_amazon(tmp_path, actions='stars')
  (tmp_path / 'Toys_and_Games.txt').write_text('1 2\n')
  with pytest.raises(UserError, match='2 categories'):
    load_amazon(tmp_path)
  assert load_amazon(tmp_path, category='Toys_and_Games').events.collect().height == 1
  (tmp_path / 'Bad.txt').write_text('1 B000\n')
  with pytest.raises(UserError, match='lines of integers'):
    load_amazon(tmp_path / 'Bad.txt')


REVIEW = {'reviewerID': 'A1YJEY40YUW4SE', 'asin': '7806397051', 'overall': 4.0, 'unixReviewTime': 1391040000, 'x': 'y'}


@pytest.mark.parametrize('suffix', ['.json', '.json.gz'])
def test_amazon_reviews_are_read_line_by_line(tmp_path, suffix):
  file = tmp_path / f'reviews_Beauty_5{suffix}'
  text = json.dumps(REVIEW) + '\n'
  file.write_bytes(gzip.compress(text.encode()) if suffix.endswith('gz') else text.encode())
  log = load_amazon(tmp_path, category='Beauty', actions='stars')
  assert log.events.collect().rows() == [('A1YJEY40YUW4SE', 1_391_040_000_000, '7806397051', ['closeup'])]
  assert log.time_known
  (tmp_path / 'reviews_Bad_5.json').write_text(text + '{"asin": 3}\n')
  with pytest.raises(UserError, match='line 2'):
    load_amazon(tmp_path, category='Bad')


@pytest.mark.parametrize(
  'text',
  [
    'A1YJEY40YUW4SE,7806397051,4.0,1391040000\n',
    '7806397051,A1YJEY40YUW4SE,4.0,1391040000\n',
    'user_id,parent_asin,rating,timestamp\nA1YJEY40YUW4SE,7806397051,4.0,1391040000000\n',
  ],
)
def test_amazon_ratings_of_three_vintages_agree(tmp_path, text):
  (tmp_path / 'ratings_Beauty.csv').write_text(text)
  log = load_amazon(tmp_path)
  assert log.events.collect().rows() == [('A1YJEY40YUW4SE', 1_391_040_000_000, '7806397051')]


def test_k_core_drops_until_nothing_changes():
  # Item 3 has one user, without it user 2 has one item left, without which item 2 has one user: the rest is a 2-core.
  rows = [(1, 1), (1, 9), (4, 1), (4, 9), (1, 2), (2, 2), (2, 3)]
  events = pl.DataFrame(rows, schema=['user_id', 'item_id'], orient='row')
  assert sorted(k_core(events, 2).rows()) == [(1, 1), (1, 9), (4, 1), (4, 9)]
  assert k_core(events, 0).equals(events)


def test_every_loader_says_what_it_expected_to_find(tmp_path):
  for load in (load_kuairand, load_globo, load_movielens, load_amazon):
    with pytest.raises(UserError, match='expected'):
      load(tmp_path)
    with pytest.raises(UserError, match='no such file or directory'):
      load(tmp_path / 'missing')
  assert find_files(tmp_path, ('*.x',)) == []


def test_prepared_kuairand_has_requests_by_day_features_and_its_terms(tmp_path, capsys):
  dataset = prepare_source('kuairand', write_kuairand_csv(tmp_path / 'raw'), tmp_path / 'out')
  info = dataset.info
  assert 'CC BY-SA' in info.licence
  assert 'CC BY-SA' in capsys.readouterr().err
  assert info.actions == info.labels == tuple(SIGNALS)
  assert (info.time_known.histories, info.time_known.impressions) == (True, True)
  assert info.counts.events.kept == info.counts.impressions.kept == 4
  assert dataset.requests['candidates'].to_list() == [1, 1, 1, 1]
  users = dataset.users.with_row_index().select('user_id', 'index').rows()
  request = dataset.request(1)  # user 1 on 1 May
  assert dict(users)[1] == request.user_row
  assert request.history_end == 1
  assert request.labels.tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]
  dense = dict(zip(info.features.dense, request.dense[0].tolist(), strict=True))
  assert (dense['duration_ms'], dense['register_days']) == (7000, 400)
  assert dense['video_duration'] != dense['video_duration']  # missing
  tag = [f.name for f in info.features.sparse].index('tag')
  assert dataset.request(0).sparse[0, tag] > 0
  assert request.sparse[0, tag] == 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'raw']


def test_prepared_extract_puts_the_watch_lists_before_the_log(tmp_path):
  data = write_kuairand_csv(tmp_path / 'csv') / 'KuaiRand-Tiny' / 'data'
  raw = tmp_path / 'raw'
  raw.mkdir()
  log = pl.concat([pl.read_csv(f) for f in sorted(data.glob('log_*.csv'))]).filter(
    pl.col('time_ms') > 1_651_363_200_000
  )
  log.write_parquet(raw / 'events_a.parquet')
  pl.read_csv(data / 'user_features_tiny.csv').write_parquet(raw / 'users.parquet')
  pl.read_csv(data / 'video_features_basic_tiny.csv').write_parquet(raw / 'items.parquet')
  pl.DataFrame(
    {
      'user_id': [1],
      'history_len': [3],
      'last_time_ms': [1_651_363_100_000],
      'watch_seq': [[12, 10, 12]],
      'like_seq': [[12]],
      'long_watch_seq': [[10, 12]],
    }
  ).write_parquet(raw / 'histories_a.parquet')
  dataset = prepare_source('kuairand', raw, tmp_path / 'out')
  assert (dataset.info.time_known.histories, dataset.info.time_known.impressions) == (False, True)
  assert 'none' in dataset.info.surfaces
  assert '0 of 1 like' in dataset.info.notes
  request = dataset.request(0)
  history = dataset.history(request.user_row)
  assert request.history_end == 3
  assert history.item.tolist() == [12, 10, 12, 11]
  like, hate, long_view = (1 << list(SIGNALS).index(name) for name in ('like', 'hate', 'long_view'))
  assert history.actions.tolist() == [0, long_view, like | long_view, hate]


def test_prepared_amazon_knows_neither_times_nor_actions_nor_surfaces(tmp_path):
  (tmp_path / 'Beauty.txt').write_text('1 5 6 5\n2 7\n')
  dataset = prepare_source('amazon', tmp_path / 'Beauty.txt', tmp_path / 'out')
  assert not dataset.info.time_known.histories
  assert dataset.info.actions == ()
  assert dataset.history(0).item.tolist() == [5, 6, 5]
  assert 'order only' in dataset.info.notes


def test_prepared_stars_keep_the_order_of_the_actions(tmp_path):
  (tmp_path / 'ratings.dat').write_text('1::20::5::978300760\n1::21::2::978300760\n')
  dataset = prepare_source('movielens', tmp_path, tmp_path / 'out')
  assert dataset.info.actions == ('hide', 'click', 'closeup', 'save')
  assert dataset.history(0).actions.tolist() == [8, 1]  # equal times keep the order of the file
  assert dataset.history(0).timestamp.tolist() == [978_300_760_000] * 2


def test_unknown_sources_and_options_are_named(tmp_path):
  with pytest.raises(UserError, match='known: kuairand, globo, movielens, amazon'):
    prepare_source('netflix', tmp_path, tmp_path / 'out')
  with pytest.raises(UserError, match="no option 'categroy'; it has: category, actions, core, cap"):
    prepare_source('amazon', tmp_path, tmp_path / 'out', categroy='Beauty')
  with pytest.raises(UserError, match="no option 'path'"):
    prepare_source('amazon', tmp_path, tmp_path / 'out', path='elsewhere')


def test_words_of_the_command_line_are_read_by_the_type_of_the_option(tmp_path):
  raw, out = write_kuairand_csv(tmp_path / 'raw'), tmp_path / 'out'
  dataset = prepare_source('kuairand', raw, out, impressions_from='2022-05-02', cap='2', overwrite='false')
  assert 0 < dataset.info.counts.impressions.kept < 4
  with pytest.raises(UserError, match='out'):  # 'false' is no reason to replace what is there
    prepare_source('kuairand', raw, out, overwrite='false')
  with pytest.raises(UserError, match="'cap' got 'abc'; expected a value of type int"):
    prepare_source('kuairand', raw, out, cap='abc')


@pytest.mark.parametrize('content', [b'PAR1 nonsense', None])
def test_other_files_than_the_published_ones_are_refused_and_leave_nothing(tmp_path, content):
  raw = tmp_path / 'raw'
  raw.mkdir()
  if content is None:
    pl.DataFrame({'user_id': [1], 'item': [2]}).write_parquet(raw / 'clicks.parquet')
  else:
    (raw / 'clicks.parquet').write_bytes(content)
  with pytest.raises(UserError, match='not the files of globo as published') as error:
    prepare_source('globo', raw, tmp_path / 'out')
  assert '\n' not in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ['raw']


@needs_data
def test_the_real_kuairand_extract_has_the_published_counts():
  log = load_kuairand(Path(DATA) / 'kuairand_pure')
  shown = log.impressions.collect()
  assert shown.height == 228_329
  counts = {'click': 100_900, 'long_view': 70_963, 'profile_enter': 4_231, 'like': 3_915, 'comment': 579}
  counts |= {'follow': 304, 'forward': 195, 'hate': 190}
  assert {name: int(shown[name].sum()) for name in counts} == counts
  events = log.events.collect()
  assert events.height == 228_329 + 817_187
  earlier = events.head(817_187)
  marks = earlier.select(pl.col('actions').list.contains(name).sum().alias(name) for name in ('like', 'long_view'))
  assert marks.row(0) == (22_534 - 6_404, 390_929 - 99_433)
  last = earlier.group_by('user_id').agg(pl.col('timestamp').max())
  first = shown.group_by('user_id').agg(first=pl.col('timestamp').min())
  assert last.join(first, on='user_id').select((pl.col('timestamp') < pl.col('first')).all()).item()


@needs_data
def test_the_real_sequence_sets_have_the_published_sizes():
  data = Path(DATA)
  globo = load_globo(data / 'globo').events.collect()
  assert (globo.height, globo['user_id'].n_unique(), globo['item_id'].n_unique()) == (2_988_181, 322_897, 46_033)
  sizes = [
    (load_movielens(data / 'ml1m'), 999_611, 6_040, 3_416),
    (load_movielens(data / 'ml100k'), 100_000, 943, 1_682),
    (load_amazon(data / 'amazon', category='Beauty'), 198_502, 22_363, 12_101),
    (load_amazon(data / 'amazon', category='Sports_and_Outdoors'), 296_337, 35_598, 18_357),
    (load_amazon(data / 'amazon', category='Toys_and_Games'), 167_597, 19_412, 11_924),
  ]
  for log, *size in sizes:
    events = log.events.collect()
    assert [events.height, events['user_id'].n_unique(), events['item_id'].n_unique()] == size, log.source
