"""Turns requests and users of a prepared data set into the JSON that a bundle reads: examples, and parity checks."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.info import SparseFeature
from pinfm_jax.data.records import History, Request


def dataset_requests(dataset: PreparedDataset, rows: Iterable[int], history_length: int) -> Iterator[dict[str, Any]]:
  """Requests of the data set as a client would send them.

  Args:
    dataset: a data set with impressions.
    rows: which requests.
    history_length: events sent, the user's newest before the request; at least the bundle's `schema.most_events`.

  Yields:
    Documents in the form of `serve.requests`. Hashed sparse features, whose values are not stored, are given as
    {"index": i}; missing values are left out.
  """
  writer = _RequestWriter(dataset)
  for row in rows:
    yield writer.document(int(row), history_length)


def dataset_users(dataset: PreparedDataset, rows: Iterable[int], ends: Iterable[int]) -> Iterator[dict[str, Any]]:
  """Users of the data set as `pinfm recommend` takes them: all their events before an offset of their histories.

  Args:
    dataset: any data set.
    rows: which users.
    ends: how many of each one's events.
  """
  writer = _RequestWriter(dataset)
  for row, end in zip(rows, ends, strict=True):
    history = writer.events(dataset.history(int(row)), range(end))
    yield {'request_id': int(row), 'history': history, 'candidates': []}


class _RequestWriter:
  def __init__(self, dataset: PreparedDataset):
    self._dataset, self._info = dataset, dataset.info
    self._keys = dataset.items['item_key'].to_numpy()
    self._ids = dataset.items['item_id']
    self._content = dataset.items['content'].to_numpy() if dataset.info.content_width else None

  def document(self, row: int, history_length: int) -> dict[str, Any]:
    request = self._dataset.request(row)
    history = self._dataset.history(request.user_row)
    first = max(request.history_end - history_length, 0)
    return {
      'request_id': self._dataset.requests['request_id'][row],
      'timestamp': int(request.timestamp.min()),
      'history_events': request.history_end,
      'history': self.events(history, range(first, request.history_end)),
      'candidates': [self._candidate(request, c) for c in range(len(request))],
    }

  def events(self, history: History, places: Iterable[int]) -> list[dict[str, Any]]:
    return [self._event(history, i) for i in places]

  def _event(self, history: History, i: int) -> dict[str, Any]:
    actions = int(history.actions[i])
    return {
      'timestamp': int(history.timestamp[i]),
      'item_id': self._ids[self._item(history.item[i])],
      'surface': self._info.surfaces[history.surface[i]],
      'actions': [name for bit, name in enumerate(self._info.actions) if actions >> bit & 1],
    }

  def _candidate(self, request: Request, c: int) -> dict[str, Any]:
    features, item = self._info.features, self._item(request.item[c])
    document = {
      'item_id': self._ids[item],
      'timestamp': int(request.timestamp[c]),
      'surface': self._info.surfaces[request.surface[c]],
    }
    if request.created_at[c] >= 0:
      document['item_created_at'] = int(request.created_at[c])
    dense = zip(features.dense, request.dense[c].tolist(), strict=True)
    document |= {name: value for name, value in dense if not np.isnan(value)}
    sparse = zip(features.sparse, request.sparse[c].tolist(), strict=True)
    document |= {feature.name: _sparse_value(feature, index) for feature, index in sparse if index}
    start = 0
    for feature in features.embedding:
      document[feature.name] = request.embedding[c, start : start + feature.width].tolist()
      start += feature.width
    if self._content is not None and not np.isnan(self._content[item]).any():
      document['content'] = self._content[item].tolist()
    return document

  def _item(self, key: np.uint64) -> int:
    return int(np.searchsorted(self._keys, key))


def _sparse_value(feature: SparseFeature, index: int) -> Any:
  return {'index': index} if feature.values is None else feature.values[index - 1]
