"""Random access to the records of one kind, numbered over their shards in order."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from pinfm_jax.data.info import DataFile
from pinfm_jax.errors import UserError

_RANDOM_ACCESS = 'readahead_buffer_size:0,max_parallelism:0'
_CHUNK_RECORDS = 4096
_CHUNK_BYTES = 32 << 20


class Shards:
  """The records of one kind, numbered over the shards in order; files are opened when first needed."""

  def __init__(self, path: Path, files: Sequence[DataFile], kind: str):
    """`files` lie below the data set's directory `path`; `kind` names the records in messages."""
    self._files = list(files)
    self._paths = [path / file.name for file in self._files]
    self._ends = list(itertools.accumulate(file.records for file in self._files))
    self._readers: list[ArrayRecordReader | None] = [None] * len(self._files)
    self._kind = kind

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def check(self) -> None:
    """Raises UserError unless every shard holds the stated number of records."""
    for shard, file in enumerate(self._files):
      try:
        found = self._reader(shard).num_records()
      except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(self._paths[shard], str(error)) from None
      if found != file.records:
        raise _damaged(self._paths[shard], f'it holds {found} records, expected {file.records}')

  def decode(self, decoder: Callable[[bytes], object], row: int):  # noqa: ANN201 (History or Request)
    """What `decoder` makes of record `row`.

    Raises:
      IndexError: there is no such record.
      UserError: the record cannot be read.
    """
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
    """All records in order, read ahead in chunks."""
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


def _damaged(path: Path, why: str) -> UserError:
  reason = why.splitlines()[0][:200] if why else 'it cannot be read'
  return UserError(f'{path} is damaged: {reason}; copy or prepare the data set again')
