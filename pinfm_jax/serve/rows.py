"""Where the packed table rows of a bundle come from at serving time: one interface, and memory-mapped local files."""

from pathlib import Path
from typing import Protocol

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows
from pinfm_jax.serve.manifest import TableLayout


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
    self._layout = layout
    total = layout.sub_tables * layout.rows
    if path.stat().st_size != total * layout.row_bytes:
      raise UserError(
        f'{path} has {path.stat().st_size} bytes, expected {total} rows of {layout.row_bytes}: export the bundle again'
      )
    # A plain array over the map: indexing a np.memmap returns memmaps, which is slower and means nothing here.
    self._packed = np.asarray(np.memmap(path, np.uint8, 'r', shape=(total, layout.row_bytes)))

  def rows(self, words: np.ndarray) -> np.ndarray:
    """uint32 id words [..., 2] -> packed uint8 rows [..., S, row_bytes]."""
    layout = self._layout
    return self._packed[hash_rows(words, layout.sub_tables, layout.rows, layout.hash_seed)]
