"""The configuration of a preparation: which files, which columns mean what, and the limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pinfm_jax.data.events import ID_TYPES, MAX_ACTIONS, MAX_LABELS, MAX_SURFACES
from pinfm_jax.data.preparation.canonical import TIME_UNITS
from pinfm_jax.errors import UserError

_TUPLES = ('logs', 'impressions', 'labels', 'dense', 'sparse', 'embedding')


@dataclass(frozen=True)
class PrepareConfig:
  """What `prepare` reads and writes.

  A mapping of columns goes from the canonical name to the source's; a canonical name that is not mapped is looked up
  under its own name. Without a timestamp column the log is order-only, without a surface column every event has the
  surface 'none', without action columns every event has the empty action set.

  Attributes:
    logs: event files, in order (.csv, .tsv, .jsonl, also .gz, or .parquet).
    out: the directory to make.
    columns: user_id, timestamp, item_id, surface, and action (one or more names in every row) or actions (the same,
      may be empty): a list or names joined by '|'.
    action_columns: 0/1 source column -> action name.
    impressions: impression files, in order.
    impression_columns: request_id, user_id, timestamp, item_id, surface, item_created_at, labels and features.
    request_by: 'request_id', or 'user_day': a request is a user's UTC day.
    labels: label names; their columns are 0/1.
    dense, sparse, embedding: feature names, found in the impressions, else in `items`, else in `users`.
    reference_columns: label -> column of its true probability (simulated logs).
    items: item file with item_id and maybe created_at, content and item features.
    item_columns: item_id, created_at, content and features of the item file.
    users: user file with user_id and user features.
    user_columns: user_id and features of the user file.
    cap: a user's newest events that are kept.
    actions, surfaces: the names in the order of their codes, any other name is a malformed row; None: as met, sorted
      (by number if all are integers, else by name).
    time_unit, impression_time_unit: 'auto', 's', 'ms', 'iso', or 'order' (the column holds positions, not times).
    user_id_type, item_id_type: 'auto', 'integer' or 'string'.
    time_known: overrides what is known about the histories' times.
    max_rejected_share: a larger share of malformed rows stops the preparation.
    shards: record files of each kind (None: by size).
    partitions: parts that the users are processed in (None: by size); never changes the result.
    source, licence, notes: kept in dataset.json.
    overwrite: replace a prepared data set at `out`.
  """

  logs: tuple[str | Path, ...]
  out: str | Path
  columns: Mapping[str, str] = field(default_factory=dict)
  action_columns: Mapping[str, str] = field(default_factory=dict)
  impressions: tuple[str | Path, ...] = ()
  impression_columns: Mapping[str, str] = field(default_factory=dict)
  request_by: str = 'request_id'
  labels: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
  sparse: tuple[str, ...] = ()
  embedding: tuple[str, ...] = ()
  reference_columns: Mapping[str, str] = field(default_factory=dict)
  items: str | Path | None = None
  item_columns: Mapping[str, str] = field(default_factory=dict)
  users: str | Path | None = None
  user_columns: Mapping[str, str] = field(default_factory=dict)
  cap: int = 16_000
  actions: tuple[str, ...] | None = None
  surfaces: tuple[str, ...] | None = None
  time_unit: str = 'auto'
  impression_time_unit: str = 'auto'
  user_id_type: str = 'auto'
  item_id_type: str = 'auto'
  time_known: bool | None = None
  max_rejected_share: float = 0.01
  shards: int | None = None
  partitions: int | None = None
  source: str = ''
  licence: str | None = None
  notes: str = ''
  overwrite: bool = False

  def __post_init__(self):
    for name in _TUPLES:
      if isinstance(getattr(self, name), str | Path):
        object.__setattr__(self, name, (getattr(self, name),))
      object.__setattr__(self, name, tuple(getattr(self, name)))

  def check(self) -> None:
    """Raises UserError for a setting that cannot work."""
    if not self.logs:
      raise UserError('got no log to prepare, expected at least one event file')
    for name, allowed in (
      ('time_unit', TIME_UNITS),
      ('impression_time_unit', TIME_UNITS),
      ('user_id_type', ('auto', *ID_TYPES)),
      ('item_id_type', ('auto', *ID_TYPES)),
      ('request_by', ('request_id', 'user_day')),
    ):
      if getattr(self, name) not in allowed:
        raise UserError(f'got {name} {getattr(self, name)!r}, expected one of {", ".join(allowed)}')
    for name, limit, count in (
      ('actions', MAX_ACTIONS, len(self.actions or ())),
      ('surfaces', MAX_SURFACES, len(self.surfaces or ())),
      ('labels', MAX_LABELS, len(self.labels)),
    ):
      if count > limit:
        raise UserError(f'got {count} {name}, at most {limit} can be stored')
    for name in ('cap', 'shards', 'partitions'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f'{name} must be at least 1, got {value}')
    if self.request_by == 'user_day' and self.impression_time_unit == 'order':
      raise UserError(
        "request_by 'user_day' needs times, but impression_time_unit is 'order': give a request_id column"
      )
    if not 0 <= self.max_rejected_share <= 1:
      raise UserError(f'max_rejected_share must lie between 0 and 1, got {self.max_rejected_share}')
    for column, action in self.action_columns.items():
      if self.actions is not None and action not in self.actions:
        raise UserError(
          f'action_columns maps {column!r} to {action!r}, expected one of actions ({", ".join(self.actions)}): '
          'add it to actions'
        )
    self._check_features()

  def _check_features(self) -> None:
    names = [*self.dense, *self.sparse, *self.embedding]
    for name in names:
      if names.count(name) > 1:
        raise UserError(f'the feature {name!r} is listed twice: once in dense, sparse or embedding is expected')
    if not self.impressions and (names or self.labels or self.reference_columns):
      given = next(name for name in (*_TUPLES[2:], 'reference_columns') if getattr(self, name))
      raise UserError(f'{given} needs impressions: give impression files, or leave {given} out')
    for label in self.reference_columns:
      if label not in self.labels:
        raise UserError(f'reference_columns names {label!r}, which is not among the labels ({", ".join(self.labels)})')
