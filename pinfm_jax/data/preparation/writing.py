"""Writes the files of a prepared data set, and makes the directory appear all at once."""

import contextlib
import fcntl
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from array_record.python.array_record_module import ArrayRecordWriter

from pinfm_jax.data.info import DataFile, file_sha256
from pinfm_jax.errors import UserError

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


@contextlib.contextmanager
def atomic_directory(out: Path, overwrite: bool) -> Iterator[Path]:
  """Gives an empty directory beside `out` that becomes `out` if the block succeeds, and vanishes if it does not.

  What a killed run left behind is removed by the next one: a run holds a lock on its directory while it lives.

  Raises:
    UserError: `out` exists and may not be replaced, or is not writable.
  """
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    check_free(out, overwrite)
    partial = out.with_name(f'{out.name}.partial-{uuid.uuid4().hex[:8]}')
    partial.mkdir()
  except OSError as error:
    raise UserError(f'{out.parent} cannot be written to ({error.strerror}): choose another place') from None
  lock = os.open(partial, os.O_RDONLY)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield partial
    check_free(out, overwrite)
    replaced = out.with_name(f'{partial.name}.old')
    if out.exists():
      out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  finally:
    os.close(lock)


def check_free(out: Path, overwrite: bool) -> None:
  """Raises UserError if `out` exists, unless it is an empty directory, or a data set that may be replaced."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not overwrite:
    raise UserError(f'{out} exists already: choose another directory, or say overwrite')
  if not (out / 'dataset.json').is_file():
    raise UserError(f'{out} is not a prepared data set, so it is not overwritten: remove it yourself')


def _remove_stale(out: Path) -> None:
  for partial in out.parent.glob(f'{out.name}.partial-*'):
    if not partial.is_dir():
      continue
    if partial.suffix == '.old' and not out.exists():
      partial.rename(out)  # that run was killed after moving the old data set away, before the new one took its place
      continue
    lock = os.open(partial, os.O_RDONLY)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError:
      pass  # another run is writing it
    finally:
      os.close(lock)
