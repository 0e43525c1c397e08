"""Logs without impressions: MovieLens (stars) and Amazon (purchases in order)."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from pinfm_jax.data.public.schema import STAR_ACTIONS, STAR_NOTE, SourceLog, find_files, k_core, star_actions
from pinfm_jax.errors import UserError

MOVIELENS_TERMS = 'GroupLens: research use, no redistribution, no commercial use without permission'
_AMAZON_TERMS = 'none stated by the source: research use only (McAuley et al.)'
_ORDER_NOTE = 'The set knows the order only: timestamps are ordinals.'


def load_movielens(path: Path, actions: str = 'stars', core: int = 0) -> SourceLog:
  """MovieLens: 100K (u.data), 1M (ratings.dat), 20M to 32M (ratings.csv), or 1M in the sequential edition (Parquet).

  Args:
    path: the folder or the file of ratings.
    actions: 'stars' (see the note in the prepared set) or 'none'.
    core: keep users and items with at least so many ratings.

  Raises:
    UserError: no ratings there, or an unknown choice.
  """
  files = find_files(path, ('*sasrec_edition.parquet', 'u.data', 'ratings.dat', 'ratings.csv'))
  if not files:
    raise UserError(f'{path}: no MovieLens ratings here; expected u.data, ratings.dat or ratings.csv')
  file = files[0]
  if file.suffix == '.parquet':
    ratings = pl.read_parquet(file).select(user_id='user', timestamp='pos', item_id='item', rating='rating')
    source, notes, time_known = 'MovieLens-1M, sequential edition', (_ORDER_NOTE,), False
  else:
    ratings = read_ratings(file).with_columns(pl.col('timestamp').cast(pl.Int64) * 1000)
    source, time_known = f'MovieLens ({file.parent.name}/{file.name})', True
    notes = ('Times are seconds when the stars were given; equal times keep the order of the file.',)
  return _starred(source, MOVIELENS_TERMS, k_core(ratings, core), time_known, actions, notes)


def load_amazon(path: Path, category: str = '', actions: str = 'none', core: int = 0) -> SourceLog:
  """Amazon reviews: text lines `user item item ..` in order, 5-core review JSON (.gz too), or ratings-only CSV.

  Args:
    path: the file, or a folder that has one of the category.
    category: like Beauty; may be left out (empty) if the folder has one only.
    actions: 'none', or 'stars' where the edition has them.
    core: keep users and items with at least so many reviews.

  Raises:
    UserError: no such file, several, or lines that cannot be read.
  """
  file = _amazon_file(path, category)
  notes = ('Review times are days: equal times keep the order of the file.',)
  if file.suffix == '.txt':
    events, notes = _sequences(file), (_ORDER_NOTE,)
  elif file.name.endswith(('.json', '.json.gz')):
    events = _reviews(file)
  else:
    events = _amazon_ratings(file)
  source = f'Amazon reviews ({file.name})'
  return _starred(source, _AMAZON_TERMS, k_core(events, core), file.suffix != '.txt', actions, notes)


def _starred(
  source: str, terms: str, events: pl.DataFrame, time_known: bool, actions: str, notes: tuple[str, ...]
) -> SourceLog:
  """The log with stars as actions, or with none."""
  if actions not in ('stars', 'none'):
    raise UserError(f"actions is {actions!r}; expected 'stars' or 'none'")
  if actions == 'none':
    return SourceLog(source, terms, events.select('user_id', 'timestamp', 'item_id').lazy(), time_known, notes=notes)
  if 'rating' not in events.columns:
    raise UserError(f"{source} has no stars; use actions='none'")
  starred = events.select('user_id', 'timestamp', 'item_id', star_actions('rating'))
  return SourceLog(source, terms, starred.lazy(), time_known, STAR_ACTIONS, notes=(*notes, STAR_NOTE))


def read_ratings(file: Path) -> pl.DataFrame:
  """user_id, item_id, rating, timestamp (s) of any GroupLens layout.

  Raises:
    UserError: other columns than these.
  """
  separator = {'u.data': '\t', 'ratings.dat': ':', 'ratings.csv': ','}[file.name]
  table = pl.read_csv(file, separator=separator, has_header=file.name == 'ratings.csv', infer_schema=False)
  if file.name == 'ratings.dat':
    table = table[:, ::2]  # `::` reads as single colons with an empty column between any two values
  if table.width != 4:
    raise UserError(f'{file}: {table.width} columns, expected user, item, rating, timestamp')
  table.columns = ['user_id', 'item_id', 'rating', 'timestamp']
  return table.with_columns(pl.col('user_id', 'item_id', 'timestamp').cast(pl.Int64), pl.col('rating').cast(pl.Float64))


def _amazon_file(path: Path, category: str) -> Path:
  if path.is_file():
    return path
  stem = category or '*'
  patterns = (f'{stem}.txt', f'reviews_{stem}_5.json*', f'{stem}_5.json*', f'ratings_{stem}.csv', f'{stem}.csv')
  files = find_files(path, patterns, depth=1)
  if not files:
    raise UserError(f'{path}: no Amazon file of category {stem!r}; expected one like {", ".join(patterns)}')
  if len(files) > 1:
    raise UserError(f'{path}: {len(files)} categories ({", ".join(f.stem for f in files)}); say which with category')
  return files[0]


def _sequences(file: Path) -> pl.DataFrame:
  """Lines `user item item ..`, oldest item first."""
  try:
    table = pl.DataFrame(
      {'ids': [[int(v) for v in line.split()] for line in file.read_text().splitlines() if line.strip()]},
      schema={'ids': pl.List(pl.Int64)},
    )
  except ValueError as error:
    raise UserError(f'{file}: expected lines of integers `user item item ..` ({error})') from None
  table = table.select(user_id=pl.col('ids').list.first(), item_id=pl.col('ids').list.slice(1)).explode('item_id')
  table = table.drop_nulls()
  return table.with_columns(timestamp=pl.int_range(pl.len()).over('user_id'))


def _reviews(file: Path) -> pl.DataFrame:
  """Review JSON, one object a line: reviewerID, asin, unixReviewTime (s), overall."""
  columns: dict[str, list] = {'user_id': [], 'item_id': [], 'timestamp': [], 'rating': []}
  with gzip.open(file, 'rt') if file.suffix == '.gz' else file.open() as lines:
    for number, line in enumerate(lines, 1):
      for column, value in zip(columns.values(), _review(line, number, file), strict=True):
        column.append(value)
  return pl.DataFrame(columns)


def _review(line: str, number: int, file: Path) -> Iterable:
  try:
    row = json.loads(line)
    return row['reviewerID'], row['asin'], 1000 * int(row['unixReviewTime']), float(row['overall'])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file}, line {number}: not a review ({error!r}); expected the 5-core JSON lines') from None


def _amazon_ratings(file: Path) -> pl.DataFrame:
  """Ratings only. 2014: user,item,rating,s; 2018: item,user,rating,s; 2023: a header, and ms."""
  head = pl.read_csv(file, has_header=False, n_rows=100, infer_schema=False)
  if head.width != 4:
    raise UserError(f'{file}: {head.width} columns, expected user, item, rating, timestamp')
  if 'parent_asin' in head.row(0):
    table = pl.read_csv(file, schema_overrides={'user_id': pl.String, 'parent_asin': pl.String})
    return table.select('user_id', pl.col('parent_asin').alias('item_id'), 'rating', 'timestamp')
  # An ASIN has ten characters and a reviewer's id has more.
  first_is_item = head.to_series(0).str.len_chars().median() == 10 < head.to_series(1).str.len_chars().median()
  names = ['item_id', 'user_id'] if first_is_item else ['user_id', 'item_id']
  table = pl.read_csv(file, has_header=False, infer_schema=False)
  table.columns = [*names, 'rating', 'timestamp']
  return table.with_columns(pl.col('rating').cast(pl.Float64), pl.col('timestamp').cast(pl.Int64) * 1000)
