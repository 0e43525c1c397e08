"""What is done with one part of the users: merge, sort, cap, and find what each request may see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from pinfm_jax.data.info import Features, SparseFeature
from pinfm_jax.data.preparation.features import DENSE, EMBEDDING, SPARSE, SideTable, encode_sparse_column
from pinfm_jax.data.preparation.impressions import DAY_MS, REFERENCE
from pinfm_jax.data.records import History, Request, unpack_bits


@dataclass(frozen=True)
class EventPart:
  """The stored events of some users, one user after the other, and what became of the others.

  Attributes:
    users: mixed (ascending), user_key and, for string ids, user_id; events, u32.
    offsets: int64 [users + 1] into the events.
    events: the events.
    items: item_key, first_seen, events and, for string ids, item_id.
    merged, duplicates, cut: numbers of rows.
  """

  users: pl.DataFrame
  offsets: np.ndarray
  events: History
  items: pl.DataFrame
  merged: int
  duplicates: int
  cut: int


@dataclass(frozen=True)
class RequestPart:
  """The requests of some users.

  Attributes:
    requests: mixed, timestamp and order of the first impression, request_id, candidates; sorted by user.
    offsets: int64 [requests + 1] into the candidates.
    candidates: all requests' candidates (its user_row and history_end mean nothing).
    items: item_key, first_seen, created_at and, for string ids, item_id.
    users: mixed, user_key and, for string ids, user_id.
    merged, duplicates: numbers of rows.
  """

  requests: pl.DataFrame
  offsets: np.ndarray
  candidates: Request
  items: pl.DataFrame
  users: pl.DataFrame
  merged: int
  duplicates: int


Ordinals = Callable[[np.ndarray], np.ndarray]


def merge_events(
  rows: pl.DataFrame, order_only: bool, ordinals: Ordinals | None = None
) -> tuple[pl.DataFrame, int, int]:
  """Merges rows that agree in user, time, item and surface.

  Args:
    rows: mixed, item_key, timestamp (unless order_only), surface, actions, order.
    order_only: the times are the ranks of the user's rows in file order.
    ordinals: hashes of users -> the rank of their first row here; None: 0.

  Returns:
    The events sorted by user, time and first row, how many rows merged, and how many were exact duplicates.
  """
  if order_only:
    rows = rows.sort('mixed', 'order')
    bounds = _bounds(rows['mixed'].to_numpy())
    rank = np.arange(rows.height) - np.repeat(bounds[:-1], np.diff(bounds))
    if ordinals is not None:
      rank += np.repeat(ordinals(rows['mixed'].to_numpy()[bounds[:-1]]), np.diff(bounds))
    return rows.with_columns(pl.Series('timestamp', rank, pl.Int64)), 0, 0
  rows = rows.sort('mixed', 'timestamp', 'order')
  # Only rows of one user at one time can merge; they are few, and hashing all rows would take longer than sorting.
  sizes = np.diff(_bounds(rows['mixed'].to_numpy(), rows['timestamp'].to_numpy()))
  tied = pl.Series(np.repeat(sizes > 1, sizes))
  ties = rows.filter(tied)
  keys = ['mixed', 'timestamp', 'item_key', 'surface']
  distinct = ties.group_by([*keys, 'actions']).agg(pl.col('order').min())
  merged = distinct.group_by(keys).agg(pl.col('order').min(), pl.col('actions').bitwise_or())
  if merged.height < ties.height:
    rows = pl.concat([rows.filter(~tied), merged.select(rows.columns)]).sort('mixed', 'timestamp', 'order')
  return rows, distinct.height - merged.height, ties.height - distinct.height


def event_part(
  rows: pl.DataFrame,
  extra_users: pl.DataFrame | None,
  order_only: bool,
  cap: int,
  action_code: Sequence[int],
  surface_code: np.ndarray,
  ordinals: Ordinals | None = None,
) -> EventPart:
  """The stored events of the users of one part.

  Args:
    rows: their canonical event rows with `mixed`.
    extra_users: users that need a (maybe empty) history too: mixed, user_key and, for string ids, user_id.
    order_only: see merge_events.
    cap: a user's newest events that are kept.
    action_code: stored bit of every provisional action.
    surface_code: stored code of every provisional surface.
    ordinals: see merge_events.
  """
  ids = [name for name in ('user_key', 'user_id', 'item_id') if name in rows.columns]
  merged, num_merged, num_duplicates = merge_events(rows.drop(ids), order_only, ordinals)
  bounds = _bounds(merged['mixed'].to_numpy())
  kept = np.arange(merged.height) >= np.repeat(bounds[1:] - cap, np.diff(bounds))
  items = (
    merged.select('item_key', 'timestamp', pl.Series('kept', kept))
    .group_by('item_key')
    .agg(pl.col('timestamp').min().alias('first_seen'), pl.col('kept').sum().cast(pl.UInt64).alias('events'))
  )
  if 'item_id' in ids:
    items = items.join(rows.select('item_key', 'item_id').unique('item_key'), on='item_key', how='left')
  stored = merged if kept.all() else merged.filter(pl.Series(kept))
  users = rows.select(name for name in ('mixed', 'user_key', 'user_id') if name in rows.columns).unique('mixed')
  if extra_users is not None:
    users = pl.concat([users, extra_users.select(users.columns)]).unique('mixed')
  users = users.sort('mixed')
  ends = np.searchsorted(stored['mixed'].to_numpy(), users['mixed'].to_numpy(), side='right')
  offsets = np.concatenate([[0], ends]).astype(np.int64)
  events = History(
    stored['timestamp'].to_numpy(),
    stored['item_key'].to_numpy(),
    surface_code[stored['surface'].to_numpy()],
    permute_bits(stored['actions'].to_numpy(), action_code),
  )
  users = users.with_columns(pl.Series('events', np.diff(offsets), pl.UInt32))
  return EventPart(users, offsets, events, items, num_merged, num_duplicates, merged.height - stored.height)


def request_part(
  rows: pl.DataFrame,
  features: Features,
  labels: Sequence[str],
  reference: Sequence[str],
  sides: Sequence[SideTable],
  surface_code: np.ndarray,
) -> RequestPart:
  """The requests of the users of one part, with every candidate once.

  Args:
    rows: their canonical impression rows with `mixed`.
    features: the features in the order of the record's columns.
    labels: label names.
    reference: labels that have a true probability.
    sides: item and user tables whose features are joined.
    surface_code: stored code of every provisional surface.
  """
  rows = rows.sort('mixed', 'request_key', 'timestamp', 'order').with_row_index('row')
  group = ['mixed', 'request_key', 'item_key']
  distinct = rows.select([*group, 'timestamp', 'surface', 'labels']).unique().height
  merged = rows.group_by(group, maintain_order=True).agg(pl.col('row').first(), pl.col('labels').bitwise_or())
  # Groups come in the order of their first rows, which is by request, then time, then file order.
  shown = rows[merged['row'].to_numpy()].with_columns(merged['labels'])
  for side in sides:
    overlap = [name for name in side.frame.columns if name != side.key and name in shown.columns]
    shown = shown.join(side.frame.rename({name: f'{name}:side' for name in overlap}), on=side.key, how='left')
  created = [name for name in ('created_at', 'created_at:side') if name in shown.columns]
  shown = shown.with_columns(pl.coalesce(*created, pl.lit(None, pl.Int64)).alias('created_at')).sort('row')
  offsets = _bounds(shown['mixed'].to_numpy(), shown['request_key'].to_numpy())
  ids = [name for name in ('request_id', 'user_id') if name in shown.columns]
  requests = shown[offsets[:-1]].select('mixed', 'user_key', 'request_key', 'timestamp', 'order', *ids)
  requests = requests.with_columns(pl.Series('candidates', np.diff(offsets), pl.UInt32))
  items = rows.group_by('item_key').agg(
    pl.col('timestamp').min().alias('first_seen'),
    *([pl.col('created_at').min()] if 'created_at' in rows.columns else []),
    *([pl.col('item_id').first()] if 'item_id' in rows.columns else []),
  )
  users = rows.select(name for name in ('mixed', 'user_key', 'user_id') if name in rows.columns).unique('mixed')
  candidates = _candidates(shown, features, labels, reference, surface_code)
  return RequestPart(requests, offsets, candidates, items, users, distinct - shown.height, rows.height - distinct)


def history_ends(events: EventPart, requests: RequestPart) -> tuple[np.ndarray, np.ndarray]:
  """For every request the place of its user in `events.users`, and how many stored events precede it strictly."""
  user = np.searchsorted(events.users['mixed'].to_numpy(), requests.requests['mixed'].to_numpy())
  times, offsets = events.events.timestamp, events.offsets
  ends = [
    int(np.searchsorted(times[offsets[u] : offsets[u + 1]], time, side='left'))
    for u, time in zip(user.tolist(), requests.requests['timestamp'].to_list(), strict=True)
  ]
  return user, np.array(ends, np.int64)


def request_ids(requests: pl.DataFrame, request_by: str) -> pl.Series:
  """The ids of requests: the log's, or USER:YYYY-MM-DD where a request is a user's day."""
  if 'request_id' in requests.columns:
    return requests['request_id']
  if request_by == 'request_id':
    return requests['request_key'].reinterpret(signed=True).alias('request_id')
  user = pl.col('user_id') if 'user_id' in requests.columns else pl.col('user_key').reinterpret(signed=True)
  day = pl.from_epoch(pl.col('timestamp') // DAY_MS, time_unit='d').cast(pl.String)
  return requests.select(pl.concat_str(user.cast(pl.String), day, separator=':').alias('request_id')).to_series()


def permute_bits(masks: np.ndarray, position: Sequence[int]) -> np.ndarray:
  """Moves bit i of every mask to bit position[i]."""
  moved = np.zeros_like(masks)
  for bit, target in enumerate(position):
    moved |= (masks >> np.uint32(bit) & np.uint32(1)) << np.uint32(target)
  return moved


def _candidates(
  shown: pl.DataFrame, features: Features, labels: Sequence[str], reference: Sequence[str], surface_code: np.ndarray
) -> Request:
  rows = shown.height
  dense = [shown[DENSE + name].fill_null(float('nan')).to_numpy() for name in features.dense]
  sparse = [_sparse_codes(shown[SPARSE + feature.name], feature) for feature in features.sparse]
  vectors = [_vectors(shown[EMBEDDING + feature.name], feature.width) for feature in features.embedding]
  missing = np.full(rows, np.nan, np.float32)
  truth = [shown[REFERENCE + label].to_numpy() if label in reference else missing for label in labels]
  return Request(
    user_row=0,
    history_end=0,
    timestamp=shown['timestamp'].to_numpy(),
    item=shown['item_key'].to_numpy(),
    created_at=shown['created_at'].fill_null(-1).to_numpy(),
    surface=surface_code[shown['surface'].to_numpy()],
    labels=unpack_bits(shown['labels'].to_numpy(), len(labels)),
    dense=np.stack(dense, axis=1) if dense else np.zeros((rows, 0), np.float32),
    sparse=np.stack(sparse, axis=1) if sparse else np.zeros((rows, 0), np.int32),
    embedding=np.concatenate(vectors, axis=1) if vectors else np.zeros((rows, 0), np.float32),
    reference=np.stack(truth, axis=1) if reference else None,
  )


def _sparse_codes(column: pl.Series, feature: SparseFeature) -> np.ndarray:
  # Features of the item and user files were encoded when these files were read.
  return encode_sparse_column(feature, column) if column.dtype == pl.String else column.fill_null(0).to_numpy()


def _vectors(column: pl.Series, width: int) -> np.ndarray:
  made = np.zeros((len(column), width), np.float32)
  present = column.is_not_null().to_numpy()
  if present.any():
    made[present] = column.drop_nulls().to_numpy()
  return made


def _bounds(*groups: np.ndarray) -> np.ndarray:
  """Where each run of rows with equal values starts, and at last the number of rows."""
  changes = [group[1:] != group[:-1] for group in groups]
  rows = len(groups[0])
  inner = np.flatnonzero(np.logical_or.reduce(changes)) + 1
  return np.concatenate([[0], inner, [rows]]) if rows else np.zeros(1, np.int64)
