"""From events and candidates to padded model inputs: one code path for training, evaluation and serving.

What a model sees must not depend on who asks, so the window of the history, the derived features and the order of
the columns are decided here alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pinfm_jax.config import HOUR_MS, TransActConfig
from pinfm_jax.data.info import DatasetInfo, Features
from pinfm_jax.data.records import History, Request
from pinfm_jax.data.tokens import PLAIN, TokenInputs, event_gaps, request_gap
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words

AGE = 'item_age_hours'
EVENTS = 'history_events'


@dataclass(frozen=True)
class FeatureSchema:
  """The ranker's inputs, in column order; part of every checkpoint's configuration and of a bundle's manifest.

  Attributes:
    features: dense, sparse and embedding features of the prepared data set.
    content_width: width of the items' content vector (0 = none), the last embedding feature.
    num_surfaces: size of the surface vocabulary.
    item_buckets: hashed buckets of the candidate's id as a sparse feature of the ranker itself; 0 = none.
    history_length: L_d, the most events the model reads; also bounds the feature that counts them.
    labels: names of the labels predicted.
    recent_length: newest events that the ranker's own sequence module reads (TransAct); 0 = there is none.
    recent_buckets: rows of that module's hashed item table.
  """

  features: Features
  content_width: int
  num_surfaces: int
  item_buckets: int
  history_length: int
  labels: tuple[str, ...]
  recent_length: int = 0
  recent_buckets: int = 0

  @classmethod
  def of(
    cls, info: DatasetInfo, item_buckets: int, history_length: int, transact: TransActConfig | None = None
  ) -> 'FeatureSchema':
    """The schema of a prepared data set with impressions."""
    if not info.labels:
      raise UserError('the data set has no impressions with labels; prepare it with --impressions to train a ranker')
    recent = (transact.length, transact.item_buckets) if transact and transact.length else (0, 0)
    return cls(
      info.features, info.content_width, len(info.surfaces), item_buckets, history_length, info.labels, *recent
    )

  @property
  def most_events(self) -> int:
    """How many of a user's newest events are read at most."""
    return max(self.history_length, self.recent_length)

  @property
  def dense_names(self) -> tuple[str, ...]:
    """Names of the dense columns: the data set's, then the derived ones."""
    return (*self.features.dense, AGE, EVENTS)

  @property
  def sparse_sizes(self) -> tuple[int, ...]:
    """Cardinalities of the sparse columns: the data set's, the surface, the item id."""
    sizes = [*(feature.size for feature in self.features.sparse), self.num_surfaces + 1]
    return tuple(sizes + ([self.item_buckets + 1] if self.item_buckets else []))

  @property
  def embedding_widths(self) -> tuple[int, ...]:
    """Widths of the embedding features."""
    widths = [feature.width for feature in self.features.embedding]
    return tuple(widths + ([self.content_width] if self.content_width else []))

  @property
  def candidate_width(self) -> int:
    """Width of what `ranker.candidate_content` reads: the last embedding input; 0 = there is none.

    That is the items' content, or without any the last embedding feature, which may change from request to request.
    """
    return (self.embedding_widths or (0,))[-1]


def window_start(events: int, length: int, block: int) -> int:
  """First event of the model's window over a history of `events` events.

  The window holds at most `length` events and slides in whole blocks, so that the learned positions, and with them a
  cached user's keys and values, stay valid while events are appended (until the window is full).
  """
  if events <= length:
    return 0
  return -(-(events - length) // block) * block


def history_inputs(
  history: History, end: int, length: int, block: int, tokens: TokenInputs = PLAIN
) -> dict[str, np.ndarray]:
  """The last events before offset `end`, padded to `length`; see `event_inputs`."""
  events = slice(window_start(end, length, block), end)
  return event_inputs(history, events, length, tokens)


def event_inputs(
  history: History,
  events: slice,
  length: int,
  tokens: TokenInputs = PLAIN,
  own_content: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """A slice of a history, padded at the end to `length`.

  Args:
    history: a user's events.
    events: which of them.
    length: L.
    tokens: what the model reads besides.
    own_content: [all events of the history, W], content that came with them (see `ItemContent.inputs`).

  Returns:
    item [L, 2] uint32 words, surface [L] int32, actions [L] uint32, mask [L] bool; with time gaps also gap [L] int32,
    with content also content [L, W] float16 and maybe new [L] bool.
  """
  item = history.item[events]
  columns = {
    'item': key_words(item),
    'surface': history.surface[events].astype(np.int32),
    'actions': history.actions[events].astype(np.uint32),
    'mask': np.ones(len(item), bool),
  }
  if tokens.gap_buckets:
    columns['gap'] = event_gaps(history.timestamp[events], tokens.gap_buckets)
  if tokens.items:
    columns |= tokens.items.inputs(item, None if own_content is None else own_content[events])
  return {name: _pad(column, length) for name, column in columns.items()}


def recent_items(words: np.ndarray, schema: FeatureSchema) -> np.ndarray:
  """Rows of TransAct's item table: uint32 [n, 2] id words -> int32 [n], from 1 on, since 0 is padding.

  The seed is another than that of the ranker's own buckets, so that two items rarely share both.
  """
  return hash_rows(words, 1, schema.recent_buckets, seed=2)[:, 0] + 1


def recent_inputs(
  history: History,
  end: int,
  schema: FeatureSchema,
  tokens: TokenInputs = PLAIN,
  request_ms: int | None = None,
  own_content: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """The newest events before offset `end`, newest first, padded to `schema.recent_length`: TransAct's inputs.

  Args:
    history: a user's events.
    end: offset of the first event that did not come before the request.
    schema: with a length above 0.
    tokens: of the model; its content is read.
    request_ms: time of the request; None = not known, or not needed.
    own_content: see `event_inputs`.

  Returns:
    item [L] int32, actions [L] uint32, hours [L] float32 from the event to the request (NaN without `request_ms`); with
    content also content [L, W] float16.
  """
  events = slice(max(end - schema.recent_length, 0), end)
  item, hours = history.item[events], np.full(events.stop - events.start, np.nan, np.float32)
  if request_ms is not None:
    hours[:] = (request_ms - history.timestamp[events]) / HOUR_MS
  columns = {
    'item': recent_items(key_words(item), schema),
    'actions': history.actions[events].astype(np.uint32),
    'hours': hours,
  }
  if tokens.items:
    own = None if own_content is None else own_content[events]
    columns['content'] = tokens.items.inputs(item, own)['content']
  return {name: _pad(column[::-1], schema.recent_length) for name, column in columns.items()}


def candidate_inputs(
  request: Request,
  rows: slice,
  candidates: int,
  schema: FeatureSchema,
  content: np.ndarray | None,
  tokens: TokenInputs = PLAIN,
  last_event_ms: int | None = None,
  own_content: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Some of a request's candidates, padded to `candidates`.

  Args:
    request: the request.
    rows: which of its candidates.
    candidates: C.
    schema: column order.
    content: [all candidates of the request, content_width], or None if the schema has none.
    tokens: what the model reads besides.
    last_event_ms: time of the user's last event before the request, None without one.
    own_content: like `content`, what came with the candidates (see `ItemContent.inputs`); None = look all of it up.

  Returns:
    item [C, 2], mask [C], age_hours [C], dense [C, F], sparse [C, F], embedding [C, F], labels [C, T]; with time gaps
    also gap [C], with content also content [C, W] and maybe new [C], with TransAct recent_item [C].
  """
  names = ('timestamp', 'created_at', 'item', 'surface', 'dense', 'sparse', 'embedding')
  some = replace(request, **{name: getattr(request, name)[rows] for name in names})
  content, own_content = (None if given is None else given[rows] for given in (content, own_content))
  gap = request_gap(request.timestamp, last_event_ms, tokens.gap_buckets) if tokens.gap_buckets else 0
  columns = _candidate_columns(some, request.history_end, gap, schema, content, tokens, own_content)
  columns['labels'] = request.labels[rows].astype(np.float32)
  return {name: _pad(column, candidates) for name, column in columns.items()}


def joined_candidates(
  requests: Sequence[Request],
  schema: FeatureSchema,
  content: np.ndarray | None,
  tokens: TokenInputs = PLAIN,
  last_event_ms: Sequence[int | None] = (),
  own_content: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """All candidates of several requests, one request's after another's: at once, since a call costs more than a row.

  Args:
    requests: the requests.
    schema: column order.
    content: [all candidates, content_width], or None if the schema has none.
    tokens: what the model reads besides.
    last_event_ms: of each request, see `candidate_inputs`; read only with time gaps.
    own_content: like `content`, see `candidate_inputs`.

  Returns:
    What `candidate_inputs` makes of each, without mask, labels and padding.
  """
  counts = [len(request) for request in requests]
  names = ('timestamp', 'created_at', 'item', 'surface', 'dense', 'sparse', 'embedding')
  joined = replace(
    requests[0], **{name: np.concatenate([getattr(request, name) for request in requests]) for name in names}
  )
  ends = np.repeat([request.history_end for request in requests], counts)
  gaps = 0
  if tokens.gap_buckets:
    pairs = zip(requests, last_event_ms, strict=True)
    gaps = np.repeat([request_gap(r.timestamp, last, tokens.gap_buckets) for r, last in pairs], counts)
  columns = _candidate_columns(joined, ends, gaps, schema, content, tokens, own_content)
  del columns['mask']
  return columns


def _candidate_columns(
  request: Request,
  history_end: int | np.ndarray,
  gap: int | np.ndarray,
  schema: FeatureSchema,
  content: np.ndarray | None,
  tokens: TokenInputs,
  own_content: np.ndarray | None,
) -> dict[str, np.ndarray]:
  """The inputs of a request's n candidates; `history_end` and `gap` may be of each, [n]. Labels are not read."""
  item, surface = request.item, request.surface
  words, count = key_words(item), len(item)
  age = item_age_hours(request.timestamp, request.created_at)
  events = np.empty(count, np.float32)
  events[:] = np.minimum(history_end, schema.history_length)
  dense = np.concatenate([request.dense, age[:, None], events[:, None]], axis=1)
  sparse = [request.sparse, surface[:, None].astype(np.int32) + 1]
  if schema.item_buckets:
    sparse.append(hash_rows(words, 1, schema.item_buckets, seed=1) + 1)
  embedding = [request.embedding]
  if schema.content_width:
    embedding.append(content)
  columns = {
    'item': words,
    'mask': np.ones(count, bool),
    'age_hours': age,
    'dense': dense.astype(np.float32),
    'sparse': np.concatenate(sparse, axis=1).astype(np.int32),
    'embedding': np.concatenate(embedding, axis=1).astype(np.float32),
  }
  if schema.recent_length:
    columns['recent_item'] = recent_items(words, schema)
  if tokens.gap_buckets:
    columns['gap'] = np.empty(count, np.int32)
    columns['gap'][:] = gap
  if tokens.items:
    columns |= tokens.items.inputs(item, own_content)
  return columns


def item_age_hours(timestamp: np.ndarray, created_at: np.ndarray) -> np.ndarray:
  """Age of items in hours, float32; NaN where the creation time is unknown (-1), never negative."""
  age = np.maximum(timestamp - created_at, 0) / HOUR_MS
  return np.where(created_at < 0, np.nan, age).astype(np.float32)


def _pad(array: np.ndarray, length: int) -> np.ndarray:
  padded = np.zeros((length, *array.shape[1:]), array.dtype)  # np.pad takes ten times as long
  padded[: len(array)] = array
  return padded
