"""Reads and checks ranking requests in JSON, and turns them into the records that training featurizes.

  {"request_id": "r1", "timestamp": 1700000000000, "surface": "feed",
   "history": [{"timestamp": 1699990000000, "item_id": 7, "surface": "feed", "actions": ["click"]}, ...],
   "candidates": [{"item_id": 9, "item_created_at": 1699900000000, "price": 3.5, "country": "fr", ...}, ...]}

Times are milliseconds since 1970 or ISO 8601 (UTC unless said otherwise). Only request_id, history, candidates and
their item_ids are required; a feature, surface or time that is not given counts as missing. A candidate may carry its
own timestamp and surface, and "content" if the model has content vectors. A client that sends just a user's newest
events adds "history_events", how many the user has in all, and gets the same scores. "user_id" is allowed and unused.

A model with time gaps needs the times of all events and of the request. A model that adds content to its item vectors
knows the content of the items it was exported with; an event or a candidate may bring its own, which wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pinfm_jax.data.events import NO_SURFACE
from pinfm_jax.data.featurize import FeatureSchema, event_inputs, recent_inputs, window_start
from pinfm_jax.data.records import History, Request
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.serve import columns
from pinfm_jax.serve.cache import Window
from pinfm_jax.serve.fields import (
  check_names,
  is_unicode,
  read_key,
  read_list,
  read_name,
  read_number,
  read_sparse,
  read_time,
  read_vector,
  show,
)
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.memo import Memo, content_key

_REQUEST_FIELDS = ('request_id', 'user_id', 'timestamp', 'surface', 'history', 'history_events', 'candidates')
_EVENT_FIELDS = ('timestamp', 'item_id', 'surface', 'actions')
_CANDIDATE_FIELDS = ('item_id', 'item_created_at', 'timestamp', 'surface')
_MISSING_SURFACE = -1  # featurize adds 1: index 0 is the missing value
_REMEMBERED_BYTES = 128 << 20


@dataclass(frozen=True)
class ScoringRequest:
  """A request, checked.

  Attributes:
    request_id: as given.
    item_ids: of the candidates, as given.
    history: the events given, oldest first.
    window: the events of `history` that the model reads.
    candidates: their features; `history_end` counts all the user's events.
    content: [C, content width], NaN where a candidate brings none; None if the model has none.
    history_content: the same of the history's events, None if no event brings any.
    windows: what `model_window` made of the history, by the window's first event; requests with the same history may
      share it.
    recent_columns: what `recent` made of the history, likewise.
  """

  request_id: int | str
  item_ids: tuple[int | str, ...]
  history: History
  window: slice
  candidates: Request
  content: np.ndarray | None
  history_content: np.ndarray | None = None
  windows: dict[int, Window] = field(default_factory=dict, compare=False, repr=False)
  recent_columns: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

  def model_window(self, tokens: TokenInputs) -> Window:
    """What the model reads of the history; `tokens` is the model's, always the same."""
    first = self.window.start
    if first not in self.windows:
      count = self.window.stop - first
      inputs = event_inputs(self.history, self.window, count, tokens, self.history_content)
      self.windows[first] = Window.of({name: column for name, column in inputs.items() if name != 'mask'})
    return self.windows[first]

  def recent(self, schema: FeatureSchema, tokens: TokenInputs) -> dict[str, np.ndarray]:
    """What TransAct reads of the history: columns [1, L, ...] of `serve.programs`. The arguments are the model's."""
    if not self.recent_columns:
      columns = recent_inputs(self.history, len(self.history), schema, tokens, own_content=self.history_content)
      columns['events'] = columns.pop('item')  # beside the candidates' recent_item
      self.recent_columns.update(
        {f'recent_{name}': column[None] for name, column in columns.items() if name != 'hours'}
      )
    return self.recent_columns

  def candidate_content(self, tokens: TokenInputs) -> np.ndarray | None:
    """Content of the candidates as a feature of the ranker: their own, else what the model knows, else zeros."""
    if self.content is None:
      return None
    known = tokens.items.inputs(self.candidates.item)['content'] if tokens.items else np.float32(0)
    return np.where(np.isnan(self.content).any(axis=1, keepdims=True), known, self.content)

  @property
  def last_event_ms(self) -> int | None:
    """Time of the newest event; None without one."""
    return int(self.history.timestamp[-1]) if len(self.history) else None


@dataclass(frozen=True)
class _Events:
  """A history as checked; see ScoringRequest for the fields."""

  history: History
  content: np.ndarray | None
  timed: bool
  windows: dict[int, Window] = field(default_factory=dict)
  recent_columns: dict[str, np.ndarray] = field(default_factory=dict)

  @property
  def bytes(self) -> int:
    """About what it takes, with a window."""
    arrays = (self.history.timestamp, self.history.item, self.history.surface, self.history.actions)
    return 512 + 3 * sum(array.nbytes for array in arrays) + (0 if self.content is None else 2 * self.content.nbytes)


class RequestParser:
  """Checks requests against a bundle's vocabularies and features; several threads may use one.

  A history that was checked before is known by a hash of its JSON, which costs a tenth of checking it.
  """

  def __init__(self, manifest: Manifest):
    """Takes what the manifest says of inputs."""
    self._length, self._block = manifest.schema.history_length, manifest.history_block
    self._id_type = manifest.id_type.item
    self._actions = {name: 1 << bit for bit, name in enumerate(manifest.actions)}
    self._surfaces = {name: code for code, name in enumerate(manifest.surfaces)}
    self._schema, features = manifest.schema, manifest.schema.features
    vectors = [(feature.name, feature.width) for feature in features.embedding]
    content = ['content'] if self._schema.content_width else []
    names = (*features.dense, *(f.name for f in features.sparse), *(name for name, _ in vectors), *content)
    self._candidate_fields = dict.fromkeys((*_CANDIDATE_FIELDS, *names))
    self._vectors = vectors
    model = manifest.pinfm
    self._needs_times = model is not None and model.tower.time_gap_buckets > 0
    self._event_content = model.content_width if model is not None and model.content else 0
    self._event_fields = dict.fromkeys((*_EVENT_FIELDS, *(['content'] if self._event_content else [])))
    self._memo = Memo(_REMEMBERED_BYTES)

  def forget(self) -> None:
    """Forgets the histories that were checked."""
    self._memo = Memo(_REMEMBERED_BYTES)

  def parse(self, document: Any) -> ScoringRequest:
    """Checks one request.

    Args:
      document: the decoded JSON object.

    Raises:
      UserError: anything wrong with it; the message says where in the request, not which request.
    """
    check_names(document, _REQUEST_FIELDS, 'a request')
    request_id = document.get('request_id')
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
      raise UserError(f'got request_id {show(request_id)}, expected a string or an integer')
    if not is_unicode(request_id):
      raise UserError(f'got request_id {show(request_id)}, which is no valid Unicode: spell it in UTF-8')
    time = read_time(document.get('timestamp'), 'timestamp')
    events = self._known_history(read_list(document, 'history'), time)
    history = events.history
    total = document.get('history_events', len(history))
    if isinstance(total, bool) or not isinstance(total, int) or total < len(history):
      raise UserError(
        f'got history_events {show(total)}, expected the number of all events of the user, '
        f'at least the {len(history)} distinct ones given'
      )
    first, sent = window_start(total, self._length, self._block), len(document['history'])
    needed = max(total - first, min(total, self._schema.recent_length))
    if sent < needed:
      raise UserError(
        f'got {sent} events in history, of {total} of the user (history_events): the model reads the newest '
        f'{needed}, so send at least those, best the newest {self._schema.most_events}'
      )
    listed = read_list(document, 'candidates')
    skipped = total - len(history)  # older events that the client did not send
    return ScoringRequest(
      request_id=request_id,
      item_ids=tuple(c.get('item_id') if isinstance(c, Mapping) else None for c in listed),
      history=history,
      window=slice(max(first - skipped, 0), len(history)),
      candidates=self._candidates(document, listed, total),
      content=self._content(listed),
      history_content=events.content,
      windows=events.windows,
      recent_columns=events.recent_columns,
    )

  def _known_history(self, listed: list, before: int | None) -> _Events:
    """The checked history, remembered or new; all of it must lie before the request."""
    key = content_key(listed)
    events = None if key is None else self._memo.get(key)
    if events is None:
      try:
        events = self._plain_history(listed)
      except columns.UnusualError:
        events = self._history(listed)
      if key is not None:
        self._memo.put(key, events, events.bytes)
    last = int(events.history.timestamp[-1]) if events.timed and len(events.history) else None
    if last is not None and before is not None and last >= before:
      raise UserError(
        f"a history event at {last} is not before the request's timestamp {before}; "
        'leave out what came after, as in training'
      )
    return events

  def _plain_history(self, listed: list) -> _Events:
    """`_history` of events that are spelled plainly and need not be merged."""
    columns.plain_objects(listed, self._event_fields)
    if not listed or self._event_content and any('content' in event for event in listed):
      raise columns.UnusualError
    time = columns.times([event.get('timestamp') for event in listed], missing=-1)
    timed = bool(time[0] >= 0)
    if not timed:
      if self._needs_times or time.max() >= 0:
        raise columns.UnusualError
      time = np.arange(len(listed))
    order = np.argsort(time, kind='stable')
    time = time[order]
    if time[0] < 0 or (np.diff(time) == 0).any():
      raise columns.UnusualError
    surface = columns.names([event.get('surface') for event in listed], self._surfaces, self._surfaces.get(NO_SURFACE))
    history = History(
      time,
      columns.keys([event.get('item_id') for event in listed], self._id_type)[order],
      surface.astype(np.uint16)[order],
      columns.name_sets([event.get('actions', []) for event in listed], self._actions)[order],
    )
    return _Events(history, None, timed)

  def _history(self, listed: list) -> _Events:
    """Events sorted by time, stably; those that agree in time, item and surface are one event, as in preparation."""
    events = [_at('history event', i, self._event, event) for i, event in enumerate(listed)]
    timed = [time is not None for time, *_ in events]
    if any(timed) and not all(timed):
      raise UserError(f'history event {timed.index(False)} has no timestamp but others have; give all or none')
    if self._needs_times and not all(timed):
      raise UserError(
        'the history has no timestamps, but the model of this bundle reads the time between events; '
        'give every event its timestamp'
      )
    if all(timed):
      events.sort(key=lambda event: event[0])
    else:  # in the order given; the ordinal keeps repeats apart
      events = [(i, *rest) for i, (_, *rest) in enumerate(events)]
    merged: dict[tuple, int] = {}
    contents: dict[tuple, list[float]] = {}
    for *key, actions, content in events:
      merged[tuple(key)] = merged.get(tuple(key), 0) | actions
      if content is not None:
        contents.setdefault(tuple(key), content)
    time, item, surface = zip(*merged, strict=True) if merged else ((), (), ())
    history = History(
      np.array(time, np.int64),
      np.array(item, np.uint64),
      np.array(surface, np.uint16),
      np.array(list(merged.values()), np.uint32),
    )
    if not contents:
      return _Events(history, None, all(timed))
    none = [np.nan] * self._event_content
    return _Events(history, np.array([contents.get(key, none) for key in merged], np.float32), all(timed))

  def _event(self, event: Any) -> tuple[int | None, int, int, int, list[float] | None]:
    check_names(event, self._event_fields, 'an event')
    name = event.get('surface', NO_SURFACE if NO_SURFACE in self._surfaces else None)
    surface = read_name(self._surfaces, name, 'surface')
    bits = 0
    for name in read_list(event, 'actions', []):
      bits |= read_name(self._actions, name, 'action')
    content = event.get('content')
    if content is not None:
      content = read_vector(content, 'content', self._event_content)
    time = read_time(event.get('timestamp'), 'timestamp')
    return time, read_key(event.get('item_id'), self._id_type), surface, bits, content

  def _candidates(self, document: Mapping, listed: list, history_events: int) -> Request:
    time = read_time(document.get('timestamp'), 'timestamp')
    surface = self._surface(document.get('surface'))
    try:
      times, items, created, surfaces, dense, sparse, embedding = self._plain_candidates(listed, time, surface)
    except columns.UnusualError:
      rows = [_at('candidate', i, self._candidate, c, time, surface) for i, c in enumerate(listed)]
      times, items, created, surfaces, dense, sparse, embedding = zip(*rows, strict=True) if rows else [()] * 7
    features, count = self._schema.features, len(listed)
    return Request(
      user_row=0,
      history_end=history_events,
      timestamp=np.asarray(times, np.int64),
      item=np.asarray(items, np.uint64),
      created_at=np.asarray(created, np.int64),
      surface=np.asarray(surfaces, np.int32),
      labels=np.zeros((count, len(self._schema.labels)), np.uint8),
      dense=np.asarray(dense, np.float32).reshape(count, len(features.dense)),
      sparse=np.asarray(sparse, np.int32).reshape(count, len(features.sparse)),
      embedding=np.asarray(embedding, np.float32).reshape(count, features.embedding_width),
      reference=None,
    )

  def _plain_candidates(self, listed: list, time: int | None, surface: int) -> tuple[np.ndarray, ...]:
    """The columns of `_candidate`, of candidates that are spelled plainly."""
    columns.plain_objects(listed, self._candidate_fields)
    times = columns.times([c.get('timestamp', time) for c in listed], missing=-1)
    created = columns.times([c.get('item_created_at') for c in listed], missing=-1)
    if (times < 0).any() and (self._needs_times or (created >= 0).any()):
      raise columns.UnusualError
    features, count = self._schema.features, len(listed)
    sparse = (columns.encoded([c.get(f.name) for c in listed], partial(read_sparse, f)) for f in features.sparse)
    embedding = (columns.vectors([c.get(name) for c in listed], width, 0) for name, width in self._vectors)
    return (
      np.maximum(times, 0),
      columns.keys([c.get('item_id') for c in listed], self._id_type),
      created,
      columns.names([c.get('surface') for c in listed], self._surfaces, surface),
      columns.numbers(listed, features.dense),
      columns.side_by_side(sparse, count, np.int32),
      columns.side_by_side(embedding, count, np.float32),
    )

  def _candidate(self, candidate: Any, time: int | None, surface: int) -> tuple:
    """One candidate's columns; `time` and `surface` are the request's."""
    check_names(candidate, self._candidate_fields, 'a candidate')
    time = read_time(candidate.get('timestamp', time), 'timestamp')
    created = read_time(candidate.get('item_created_at'), 'item_created_at')
    if created is not None and time is None:
      raise UserError('got item_created_at, but the age needs the time of the request too: give its timestamp')
    if self._needs_times and time is None:
      raise UserError(
        'the request has no timestamp, but the model of this bundle reads the time since the last event: give it'
      )
    features = self._schema.features
    return (
      time or 0,
      read_key(candidate.get('item_id'), self._id_type),
      -1 if created is None else created,
      self._surface(candidate['surface']) if candidate.get('surface') is not None else surface,
      [read_number(candidate.get(name), name) for name in features.dense],
      [read_sparse(feature, candidate.get(feature.name)) for feature in features.sparse],
      [x for name, width in self._vectors for x in read_vector(candidate.get(name), name, width)],
    )

  def _content(self, listed: list) -> np.ndarray | None:
    width = self._schema.content_width
    if not width:
      return None
    try:
      return columns.vectors([c.get('content') for c in listed], width, np.nan)
    except columns.UnusualError:
      pass
    rows = [
      [np.nan] * width if c.get('content') is None else _at('candidate', i, read_vector, c['content'], 'content', width)
      for i, c in enumerate(listed)
    ]
    return np.array(rows, np.float32).reshape(len(listed), width)

  def _surface(self, name: Any) -> int:
    if name is None:
      return self._surfaces.get(NO_SURFACE, _MISSING_SURFACE)
    return read_name(self._surfaces, name, 'surface')


def _at(what: str, place: int, function: Any, *arguments: Any) -> Any:
  """Calls the function; an error says which element it concerns."""
  try:
    return function(*arguments)
  except UserError as error:
    raise UserError(f'{what} {place}: {error}') from None
