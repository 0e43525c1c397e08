"""A click log in time order, and exact counts of what was clicked before a moment."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from pinfm_jax.config import HOUR_MS

CONTEXT = ('environment', 'device', 'os', 'country', 'region', 'referrer')
_TIME_BITS = 42  # milliseconds of 139 years


@dataclass(frozen=True)
class Times:
  """Times of the clicks of many groups (articles, users, sessions), for counts strictly before a moment.

  Attributes:
    keys: int64, ascending: group << 42 | milliseconds since `origin_ms`.
    origin_ms: no click is earlier.
  """

  keys: np.ndarray
  origin_ms: int

  @classmethod
  def of(cls, group: np.ndarray, timestamp: np.ndarray, origin_ms: int) -> 'Times':
    """Of clicks at `timestamp` [n] in the groups `group` [n]."""
    return cls(np.sort(group << _TIME_BITS | timestamp - origin_ms), origin_ms)

  def before(self, group: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """How many clicks each group had strictly before each time, int64."""
    return self._place(group, timestamp) - np.searchsorted(self.keys, group << _TIME_BITS)

  def between(self, group: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many clicks each group had in [begin, end), int64."""
    return self._place(group, end) - self._place(group, begin)

  def last(self, group: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Time of each group's last click strictly before each time, int64 ms; -1 without one."""
    place = self._place(group, timestamp) - 1
    key = self.keys[np.maximum(place, 0)]
    found = (place >= 0) & (key >> _TIME_BITS == group)
    return np.where(found, (key & (1 << _TIME_BITS) - 1) + self.origin_ms, -1)

  def _place(self, group: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    return np.searchsorted(self.keys, group << _TIME_BITS | np.maximum(timestamp - self.origin_ms, 0))


@dataclass(frozen=True)
class ClickLog:
  """n clicks in the order of their times.

  Attributes:
    timestamp: int64 [n] ms.
    user, item, session: int64 [n], ranks of the ids.
    user_ids, item_ids: int64, the ids by rank.
    context: int64 [n, 6], CONTEXT of the first click of the click's session.
  """

  timestamp: np.ndarray
  user: np.ndarray
  item: np.ndarray
  session: np.ndarray
  user_ids: np.ndarray
  item_ids: np.ndarray
  context: np.ndarray

  @classmethod
  def of(cls, rows: pl.DataFrame) -> 'ClickLog':
    """Of the columns user, session, timestamp, item and CONTEXT, in any order."""
    rows = rows.select(pl.all().cast(pl.Int64)).sort('timestamp', 'user', 'session', 'item', *CONTEXT)
    first = rows.select(pl.col(CONTEXT).first().over('session'))
    user_ids, user = np.unique(rows['user'].to_numpy(), return_inverse=True)
    item_ids, item = np.unique(rows['item'].to_numpy(), return_inverse=True)
    session = np.unique(rows['session'].to_numpy(), return_inverse=True)[1]
    return cls(rows['timestamp'].to_numpy(), user, item, session, user_ids, item_ids, first.to_numpy())

  def __len__(self) -> int:
    return len(self.timestamp)

  @property
  def _origin_ms(self) -> int:
    return int(self.timestamp[0]) if len(self) else 0

  @cached_property
  def item_times(self) -> Times:
    """When each article was clicked."""
    return Times.of(self.item, self.timestamp, self._origin_ms)

  @cached_property
  def user_times(self) -> Times:
    """When each user clicked."""
    return Times.of(self.user, self.timestamp, self._origin_ms)

  @cached_property
  def session_times(self) -> Times:
    """When there were clicks in each session."""
    return Times.of(self.session, self.timestamp, self._origin_ms)

  @cached_property
  def first_reads(self) -> np.ndarray:
    """Places of the first click of each user on each article, ascending: in time order."""
    pair = self.user * len(self.item_ids) + self.item
    return np.sort(np.unique(pair, return_index=True)[1])

  @cached_property
  def _reads(self) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the pairs (user, article), ascending, and the time of the first click of each."""
    pair, place = np.unique(self.user * len(self.item_ids) + self.item, return_index=True)
    return pair, self.timestamp[place]

  def has_read(self, user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Whether each user clicked each article strictly before each time."""
    pairs, times = self._reads
    pair = user * len(self.item_ids) + item
    place = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    return (pairs[place] == pair) & (times[place] < timestamp)

  def window(self, begin_ms: np.ndarray, end_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first click at or after `begin_ms`, and of the first at or after `end_ms`."""
    return np.searchsorted(self.timestamp, begin_ms), np.searchsorted(self.timestamp, end_ms)


def hour_of(timestamp: np.ndarray) -> np.ndarray:
  """Hours since 1970, int64."""
  return timestamp // HOUR_MS
