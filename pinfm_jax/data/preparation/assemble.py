"""From spooled rows to the shards and tables of a data set, one part of the users after the other."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.info import DataFile, Features, TimeKnown
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SideTable
from pinfm_jax.data.preparation.intake import Shared
from pinfm_jax.data.preparation.item_table import ItemTable
from pinfm_jax.data.preparation.partition import (
  EventPart,
  RequestPart,
  event_part,
  history_ends,
  request_ids,
  request_part,
)
from pinfm_jax.data.preparation.spool import Spool, plan
from pinfm_jax.data.preparation.stored import StoredUsers
from pinfm_jax.data.preparation.writing import RecordSpool, ShardWriter, write_table
from pinfm_jax.data.records import encode_histories, encode_requests
from pinfm_jax.progress import Progress

_PART_BYTES = 96 << 20
_ROWS_PER_SHARD = 8_000_000


@dataclass(frozen=True)
class Ingested:
  """Everything that reading the files has brought.

  Attributes:
    config: the configuration.
    shared: id types and vocabularies.
    events, impressions: the spooled rows.
    order_only: the log has no times.
    time_known: what is known about the times.
    features: the candidates' features.
    sides: loaded item and user files.
    stored: users of the data set that is appended to, or None.
  """

  config: PrepareConfig
  shared: Shared
  events: Spool
  impressions: Spool
  order_only: bool
  time_known: TimeKnown
  features: Features
  sides: list[SideTable]
  stored: StoredUsers | None = None


@dataclass(frozen=True)
class Assembled:
  """What was written: files, sizes, and what became of the rows (kept, merged, duplicates, cut)."""

  shards: tuple[DataFile, ...]
  tables: tuple[DataFile, ...]
  users: int
  new_users: int
  items: int
  requests: int
  content_width: int
  time_range_ms: tuple[int, int]
  events: Counter[str]
  impressions: Counter[str]


class Assembler:
  """Writes the record files and tables of one data set."""

  def __init__(self, ingested: Ingested, folder: Path, spill: Path):
    """Files go to `folder`, what is only needed on the way to `spill`."""
    self._in, self._config, self._folder = ingested, ingested.config, folder
    self._action_code = ingested.shared.actions.final()[1].tolist()
    self._surface_code = ingested.shared.surfaces.final()[1].astype(np.uint16)
    shards = self._shards(ingested.events)
    self._histories = ShardWriter(folder, 'histories', shards)
    self._shard_last = last_hashes(shards)
    self._request_records = RecordSpool(spill / 'requests.bin')
    self._items = ItemTable()
    self._users: list[pl.DataFrame] = []
    self._requests: list[pl.DataFrame] = []
    self._num_users = self._new_users = 0
    self._times: list[int] = []
    self._event_rows: Counter[str] = Counter()
    self._impression_rows: Counter[str] = Counter()

  def run(self) -> Assembled:
    """Writes everything."""
    spools = [self._in.events, self._in.impressions]
    progress = Progress('write', sum(spool.rows for spool in spools), 'rows')
    done = 0
    for first, last in plan(spools, self._config.partitions, _PART_BYTES):
      done += self._part(first, last)
      progress.update(done)
    shards = self._histories.close()
    tables = [self._write_users()]
    id_type = self._in.shared.id_type['item']
    items, content_width = self._items.finish(self._config, id_type, self._in.time_known, self._in.sides)
    tables.append(write_table(items, self._folder / 'items.parquet'))
    num_requests = 0
    if self._config.impressions:
      request_shards, table = self._write_requests()
      shards += request_shards
      tables.append(table)
      num_requests = table.records
    progress.close(f'{self._num_users} users, {items.height} items, {num_requests} requests')
    return Assembled(
      shards=tuple(shards),
      tables=tuple(tables),
      users=self._num_users,
      new_users=self._new_users,
      items=items.height,
      requests=num_requests,
      content_width=content_width,
      time_range_ms=(min(self._times), max(self._times)) if self._times else (0, 0),
      events=self._event_rows,
      impressions=self._impression_rows,
    )

  def _shards(self, spool: Spool) -> int:
    return number_of_shards(self._config, spool.rows)

  def _part(self, first: int, last: int) -> int:
    """Writes the users of some buckets; returns how many rows that took."""
    rows, shown = self._in.events.read(first, last), self._in.impressions.read(first, last)
    if not rows.height and not shown.height:
      return 0
    requests = None
    if shown.height:
      config = self._config
      truths = list(config.reference_columns)
      requests = request_part(shown, self._in.features, config.labels, truths, self._in.sides, self._surface_code)
    part = event_part(
      rows,
      requests.users if requests else None,
      self._in.order_only,
      self._config.cap,
      self._action_code,
      self._surface_code,
      self._in.stored.next_ordinals if self._in.stored else None,
    )
    rows_U = self._number(part.users['mixed'].to_numpy())
    self._write_histories(part, rows_U)
    if requests:
      self._spool_requests(part, requests, rows_U)
    self._num_users += part.users.height
    return rows.height + shown.height

  def _number(self, mixed: np.ndarray) -> np.ndarray:
    """Rows of users: stored ones keep theirs, the others get the next ones."""
    stored = self._in.stored
    rows = stored.rows(mixed) if stored else np.full(len(mixed), -1)
    new = np.flatnonzero(rows < 0)
    rows[new] = (stored.count if stored else 0) + self._new_users + np.arange(len(new))
    self._new_users += len(new)
    return rows

  def _write_histories(self, part: EventPart, rows_U: np.ndarray) -> None:
    records = encode_histories(part.events, part.offsets)
    shard = np.searchsorted(self._shard_last, part.users['mixed'].to_numpy())
    for number, count in zip(*np.unique(shard, return_counts=True), strict=True):
      self._histories.write(int(number), islice(records, int(count)))
    self._users.append(part.users.drop('mixed').with_columns(pl.Series('user_row', rows_U, pl.UInt32)))
    self._items.add(part.items)
    self._event_rows.update(kept=len(part.events), merged=part.merged, duplicates=part.duplicates, cut=part.cut)
    if len(part.events) and self._in.time_known.histories:
      self._times += [int(part.events.timestamp.min()), int(part.events.timestamp.max())]

  def _spool_requests(self, events: EventPart, part: RequestPart, rows_U: np.ndarray) -> None:
    place, ends = history_ends(events, part)
    rows = rows_U[place]
    if self._in.stored:
      ends = ends + self._in.stored.events(events.users['mixed'].to_numpy())[place]
    self._request_records.append(encode_requests(part.candidates, rows, ends, part.offsets))
    self._requests.append(requests_table(part, self._config.request_by, rows))
    self._items.add(part.items.with_columns(pl.col('first_seen').alias('first_shown')))
    self._impression_rows.update(kept=len(part.candidates), merged=part.merged, duplicates=part.duplicates)
    if self._in.time_known.impressions:
      self._times += [int(part.candidates.timestamp.min()), int(part.candidates.timestamp.max())]

  def _write_users(self) -> DataFile:
    users = users_table(self._users, self._in.stored is not None)
    return write_table(users, self._folder / 'users.parquet')

  def _write_requests(self) -> tuple[list[DataFile], DataFile]:
    """Puts the requests of all parts in the order of their first impressions."""
    table = pl.concat(self._requests)
    order = np.lexsort((table['order'].to_numpy(), table['timestamp'].to_numpy()))
    count = self._shards(self._in.impressions)
    writer = ShardWriter(self._folder, 'requests', count)
    records = self._request_records.read(order)
    for shard in range(count):
      size = len(order) * (shard + 1) // count - len(order) * shard // count
      writer.write(shard, islice(records, size))
    shards = writer.close()
    return shards, write_table(table[order].drop('order'), self._folder / 'requests.parquet')


def number_of_shards(config: PrepareConfig, rows: int) -> int:
  """Record files for so many rows of input, unless the configuration says how many."""
  return config.shards or max(1, math.ceil(rows / _ROWS_PER_SHARD))


def last_hashes(shards: int) -> np.ndarray:
  """The last hash of a user of each shard, uint64 [shards].

  Shards divide the hashes of the users evenly, so that they can be filled before the users are counted.
  """
  return np.array([((shard + 1) << 64) // shards - 1 for shard in range(shards)], np.uint64)


def users_table(parts: list[pl.DataFrame], with_rows: bool = False) -> pl.DataFrame:
  """The table of users as it is stored, from that of every part; `with_rows` for one that is appended."""
  users = pl.concat(parts)
  if 'user_id' not in users.columns:
    users = users.with_columns(pl.col('user_key').reinterpret(signed=True).alias('user_id'))
  names = ['user_key', 'user_id', 'events']
  return users.select(['user_row', *names] if with_rows else names)


def requests_table(part: RequestPart, request_by: str, rows: np.ndarray) -> pl.DataFrame:
  """The table of a part's requests with the rows of their users, not yet in the order of time."""
  table = part.requests.with_columns(request_ids(part.requests, request_by), pl.Series('user_row', rows, pl.UInt32))
  return table.select('request_id', 'user_row', 'timestamp', 'candidates', 'order')
