"""Reads a prepared data set: histories and requests by row, tables of users, items and requests."""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
from array_record.python.array_record_module import ArrayRecordReader

from pinfm_jax.data.info import DataFile, DatasetInfo
from pinfm_jax.data.records import History, Request, decode_history, decode_request
from pinfm_jax.errors import UserError

__all__ = ['DatasetInfo', 'History', 'PreparedDataset', 'Request', 'file_sha256']

_RANDOM_ACCESS = 'readahead_buffer_size:0,max_parallelism:0'
_CHUNK_RECORDS = 4096
_CHUNK_BYTES = 32 << 20


class PreparedDataset:
  """A prepared data set, opened for reading.

  Objects are cheap, can be pickled (a worker process opens its own files) and shared between threads.
  """

  def __init__(self, path: str | Path, info: DatasetInfo):
    """Use `PreparedDataset.open`, which checks the files."""
    self.path = Path(path)
    self.info = info
    self._histories = _Shards(self.path, info, 'histories')
    self._requests = _Shards(self.path, info, 'requests')
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
    dataset._histories.check()
    dataset._requests.check()
    return dataset

  @property
  def num_users(self) -> int:
    """Number of users (history records)."""
    return len(self._histories)

  @property
  def num_requests(self) -> int:
    """Number of requests (0 for a data set prepared without impressions)."""
    return len(self._requests)

  def history(self, user_row: int) -> History:
    """The events of the user in row `user_row` of `users`, oldest first."""
    return self._histories.decode(decode_history, user_row)

  def request(self, row: int) -> Request:
    """The request in row `row` of `requests`."""
    return self._requests.decode(decode_request, row)

  def histories(self) -> Iterator[History]:
    """All histories in row order, read ahead in chunks."""
    return self._histories.decode_all(decode_history)

  def all_requests(self) -> Iterator[Request]:
    """All requests in row order (by time), read ahead in chunks."""
    return self._requests.decode_all(decode_request)

  @property
  def users(self) -> pl.DataFrame:
    """user_key u64, user_id, events u32; row i describes history i."""
    return self._table('users.parquet')

  @property
  def items(self) -> pl.DataFrame:
    """item_key u64 (ascending), item_id, first_seen i64 ms, created_at i64 ms or null, events u64, maybe content."""
    return self._table('items.parquet')

  @property
  def requests(self) -> pl.DataFrame:
    """request_id, user_row u32, timestamp i64 ms, candidates u32; row i describes request i.

    Raises:
      UserError: the data set was prepared without impressions.
    """
    if not self.info.shard_names('requests'):
      raise UserError(f'{self.path} has no requests: prepare it with impressions (`pinfm prepare --impressions FILE`)')
    return self._table('requests.parquet')

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

  def _table(self, name: str) -> pl.DataFrame:
    # Two threads may both read the table the first time; the second result simply replaces the first.
    if name not in self._tables:
      self._tables[name] = pl.read_parquet(self.path / name)
    return self._tables[name]

  def __getstate__(self) -> dict:
    return {'path': self.path, 'info': self.info}

  def __setstate__(self, state: dict) -> None:
    self.__init__(state['path'], state['info'])

  def __repr__(self) -> str:
    return f'PreparedDataset({str(self.path)!r}: {self.num_users} users, {self.num_requests} requests)'


class _Shards:
  """The records of one kind, numbered over the shards in order; files are opened when first needed."""

  def __init__(self, path: Path, info: DatasetInfo, kind: str):
    names = set(info.shard_names(kind))
    self._files = [file for file in info.shards if file.name in names]
    self._paths = [path / file.name for file in self._files]
    self._ends = list(itertools.accumulate(file.records for file in self._files))
    self._readers: list[ArrayRecordReader | None] = [None] * len(self._files)
    self._kind = kind

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def check(self) -> None:
    for shard, file in enumerate(self._files):
      try:
        found = self._reader(shard).num_records()
      except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(self._paths[shard], str(error)) from None
      if found != file.records:
        raise _damaged(self._paths[shard], f'it holds {found} records, expected {file.records}')

  def decode(self, decoder: Callable[[bytes], object], row: int):  # noqa: ANN201 (History or Request)
    row = int(row)
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} is outside the {len(self)} {self._kind} of the data set')
    shard = bisect.bisect_right(self._ends, row)
    position = row - (self._ends[shard] - self._files[shard].records)
    try:
      # A range read runs in this thread; read([i]) would start a thread pool (600 us instead of 4).
      return decoder(self._reader(shard).read(position, position + 1)[0])
    except (RuntimeError, ValueError, IndexError) as error:
      raise _damaged(self._paths[shard], f'record {position}: {error}') from None

  def decode_all(self, decoder: Callable[[bytes], object]) -> Iterator:
    for shard, file in enumerate(self._files):
      step = max(1, min(_CHUNK_RECORDS, _CHUNK_BYTES * file.records // max(file.bytes, 1)))
      for start in range(0, file.records, step):
        try:
          decoded = [decoder(record) for record in self._reader(shard).read(start, min(start + step, file.records))]
        except (RuntimeError, ValueError, IndexError) as error:
          raise _damaged(self._paths[shard], f'records from {start}: {error}') from None
        yield from decoded

  def _reader(self, shard: int) -> ArrayRecordReader:
    # Range reads are thread-safe; two threads may both open the file the first time, which is harmless.
    reader = self._readers[shard]
    if reader is None:
      reader = self._readers[shard] = ArrayRecordReader(str(self._paths[shard]), _RANDOM_ACCESS)
    return reader


def file_sha256(path: Path) -> str:
  """SHA-256 of a file, as hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _check_size(path: Path, file: DataFile) -> None:
  if not path.is_file():
    raise UserError(f'{path} is missing: copy or prepare the data set again')
  size = path.stat().st_size
  if size != file.bytes:
    kind = 'truncated' if size < file.bytes else 'changed'
    raise UserError(f'{path} is {kind}: {size} bytes, expected {file.bytes}; copy or prepare the data set again')


def _damaged(path: Path, why: str) -> UserError:
  reason = why.splitlines()[0][:200] if why else 'it cannot be read'
  return UserError(f'{path} is damaged: {reason}; copy or prepare the data set again')
