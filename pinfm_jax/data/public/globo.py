"""Globo's news clicks: the events, and ranking requests made of them (a click against what else was being read)."""

from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.public.click_log import CONTEXT, ClickLog
from pinfm_jax.data.public.click_requests import RequestOptions, make_requests
from pinfm_jax.data.public.schema import SourceLog, find_files
from pinfm_jax.errors import UserError

TERMS = 'academic use, non-commercial (Globo.com)'
READERS = 'readers'
DENSE = ('clicks_1h', 'clicks_24h', 'clicks_before', 'hours_since_click', 'user_clicks', 'session_clicks')

_COLUMNS = {
  'environment': 'click_environment',
  'device': 'click_deviceGroup',
  'os': 'click_os',
  'country': 'click_country',
  'region': 'click_region',
  'referrer': 'click_referrer_type',
}


def load_globo(
  path: Path,
  requests: bool = False,
  candidates: int = 10,
  window_hours: float = 1.0,
  max_requests: int = 0,
  impressions_from: str = '2017-10-14',
  impressions_until: str = '2017-10-17',
  vectors_until: str = '',
  seed: int = 0,
) -> SourceLog:
  """Globo's news clicks: clicks_hour_*.csv as published (with articles_metadata.csv if there), or clicks.parquet.

  Args:
    path: the folder or the file of clicks.
    requests: also make ranking requests of the clicks (`click_requests`); without, the set has events alone.
    candidates: C of a request, the clicked article among them.
    window_hours: the other candidates are drawn from the clicks of so many hours before the request.
    max_requests: of a UTC day, those of whole users chosen by hash; 0 = all.
    impressions_from, impressions_until: times (2017-10-14, 2017-10-14T15) between which clicks make requests.
    vectors_until: readers' vectors are computed from the clicks before this time; '' = impressions_from.
    seed: of the draws.

  Raises:
    UserError: the files are not there, or a setting cannot be.
  """
  files = find_files(path, ('clicks.parquet', 'clicks_hour_*.csv'))
  if not files:
    raise UserError(f'{path}: no Globo clicks here; expected clicks.parquet or clicks/clicks_hour_*.csv')
  clicks = pl.scan_parquet(files) if files[0].suffix == '.parquet' else pl.scan_csv(files)
  events = clicks.select(
    pl.col('user_id').cast(pl.Int64),
    pl.col('click_timestamp').cast(pl.Int64).alias('timestamp'),
    pl.col('click_article_id').cast(pl.Int64).alias('item_id'),
    pl.col('click_referrer_type').cast(pl.String).alias('surface'),
    pl.lit(['click'], pl.List(pl.String)).alias('actions'),
  )
  metadata, items = find_files(path, ('articles_metadata.csv',)) if path.is_dir() else [], None
  note = 'The surface is the referrer type (1-7), whose meaning is not published. '
  if metadata:
    items = pl.scan_csv(metadata).select(item_id='article_id', created_at='created_at_ts')
    note += 'Creation times are those of the publisher.'
  else:
    note += 'Creation times are unknown here; first_seen is the first click of the log, a proxy.'
  log = SourceLog('Globo news clicks', TERMS, events, True, ('click',), items=items, notes=(note,))
  if not requests:
    return log
  begin, end = time_ms(impressions_from, 'impressions_from'), time_ms(impressions_until, 'impressions_until')
  options = RequestOptions(
    begin_ms=begin,
    end_ms=end,
    vectors_until_ms=time_ms(vectors_until, 'vectors_until') if vectors_until else begin,
    candidates=candidates,
    window_hours=window_hours,
    max_requests=max_requests,
    seed=seed,
  )
  return _with_requests(log, clicks, options)


def _with_requests(log: SourceLog, clicks: pl.LazyFrame, options: RequestOptions) -> SourceLog:
  rows = clicks.select(
    user='user_id',
    session='session_id',
    timestamp='click_timestamp',
    item='click_article_id',
    **_COLUMNS,
  )
  made = make_requests(ClickLog.of(rows.collect()), options)
  return SourceLog(
    source=log.source,
    licence=log.licence,
    events=log.events,
    time_known=True,
    actions=log.actions,
    impressions=made.impressions.lazy(),
    labels=('click',),
    dense=DENSE,
    sparse=CONTEXT,
    embedding=(READERS,),
    items=log.items,
    request_by='request_id',
    notes=(*log.notes, made.note),
  )


def time_ms(text: str, option: str) -> int:
  """Milliseconds since 1970 of a UTC date or time.

  Raises:
    UserError: it is none.
  """
  try:
    return int(np.datetime64(str(text), 'ms').astype(np.int64))
  except ValueError:
    raise UserError(f'{option} is {text!r}; expected a date or time like 2017-10-14 or 2017-10-14T15') from None
