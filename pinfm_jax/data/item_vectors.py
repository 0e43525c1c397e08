"""Reads pretrained item vectors in batches: Parquet with an id and a vector column, or two .npy files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from pinfm_jax.data.events import id_keys
from pinfm_jax.errors import UserError

_BATCH = 1 << 16
_FLOATS = (pl.Float32, pl.Float64)


class ItemVectors(Protocol):
  """Vectors of items, in an order that stays.

  Attributes:
    count: how many there are.
    width: W.
    id_type: 'integer' or 'string'.
  """

  count: int
  width: int
  id_type: str

  def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys uint64 [n] and vectors float32 [n, W], finite; raises UserError."""


def open_item_vectors(
  path: str | Path,
  ids: str | Path | None = None,
  id_column: str = 'item_id',
  vector_column: str = 'vector',
  id_type: str | None = None,
) -> ItemVectors:
  """Opens a file of vectors.

  Args:
    path: Parquet, or .npy with [n, W] floats.
    ids: for .npy, a second .npy with the n ids, integers or text.
    id_column: of Parquet.
    vector_column: of Parquet: lists or arrays of one width.
    id_type: 'integer' or 'string'; None = as they are stored.

  Raises:
    UserError: a file, a column or its type is not as expected.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'{path}: no such file; expected item vectors, Parquet or .npy')
  if path.suffix == '.npy':
    if ids is None:
      raise UserError(f'{path} has no ids: give a .npy file of as many ids with --ids')
    return _Npy(path, Path(ids), id_type)
  if ids is not None:
    raise UserError(f'--ids belongs to vectors in .npy; the ids of {path} are its column {id_column!r} (--id-column)')
  return _Parquet(path, id_column, vector_column, id_type)


class _Npy:
  def __init__(self, path: Path, ids: Path, id_type: str | None):
    self._path, self._vectors, self._ids = path, _mapped(path), _mapped(ids)
    if self._vectors.ndim != 2 or self._vectors.dtype.kind != 'f' or 0 in self._vectors.shape:
      raise UserError(f'{path} holds {_words(self._vectors)}, expected floats [items, width]')
    if self._ids.shape != self._vectors.shape[:1] or self._ids.dtype.kind not in 'iuU':
      raise UserError(f'{ids} holds {_words(self._ids)}, expected {len(self._vectors)} ids, integers or text')
    self.count, self.width = self._vectors.shape
    self.id_type = id_type or ('string' if self._ids.dtype.kind == 'U' else 'integer')

  def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `ItemVectors`."""
    for start in range(0, self.count, _BATCH):
      rows = slice(start, start + _BATCH)
      keys = id_keys(pl.Series(np.asarray(self._ids[rows])), self.id_type)
      yield keys, _finite(np.asarray(self._vectors[rows], np.float32), self._path, start)


class _Parquet:
  def __init__(self, path: Path, id_column: str, vector_column: str, id_type: str | None):
    self._path, self._names = path, [id_column, vector_column]
    try:
      schema = pl.scan_parquet(path, glob=False).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
      raise UserError(f'{path} cannot be read as Parquet ({str(error).splitlines()[0]})') from None
    for name, option in zip(self._names, ('--id-column', '--vector-column'), strict=True):
      if name not in schema:
        raise UserError(f'{path} has no column {name!r}, it has {", ".join(schema)}: name it with {option}')
    ids, vectors = schema[id_column], schema[vector_column]
    inner = getattr(vectors, 'inner', None)
    if not isinstance(vectors, pl.List | pl.Array) or inner not in _FLOATS:
      raise UserError(f'{path}: {vector_column} is {vectors}, expected lists of float32 or float64')
    if not ids.is_integer() and ids != pl.String:
      raise UserError(f'{path}: {id_column} is {ids}, expected integers or text')
    self.id_type = id_type or ('string' if ids == pl.String else 'integer')
    scan = pl.scan_parquet(path, glob=False)
    lengths = pl.col(vector_column).len() if isinstance(vectors, pl.Array) else pl.col(vector_column).list.len()
    self.count = scan.select(pl.len()).collect().item()
    if not self.count:
      raise UserError(f'{path} holds no vectors')
    self.width = vectors.size if isinstance(vectors, pl.Array) else scan.select(lengths).head(1).collect().item()
    if not self.width:
      raise UserError(f'{path}: the first {vector_column} is empty or missing, expected one of the width of all')

  def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `ItemVectors`."""
    wanted = pl.Array(pl.Float32, self.width)
    for start in range(0, self.count, _BATCH):
      frame = pl.scan_parquet(self._path, glob=False).select(self._names).slice(start, _BATCH).collect()
      try:
        vectors = frame[self._names[1]].cast(wanted)
      except pl.exceptions.PolarsError:
        raise UserError(
          f'{self._path}: not all vectors of rows {start} to {start + len(frame) - 1} have the width {self.width}'
        ) from None
      missing = vectors.is_null()
      if missing.any():
        raise UserError(f'{self._path}: row {start + missing.arg_max()} has no vector; leave such items out')
      try:
        keys = id_keys(frame[self._names[0]], self.id_type)
      except UserError as error:
        raise UserError(f'{self._path}: {error}') from None
      yield keys, _finite(vectors.to_numpy(), self._path, start)


def _mapped(path: Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read as .npy ({str(error).splitlines()[0]})') from None


def _finite(vectors_NW: np.ndarray, path: Path, start: int) -> np.ndarray:
  wrong = ~np.isfinite(vectors_NW).all(axis=1)
  if wrong.any():
    raise UserError(f'{path}: the vector of row {start + int(wrong.argmax())} has NaN or infinite values; leave it out')
  return vectors_NW


def _words(array: np.ndarray) -> str:
  return f'{array.dtype}{list(array.shape)}'
