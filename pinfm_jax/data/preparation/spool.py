"""Rows on disk in runs sorted by a hash of the user, to be read back part by part, however large the log.

The hash orders the users: all of a data set's files follow it, so the number of parts never shows in the result.
"""

from pathlib import Path

import numpy as np
import polars as pl

BUCKETS = 4096
_RUN_BYTES = 96 << 20
_BATCH_ROWS = 65_536


def mix(keys: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64: a one-to-one scrambling of uint64 keys, so that no two users are ever equal."""
  x = keys.astype(np.uint64, copy=True)
  x ^= x >> np.uint64(30)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(27)
  x *= np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return x


class Spool:
  """An append-only set of rows with a `user_key` column, readable by ranges of users."""

  def __init__(self, folder: Path, name: str):
    """Rows are kept in the files `folder/name-*.ipc`."""
    self._folder, self._name = folder, name
    self._waiting: list[pl.DataFrame] = []
    self._waiting_bytes = 0
    self._starts: list[np.ndarray] = []
    self._schema: dict[str, pl.DataType] = {}
    self.rows = 0
    self.bytes = 0

  def append(self, frame: pl.DataFrame) -> None:
    """Adds rows; they reach the disk in runs of about 100 MB."""
    if frame.is_empty():
      return
    self._schema = dict(frame.schema)
    self._waiting.append(frame)
    size = int(frame.estimated_size())
    self._waiting_bytes += size
    self.bytes += size
    self.rows += frame.height
    if self._waiting_bytes >= _RUN_BYTES:
      self.flush()

  def flush(self) -> None:
    """Writes what is still in memory."""
    if not self._waiting:
      return
    frame = pl.concat(self._waiting)
    self._waiting, self._waiting_bytes = [], 0
    bucket = bucket_of(mix(frame['user_key'].to_numpy()))
    sorted_frame = frame[np.argsort(bucket, kind='stable')]
    sorted_frame.write_ipc(self._path(len(self._starts)), record_batch_size=_BATCH_ROWS)
    self._starts.append(np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=BUCKETS))]))

  def bucket_rows(self) -> np.ndarray:
    """int64 [BUCKETS]: how many rows lie in each bucket of users."""
    return sum((np.diff(starts) for starts in self._starts), np.zeros(BUCKETS, np.int64))

  def read(self, first: int, last: int) -> pl.DataFrame:
    """The rows of the buckets first <= b < last with their user hash `mixed`, in no particular order."""
    parts = []
    for run, starts in enumerate(self._starts):
      offset, count = int(starts[first]), int(starts[last] - starts[first])
      if count:
        parts.append(pl.scan_ipc(self._path(run)).slice(offset, count).collect())
    frame = pl.concat(parts) if parts else pl.DataFrame(schema=self._schema or {'user_key': pl.UInt64})
    return frame.with_columns(pl.Series('mixed', mix(frame['user_key'].to_numpy()), pl.UInt64))

  def _path(self, run: int) -> Path:
    return self._folder / f'{self._name}-{run:05}.ipc'


def plan(spools: list[Spool], partitions: int | None, part_bytes: int) -> list[tuple[int, int]]:
  """Ranges of buckets that are processed one after the other.

  Args:
    spools: what will be read for every range.
    partitions: how many ranges, or None to let each hold about `part_bytes`.
    part_bytes: see partitions.

  Returns:
    (first, last) of every range, covering all buckets in order.
  """
  if partitions is not None:
    edges = np.linspace(0, BUCKETS, min(partitions, BUCKETS) + 1).astype(int).tolist()
    return list(zip(edges, edges[1:], strict=False))
  weight = np.zeros(BUCKETS)
  for spool in spools:
    weight += spool.bucket_rows() * (spool.bytes / max(spool.rows, 1))
  ranges, first, held = [], 0, 0.0
  for bucket in range(BUCKETS):
    if held and held + weight[bucket] > part_bytes:
      ranges.append((first, bucket))
      first, held = bucket, 0.0
    held += weight[bucket]
  return [*ranges, (first, BUCKETS)]


def bucket_of(mixed: np.ndarray) -> np.ndarray:
  """The bucket of each user, from its hash."""
  return (mixed >> np.uint64(64 - 12)).astype(np.uint16)
