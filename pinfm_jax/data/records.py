"""The binary records of a prepared data set: one user's history, one request with its candidates.

Both are a fixed header followed by little-endian columns, so that a record decodes into NumPy views without a copy.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

HISTORY_MAGIC = b'PFH1'
REQUEST_MAGIC = b'PFR1'
_REQUEST_HEADER = struct.Struct('<4s8I')
_EVENT_BYTES = 8 + 8 + 2 + 4


@dataclass(frozen=True)
class History:
  """One user's events, oldest first; every array has the length n.

  Attributes:
    timestamp: int64 [n], milliseconds since 1970 (ordinals 0, 1, 2, .. where the times are not known).
    item: uint64 [n], item keys.
    surface: uint16 [n], index into `DatasetInfo.surfaces`.
    actions: uint32 [n], bit a is set if action a of `DatasetInfo.actions` was taken.
  """

  timestamp: np.ndarray
  item: np.ndarray
  surface: np.ndarray
  actions: np.ndarray

  def __len__(self) -> int:
    return len(self.timestamp)

  def before(self, end: int) -> 'History':
    """The first `end` events."""
    return self.between(0, end)

  def between(self, start: int, end: int) -> 'History':
    """Events `start` to `end - 1`."""
    return History(*(getattr(self, field.name)[start:end] for field in fields(self)))

  @classmethod
  def joined(cls, parts: Sequence['History']) -> 'History':
    """The events of several histories, one after the other (of several users: their times then do not ascend)."""
    return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


# (row of whom it is asked for, events) -> the events that a model is to read in their place.
HistoryChange = Callable[[int, History], History]


@dataclass(frozen=True)
class Request:
  """One request: C candidates shown to one user, in the order of their first impression.

  Attributes:
    user_row: the user's row in the data set.
    history_end: how many of the user's stored events came strictly before the first impression.
    timestamp: int64 [C], milliseconds since 1970.
    item: uint64 [C], item keys.
    created_at: int64 [C], milliseconds since 1970; -1 = unknown.
    surface: uint16 [C].
    labels: uint8 [C, T], 0 or 1.
    dense: float32 [C, Fd], NaN = missing.
    sparse: int32 [C, Fs], 0 = missing or unknown.
    embedding: float32 [C, Fe], the embedding features side by side, zeros where missing.
    reference: float32 [C, T], the true probabilities of a simulated log, or None.
  """

  user_row: int
  history_end: int
  timestamp: np.ndarray
  item: np.ndarray
  created_at: np.ndarray
  surface: np.ndarray
  labels: np.ndarray
  dense: np.ndarray
  sparse: np.ndarray
  embedding: np.ndarray
  reference: np.ndarray | None

  def __len__(self) -> int:
    return len(self.timestamp)


def encode_histories(events: History, offsets: np.ndarray) -> Iterator[bytes]:
  """The records of many users whose events lie one user after the other.

  Args:
    events: all users' events.
    offsets: [users + 1], user u owns the events offsets[u] to offsets[u + 1].

  Yields:
    One record a user.
  """
  timestamp = _raw(events.timestamp, '<i8')
  item = _raw(events.item, '<u8')
  surface = _raw(events.surface, '<u2')
  actions = _raw(events.actions, '<u4')
  bounds = offsets.tolist()
  for a, b in zip(bounds, bounds[1:], strict=False):
    size = (b - a).to_bytes(4, 'little')
    columns = (timestamp[8 * a : 8 * b], item[8 * a : 8 * b], surface[2 * a : 2 * b], actions[4 * a : 4 * b])
    yield b''.join((HISTORY_MAGIC, size, *columns))


def decode_history(record: bytes) -> History:
  """The history of a record; the arrays are read-only views of it.

  Raises:
    ValueError: the bytes are no history record.
  """
  if len(record) < 8 or record[:4] != HISTORY_MAGIC:
    raise ValueError(f'not a history record: {len(record)} bytes that start with {record[:4]!r}')
  n = int.from_bytes(record[4:8], 'little')
  if len(record) != 8 + n * _EVENT_BYTES:
    raise ValueError(f'damaged history record: {len(record)} bytes for {n} events, expected {8 + n * _EVENT_BYTES}')
  return History(
    timestamp=np.frombuffer(record, '<i8', n, 8),
    item=np.frombuffer(record, '<u8', n, 8 + 8 * n),
    surface=np.frombuffer(record, '<u2', n, 8 + 16 * n),
    actions=np.frombuffer(record, '<u4', n, 8 + 18 * n),
  )


def encode_requests(
  candidates: Request, user_rows: np.ndarray, history_ends: np.ndarray, offsets: np.ndarray
) -> Iterator[bytes]:
  """The records of many requests whose candidates lie one request after the other.

  Args:
    candidates: all requests' candidates (its own user_row and history_end are not read).
    user_rows: [requests].
    history_ends: [requests].
    offsets: [requests + 1], request r owns the candidates offsets[r] to offsets[r + 1].

  Yields:
    One record a request.
  """
  has_reference = candidates.reference is not None
  columns = [
    _raw(candidates.timestamp, '<i8'),
    _raw(candidates.item, '<u8'),
    _raw(candidates.created_at, '<i8'),
    _raw(candidates.surface, '<u2'),
    _raw(pack_bits(candidates.labels), '<u4'),
    _raw(candidates.dense, '<f4'),
    _raw(candidates.sparse, '<i4'),
    _raw(candidates.embedding, '<f4'),
    *([_raw(candidates.reference, '<f4')] if has_reference else []),
  ]
  widths = (candidates.dense.shape[1], candidates.sparse.shape[1], candidates.embedding.shape[1])
  labels = candidates.labels.shape[1]
  sizes = [8, 8, 8, 2, 4, *(4 * width for width in widths), *([4 * labels] if has_reference else [])]
  bounds = offsets.tolist()
  for r, (user_row, end) in enumerate(zip(user_rows.tolist(), history_ends.tolist(), strict=True)):
    a, b = bounds[r], bounds[r + 1]
    header = _REQUEST_HEADER.pack(REQUEST_MAGIC, user_row, end, b - a, *widths, labels, has_reference)
    yield b''.join((header, *(raw[a * size : b * size] for raw, size in zip(columns, sizes, strict=True))))


def with_user_row(record: bytes, user_row: int) -> bytes:
  """A request's record with another row of the user."""
  return record[:4] + user_row.to_bytes(4, 'little') + record[8:]


def decode_request(record: bytes) -> Request:
  """The request of a record; all arrays but the labels are read-only views of it.

  Raises:
    ValueError: the bytes are no request record.
  """
  if len(record) < _REQUEST_HEADER.size or record[:4] != REQUEST_MAGIC:
    raise ValueError(f'not a request record: {len(record)} bytes that start with {record[:4]!r}')
  _, user_row, history_end, count, dense, sparse, embedding, labels, has_reference = _REQUEST_HEADER.unpack_from(record)
  floats = dense + sparse + embedding + (labels if has_reference else 0)
  expected = _REQUEST_HEADER.size + count * (30 + 4 * floats)
  if len(record) != expected:
    raise ValueError(f'damaged request record: {len(record)} bytes for {count} candidates, expected {expected}')
  position = _REQUEST_HEADER.size

  def take(dtype: str, width: int | None = None) -> np.ndarray:
    nonlocal position
    size = count if width is None else count * width
    column = np.frombuffer(record, dtype, size, position)
    position += column.nbytes
    return column if width is None else column.reshape(count, width)

  return Request(
    user_row=user_row,
    history_end=history_end,
    timestamp=take('<i8'),
    item=take('<u8'),
    created_at=take('<i8'),
    surface=take('<u2'),
    labels=unpack_bits(take('<u4'), labels),
    dense=take('<f4', dense),
    sparse=take('<i4', sparse),
    embedding=take('<f4', embedding),
    reference=take('<f4', labels) if has_reference else None,
  )


def pack_bits(flags: np.ndarray) -> np.ndarray:
  """uint32 [n] whose bit t is flags[:, t]; at most 32 columns."""
  weights = np.uint32(1) << np.arange(flags.shape[1], dtype=np.uint32)
  return (flags.astype(bool) * weights).sum(axis=1, dtype=np.uint32)


def unpack_bits(bits: np.ndarray, width: int) -> np.ndarray:
  """uint8 [n, width]: the lowest `width` bits of every number, lowest first (the inverse of pack_bits)."""
  return (bits[:, None] >> np.arange(width, dtype=np.uint32) & np.uint32(1)).astype(np.uint8)


def _raw(column: np.ndarray, dtype: str) -> memoryview | bytes:
  data = np.ascontiguousarray(column, dtype)
  return memoryview(data).cast('B') if data.size else b''
