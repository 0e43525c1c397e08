"""Where the packed table rows of a bundle come from at serving time: one interface, and memory-mapped local files.

`serve.remote_rows` is the other implementation: row servers on other hosts.
"""

import mmap
from pathlib import Path
from typing import Protocol

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.manifest import TableLayout

_CHUNK_IDS = 4096  # hashed at once: the intermediate arrays stay in a processor's own cache


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

  def rows(self, words: np.ndarray) -> np.ndarray:
    """uint32 id words [..., 2] -> packed uint8 rows [..., S, row_bytes]."""
    layout, ids_N2 = self.layout, words.reshape(-1, 2)
    found = np.empty((len(ids_N2), layout.sub_tables, layout.row_bytes), np.uint8)
    # A repeated id is looked up again: to search for repetitions costs what they cost, since their rows are in cache.
    for start in range(0, len(ids_N2), _CHUNK_IDS):
      part = slice(start, start + _CHUNK_IDS)
      self.numbered(hash_rows(ids_N2[part], layout.sub_tables, layout.rows, layout.hash_seed), found[part])
    return found.reshape(*words.shape[:-1], layout.sub_tables, layout.row_bytes)

  def numbered(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The rows of these numbers, all below S * R: [...] -> packed uint8 [..., row_bytes]."""
    # `take` copies a row at a time, indexing a byte at a time; 'clip' skips a check that hashes do not need.
    return self._packed.take(numbers, axis=0, out=out, mode='clip')
