"""Reads a checkpoint's tables in blocks of rows, however large they are: for the export, which needs each row once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from pinfm_jax.errors import UserError

BLOCK_ROWS = 1 << 16
CHUNK_BYTES = 64 << 20


def chunked_saves() -> ocp.Context:
  """How checkpoints are saved: arrays in pieces of at most 64 MiB, the least that a reader must hold.

  A piece is compressed as a whole; unless told otherwise, Orbax makes one of a device's whole part of a table.
  """
  context = ocp.Context()
  context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  return context


class StoredState:
  """The newest checkpoint in a directory, opened for reading a part of it."""

  def __init__(self, directory: Path):
    """Opens the checkpoint.

    Raises:
      UserError: there is none.
    """
    self._directory = Path(directory).absolute()
    if not self._directory.is_dir():
      raise UserError(f'{directory} has no checkpoints; run the stage that trains it first')
    with ocp.training.Checkpointer(self._directory) as checkpointer:
      if checkpointer.latest is None:
        raise UserError(f'{directory} has no checkpoints; run the stage that trains it first')
      self.step = checkpointer.latest.step
      self._layout = checkpointer.checkpointables_metadata(self.step).metadata['state']

  @property
  def has_tables(self) -> bool:
    """Whether the model has item tables."""
    return 'tables' in self._layout

  def parts(self, *names: str) -> dict[str, Any]:
    """Some top-level parts of the state ('params', 'constants', ..), as nested dicts of NumPy arrays."""

    def wanted(name: str, tree: Any) -> Any:
      # Abstract NumPy arrays ask Orbax for host memory; `empty` touches no page.
      return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype) if name in names else ..., tree)

    abstract = {name: wanted(name, tree) for name, tree in self._layout.items()}
    with ocp.training.Checkpointer(self._directory) as checkpointer:
      state = checkpointer.load_checkpointables(self.step, {'state': abstract})['state']
    return {name: state[name] for name in names if name in self._layout}

  def table_rows(self, count: int, block_rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
    """The first `count` rows of the tables in order, as stored (float32, or bf16 as uint16 bits).

    Besides the block, one stored piece is in memory: 64 MiB, or a device's part of the table in a checkpoint that was
    saved without `chunked_saves`.

    Args:
      count: how many rows; the padding behind them is left out.
      block_rows: rows of a block, at most.

    Yields:
      Blocks [rows, E].
    """
    path = self._directory / str(self.step) / 'state'
    spec = {'driver': 'zarr3', 'kvstore': {'driver': 'ocdbt', 'base': path.as_uri(), 'path': 'tables.rows'}}
    table = tensorstore.open(spec, open=True, read=True).result()
    if table.shape[0] < count:
      raise UserError(
        f'{path} has {table.shape[0]} table rows, the model {count}: use the settings it was trained with'
      )
    piece = table.chunk_layout.read_chunk.shape[0]
    # Whole pieces, since reading any row of one decompresses all of it.
    step = piece * max(1, block_rows // piece)
    for start in range(0, count, step):
      block_GE = table[start : min(start + step, count)].read().result()
      for first in range(0, len(block_GE), block_rows):
        yield block_GE[first : first + block_rows]
