"""Where the packed table rows of a bundle come from at serving time: one interface, and memory-mapped local files.

`serve.rows.remote` is the other implementation: row servers on other hosts.
"""

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.manifest import TableLayout

_READERS = 8  # rows that are not in memory wait for the disk, which answers several at once
_LEAST_ROWS = 512  # of a reader: fewer cost less than to hand them over
_MOST_ROWS = 1 << 15  # at once: the intermediate arrays of their hashing stay in a processor's own cache


class RowSource(Protocol):
  """Anything that gives the packed rows of item ids."""

  def rows(self, words: np.ndarray) -> np.ndarray:
    """uint32 id words [..., 2] -> packed uint8 rows [..., S, row_bytes]."""
    ...


class MappedRows:
  """Rows of a local `tables.bin`; only the pages that are touched take memory."""

  def __init__(self, path: Path, layout: TableLayout):
    """Maps the file.

    Raises:
      UserError: the file's size does not fit the layout.
    """
    self.layout = layout
    total = layout.sub_tables * layout.rows
    if path.stat().st_size != total * layout.row_bytes:
      raise UserError(
        f'{path} has {path.stat().st_size} bytes, expected {total} rows of {layout.row_bytes}: export the bundle again'
      )
    with open(path, 'rb') as file:
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, 'MADV_RANDOM'):  # hashed rows have no neighbours worth reading ahead
      mapped.madvise(mmap.MADV_RANDOM)
    self._packed = np.frombuffer(mapped, np.uint8).reshape(total, layout.row_bytes)
    self._readers = ThreadPoolExecutor(_READERS, 'rows')

  def rows(self, words: np.ndarray) -> np.ndarray:
    """uint32 id words [..., 2] -> packed uint8 rows [..., S, row_bytes]."""
    layout, ids_N2 = self.layout, words.reshape(-1, 2)
    found = np.empty((len(ids_N2), layout.sub_tables, layout.row_bytes), np.uint8)

    # A repeated id is looked up again: to search for repetitions costs what they cost, since their rows are in cache.
    def look_up(part: slice) -> None:
      self._copy(hash_rows(ids_N2[part], layout.sub_tables, layout.rows, layout.hash_seed), found[part])

    self._in_parts(len(ids_N2), layout.sub_tables, look_up)
    return found.reshape(*words.shape[:-1], layout.sub_tables, layout.row_bytes)

  def numbered(self, numbers_K: np.ndarray) -> np.ndarray:
    """The rows of these numbers, which must be below S * R: [K] -> packed uint8 [K, row_bytes]."""
    found = np.empty((len(numbers_K), self.layout.row_bytes), np.uint8)
    self._in_parts(len(numbers_K), 1, lambda part: self._copy(numbers_K[part], found[part]))
    return found

  def _copy(self, numbers: np.ndarray, out: np.ndarray) -> None:
    # `take` copies a row at a time, indexing a byte at a time; 'clip' skips a check that these numbers do not need.
    self._packed.take(numbers, axis=0, out=out, mode='clip')

  def _in_parts(self, count: int, rows_each: int, work: Callable[[slice], None]) -> None:
    """Calls `work` for parts of `count` things that have `rows_each` rows each, in several threads if they are many."""
    step = min(max(_LEAST_ROWS, -(-count * rows_each // _READERS)), _MOST_ROWS)
    step = max(1, step // rows_each)
    parts = [slice(start, start + step) for start in range(0, count, step)]
    if len(parts) < 2:
      for part in parts:
        work(part)
    else:
      for done in [self._readers.submit(work, part) for part in parts]:
        done.result()
