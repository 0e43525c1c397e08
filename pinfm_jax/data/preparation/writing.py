"""Writes the files of a prepared data set."""

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from array_record.python.array_record_module import ArrayRecordWriter

from pinfm_jax.data.info import DataFile, file_sha256

_WRITER_OPTIONS = 'group_size:1,zstd:1'


class ShardWriter:
  """Writes records into numbered shards, first to last."""

  def __init__(self, folder: Path, kind: str, count: int, only: int | None = None):
    """Starts at the first shard.

    Args:
      folder: where `count` shards KIND-00000-of-0000N.array_record are made, even if some stay empty.
      kind: see folder.
      count: see folder.
      only: make this shard alone.
    """
    first, last = (0, count) if only is None else (only, only + 1)
    self._first, self._current = first, first - 1
    self._paths = [folder / f'{kind}-{i:05}-of-{count:05}.array_record' for i in range(first, last)]
    self._records = [0] * (last - first)
    self._writer: ArrayRecordWriter | None = None

  def write(self, shard: int, records: Iterable[bytes]) -> None:
    """Appends records to a shard; shards are never returned to."""
    self._advance(shard)
    for record in records:
      self._writer.write(record)
      self._records[shard - self._first] += 1

  def close(self) -> list[DataFile]:
    """Finishes all shards and describes them."""
    self._advance(self._first + len(self._paths))
    return [describe(path, records) for path, records in zip(self._paths, self._records, strict=True)]

  def _advance(self, shard: int) -> None:
    while self._current < shard:
      if self._writer is not None:
        self._writer.close()
        self._writer = None
      self._current += 1
      if self._current < self._first + len(self._paths):
        self._writer = ArrayRecordWriter(str(self._paths[self._current - self._first]), _WRITER_OPTIONS)


class RecordSpool:
  """Records on disk that are read back in another order than they were written in."""

  def __init__(self, path: Path):
    """Records are kept in the file `path`."""
    self._path = path
    self._sizes: list[int] = []

  def append(self, records: Iterable[bytes]) -> None:
    """Adds records."""
    with self._path.open('ab') as file:
      for record in records:
        file.write(record)
        self._sizes.append(len(record))

  def read(self, order: np.ndarray) -> Iterator[bytes]:
    """The records in the given order of their numbers."""
    if not len(order):
      return
    ends = np.cumsum(self._sizes)
    with self._path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      for record in order.tolist():
        yield data[int(ends[record]) - self._sizes[record] : int(ends[record])]


def write_table(frame: pl.DataFrame, path: Path) -> DataFile:
  """Writes a table as Parquet and describes it."""
  frame.write_parquet(path, compression='zstd', compression_level=1)
  return describe(path, frame.height)


def describe(path: Path, records: int) -> DataFile:
  """A finished file's name, records, bytes and SHA-256."""
  return DataFile(path.name, records, path.stat().st_size, file_sha256(path))
