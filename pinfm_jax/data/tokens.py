"""What the model reads of an event besides item, surface and actions: the time since the event before, and content.

Both are options of the model's configuration. They are computed here, on the host, for training, evaluation and
serving alike.

Content goes to the device row by row with the batch, not as a table: a catalogue of 100 M items x 64 is 13 GB in
float16, which would take a device's memory away from the item tables, while the vectors of a batch of 64 x 256 events
are 2 MB. Vectors are stored with unit length (the model reads their direction), which float16 holds to 0.05 %.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pinfm_jax.config import PinFMConfig, TableConfig
from pinfm_jax.data.info import DatasetInfo
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import EXACT_ROWS

if TYPE_CHECKING:
  from pinfm_jax.data.dataset import PreparedDataset

_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class ItemContent:
  """Content of the items of a catalogue, looked up by key.

  Attributes:
    keys_V: uint64 item keys, ascending.
    vectors_VW: float16 of unit length; zeros for an item without content.
    known_V: False for items that training never saw, whose id vectors therefore mean nothing; None = not told apart
      (a model that was trained without hidden ids cannot do without them).
  """

  keys_V: np.ndarray
  vectors_VW: np.ndarray
  known_V: np.ndarray | None = None

  @classmethod
  def of(cls, dataset: 'PreparedDataset', trained_until_ms: int | None = None) -> 'ItemContent':
    """Content of a data set's items.

    Args:
      dataset: has content vectors.
      trained_until_ms: end of the training data: items first seen later are not known; None = not told apart.
    """
    items = dataset.items
    keys_V = items['item_key'].to_numpy()
    vectors_VW = np.zeros((len(keys_V), dataset.info.content_width), np.float16)
    for start in range(0, len(keys_V), _CHUNK_ROWS):  # the float32 copies stay small
      rows = slice(start, start + _CHUNK_ROWS)
      vectors_VW[rows] = unit_half(items['content'][rows].to_numpy())
    known_V = None if trained_until_ms is None else items['first_seen'].to_numpy() < trained_until_ms
    return cls(keys_V, vectors_VW, known_V)

  def inputs(self, keys: np.ndarray, own: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The model's inputs for items.

    Args:
      keys: uint64 [n].
      own: float32 [n, W], content that comes with the items and wins; a row of NaN = none does.

    Returns:
      content [n, W] float16, zeros for items without any; and, where `known_V` is, new [n] bool: training never saw
      the item, so its id is hidden.
    """
    # Sorted queries share the upper levels of the search: a third less time in a catalogue of 2 M items.
    order = np.argsort(keys)
    place = np.empty(len(keys), np.int64)
    place[order] = np.searchsorted(self.keys_V, keys[order])
    found = place < len(self.keys_V)
    found[found] = self.keys_V.take(place[found]) == keys[found]
    content = np.zeros((len(keys), self.vectors_VW.shape[1]), np.float16)
    content[found] = self.vectors_VW.take(place[found], axis=0)
    if own is not None:
      given = ~np.isnan(own).any(axis=1)
      content[given] = unit_half(own[given])
    if self.known_V is None:
      return {'content': content}
    known = np.zeros(len(keys), bool)
    known[found] = self.known_V.take(place[found])
    return {'content': content, 'new': ~known}


@dataclass(frozen=True)
class TokenInputs:
  """What the tokens of a model read; nothing by default.

  Attributes:
    gap_buckets: of the time gaps; 0 = none.
    items: content of the items; None = none.
  """

  gap_buckets: int = 0
  items: ItemContent | None = None

  @classmethod
  def of(cls, model: PinFMConfig, dataset: 'PreparedDataset', trained_until_ms: int | None = None) -> 'TokenInputs':
    """What a model reads of a data set.

    Args:
      model: its configuration.
      dataset: the data.
      trained_until_ms: end of the training data, to tell new items apart if the model learned to read them.

    Raises:
      UserError: see `check_tokens` and `check_exact_rows`.
    """
    check_tokens(model, dataset.info)
    check_exact_rows(model.tables, dataset)
    items = ItemContent.of(dataset, trained_until_ms if model.id_mask else None) if model.content else None
    return cls(model.tower.time_gap_buckets, items)


PLAIN = TokenInputs()


def check_exact_rows(tables: TableConfig, dataset: 'PreparedDataset') -> None:
  """Checks that every item of a data set has a row of its own where the tables hash nothing.

  Raises:
    UserError: ids that are text, or are too large for the rows.
  """
  if tables.hash_seed != EXACT_ROWS:
    return
  if dataset.info.id_type.item != 'integer':
    raise UserError(
      f'model.tables.hash_seed is {EXACT_ROWS} (exact rows), but the item ids are text; set another hash_seed'
    )
  largest = int(dataset.items['item_key'].max())
  if largest >= tables.rows - 1:
    raise UserError(
      f'model.tables.rows is {tables.rows}, and exact rows (model.tables.hash_seed={EXACT_ROWS}) of ids up to '
      f'{largest} need at least {largest + 2}'
    )


def check_hidden_actions(share: float, info: DatasetInfo) -> None:
  """Raises UserError if pretraining is to hide and predict actions (`pretrain.action_mask`) that nobody has taken."""
  if share and not info.actions:
    raise UserError(
      f'pretrain.action_mask is {share}, but the events of this data set have no actions to predict; set it to 0'
    )


def check_tokens(model: PinFMConfig, info: DatasetInfo) -> None:
  """Checks that a data set has what the model's options need.

  Raises:
    UserError: time gaps without times, or content vectors that are not there or have another width.
  """
  if model.tower.time_gap_buckets and not info.time_known.histories:
    raise UserError(
      f'model.tower.time_gap_buckets is {model.tower.time_gap_buckets}, but the histories of this data set have no '
      'times, only an order; set it to 0, or prepare the events with their timestamps'
    )
  if model.content and not info.content_width:
    raise UserError(
      'model.content is true, but the items of this data set have no content vectors; set it to false, or prepare '
      'the data with an item file that has a content column (--items FILE)'
    )
  if model.content and model.content_width not in (0, info.content_width):
    raise UserError(
      f'model.content_width is {model.content_width}, the content vectors of this data set have {info.content_width} '
      'values; leave it at 0'
    )


def gap_bucket(gap_ms: np.ndarray, buckets: int) -> np.ndarray:
  """Log2 bucket of time gaps.

  Bucket 1 is below one second, bucket k + 2 is 2^k to 2^(k+1) seconds, and the last one takes what is longer; bucket 0
  is for events that none is known to precede. A negative gap counts as 0.

  Args:
    gap_ms: int64, milliseconds.
    buckets: how many there are, bucket 0 included.

  Returns:
    int32.
  """
  seconds = np.maximum(np.asarray(gap_ms, np.int64), 0) // 1000
  exponent = np.frexp(seconds.astype(np.float64))[1]  # exact: the bit length of an integer below 2^53
  return np.minimum(1 + exponent, buckets - 1).astype(np.int32)


def event_gaps(timestamp: np.ndarray, buckets: int) -> np.ndarray:
  """Buckets of the gaps before each event of a window; its first event has bucket 0, whatever came before the window.

  So an event's bucket does not depend on whether a server was told of the events before the window.
  """
  gaps = np.zeros(len(timestamp), np.int32)
  gaps[1:] = gap_bucket(np.diff(timestamp), buckets)
  return gaps


def request_gap(timestamp_C: np.ndarray, last_event_ms: int | None, buckets: int) -> int:
  """Bucket of the time from a user's last event to the request; 0 without an event.

  It is one for all candidates, from the first impression on, since a server ranks them all at that moment.
  """
  if last_event_ms is None or not len(timestamp_C):
    return 0
  return int(gap_bucket(timestamp_C.min() - last_event_ms, buckets))


def unit_half(vectors: np.ndarray) -> np.ndarray:
  """float [n, W] -> float16 of unit length; a row of zeros, or with a missing value, becomes zeros."""
  vectors = np.asarray(vectors, np.float64)
  vectors = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0)
  length = np.sqrt(np.sum(np.square(vectors), axis=1, keepdims=True))
  return (vectors / np.where(length > 0, length, 1)).astype(np.float16)
