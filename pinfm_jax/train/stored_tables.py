"""Reads a checkpoint's tables in blocks of rows, however large they are, to where they train or are exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import AxisType, Mesh
from orbax.checkpoint import v1 as ocp

from pinfm_jax.config import TableConfig
from pinfm_jax.errors import UserError
from pinfm_jax.train.alone import newest, reading_alone

BLOCK_ROWS = 1 << 16
CHUNK_BYTES = 64 << 20


def chunked_saves() -> ocp.Context:
  """How checkpoints are saved: arrays in pieces of at most 64 MiB, the least that a reader must hold.

  Unless told otherwise, Orbax makes one piece of a device's whole part of a table. Nothing is compressed: the low bits
  of trained rows are noise, so zstd gains a quarter of their size for some ten times the time.
  """
  context = ocp.Context()
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  return context


def read_sharded(path: Path, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
  """An array of a checkpoint in its sharding, read a block at a time into memory that is there once.

  Args:
    path: of the checkpoint.
    name: of the array in the state, its parts joined by dots.
    wanted: shape, type and sharding.
  """
  stored = _open_array(path, name)
  if stored.shape != wanted.shape or stored.dtype.numpy_dtype != wanted.dtype:
    raise ValueError(f'{name} is {stored.dtype.name}{list(stored.shape)}, expected {wanted}')
  fill = jax.jit(
    lambda whole, block, start: jax.lax.dynamic_update_slice_in_dim(whole, block, start, 0), donate_argnums=0
  )
  step = max(1, CHUNK_BYTES // max(1, stored.dtype.numpy_dtype.itemsize * int(np.prod(stored.shape[1:]))))
  parts = []
  for device, index in wanted.sharding.addressable_devices_indices_map(wanted.shape).items():
    first, last, _ = index[0].indices(wanted.shape[0])
    # A program for one device does not run under the mesh of the whole state that the caller has set.
    with jax.set_mesh(Mesh(np.array([device]), ('device',), axis_types=(AxisType.Auto,))):
      part = jnp.zeros((last - first, *wanted.shape[1:]), wanted.dtype, device=device)
      for start in range(first, last, step):
        block = stored[start : min(start + step, last)].read().result()
        part = fill(part, jax.device_put(block, device), start - first)
        part.block_until_ready()  # the next block may then reuse this one's memory
    parts.append(part)
  return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)


def _open_array(path: Path, name: str) -> tensorstore.TensorStore:
  """An array of a checkpoint as Orbax lays it out."""
  spec = {'driver': 'zarr3', 'kvstore': {'driver': 'ocdbt', 'base': (path / 'state').as_uri(), 'path': name}}
  return tensorstore.open(spec, open=True, read=True).result()


class StoredState:
  """A checkpoint in a directory, opened for reading a part of it. One process may do so (`reading_alone`)."""

  def __init__(self, directory: Path, step: int | None = None):
    """Opens the checkpoint of a step; None = the newest.

    Raises:
      UserError: there is none.
    """
    self._path = newest(directory) if step is None else directory.absolute() / str(step)
    with reading_alone():
      self._layout = ocp.checkpointables_metadata(self._path).metadata['state']

  @property
  def has_tables(self) -> bool:
    """Whether the model has item tables."""
    return 'tables' in self._layout

  def parts(self, *names: str) -> dict[str, Any]:
    """Some top-level parts of the state ('params', 'constants', ..), as nested dicts of NumPy arrays.

    Where averages of the weights were kept, 'params' are these: what every later stage uses.
    """
    averaged = 'params' in names and 'average' in self._layout
    read = [*(name for name in names if not (averaged and name == 'params')), *(['average'] if averaged else [])]

    def wanted(name: str, tree: Any) -> Any:
      # Abstract NumPy arrays ask Orbax for host memory; `empty` touches no page.
      return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype) if name in read else ..., tree)

    abstract = {name: wanted(name, tree) for name, tree in self._layout.items()}
    with reading_alone():
      state = ocp.load_checkpointables(self._path, {'state': abstract})['state']
    found = {name: state[name] for name in names if name in self._layout}
    return found | ({'params': state['average']['params']} if averaged else {})

  def table(self, config: TableConfig) -> np.ndarray:
    """All rows of the model's tables [S * R, E] in memory; see `table_rows`."""
    return np.concatenate(list(self.table_rows(config.sub_tables * config.rows)))

  def table_rows(self, count: int, block_rows: int = BLOCK_ROWS) -> Iterator[np.ndarray]:
    """The first `count` rows of the tables in order, as stored (float32, or bf16 as uint16 bits); averages if kept.

    Besides the block, one stored piece is in memory: 64 MiB, or a device's part of the table in a checkpoint that was
    saved without `chunked_saves`.

    Args:
      count: how many rows; the padding behind them is left out.
      block_rows: rows of a block, at most.

    Yields:
      Blocks [rows, E].
    """
    path = self._path
    averaged = 'rows' in (self._layout or {}).get('average', {})
    table = _open_array(path, 'average.rows' if averaged else 'tables.rows')
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
