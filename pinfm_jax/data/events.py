"""The canonical schema of events and impressions: names, limits, and the 64-bit keys of ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from pinfm_jax.errors import UserError

MAX_ACTIONS = 32
MAX_LABELS = 32
MAX_SURFACES = 65_536
MAX_ID_BYTES = 512
MAX_TIME_MS = 253_402_300_799_999  # the last millisecond of the year 9999
NO_SURFACE = 'none'
ID_TYPES = ('integer', 'string')
EVENT_FIELDS = ('user_id', 'timestamp', 'item_id', 'surface', 'action', 'actions')
IMPRESSION_FIELDS = ('request_id', 'user_id', 'timestamp', 'item_id', 'surface', 'item_created_at')
_INT64 = range(-(1 << 63), 1 << 63)


def id_key(value: int | str, id_type: str) -> int:
  """The 64-bit key of one id.

  Args:
    value: the id; for id_type 'integer' also its decimal digits as a string.
    id_type: 'integer' (the key is the int64's two's complement) or 'string' (BLAKE2b of the UTF-8 bytes).

  Returns:
    The key, 0 <= key < 2^64.

  Raises:
    UserError: the id does not fit the type.
  """
  _check_type(id_type)
  if id_type == 'integer':
    return _integer_id(value) % (1 << 64)
  text = str(value)
  try:
    size = len(text.encode())
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
    raise UserError(f'got the id {value!r}, which is no valid Unicode: spell it in UTF-8') from None
  if not 0 < size <= MAX_ID_BYTES:
    raise UserError(f'got an id of {size} bytes, expected 1 to {MAX_ID_BYTES}')
  return _string_key(text)


def id_keys(values: np.ndarray | pl.Series | Sequence, id_type: str) -> np.ndarray:
  """The 64-bit keys of many ids, uint64 [n]; each distinct string is hashed once.

  Raises:
    UserError: an id does not fit the type, or is missing.
  """
  _check_type(id_type)
  series = values if isinstance(values, pl.Series) else pl.Series(np.asarray(values))
  if series.null_count():
    raise UserError(f'got {series.null_count()} missing ids among {len(series)}: every row needs one')
  if id_type == 'integer' and series.dtype.is_integer() and series.dtype != pl.UInt64:
    return series.cast(pl.Int64).to_numpy().astype(np.int64).view(np.uint64)
  text = series if series.dtype == pl.String else series.cast(pl.String)
  distinct = text.unique()
  keys = pl.Series([id_key(value, id_type) for value in distinct.to_list()], dtype=pl.UInt64)
  return text.replace_strict(distinct, keys, return_dtype=pl.UInt64).to_numpy()


def keys_of(ids: pl.Series, id_type: str) -> pl.Series:
  """Keys of ids that were checked before (int64 or text, none missing), u64."""
  if id_type == 'integer':
    return ids.reinterpret(signed=False)
  distinct = ids.unique()
  keys = pl.Series([_string_key(value) for value in distinct.to_list()], dtype=pl.UInt64)
  return ids.replace_strict(distinct, keys, return_dtype=pl.UInt64)


@dataclass
class Vocabulary:
  """Names met so far, in the order of their provisional codes; fixed names are never added to.

  A log is read once, so codes are handed out as names appear and renumbered at the end (`final`); the first `settled`
  names, those of a data set that is appended to, keep theirs.
  """

  kind: str
  limit: int
  fixed: bool = False
  names: list[str] = field(default_factory=list)
  settled: int = 0

  @classmethod
  def of(cls, kind: str, limit: int, names: Sequence[str] | None) -> 'Vocabulary':
    """A vocabulary of the given names, or one that grows when names is None."""
    vocabulary = cls(kind, limit, names is not None, list(names or ()))
    vocabulary._check_limit()
    if len(set(vocabulary.names)) < len(vocabulary.names):
      raise UserError(f'the list of {kind}s names one twice: {", ".join(vocabulary.names)}')
    return vocabulary

  def add(self, names: Sequence[str]) -> None:
    """Gives new names the next codes (nothing happens when the vocabulary is fixed).

    Raises:
      UserError: more names than the format can store.
    """
    if not self.fixed:
      known = set(self.names)
      self.names.extend(sorted(set(names) - known))
      self._check_limit()

  def final(self) -> tuple[list[str], np.ndarray]:
    """The stored order of the names and the stored code of every provisional code.

    Fixed and settled names keep their order; discovered ones are sorted: by number if all are integers, else by name.
    """
    order, found = self.names[: self.settled], self.names[self.settled :]
    order = order + (found if self.fixed else sorted(found, key=_name_order(found)))
    position = {name: code for code, name in enumerate(order)}
    return list(order), np.array([position[name] for name in self.names], np.int64)

  def _check_limit(self) -> None:
    if len(self.names) > self.limit:
      shown = ', '.join(self.names[:5])
      raise UserError(
        f'got {len(self.names)} distinct {self.kind}s ({shown}, ..), at most {self.limit} can be stored: '
        f'is the right column mapped to {self.kind}?'
      )


def _name_order(names: Sequence[str]):  # noqa: ANN202 (a sort key)
  if all(name.lstrip('-').isdecimal() and name.isascii() for name in names):
    return lambda name: (int(name), name)
  return lambda name: name


def _integer_id(value: int | str) -> int:
  try:
    number = int(value)
  except (TypeError, ValueError):
    raise UserError(f'got the id {value!r}, expected an integer (the data set has integer ids)') from None
  if number not in _INT64 or (isinstance(value, float) and value != number):
    raise UserError(f'got the id {value!r}, expected a 64-bit integer')
  return number


def _string_key(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def _check_type(id_type: str) -> None:
  if id_type not in ID_TYPES:
    raise UserError(f'got the id type {id_type!r}, expected one of {", ".join(ID_TYPES)}')
