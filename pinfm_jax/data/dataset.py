"""Reads a prepared data set: histories and requests by row, tables of users, items and requests."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.info import DataFile, DatasetInfo, file_sha256
from pinfm_jax.data.partitions import Partitions
from pinfm_jax.data.records import History, Request, decode_request
from pinfm_jax.data.shards import Shards
from pinfm_jax.errors import UserError

__all__ = ['DatasetInfo', 'History', 'PreparedDataset', 'Request']


class PreparedDataset:
  """A prepared data set, opened for reading.

  Objects are cheap, can be pickled (a worker process opens its own files) and shared between threads.
  """

  def __init__(self, path: str | Path, info: DatasetInfo):
    """Use `PreparedDataset.open`, which checks the files."""
    self.path = Path(path)
    self.info = info
    self.parts = Partitions(self.path, info)
    self._requests = Shards(self.path, info.shard_files('requests'), 'requests')
    self._tables: dict[str, pl.DataFrame] = {}

  @classmethod
  def open(cls, path: str | Path) -> 'PreparedDataset':
    """Opens the data set in the directory `path` and checks that all of its files are whole.

    Raises:
      UserError: no data set there, another format version, or a shard is missing or truncated.
    """
    path = Path(path)
    description = path / 'dataset.json'
    if not description.is_file():
      hint = 'make one with `pinfm prepare`' if not path.exists() else 'it has no dataset.json'
      raise UserError(f'{path} is not a prepared data set: {hint}')
    info = DatasetInfo.read(description)
    for file in (*info.shards, *info.tables):
      _check_size(path / file.name, file)
    dataset = cls(path, info)
    dataset.parts.check()
    dataset._requests.check()
    return dataset

  @property
  def appended(self) -> bool:
    """Whether there is more than the first partition."""
    return len(self.info.partitions) > 1

  @property
  def num_users(self) -> int:
    """Number of users (one history each)."""
    return self.parts.num_users

  @property
  def num_requests(self) -> int:
    """Number of requests (0 for a data set prepared without impressions)."""
    return len(self._requests)

  def history(self, user_row: int) -> History:
    """The events of the user in row `user_row` of `users`, oldest first."""
    return self.parts.history(user_row)

  def request(self, row: int) -> Request:
    """The request in row `row` of `requests`.

    An item whose creation time is unknown counts as created at its first event or impression in the data set, if that
    came strictly before the request's first impression: it is as old as was known then, and of unknown age at its own
    first one.
    """
    return self._with_ages(self._within_cap(self._requests.decode(decode_request, row)))

  def histories(self) -> Iterator[History]:
    """All histories in row order; those of a data set that was not appended to are read ahead in chunks."""
    return self.parts.histories()

  def all_requests(self) -> Iterator[Request]:
    """All requests in row order (by time), read ahead in chunks."""
    return map(self._with_ages, map(self._within_cap, self._requests.decode_all(decode_request)))

  @property
  def users(self) -> pl.DataFrame:
    """user_key u64, user_id, events u32; row i describes history i."""
    return self._table('users.parquet', self.parts.users)

  @property
  def items(self) -> pl.DataFrame:
    """item_key u64 (ascending), item_id, first_seen i64 ms, created_at i64 ms or null, events u64, maybe content."""
    return self._table('items.parquet', self.parts.items)

  @property
  def requests(self) -> pl.DataFrame:
    """request_id, user_row u32, timestamp i64 ms, candidates u32; row i describes request i.

    Raises:
      UserError: the data set was prepared without impressions.
    """
    if not self.info.shard_names('requests'):
      raise UserError(f'{self.path} has no requests: prepare it with impressions (`pinfm prepare --impressions FILE`)')
    return self._table('requests.parquet', self.parts.requests)

  def verify(self) -> None:
    """Reads every file and compares its SHA-256 with the stated one.

    Raises:
      UserError: a file was changed since it was prepared.
    """
    for file in (*self.info.shards, *self.info.tables):
      found = file_sha256(self.path / file.name)
      if found != file.sha256:
        raise UserError(
          f'{self.path / file.name} was changed or damaged: its SHA-256 is {found[:16]}.., expected '
          f'{file.sha256[:16]}..; copy or prepare the data set again'
        )

  def _within_cap(self, request: Request) -> Request:
    """The request with its history's end counted over the events that `history` gives."""
    cut = self.parts.cut(request.user_row) if self.appended else 0
    return replace(request, history_end=max(request.history_end - cut, 0)) if cut else request

  @cached_property
  def _first_seen(self) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the items, ascending, and the time of each one's first event or impression."""
    return self.items['item_key'].to_numpy(), self.items['first_seen'].to_numpy()

  def _with_ages(self, request: Request) -> Request:
    """The request with unknown creation times filled in; the one place where an item's age is decided."""
    if not self.info.time_known.impressions or (request.created_at >= 0).all():
      return request
    keys, first_seen = self._first_seen
    seen = first_seen[np.searchsorted(keys, request.item)]
    known = (request.created_at < 0) & (seen < request.timestamp.min())
    return replace(request, created_at=np.where(known, seen, request.created_at))

  def _table(self, name: str, merged: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    # Two threads may both read the table the first time; the second result simply replaces the first.
    if name not in self._tables:
      self._tables[name] = merged() if self.appended else pl.read_parquet(self.path / name)
    return self._tables[name]

  def __getstate__(self) -> dict:
    return {'path': self.path, 'info': self.info}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['path'], state['info'])

  def __repr__(self) -> str:
    return f'PreparedDataset({str(self.path)!r}: {self.num_users} users, {self.num_requests} requests)'


def _check_size(path: Path, file: DataFile) -> None:
  if not path.is_file():
    raise UserError(f'{path} is missing: copy or prepare the data set again')
  size = path.stat().st_size
  if size != file.bytes:
    kind = 'truncated' if size < file.bytes else 'changed'
    raise UserError(f'{path} is {kind}: {size} bytes, expected {file.bytes}; copy or prepare the data set again')
