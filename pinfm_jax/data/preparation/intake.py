"""Reads files into canonical rows on disk, setting malformed rows aside; turns event rows into canonical ones."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from pinfm_jax.data.events import (
  MAX_ACTIONS,
  MAX_SURFACES,
  NO_SURFACE,
  Vocabulary,
  keys_of,
)
from pinfm_jax.data.preparation.canonical import (
  Field,
  flag_field,
  id_field,
  sniff_id_type,
  sniff_time_unit,
  split,
  text_field,
  time_field,
)
from pinfm_jax.data.preparation.columns import late_columns, source_column
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.reading import Batch, column_names, read_batches
from pinfm_jax.data.preparation.rejects import RejectLog
from pinfm_jax.data.preparation.spool import Spool
from pinfm_jax.data.preparation.stored import Stored
from pinfm_jax.errors import UserError
from pinfm_jax.progress import Progress

LATE = 'late: not after the end of the data set that it is appended to'


class Intake(Protocol):
  """What turns the batches of one kind of file into canonical rows."""

  kind: str

  def open(self, path: Path) -> list[str]:
    """Finds the columns of a file; returns those to read."""

  def canonical(self, batch: Batch, first_order: int) -> tuple[pl.DataFrame, pl.Series]:
    """The canonical rows of the good rows, and for every row the reason why it is bad, or null."""


@dataclass
class Shared:
  """What events and impressions agree on; settled by the first rows that are read.

  Attributes:
    id_type: 'user' and 'item' -> 'integer' or 'string', once known.
    actions, surfaces: names with provisional codes.
    stored: the data set that is appended to, or None.
  """

  id_type: dict[str, str]
  actions: Vocabulary
  surfaces: Vocabulary
  stored: Stored | None = None

  @classmethod
  def of(cls, config: PrepareConfig, stored: Stored | None = None) -> 'Shared':
    """Everything that the configuration, and the data set that is appended to, fix."""
    given = {'user': config.user_id_type, 'item': config.item_id_type}
    actions = Vocabulary.of('action', MAX_ACTIONS, config.actions)
    surfaces = Vocabulary.of('surface', MAX_SURFACES, config.surfaces)
    if stored is not None:
      for vocabulary, names in ((actions, stored.info.actions), (surfaces, stored.info.surfaces)):
        vocabulary.names = vocabulary.names or list(names)  # names that are given begin with the stored ones
        vocabulary.settled = len(names)
    actions.add(list(config.action_columns.values()))
    return cls({who: kind for who, kind in given.items() if kind != 'auto'}, actions, surfaces, stored)

  def in_time(self, time: Field) -> Field:
    """A row's time; one that lies within a data set that is appended to is late, and its row malformed.

    Merging late rows would move the history ends of requests that are stored already.
    """
    if self.stored is None or self.stored.ends_ms is None:
      return time
    return Field(time.value, (*time.faults, (time.value <= self.stored.ends_ms, LATE)))


@dataclass
class EventIntake:
  """Canonical events of a batch: user_key, item_key, timestamp, surface, actions, order, ids that are strings."""

  config: PrepareConfig
  shared: Shared
  kind: str = 'events'
  order_only: bool = False
  _units: 'TimeUnits' = field(default_factory=lambda: TimeUnits())
  _columns: dict[str, str] = field(default_factory=dict)
  _late: frozenset[str] = frozenset()

  def open(self, path: Path) -> list[str]:
    """Finds the columns of a file; returns those to read."""
    header, mapping = column_names(path), self.config.columns
    optional = ('timestamp', 'surface', 'action', 'actions')
    found = {name: source_column(path, header, mapping, name) for name in ('user_id', 'item_id')}
    found |= {name: source_column(path, header, mapping, name, required=False) for name in optional}
    found |= {column: source_column(path, header, {}, column) for column in self.config.action_columns}
    columns = {name: column for name, column in found.items() if column is not None}
    if self._columns and ('timestamp' in columns) == self.order_only:
      raise UserError(f'{path}: some logs have a timestamp column and some have none; expected the same of all')
    late = late_columns(path, mapping, columns, optional)
    self._late, self._columns, self.order_only = frozenset(late), columns | late, 'timestamp' not in columns
    self._check_order(path)
    return list(self._columns.values())

  def _check_order(self, path: Path) -> None:
    config = self.config
    if self.order_only and config.time_unit not in ('auto', 'order'):
      raise UserError(f'{path} has no timestamp column: map timestamp to one, or say time unit order')
    ordinal = self.order_only or config.time_unit == 'order'
    if ordinal and config.impressions and config.impression_time_unit != 'order':
      # Positions 0, 1, 2, .. lie before every time: a history would hold what happened after the impression.
      raise UserError(
        f'{path} has an order but no times, so it cannot be said which events precede an impression; expected times in '
        'both: give the events a timestamp, or leave the impressions out'
      )

  def canonical(self, batch: Batch, first_order: int) -> tuple[pl.DataFrame, pl.Series]:
    """The canonical rows of the good rows, and the reasons why the others are bad."""
    frame, columns, schema = batch.frame, self._columns, batch.frame.schema
    fields = common_fields(self.config, self.shared, frame, columns, self._late)
    if not self.order_only:
      time = self._units.field(batch, columns['timestamp'], self.config.time_unit, 'timestamp')
      fields['timestamp'] = self.shared.in_time(time)
    elif 'timestamp' in self._late:
      late = (pl.col('timestamp').is_not_null(), 'timestamp in a log whose first rows have none')
      fields['late'] = Field(pl.lit(None), (late,))
    for name in ('action', 'actions'):
      if name in columns:
        optional = name == 'actions' or name in self._late
        fields[name] = _actions_field(frame, columns[name], name, self.shared.actions, optional)
    for column in self.config.action_columns:
      fields[f'flag:{column}'] = flag_field(column, schema[column], column)
    fields['order'] = Field(pl.lit(pl.Series(batch.line + first_order)))
    good, reasons = split(frame, fields)
    actions = self._masks(good)
    good = with_keys(good, self.shared).with_columns(actions.alias('actions'))
    names = ['user_key', 'item_key', 'timestamp', 'surface', 'actions', 'order', 'user_id', 'item_id']
    return good.select(name for name in names if name in good.columns), reasons

  def _masks(self, good: pl.DataFrame) -> pl.Series:
    mask = np.zeros(good.height, np.uint32)
    vocabulary = self.shared.actions
    for name in ('action', 'actions'):
      if name in good.columns:
        distinct = good[name].unique().drop_nulls()
        sets = [parse_actions(text) or [] for text in distinct.to_list()]
        vocabulary.add([action for names in sets for action in names])
        bits = pl.Series([sum(1 << vocabulary.names.index(a) for a in set(names)) for names in sets], dtype=pl.UInt32)
        if len(distinct):
          mask |= good[name].replace_strict(distinct, bits, default=0, return_dtype=pl.UInt32).to_numpy()
    for column, action in self.config.action_columns.items():
      mask |= good[f'flag:{column}'].to_numpy().astype(np.uint32) << np.uint32(vocabulary.names.index(action))
    return pl.Series(mask)


def ingest(paths: Sequence[str | Path], intake: Intake, spool: Spool, rejects: RejectLog) -> None:
  """Reads all files of one kind into the spool.

  Raises:
    UserError: a file cannot be read, there are no rows at all, or too many malformed ones.
  """
  paths = [Path(path) for path in paths]
  columns = [intake.open(path) for path in paths]
  sizes = [path.stat().st_size for path in paths]
  progress = Progress(f'read {intake.kind}', sum(sizes) / 1e6, 'MB')
  order, done = 0, 0
  for path, wanted, size in zip(paths, columns, sizes, strict=True):
    intake.open(path)
    last = 0
    for batch in read_batches(path, wanted, lambda part, done=done: progress.update((done + part) / 1e6)):
      last = max([last, *batch.line[-1:].tolist(), *(line for line, _, _ in batch.broken[-1:])])
      if batch.frame.height:
        good, reasons = intake.canonical(batch, order)
        spool.append(good)
      else:
        reasons = pl.Series([], dtype=pl.String)
      rejects.take(intake.kind, batch, reasons)
    order += last
    done += size
    progress.update(done / 1e6)
  progress.close(f'{rejects.read[intake.kind]} rows, {rejects.rejected(intake.kind)} malformed')
  if not rejects.read[intake.kind]:
    raise UserError(f'{", ".join(map(str, paths))} has no rows: expected at least one of the {intake.kind}')
  rejects.check(intake.kind)
  spool.flush()


def common_fields(
  config: PrepareConfig, shared: Shared, frame: pl.DataFrame, columns: dict[str, str], late: Collection[str]
) -> dict[str, Field]:
  """The fields that an event and an impression share: both ids and the surface ('none' where a late one is null)."""
  fields: dict[str, Field] = {}
  for who in ('user', 'item'):
    column = columns[f'{who}_id']
    if who not in shared.id_type:
      shared.id_type[who] = sniff_id_type(frame[column], config.max_rejected_share)
    fields[f'{who}_id'] = id_field(column, frame.schema[column], shared.id_type[who], f'{who}_id')
  absent = NO_SURFACE if 'surface' in late else None
  sure = 'surface' in columns and 'surface' not in late
  if not sure and shared.surfaces.fixed and NO_SURFACE not in shared.surfaces.names:
    raise UserError(f'there is no surface column, so surfaces must name {NO_SURFACE!r}: add it, or map surface')
  if 'surface' in columns:
    named = text_field(columns['surface'], frame.schema[columns['surface']], 'surface', absent)
    unknown = ~named.value.is_in(shared.surfaces.names) if shared.surfaces.fixed else pl.lit(False)
    fields['surface'] = Field(named.value, (*named.faults, (unknown, 'unknown surface')))
  return fields


def with_keys(good: pl.DataFrame, shared: Shared) -> pl.DataFrame:
  """Adds the keys of both ids and the surface's provisional code; integer ids are dropped (the key says it all)."""
  names = good['surface'].unique().to_list() if 'surface' in good.columns else [NO_SURFACE]
  shared.surfaces.add(names)
  codes = [shared.surfaces.names.index(name) for name in names]
  if 'surface' in good.columns and names:
    surface = good['surface'].replace_strict(names, codes, return_dtype=pl.UInt32)
  else:
    surface = pl.Series(np.full(good.height, codes[0] if codes else 0), dtype=pl.UInt32)
  keys = [keys_of(good[f'{who}_id'], kind).alias(f'{who}_key') for who, kind in shared.id_type.items()]
  integer = [f'{who}_id' for who, kind in shared.id_type.items() if kind == 'integer']
  return good.with_columns(surface.alias('surface'), *keys).drop(integer)


class TimeUnits:
  """The units of time columns; under 'auto' that of each file is read off its values, and all files must agree."""

  def __init__(self):
    self._first: dict[str, tuple[str, str]] = {}
    self._seen: set[tuple[str, str]] = set()

  def field(self, batch: Batch, column: str, given: str, name: str, optional: bool = False) -> Field:
    """How a time column of a batch is read.

    Raises:
      UserError: the values do not look like times, or look like another unit than those of the files before.
    """
    dtype = batch.frame.schema[column]
    unit = self._sniff(batch, column, name) if given == 'auto' else given
    return time_field(column, dtype, unit, name, optional, sniffed=given == 'auto')

  def _sniff(self, batch: Batch, column: str, name: str) -> str:
    sample = batch.frame[column]
    if (name, batch.file) in self._seen or sample.null_count() == len(sample):
      return self._first.get(name, ('ms', batch.file))[0]
    self._seen.add((name, batch.file))
    here = sniff_time_unit(sample, f'{name} of {batch.file}')
    unit, file = self._first.setdefault(name, (here, batch.file))
    if here != unit:
      raise UserError(
        f'{name} looks like {here} in {batch.file} but like {unit} in {file}, expected one unit: convert one of the '
        'files, or state the time unit if both are in the same'
      )
    return unit


def parse_actions(text: str) -> list[str] | None:
  """The action names of one cell: 'click', 'click|save' or '["click", "save"]'; None if it is a broken list."""
  if not text.lstrip().startswith('['):
    return [name for name in (part.strip() for part in text.split('|')) if name]
  try:
    names = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return [str(name) for name in names] if all(isinstance(name, str | int) for name in names) else None


def _actions_field(frame: pl.DataFrame, column: str, name: str, vocabulary: Vocabulary, optional: bool) -> Field:
  if isinstance(frame.schema[column], pl.List | pl.Array):
    source = pl.col(column) if isinstance(frame.schema[column], pl.List) else pl.col(column).arr.to_list()
    text = source.cast(pl.List(pl.String)).list.join('|')
  else:
    text = pl.col(column).cast(pl.String)
  parsed = {cell: parse_actions(cell) for cell in frame.select(text.unique()).to_series().drop_nulls().to_list()}
  broken = [cell for cell, names in parsed.items() if names is None]
  empty = [cell for cell, names in parsed.items() if names == []]
  known = set(vocabulary.names)
  unknown = [cell for cell, names in parsed.items() if vocabulary.fixed and not known.issuperset(names or ())]
  faults = [(text.is_in(broken), f'unparsable {name}'), (text.is_in(unknown), 'unknown action')]
  if not optional:
    faults.insert(0, (text.is_null() | text.is_in(empty), 'missing action'))
  return Field(text, tuple(faults))
