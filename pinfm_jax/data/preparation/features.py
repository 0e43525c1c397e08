"""Sparse features as indices (the one rule of preparation and serving), and the features of items and of users."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.events import keys_of
from pinfm_jax.data.info import SparseFeature
from pinfm_jax.data.preparation.canonical import (
  Field,
  category_field,
  id_field,
  number_field,
  sniff_time_unit,
  split,
  time_field,
  vector_field,
  vector_list,
)
from pinfm_jax.data.preparation.columns import source_column
from pinfm_jax.data.preparation.reading import column_names, read_batches
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.errors import UserError

VOCABULARY_LIMIT = 10_000
HASH_BUCKETS = 131_072
DENSE, SPARSE, EMBEDDING = 'dense:', 'sparse:', 'embedding:'


def encode_sparse(feature: SparseFeature, value: object) -> int:
  """The index of one value of a sparse feature.

  Args:
    feature: the feature as `dataset.json` describes it.
    value: a string, or a number or bool, which stands for its text ('true', '3', '1.5'); None, '' or NaN: missing.

  Returns:
    0 if the value is missing or not in the vocabulary, else 1 .. feature.size - 1.
  """
  if value is None or value == '' or value != value:
    return 0
  text = str(value).lower() if isinstance(value, bool | np.bool_) else str(value)
  if feature.values is None:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, 'little') % (feature.size - 1)
  return feature.codes.get(text, 0)


def encode_sparse_column(feature: SparseFeature, texts: pl.Series) -> np.ndarray:
  """`encode_sparse` of a column of strings, int32; each distinct value is encoded once."""
  distinct = texts.drop_nulls().unique()
  if distinct.is_empty():
    return np.zeros(len(texts), np.int32)
  codes = pl.Series([encode_sparse(feature, value) for value in distinct.to_list()], dtype=pl.Int32)
  return texts.replace_strict(distinct, codes, default=0, return_dtype=pl.Int32).to_numpy()


class SparseCollector:
  """Meets the values of a sparse feature batch by batch and says how it is encoded."""

  def __init__(self, name: str, grown: SparseFeature | None = None):
    """Starts empty, or with the feature `grown` whose codes stay."""
    self._name, self._grown = name, grown
    self._values: set[str] = set()

  @property
  def values(self) -> list[str]:
    """The values met so far; beyond the limit not all of them."""
    return sorted(self._values)

  def add(self, texts: pl.Series) -> None:
    """Takes a column of strings."""
    if len(self._values) <= VOCABULARY_LIMIT:
      self._values.update(texts.drop_nulls().unique().to_list())

  def feature(self) -> SparseFeature:
    """A vocabulary, or hashed buckets if more than VOCABULARY_LIMIT values were met.

    A vocabulary that grows keeps its codes and takes the new values behind them, up to the limit; what is beyond it
    counts as unknown, which is said on stderr.
    """
    if self._grown is not None:
      return self._grown if self._grown.values is None else self._appended()
    if len(self._values) > VOCABULARY_LIMIT:
      return SparseFeature(self._name, 'hashed', HASH_BUCKETS)
    return SparseFeature(self._name, 'vocabulary', len(self._values) + 1, tuple(sorted(self._values)))

  def _appended(self) -> SparseFeature:
    old = self._grown.values
    new = sorted(self._values.difference(old))
    room = max(VOCABULARY_LIMIT - len(old), 0)
    if len(new) > room:
      sys.stderr.write(
        f'{self._name}: {len(new) - room} or more new values count as unknown, a vocabulary holds {VOCABULARY_LIMIT}; '
        'prepare all logs together to have it hashed\n'
      )
    values = (*old, *new[:room])
    return SparseFeature(self._name, 'vocabulary', len(values) + 1, values)


def feature_fields(
  names: Mapping[str, Sequence[str]],
  columns: Mapping[str, str],
  schema: Mapping[str, pl.DataType],
  widths: dict[str, int],
) -> dict[str, Field]:
  """How the features of a file are read; their columns are named 'dense:NAME', 'sparse:NAME', 'embedding:NAME'.

  Args:
    names: kind (DENSE, SPARSE, EMBEDDING) -> features of this file.
    columns: feature -> source column.
    schema: types of the source columns.
    widths: embedding feature -> width.
  """
  made: dict[str, Field] = {}
  for name in names[DENSE]:
    made[DENSE + name] = number_field(columns[name], schema[columns[name]], name)
  for name in names[SPARSE]:
    made[SPARSE + name] = category_field(columns[name])
  for name in names[EMBEDDING]:
    made[EMBEDDING + name] = vector_field(columns[name], schema[columns[name]], widths[name], name)
  return made


def vector_width(frame: pl.DataFrame, column: str, what: str) -> int:
  """The width of a vector column: that of its first vector.

  Raises:
    UserError: there is none.
  """
  lengths = frame.select(vector_list(column, frame.schema[column]).list.len()).to_series().drop_nulls()
  if lengths.is_empty() or not lengths[0]:
    raise UserError(f'{what} (column {column!r}) has no vector in {frame.height} rows: is it the right column?')
  return int(lengths[0])


@dataclass(frozen=True)
class SideTable:
  """Features of items (or of users) by key.

  Attributes:
    key: 'item_key' or 'user_key'.
    frame: key, unique; created_at (items); dense, encoded sparse and embedding columns.
    sparse: feature name -> how it was encoded.
    widths: embedding feature -> width.
  """

  key: str
  frame: pl.DataFrame
  sparse: Mapping[str, SparseFeature]
  widths: Mapping[str, int]


def load_side_table(
  path: Path,
  who: str,
  id_type: str,
  mapping: Mapping[str, str],
  names: Mapping[str, Sequence[str]],
  rejects: RejectLog,
  grown: Mapping[str, SparseFeature] | None = None,
) -> SideTable:
  """Reads an item or user file whole; of an id's several rows the first counts.

  Args:
    path: the file.
    who: 'item' or 'user'.
    id_type: how the ids are spelled in the log.
    mapping: canonical name -> source column.
    names: kind -> features to read from this file.
    rejects: takes the malformed rows.
    grown: sparse features whose codes stay, when a data set is appended to.

  Raises:
    UserError: the file cannot be read or lacks a column.
  """
  header = column_names(path)
  wanted = [name for kind in names.values() for name in kind]
  columns = {name: source_column(path, header, mapping, name) for name in (f'{who}_id', *wanted)}
  created = source_column(path, header, mapping, 'created_at', required=False) if who == 'item' else None
  collectors = {name: SparseCollector(name, (grown or {}).get(name)) for name in names[SPARSE]}
  widths: dict[str, int] = {}
  unit, frames = None, []
  for batch in read_batches(path, [*columns.values(), *([created] if created else [])]):
    schema = batch.frame.schema
    if batch.frame.height and not frames:
      widths = {name: vector_width(batch.frame, columns[name], name) for name in names[EMBEDDING]}
      unit = sniff_time_unit(batch.frame[created], 'created_at') if created else None
    fields = {f'{who}_id': id_field(columns[f'{who}_id'], schema[columns[f'{who}_id']], id_type, f'{who}_id')}
    if created:
      fields['created_at'] = time_field(created, schema[created], unit or 'ms', 'created_at', optional=True)
    good, reasons = split(batch.frame, {**fields, **feature_fields(names, columns, schema, widths)})
    rejects.take(f'{who}s', batch, reasons)
    for name, collector in collectors.items():
      collector.add(good[SPARSE + name])
    frames.append(good.with_columns(keys_of(good[f'{who}_id'], id_type).alias(f'{who}_key')).drop(f'{who}_id'))
  rejects.check(f'{who}s')
  if not frames:
    raise UserError(f'{path} has no rows: expected one row for every {who}')
  frame = pl.concat(frames).unique(f'{who}_key', keep='first', maintain_order=True)
  sparse = {name: collector.feature() for name, collector in collectors.items()}
  coded = [pl.Series(SPARSE + n, encode_sparse_column(f, frame[SPARSE + n]), pl.Int32) for n, f in sparse.items()]
  return SideTable(f'{who}_key', frame.with_columns(coded), sparse, widths)


def load_content(path: Path, id_type: str, mapping: Mapping[str, str], keys: pl.Series) -> pl.DataFrame | None:
  """item_key and content (Array of Float32) of the given items, or None if the item file has no content column.

  Rows with a malformed vector are left without content: the item itself is usable.
  """
  header = column_names(path)
  content = source_column(path, header, mapping, 'content', required=False)
  if content is None:
    return None
  id_column = source_column(path, header, mapping, 'item_id')
  width, frames = 0, []
  for batch in read_batches(path, [id_column, content]):
    if batch.frame.height and not width:
      width = vector_width(batch.frame, content, 'content')
    fields = {
      'item_id': id_field(id_column, batch.frame.schema[id_column], id_type, 'item_id'),
      'content': vector_field(content, batch.frame.schema[content], width, 'content'),
    }
    good, _ = split(batch.frame, fields)
    good = good.with_columns(keys_of(good['item_id'], id_type).alias('item_key')).select('item_key', 'content')
    frames.append(good.filter(pl.col('item_key').is_in(keys.implode())))
  return pl.concat(frames).unique('item_key', keep='first', maintain_order=True) if frames else None
