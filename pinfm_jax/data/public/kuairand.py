"""KuaiRand, a short-video feed with eight feedback signals: the published CSV files and the Parquet extract of Pure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.config import DAY_MS, HOUR_MS
from pinfm_jax.data.events import NO_SURFACE
from pinfm_jax.data.public.schema import SourceLog, find_files
from pinfm_jax.errors import UserError

SIGNALS = {
  'click': 'is_click',
  'like': 'is_like',
  'follow': 'is_follow',
  'comment': 'is_comment',
  'forward': 'is_forward',
  'hate': 'is_hate',
  'long_view': 'long_view',
  'profile_enter': 'is_profile_enter',
}
LICENCE = 'CC BY-SA 4.0 (KuaiRand, Gao et al., CIKM 2022)'

_USER_SPARSE = (
  'user_active_degree',
  'is_lowactive_period',
  'is_live_streamer',
  'is_video_author',
  'follow_user_num_range',
  'fans_user_num_range',
  'friend_user_num_range',
  'register_days_range',
  *(f'onehot_feat{i}' for i in range(18)),
)
_USER_DENSE = ('follow_user_num', 'fans_user_num', 'friend_user_num', 'register_days')
_ITEM_SPARSE = ('video_type', 'upload_type', 'tag', 'author_id', 'music_type')
# The video's length is known when it is shown; play_time_ms, profile_stay_time and comment_stay_time are outcomes.
_LOG_DENSE = ('duration_ms',)
_ITEM_DENSE = ('video_duration',)
_CHINA_OFFSET_MS = 8 * HOUR_MS

_NOTE_ROWS = 'Every video shown is one event with the set of its signals (none is a set too) and one impression.'
_NOTE_REQUEST = "A request is a user's UTC day: the log shows videos almost one at a time."
_NOTE_FEATURES = (
  'Features of users and items are one snapshot of the whole period, as published; outcomes (play time, stay times) '
  'are no features. The creation time is midnight, China time, of the upload date.'
)


def load_kuairand(path: Path, impressions_from: str = '') -> SourceLog:
  """KuaiRand-Pure, -1K or -27K as published, or the extract of Pure (events and histories as Parquet).

  Args:
    path: the folder of the files, or one above it.
    impressions_from: a date like 2022-05-01; earlier rows are events only. Empty: all rows are impressions too.

  Raises:
    UserError: the files are not there.
  """
  extract = find_files(path, ('events_*.parquet',))
  logs = extract or find_files(path, ('log_standard_*.csv',)) + find_files(path, ('log_random*.csv',))
  if not logs:
    raise UserError(f'{path}: no KuaiRand here; expected log_standard_*.csv or events_*.parquet')
  if len({log.parent for log in logs}) > 1:
    folders = ', '.join(sorted({log.parent.as_posix() for log in logs}))
    raise UserError(f'{path}: several editions of KuaiRand ({folders}); give the folder of one')
  rows = _scan(logs)
  shown = rows.select(
    pl.col('user_id').cast(pl.Int64),
    pl.col('time_ms').cast(pl.Int64).alias('timestamp'),
    pl.col('video_id').cast(pl.Int64).alias('item_id'),
    pl.col('tab').cast(pl.String).alias('surface'),
    *(pl.col(column).cast(pl.UInt8).alias(name) for name, column in SIGNALS.items()),
    pl.col('duration_ms').cast(pl.Float32),
  )
  impressions = shown.filter(pl.col('timestamp') >= _day_ms(impressions_from)) if impressions_from else shown
  events = shown.select('user_id', 'timestamp', 'item_id', 'surface', signal_lists(SIGNALS))
  notes = [_NOTE_ROWS, _NOTE_REQUEST, _NOTE_FEATURES]
  histories = find_files(path, ('histories_*.parquet',)) if extract else []
  if histories:
    first = shown.group_by('user_id').agg(first=pl.col('timestamp').min()).collect()
    earlier, note = earlier_events(pl.read_parquet(histories[0]), first)
    events, notes = pl.concat([earlier.lazy(), events]), [*notes, note]
  return SourceLog(
    source='KuaiRand-Pure, extract of 25 April - 8 May 2022' if extract else f'KuaiRand ({logs[0].stem})',
    licence=LICENCE,
    events=events,
    time_known=not histories,
    actions=tuple(SIGNALS),
    impressions=impressions,
    labels=tuple(SIGNALS),
    dense=(*_LOG_DENSE, *_USER_DENSE, *_ITEM_DENSE),
    sparse=(*_USER_SPARSE, *_ITEM_SPARSE),
    items=_items(path),
    users=_users(path),
    notes=tuple(notes),
  )


def signal_lists(names: Sequence[str]) -> pl.Expr:
  """Column `actions`: the names of the 0/1 columns that are 1."""
  marks = [pl.when(pl.col(name) == 1).then(pl.lit(name)) for name in names]
  return pl.concat_list(marks).list.drop_nulls().alias('actions')


def earlier_events(histories: pl.DataFrame, first: pl.DataFrame) -> tuple[pl.DataFrame, str]:
  """The watch lists from before the log as events, with likes and long views placed on them.

  The lists know the order and the last time only: event k of n gets last_time_ms - (n - 1 - k), and all of it is moved
  before the user's first logged event where it would overlap.

  Args:
    histories: user_id, last_time_ms, watch_seq, like_seq, long_watch_seq.
    first: user_id, first (ms of the user's first logged event).

  Returns:
    The events, and a note with how many marks were placed.
  """
  table = histories.with_columns(pl.col('user_id').cast(pl.Int64)).join(first, on='user_id', how='left')
  watched = [np.asarray(w, np.int64) for w in table['watch_seq'].to_list()]
  lengths = np.array([len(w) for w in watched])
  starts = np.concatenate([[0], np.cumsum(lengths)])
  marks, said = {}, []
  for name, column in (('like', 'like_seq'), ('long_view', 'long_watch_seq')):
    marks[name] = np.zeros(starts[-1], np.uint8)
    listed = placed = 0
    for row, (watch, mark) in enumerate(table.select('watch_seq', column).iter_rows()):
      places = place_marks(watch, mark)
      marks[name][starts[row] + np.asarray(places, np.int64)] = 1
      listed, placed = listed + len(mark), placed + len(places)
    said.append(f'{listed - placed:,} of {listed:,} {name} marks')
  last = table.select(pl.min_horizontal('last_time_ms', pl.col('first') - 1)).to_series().to_numpy()
  position = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
  columns = {
    'user_id': np.repeat(table['user_id'].to_numpy(), lengths),
    'timestamp': np.repeat(last - (lengths - 1), lengths) + position,
    'item_id': np.concatenate(watched) if watched else np.zeros(0, np.int64),
  }
  events = pl.DataFrame(columns | marks).with_columns(pl.lit(NO_SURFACE).alias('surface'))
  note = (
    f'The watch lists from before the log give {starts[-1]:,} earlier events: their order is known, their times are '
    f'ordinals before the last one, their surface is unknown (none). {" and ".join(said)} reach back further than the '
    'watch lists and could not be placed.'
  )
  return events.select('user_id', 'timestamp', 'item_id', 'surface', signal_lists(tuple(marks))), note


def place_marks(watched: Sequence[int], marked: Sequence[int]) -> list[int]:
  """Positions on the watch list of the marked (liked, long-viewed) items, both lists oldest first and cut there.

  Walks back from the end of both: each mark takes the last place before the one taken last. The first mark that finds
  none is older than the watch list, and so are all marks before it.
  """
  backwards, places, start = list(watched)[::-1], [], 0
  for item in reversed(marked):
    try:
      at = backwards.index(item, start)
    except ValueError:
      break
    places.append(len(backwards) - 1 - at)
    start = at + 1
  return places


def _users(path: Path) -> pl.LazyFrame:
  files = find_files(path, ('users.parquet', 'user_features_*.csv'))
  if not files:
    raise UserError(f'{path}: the user features are missing; expected user_features_*.csv or users.parquet')
  table = _scan(files)
  dense = [pl.col(name).cast(pl.Float32, strict=False) for name in _USER_DENSE]
  return table.select(pl.col('user_id').cast(pl.Int64), *_categories(table, _USER_SPARSE), *dense)


def _items(path: Path) -> pl.LazyFrame:
  files = find_files(path, ('items.parquet', 'video_features_basic_*.csv'))
  if not files:
    raise UserError(f'{path}: the video features are missing; expected video_features_basic_*.csv or items.parquet')
  table = _scan(files).with_columns(pl.col('tag').cast(pl.String).str.split(',').list.first())
  created = pl.col('upload_dt').cast(pl.String).str.to_date('%Y-%m-%d', strict=False).cast(pl.Datetime('ms'))
  return table.select(
    pl.col('video_id').cast(pl.Int64).alias('item_id'),
    (created.cast(pl.Int64) - _CHINA_OFFSET_MS).alias('created_at'),
    *_categories(table, _ITEM_SPARSE),
    *(pl.col(name).cast(pl.Float32, strict=False) for name in _ITEM_DENSE),
  )


def _categories(table: pl.LazyFrame, names: Sequence[str]) -> list[pl.Expr]:
  """Columns as strings; whole numbers that were read as floats lose their `.0`."""
  schema = table.collect_schema()
  whole = [pl.col(n).cast(pl.Int64, strict=False) if schema[n].is_float() else pl.col(n) for n in names]
  return [column.cast(pl.String) for column in whole]


def _scan(files: list[Path]) -> pl.LazyFrame:
  if files[0].suffix == '.parquet':
    return pl.scan_parquet(files)
  return pl.scan_csv(files, infer_schema_length=10_000)


def _day_ms(day: str) -> int:
  try:
    return int(np.datetime64(day, 'D').astype(np.int64)) * DAY_MS
  except ValueError:
    raise UserError(f'impressions_from is {day!r}; expected a date like 2022-05-01') from None
