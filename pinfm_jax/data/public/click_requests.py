"""Ranking requests of a click log: a click, against other articles that were being read at that moment.

A request is a user's click at time t. Its other candidates are drawn from the CLICKS of the last hour strictly before
t, so an article comes up as often as it is read and popularity alone tells little. Nothing that happens at t or later
decides anything but the label: the draws are a hash of (seed, user, time), and every feature is counted before t.
"""

import sys
from dataclasses import dataclass

import numpy as np
import polars as pl

from pinfm_jax.config import DAY_MS, HOUR_MS
from pinfm_jax.data.events import NO_SURFACE
from pinfm_jax.data.public.click_log import CONTEXT, ClickLog
from pinfm_jax.data.public.readers import WIDTH, ReaderVectors
from pinfm_jax.errors import UserError

_CHUNK = 20_000  # requests drawn at once
_DRAWS = 8  # for each candidate wanted


@dataclass(frozen=True)
class RequestOptions:
  """How requests are made; see `globo.load_globo`.

  Raises:
    UserError: a setting that cannot be.
  """

  begin_ms: int
  end_ms: int
  vectors_until_ms: int
  candidates: int = 10
  window_hours: float = 1.0
  max_requests: int = 0
  seed: int = 0

  def __post_init__(self):
    if self.begin_ms >= self.end_ms:
      raise UserError('impressions_from is not before impressions_until; give the earlier time first')
    if self.vectors_until_ms > self.begin_ms:
      raise UserError(
        'vectors_until is later than impressions_from: the vectors would know clicks that requests ask for; '
        'give an earlier time'
      )
    for name, least in (('candidates', 2), ('max_requests', 0)):
      if getattr(self, name) < least:
        raise UserError(f'{name} is {getattr(self, name)}; expected at least {least}')
    if self.window_hours <= 0:
      raise UserError(f'window_hours is {self.window_hours:g}; expected more than 0')


@dataclass(frozen=True)
class MadeRequests:
  """The impressions, C rows a request, and a note with what was left out."""

  impressions: pl.DataFrame
  note: str


def make_requests(log: ClickLog, options: RequestOptions) -> MadeRequests:
  """Makes the requests of all clicks in the options' time range.

  A click makes no request if the article was not read by anybody in the window before it (no candidate would be as new
  as it), if the user had read it before (no other candidate was), or if too few other articles were being read.

  Raises:
    UserError: no click makes a request.
  """
  clicks = np.arange(np.searchsorted(log.timestamp, options.begin_ms), np.searchsorted(log.timestamp, options.end_ms))
  place = clicks[np.unique(log.user[clicks] << 42 | log.timestamp[clicks] - options.begin_ms, return_index=True)[1]]
  left = {'at the same moment as another of the user': len(clicks) - len(place)}
  user, item, time = log.user[place], log.item[place], log.timestamp[place]
  unread = ~log.has_read(user, item, time)
  left['on an article that the user had read before'] = int(np.sum(~unread))
  window = np.int64(options.window_hours * HOUR_MS)
  alive = log.item_times.between(item, time - window, time) > 0
  left['on an article that nobody had read in the window before'] = int(np.sum(unread & ~alive))
  place = place[unread & alive]
  if options.max_requests and len(place):
    chosen = _of_whole_users(log, place, options)
    left["beyond the day's limit (the other users')"] = int(np.sum(~chosen))
    place = place[chosen]
  place = np.sort(place)
  drawn = [_draw(log, place[i : i + _CHUNK], options, window) for i in range(0, len(place), _CHUNK)]
  items_RC = np.concatenate([*drawn, np.zeros((0, options.candidates), np.int64)])
  full = np.all(items_RC >= 0, axis=1)
  left['while too few other articles were being read'] = int(np.sum(~full))
  place, items_RC = place[full], items_RC[full]
  if not len(place):
    raise UserError('no click makes a request between impressions_from and impressions_until; change the times')
  note = _note(options, len(clicks), len(place), left)
  sys.stderr.write(note + '\n')
  return MadeRequests(_impressions(log, place, items_RC, options), note)


def _of_whole_users(log: ClickLog, place: np.ndarray, options: RequestOptions) -> np.ndarray:
  """Which clicks belong to the users that are taken: of every UTC day, in the order of the users' hashes."""
  chance = mix(log.user_ids[log.user[place]], options.seed, 1)
  day = log.timestamp[place] // DAY_MS
  order = np.lexsort((log.user[place], chance, day))
  first = np.r_[True, day[order][1:] != day[order][:-1]]
  number = np.arange(len(order)) - np.repeat(np.flatnonzero(first), np.diff(np.r_[np.flatnonzero(first), len(order)]))
  # A user's clicks of a day stand together: all are taken or none, by the number of the last one.
  run = np.cumsum(np.r_[True, (np.diff(log.user[place][order]) != 0) | (np.diff(day[order]) != 0)]) - 1
  last = np.zeros(run[-1] + 1, np.int64)
  np.maximum.at(last, run, number)
  chosen = np.zeros(len(place), bool)
  chosen[order] = last[run] < options.max_requests
  return chosen


def _draw(log: ClickLog, place: np.ndarray, options: RequestOptions, window: np.int64) -> np.ndarray:
  """Candidates [R, C] of requests in random order; rows with -1 where too few articles were found."""
  user, item, time = log.user[place], log.item[place], log.timestamp[place]
  begin, end = log.window(time - window, time)
  others = options.candidates - 1
  draws = np.arange(_DRAWS * others + 8, dtype=np.int64)
  key = mix(log.user_ids[user], options.seed, 2) ^ mix(time, options.seed, 3)
  bits = mix(key[:, None] ^ mix(draws, options.seed, 4)[None].astype(np.uint64), options.seed, 5)
  share = (bits >> np.uint64(11)).astype(np.float64) / 2.0**53
  clicks = begin[:, None] + np.floor(share * (end - begin)[:, None]).astype(np.int64)
  drawn = log.item[np.minimum(clicks, len(log) - 1)]
  good = drawn != item[:, None]
  good &= ~log.has_read(np.repeat(user, len(draws)), drawn.ravel(), np.repeat(time, len(draws))).reshape(drawn.shape)
  good &= _first_of_its_kind(drawn)
  taken = good & (np.cumsum(good, axis=1) <= others)
  rows, columns = np.nonzero(taken)
  made = np.full((len(place), options.candidates), -1)
  made[rows, (np.cumsum(taken, axis=1) - 1)[rows, columns]] = drawn[rows, columns]
  made[:, -1] = item
  order = np.argsort(mix(key[:, None] ^ mix(np.arange(options.candidates), options.seed, 6)[None], options.seed, 7))
  return np.take_along_axis(made, order, axis=1)


def _first_of_its_kind(values: np.ndarray) -> np.ndarray:
  """Whether each value [R, K] stands for the first time in its row."""
  order = np.argsort(values, axis=1, kind='stable')
  ordered = np.take_along_axis(values, order, axis=1)
  new = np.concatenate([np.ones((len(values), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
  first = np.zeros_like(new)
  np.put_along_axis(first, order, new, axis=1)
  return first


def _impressions(log: ClickLog, place: np.ndarray, items_RC: np.ndarray, options: RequestOptions) -> pl.DataFrame:
  """One row a candidate, with what was known strictly before the request."""
  count = options.candidates
  rows = np.repeat(place, count)
  time, user, item = log.timestamp[rows], log.user[rows], items_RC.ravel()
  last = log.item_times.last(item, time)
  readers = ReaderVectors.of(log, options.vectors_until_ms)
  # The id must not change with what else is in the log.
  request = (mix(log.user_ids[log.user[place]], 0, 8) ^ mix(log.timestamp[place], 0, 9)) >> np.uint64(1)
  columns = {
    'request_id': np.repeat(request.astype(np.int64), count),
    'user_id': log.user_ids[user],
    'timestamp': time,
    'item_id': log.item_ids[item],
    'click': (item == log.item[rows]).astype(np.uint8),
    'clicks_1h': log.item_times.between(item, time - HOUR_MS, time),
    'clicks_24h': log.item_times.between(item, time - DAY_MS, time),
    'clicks_before': log.item_times.before(item, time),
    'hours_since_click': np.where(last < 0, np.nan, (time - last) / HOUR_MS),
    'user_clicks': log.user_times.before(user, time),
    'session_clicks': log.session_times.before(log.session[rows], time),
  }
  columns |= {name: log.context[rows, c] for c, name in enumerate(CONTEXT)}
  vectors = pl.concat(
    pl.Series('readers', readers.at(item[i : i + 200_000], time[i : i + 200_000]), pl.Array(pl.Float32, WIDTH)).cast(
      pl.Array(pl.Float16, WIDTH)
    )
    for i in range(0, len(rows), 200_000)
  )
  # A session's first click is the request itself, and how it came about (a search, a link) tells which article it was.
  referrer = pl.when(pl.col('session_clicks') > 0).then(pl.col('referrer'))
  table = pl.DataFrame(columns).with_columns(referrer).with_columns(pl.col(*CONTEXT).cast(pl.String), vectors)
  return table.with_columns(surface=pl.col('referrer').fill_null(NO_SURFACE))


def _note(options: RequestOptions, clicks: int, made: int, left: dict[str, int]) -> str:
  reasons = ', '.join(f'{count:,} {why}' for why, count in left.items() if count)
  return (
    f'A request is a click against {options.candidates - 1} other articles drawn from the clicks of the last '
    f'{options.window_hours:g} h before it, as often as each was clicked, that the user had not read: {made:,} '
    f'requests of {clicks:,} clicks (left out: {reasons or "none"}). The candidates are distinct, so an article that '
    'takes a large share of the clicks is still one of them. The log sets the time of the last click of a session to '
    '30 s after the one before it. Device and place of a request are those of its session; the referrer, which is also '
    'the surface, is that of the first click of its session, and unknown where that is the request itself.'
  )


def mix(value: np.ndarray, seed: int, stream: int) -> np.ndarray:
  """uint64 hash of whole numbers, one function for each (seed, stream): SplitMix64's finaliser over both."""
  x = np.asarray(value).astype(np.uint64)
  for salt in (seed * 64 + stream + 1, 0x9E37):
    x = (x + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
  return x
