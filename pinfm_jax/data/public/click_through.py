"""Click-through sets in their public formats: Criteo, Avazu, and the stars of MovieLens-1M as clicks."""

import gzip
from pathlib import Path

import polars as pl

from pinfm_jax.data.public.schema import ClickRows, find_files
from pinfm_jax.data.public.sequences import MOVIELENS_TERMS, read_ratings
from pinfm_jax.errors import UserError

_KAGGLE_TERMS = 'the terms of the Kaggle competition that published it: read them there'
_CRITEO_DENSE = tuple(f'I{i}' for i in range(1, 14))
_CRITEO_SPARSE = tuple(f'C{i}' for i in range(1, 27))
_AVAZU_SPARSE = (
  'C1', 'banner_pos', 'site_id', 'site_domain', 'site_category', 'app_id', 'app_domain', 'app_category', 'device_id',
  'device_ip', 'device_model', 'device_type', 'device_conn_type', *(f'C{i}' for i in range(14, 22)),
)  # fmt: skip
_MOVIELENS_SPARSE = ('user_id', 'item_id', 'gender', 'age', 'occupation', 'zip', 'genres')


def load_criteo(path: Path, rows: int = 0) -> ClickRows:
  """Criteo Display Advertising Challenge: train.txt, a line is the label, 13 integers and 26 categories, with tabs.

  Args:
    path: the file, or a folder with it; gzip too.
    rows: read just so many of the first; 0 = all.

  Raises:
    UserError: no such file, or lines of another form.
  """
  file = _the_file(path, ('train.txt', 'train.txt.gz'), 'Criteo')
  names = ('label', *_CRITEO_DENSE, *_CRITEO_SPARSE)
  found = len(_first_line(file).split('\t'))
  if found != len(names):
    raise UserError(f'{file}: {found} columns, expected {len(names)}: label, 13 integers, 26 categories, with tabs')
  types = {name: pl.String if name in _CRITEO_SPARSE else pl.Float32 for name in names}
  table = pl.scan_csv(file, separator='\t', has_header=False, schema=types, quote_char=None)
  notes = (
    'Rows are in the order of time, as published; their times are not.',
    'Both clicks and rows without one were subsampled by the publisher, at different rates.',
  )
  return ClickRows(
    source='Criteo Display Advertising Challenge (Kaggle, 2014)',
    licence=_KAGGLE_TERMS,
    rows=_first(table, rows).with_row_index('row'),
    dense=_CRITEO_DENSE,
    sparse=_CRITEO_SPARSE,
    time='row',
    notes=(*notes, *_cut_note(rows)),
  )


def load_avazu(path: Path, rows: int = 0) -> ClickRows:
  """Avazu Click-Through Rate Prediction: the training CSV with its header.

  The id is left out, and the hour becomes two categories, the hour of the day and the weekday: no later hour has been
  seen in training.

  Args:
    path: the file, or a folder with train, train.csv or train.gz.
    rows: read just so many of the first; 0 = all.

  Raises:
    UserError: no such file, or columns are missing.
  """
  file = _the_file(path, ('train.csv', 'train.gz', 'train'), 'Avazu')
  header = _first_line(file).split(',')
  missing = [name for name in ('click', 'hour', *_AVAZU_SPARSE) if name not in header]
  if missing:
    raise UserError(f'{file}: no column {missing[0]!r}; expected the header of Avazu: id, click, hour, C1, ..')
  table = _first(pl.scan_csv(file, schema=dict.fromkeys(header, pl.String)), rows)
  hour = pl.col('hour')  # YYMMDDHH
  made = table.select(
    pl.col('click').cast(pl.Float32).alias('label'),
    *_AVAZU_SPARSE,
    hour.str.slice(6, 2).alias('hour_of_day'),
    hour.str.slice(0, 6).str.to_date('%y%m%d').dt.weekday().cast(pl.String).alias('weekday'),
    hour.cast(pl.Int64).alias('time'),
  )
  notes = ('Both clicks and rows without one were subsampled by the publisher, at different rates.',)
  return ClickRows(
    source='Avazu Click-Through Rate Prediction (Kaggle, 2014)',
    licence=_KAGGLE_TERMS,
    rows=made,
    sparse=(*_AVAZU_SPARSE, 'hour_of_day', 'weekday'),
    time='time',
    notes=(*notes, *_cut_note(rows)),
  )


def load_movielens_clicks(path: Path) -> ClickRows:
  """MovieLens-1M as click-through, as in the DCNv2 paper: 4 and 5 stars are clicks, 1 and 2 are none, 3 are left out.

  Args:
    path: a folder with users.dat, movies.dat and ratings.dat, or the sequential edition (Parquet) instead of the last.

  Raises:
    UserError: a file is missing or has another form.
  """
  file = _the_file(path, ('*sasrec_edition.parquet', 'ratings.dat'), 'MovieLens-1M')
  tables = {name: _the_file(file.parent, (f'{name}.dat',), 'MovieLens-1M') for name in ('users', 'movies')}
  notes = (
    'The genres of a movie are one category; the title is not read.',
    'The DCNv2 paper states neither its random split nor how it reads genres and rare values.',
  )
  if file.suffix == '.parquet':
    stars = pl.read_parquet(file).select(user_id='orig_user', item_id='movie_id', stars='rating')
    source, time = 'MovieLens-1M as click-through, sequential edition', ''
    notes = (*notes, 'This edition lacks users and movies with fewer than 5 ratings, and has no times.')
  else:
    stars = read_ratings(file).select('user_id', 'item_id', 'timestamp', stars='rating')
    source, time = 'MovieLens-1M as click-through', 'timestamp'
  ids = ('user_id', 'item_id')
  stars = stars.filter(pl.col('stars') != 3).with_columns(pl.col(*ids).cast(pl.String))
  users = _fields(tables['users'], ('user_id', 'gender', 'age', 'occupation', 'zip'))
  movies = _fields(tables['movies'], ('item_id', 'title', 'genres')).drop('title')
  joined = stars.join(users, on='user_id', how='left', maintain_order='left')
  joined = joined.join(movies, on='item_id', how='left', maintain_order='left')
  label = (pl.col('stars') > 3).cast(pl.Float32).alias('label')
  rows = joined.lazy().with_columns(label).select('label', *_MOVIELENS_SPARSE, *([time] if time else []))
  return ClickRows(source, MOVIELENS_TERMS, rows, sparse=_MOVIELENS_SPARSE, time=time, notes=notes)


def _fields(file: Path, names: tuple[str, ...]) -> pl.DataFrame:
  """A file of `a::b::c` lines as strings; titles have colons of their own."""
  rows = [line.split('::') for line in file.read_text(encoding='latin-1').splitlines() if line.strip()]
  for number, row in enumerate(rows, 1):
    if len(row) != len(names):
      raise UserError(f'{file}, line {number}: {len(row)} fields, expected {"::".join(names)}')
  return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient='row')


def _the_file(path: Path, patterns: tuple[str, ...], what: str) -> Path:
  """The file that matches the first pattern that any matches, or a file that was named itself."""
  files = [path] if path.is_file() else find_files(path, patterns)
  if not files:
    raise UserError(f'{path}: no files of {what} here; expected {" or ".join(patterns)}')
  return files[0]


def _first_line(file: Path) -> str:
  with gzip.open(file, 'rt') if file.suffix == '.gz' else file.open() as lines:
    return lines.readline().rstrip('\r\n')


def _first(table: pl.LazyFrame, rows: int) -> pl.LazyFrame:
  if rows < 0:
    raise UserError(f'rows is {rows}; expected a number of rows, or 0 for all')
  return table.head(rows) if rows else table


def _cut_note(rows: int) -> tuple[str, ...]:
  return (f'Just the first {rows:,} rows were read.',) if rows else ()
