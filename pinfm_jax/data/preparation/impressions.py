"""Turns batches of impression rows into canonical rows: request, candidate, labels and features."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.events import keys_of
from pinfm_jax.data.preparation.canonical import (
  Field,
  flag_field,
  id_field,
  probability_field,
  sniff_id_type,
  split,
)
from pinfm_jax.data.preparation.columns import late_columns, source_column
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import DENSE, EMBEDDING, SPARSE, SparseCollector, feature_fields, vector_width
from pinfm_jax.data.preparation.intake import Shared, TimeUnits, common_fields, with_keys
from pinfm_jax.data.preparation.reading import Batch, column_names
from pinfm_jax.errors import UserError

LABEL, REFERENCE, DAY_MS = 'label:', 'reference:', 86_400_000


@dataclass
class ImpressionIntake:
  """Canonical impressions of a batch: the columns of an event, request_key, created_at, labels and features."""

  config: PrepareConfig
  shared: Shared
  kind: str = 'impressions'
  request_id_type: str = ''
  widths: dict[str, int] = field(default_factory=dict)
  sparse: dict[str, SparseCollector] = field(default_factory=dict)
  names: dict[str, list[str]] = field(default_factory=dict)
  _units: TimeUnits = field(default_factory=TimeUnits)
  _columns: dict[str, str] = field(default_factory=dict)
  _late: frozenset[str] = frozenset()

  def __post_init__(self):
    stored = self.shared.stored
    if stored is not None:
      self.request_id_type = stored.request_id_type

  def open(self, path: Path) -> list[str]:
    """Finds the columns of a file; returns those to read. Features that it lacks are left to the side tables."""
    config, header, mapping = self.config, column_names(path), self.config.impression_columns
    required = ['user_id', 'item_id', 'timestamp', *config.labels]
    if config.request_by == 'request_id':
      required.append('request_id')
    columns = {name: source_column(path, header, mapping, name) for name in required}
    sided = config.items is not None or config.users is not None
    features = [*config.dense, *config.sparse, *config.embedding]
    found = {name: source_column(path, header, mapping, name, required=not sided) for name in features}
    optional = ('surface', 'item_created_at')
    found |= {name: source_column(path, header, mapping, name, required=False) for name in optional}
    columns |= {name: column for name, column in found.items() if column is not None}
    late = late_columns(path, mapping, columns, optional)
    columns |= late
    columns |= {
      REFERENCE + label: source_column(path, header, {}, column) for label, column in config.reference_columns.items()
    }
    names = {
      DENSE: [name for name in config.dense if name in columns],
      SPARSE: [name for name in config.sparse if name in columns],
      EMBEDDING: [name for name in config.embedding if name in columns],
    }
    if self.names and names != self.names:
      raise UserError(f'{path} has other features than the impression files before it; expected the same of all')
    self.names, self._columns, self._late = names, columns, frozenset(late)
    known = self.shared.stored.sparse if self.shared.stored else {}
    self.sparse = self.sparse or {name: SparseCollector(name, known.get(name)) for name in names[SPARSE]}
    return list(columns.values())

  def canonical(self, batch: Batch, first_order: int) -> tuple[pl.DataFrame, pl.Series]:
    """The canonical rows of the good rows, and the reasons why the others are bad."""
    frame, columns, schema = batch.frame, self._columns, batch.frame.schema
    if not self.widths and self.shared.stored:
      self.widths = {name: self.shared.stored.widths[name] for name in self.names[EMBEDDING]}
    if not self.widths:
      self.widths = {name: vector_width(frame, columns[name], name) for name in self.names[EMBEDDING]}
    fields = common_fields(self.config, self.shared, frame, columns, self._late)
    fields |= self._time_fields(batch)
    if 'request_id' in columns:
      if not self.request_id_type:
        self.request_id_type = sniff_id_type(frame[columns['request_id']], self.config.max_rejected_share)
      column = columns['request_id']
      fields['request_id'] = id_field(column, schema[column], self.request_id_type, 'request_id')
    for label in self.config.labels:
      fields[LABEL + label] = flag_field(columns[label], schema[columns[label]], label)
    for label in self.config.reference_columns:
      column = columns[REFERENCE + label]
      fields[REFERENCE + label] = probability_field(column, schema[column], f'the probability of {label}')
    fields |= feature_fields(self.names, columns, schema, self.widths)
    fields['order'] = Field(pl.lit(pl.Series(batch.line + first_order)))
    good, reasons = split(frame, fields)
    for name, collector in self.sparse.items():
      collector.add(good[SPARSE + name])
    return self._finish(with_keys(good, self.shared)), reasons

  def _time_fields(self, batch: Batch) -> dict[str, Field]:
    unit, columns = self.config.impression_time_unit, self._columns
    made = {'timestamp': self.shared.in_time(self._units.field(batch, columns['timestamp'], unit, 'timestamp'))}
    if 'item_created_at' in columns:
      unit = 'auto' if unit == 'order' else unit
      column = columns['item_created_at']
      made['created_at'] = self._units.field(batch, column, unit, 'item_created_at', optional=True)
    return made

  def _finish(self, good: pl.DataFrame) -> pl.DataFrame:
    labels = np.zeros(good.height, np.uint32)
    for bit, label in enumerate(self.config.labels):
      labels |= good[LABEL + label].to_numpy().astype(np.uint32) << np.uint32(bit)
    if 'request_id' in good.columns:
      request = keys_of(good['request_id'], self.request_id_type)
    else:
      request = (good['timestamp'] // DAY_MS).cast(pl.UInt64)
    drop = [LABEL + label for label in self.config.labels]
    if self.request_id_type == 'integer':
      drop.append('request_id')
    return good.drop(drop).with_columns(request.alias('request_key'), pl.Series('labels', labels, pl.UInt32))
