"""Reads and checks ranking requests in JSON, and turns them into the records that training featurizes.

  {"request_id": "r1", "timestamp": 1700000000000, "surface": "feed",
   "history": [{"timestamp": 1699990000000, "item_id": 7, "surface": "feed", "actions": ["click"]}, ...],
   "candidates": [{"item_id": 9, "item_created_at": 1699900000000, "price": 3.5, "country": "fr", ...}, ...]}

Times are milliseconds since 1970 or ISO 8601 (UTC unless said otherwise). Only request_id, history, candidates and
their item_ids are required; a feature, surface or time that is not given counts as missing. A candidate may carry its
own timestamp and surface, and "content" if the model has content vectors. A client that sends just a user's newest
events adds "history_events", how many the user has in all, and gets the same scores. "user_id" is allowed and unused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pinfm_jax.data.events import NO_SURFACE
from pinfm_jax.data.featurize import window_start
from pinfm_jax.data.records import History, Request
from pinfm_jax.errors import UserError
from pinfm_jax.serve.fields import (
  check_names,
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

_REQUEST_FIELDS = ('request_id', 'user_id', 'timestamp', 'surface', 'history', 'history_events', 'candidates')
_EVENT_FIELDS = ('timestamp', 'item_id', 'surface', 'actions')
_CANDIDATE_FIELDS = ('item_id', 'item_created_at', 'timestamp', 'surface')
_MISSING_SURFACE = -1  # featurize adds 1: index 0 is the missing value


@dataclass(frozen=True)
class ScoringRequest:
  """A request, checked.

  Attributes:
    request_id: as given.
    item_ids: of the candidates, as given.
    history: the events given, oldest first.
    window: the events of `history` that the model reads.
    candidates: their features; `history_end` counts all the user's events.
    content: [C, content width], None if the model has none.
  """

  request_id: int | str
  item_ids: tuple[int | str, ...]
  history: History
  window: slice
  candidates: Request
  content: np.ndarray | None


class RequestParser:
  """Checks requests against a bundle's vocabularies and features."""

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
    history = self._history(read_list(document, 'history'), read_time(document.get('timestamp'), 'timestamp'))
    total = document.get('history_events', len(history))
    if isinstance(total, bool) or not isinstance(total, int) or total < len(history):
      raise UserError(
        f'got history_events {show(total)}, expected the number of all events of the user, '
        f'at least the {len(history)} distinct ones given'
      )
    listed = read_list(document, 'candidates')
    skipped = total - len(history)  # older events that the client did not send
    return ScoringRequest(
      request_id=request_id,
      item_ids=tuple(c.get('item_id') if isinstance(c, Mapping) else None for c in listed),
      history=history,
      window=slice(max(window_start(total, self._length, self._block) - skipped, 0), len(history)),
      candidates=self._candidates(document, listed, total),
      content=self._content(listed),
    )

  def _history(self, listed: list, before: int | None) -> History:
    """Events sorted by time, stably; those that agree in time, item and surface are one event, as in preparation."""
    events = [_at('history event', i, self._event, event) for i, event in enumerate(listed)]
    timed = [time is not None for time, *_ in events]
    if any(timed) and not all(timed):
      raise UserError(f'history event {timed.index(False)} has no timestamp but others have; give all or none')
    if all(timed):
      events.sort(key=lambda event: event[0])
      if events and before is not None and events[-1][0] >= before:
        raise UserError(
          f"a history event at {events[-1][0]} is not before the request's timestamp {before}; "
          'leave out what came after, as in training'
        )
    else:  # in the order given; the ordinal keeps repeats apart
      events = [(i, *rest) for i, (_, *rest) in enumerate(events)]
    merged: dict[tuple, int] = {}
    for *key, actions in events:
      merged[tuple(key)] = merged.get(tuple(key), 0) | actions
    time, item, surface = zip(*merged, strict=True) if merged else ((), (), ())
    return History(
      np.array(time, np.int64),
      np.array(item, np.uint64),
      np.array(surface, np.uint16),
      np.array(list(merged.values()), np.uint32),
    )

  def _event(self, event: Any) -> tuple[int | None, int, int, int]:
    check_names(event, _EVENT_FIELDS, 'an event')
    name = event.get('surface', NO_SURFACE if NO_SURFACE in self._surfaces else None)
    surface = read_name(self._surfaces, name, 'surface')
    bits = 0
    for name in read_list(event, 'actions', []):
      bits |= read_name(self._actions, name, 'action')
    return read_time(event.get('timestamp'), 'timestamp'), read_key(event.get('item_id'), self._id_type), surface, bits

  def _candidates(self, document: Mapping, listed: list, history_events: int) -> Request:
    time = read_time(document.get('timestamp'), 'timestamp')
    surface = self._surface(document.get('surface'))
    rows = [_at('candidate', i, self._candidate, c, time, surface) for i, c in enumerate(listed)]
    times, items, created, surfaces, dense, sparse, embedding = zip(*rows, strict=True) if rows else [()] * 7
    features, count = self._schema.features, len(rows)
    return Request(
      user_row=0,
      history_end=history_events,
      timestamp=np.array(times, np.int64),
      item=np.array(items, np.uint64),
      created_at=np.array(created, np.int64),
      surface=np.array(surfaces, np.int32),
      labels=np.zeros((count, len(self._schema.labels)), np.uint8),
      dense=np.array(dense, np.float32).reshape(count, len(features.dense)),
      sparse=np.array(sparse, np.int32).reshape(count, len(features.sparse)),
      embedding=np.array(embedding, np.float32).reshape(count, features.embedding_width),
      reference=None,
    )

  def _candidate(self, candidate: Any, time: int | None, surface: int) -> tuple:
    """One candidate's columns; `time` and `surface` are the request's."""
    check_names(candidate, self._candidate_fields, 'a candidate')
    time = read_time(candidate.get('timestamp', time), 'timestamp')
    created = read_time(candidate.get('item_created_at'), 'item_created_at')
    if created is not None and time is None:
      raise UserError('got item_created_at, but the age needs the time of the request too: give its timestamp')
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
    rows = [_at('candidate', i, read_vector, c.get('content'), 'content', width) for i, c in enumerate(listed)]
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
