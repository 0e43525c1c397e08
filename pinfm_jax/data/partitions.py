"""Reads a data set that was appended to: a user's history is what all partitions hold of it, one after the other.

Stored offsets of requests count over all stored events of the user, whatever partition holds them, so that they stay
right when more is appended. The cap is applied when a history is read: it is the user's newest `cap` events, and an
offset moves by as many as that leaves out. So appending a day gives the same histories and requests as preparing
all days together, and nothing that is stored is ever rewritten.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.data.records import History, decode_history
from pinfm_jax.data.shards import Shards

_ITEM_COLUMNS = ('item_key', 'item_id', 'first_seen', 'created_at', 'events', 'content')


class Partitions:
  """The histories and tables of all partitions of a data set; at least one."""

  def __init__(self, path: Path, info: DatasetInfo):
    """Opens nothing yet; see `check`."""
    self._path, self._info = path, info
    self._shards = [Shards(path, info.shard_files('histories', n), 'histories') for n in range(len(info.partitions))]

  def check(self) -> None:
    """Raises UserError unless the record files are whole."""
    for shards in self._shards:
      shards.check()

  @property
  def num_users(self) -> int:
    """Number of users over all partitions."""
    return sum(part.new_users for part in self._info.partitions)

  def history(self, user_row: int) -> History:
    """A user's newest `cap` events, oldest first."""
    user_row = int(user_row)
    if not 0 <= user_row < self.num_users:
      raise IndexError(f'row {user_row} is outside the {self.num_users} histories of the data set')
    parts, events = [], 0
    for number in reversed(range(len(self._shards))):
      record = self._record(number, user_row)
      if record is not None and events < self._info.cap:
        parts.append(self._shards[number].decode(decode_history, record))
        events += len(parts[-1])
    return _newest(parts[::-1], self._info.cap)

  def histories(self) -> Iterator[History]:
    """All histories in row order; those of a single partition are read ahead in chunks."""
    if len(self._shards) == 1:
      return self._shards[0].decode_all(decode_history)
    return map(self.history, range(self.num_users))

  def cut(self, user_row: int) -> int:
    """How many of a user's stored events the cap leaves out."""
    return max(int(self.stored_events[user_row]) - self._info.cap, 0)

  @cached_property
  def stored_events(self) -> np.ndarray:
    """int64 [users]: stored events of every user over all partitions."""
    return self.events_of_first(len(self._shards))

  def events_of_first(self, partitions: int) -> np.ndarray:
    """int64 [users]: stored events of every user in the first `partitions` partitions."""
    total = np.zeros(self.num_users, np.int64)
    for number in range(partitions):
      total[self.rows(number)] += self._column(number, 'events').astype(np.int64)
    return total

  def rows(self, partition: int) -> np.ndarray:
    """Rows of the users of a partition, in the order of its records."""
    return self._rows[partition] if partition else np.arange(self._info.partitions[0].new_users)

  def users(self) -> pl.DataFrame:
    """user_key, user_id and events of all users, in the order of their rows."""
    first = 0
    frames = []
    for number, part in enumerate(self._info.partitions):
      frame = pl.read_parquet(self._file(number, 'users.parquet'))
      if number:
        frame = frame.filter(pl.col('user_row') >= first).sort('user_row').drop('user_row')
      frames.append(frame)
      first += part.new_users
    events = np.minimum(self.stored_events, self._info.cap)
    return pl.concat(frames).with_columns(pl.Series('events', events, pl.UInt32))

  def items(self) -> pl.DataFrame:
    """The items of all partitions by ascending key; of contents the newest counts.

    `events` are those stored, those that the cap leaves out included.
    """
    frames = [pl.read_parquet(self._file(number, 'items.parquet')) for number in range(len(self._shards))]
    table = pl.concat(frames, how='diagonal')
    rules = {
      'item_id': pl.col('item_id').first(),
      'first_seen': pl.col('first_seen').min(),
      'created_at': pl.col('created_at').min(),
      'events': pl.col('events').sum(),
    }
    merged = table.group_by('item_key').agg(rules.values()).sort('item_key')
    if 'content' in table.columns:
      known = table.select('item_key', 'content').filter(pl.col('content').is_not_null())
      merged = merged.join(known.unique('item_key', keep='last', maintain_order=True), on='item_key', how='left')
    return merged.select(name for name in _ITEM_COLUMNS if name in merged.columns)

  def item_keys(self) -> pl.Series:
    """The distinct keys of the items of all partitions."""
    numbers = range(len(self._shards))
    tables = (pl.read_parquet(self._file(number, 'items.parquet'), columns=['item_key']) for number in numbers)
    return pl.concat(tables)['item_key'].unique()

  def requests(self) -> pl.DataFrame:
    """The requests of all partitions, by time: those of a partition come after all earlier ones."""
    numbers = [number for number in range(len(self._shards)) if self._info.shard_files('requests', number)]
    return pl.concat(pl.read_parquet(self._file(number, 'requests.parquet')) for number in numbers)

  @cached_property
  def _rows(self) -> list[np.ndarray]:
    """The users' rows of all partitions, but that record i of the first one is user i's."""
    later = range(1, len(self._shards))
    return [np.zeros(0, np.int64), *(self._column(number, 'user_row').astype(np.int64) for number in later)]

  @cached_property
  def _order(self) -> list[np.ndarray]:
    """For every partition its records in the order of the users' rows."""
    return [np.argsort(rows, kind='stable') for rows in self._rows]

  def _record(self, partition: int, user_row: int) -> int | None:
    if not partition:
      return user_row if user_row < self._info.partitions[0].new_users else None
    rows, order = self._rows[partition], self._order[partition]
    place = int(np.searchsorted(rows, user_row, sorter=order))
    return int(order[place]) if place < len(rows) and rows[order[place]] == user_row else None

  def _column(self, partition: int, name: str) -> np.ndarray:
    return pl.read_parquet(self._file(partition, 'users.parquet'), columns=[name])[name].to_numpy()

  def _file(self, partition: int, name: str) -> Path:
    return self._path / self._info.partitions[partition].directory / name


def _newest(parts: list[History], cap: int) -> History:
  if not parts:
    none = np.zeros(0, np.int64)
    return History(none, none.astype(np.uint64), none.astype(np.uint16), none.astype(np.uint32))
  if len(parts) == 1:
    return parts[0]
  events = History.joined(parts)
  return events.between(max(len(events) - cap, 0), len(events))
