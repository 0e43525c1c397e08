"""What a preparation must know of the data set that it is appended to: users' rows, their events, codes and times."""

from functools import cached_property

import numpy as np
import polars as pl

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.info import Features, SparseFeature
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.spool import mix
from pinfm_jax.errors import UserError


class StoredUsers:
  """The users of the earlier partitions by their hash; memory grows with the users, not with their events."""

  def __init__(self, dataset: PreparedDataset):
    """Reads the tables of users."""
    mixed = mix(dataset.users['user_key'].to_numpy())
    order = np.argsort(mixed)
    self._mixed, self._row = mixed[order], order
    self._dataset, self.count = dataset, len(mixed)

  def rows(self, mixed: np.ndarray) -> np.ndarray:
    """int64: rows of the users with these hashes; -1 for one that is not stored."""
    place = np.minimum(np.searchsorted(self._mixed, mixed), max(self.count - 1, 0))
    known = self._mixed[place] == mixed if self.count else np.zeros(len(mixed), bool)
    return np.where(known, self._row[place] if self.count else 0, -1)

  def events(self, mixed: np.ndarray) -> np.ndarray:
    """int64: how many stored events each of these users has, 0 for one that is not stored."""
    rows = self.rows(mixed)
    return np.where(rows < 0, 0, self._dataset.parts.stored_events[rows] if self.count else 0)

  def next_ordinals(self, mixed: np.ndarray) -> np.ndarray:
    """int64: where the ordinal times of each of these users go on, in a log that knows the order alone."""
    return np.array([0 if row < 0 else self._after(row) for row in self.rows(mixed).tolist()], np.int64)

  def _after(self, row: int) -> int:
    history = self._dataset.history(row)
    return int(history.timestamp[-1]) + 1 if len(history) else 0


class Stored:
  """The data set that is appended to."""

  def __init__(self, dataset: PreparedDataset):
    """Takes an opened data set."""
    self.dataset, self.info = dataset, dataset.info

  @cached_property
  def users(self) -> StoredUsers:
    """Its users."""
    return StoredUsers(self.dataset)

  @property
  def ends_ms(self) -> int | None:
    """Time of its last event or impression: rows that are not later are late. None where times are not known."""
    return self.info.time_range_ms[1] if self.info.time_known.histories else None

  @property
  def sparse(self) -> dict[str, SparseFeature]:
    """Its sparse features by name."""
    return {feature.name: feature for feature in self.info.features.sparse}

  @property
  def widths(self) -> dict[str, int]:
    """Widths of its embedding features by name."""
    return {feature.name: feature.width for feature in self.info.features.embedding}

  def check_schema(self, features: Features, config: PrepareConfig) -> None:
    """Raises UserError unless the new requests have the shapes of the stored ones."""
    if not config.impressions:
      return
    expected, found = self.widths, {feature.name: feature.width for feature in features.embedding}
    if found != expected:
      raise UserError(f'{self.dataset.path} has embedding features of the widths {expected}, got {found}')
    stored = self.dataset.request(0).reference is not None
    if stored != bool(config.reference_columns):
      raise UserError(
        f'the requests of {self.dataset.path} have {"true" if stored else "no true"} probabilities; '
        f'{"give" if stored else "leave out"} reference_columns, so that all have the same'
      )

  @property
  def request_id_type(self) -> str:
    """How its requests' ids are spelled; '' where it has no requests."""
    files = self.info.shard_files('requests')
    if not files:
      return ''
    dtype = self.dataset.requests.schema['request_id']
    return 'string' if dtype == pl.String else 'integer'
