"""Reads a request's columns at once, several times as fast as value by value.

Every function takes one field of all events or candidates and raises `UnusualError` for whatever is not plain: the
caller then reads value by value (`serve.fields`), which takes every spelling and says what is wrong. Where a function
returns, it returns what `serve.fields` would.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np

from pinfm_jax.data.events import MAX_TIME_MS, id_key
from pinfm_jax.errors import UserError
from pinfm_jax.serve.fields import LARGEST_FLOAT


class UnusualError(Exception):
  """Not plain, or wrong: to be read value by value."""


def plain_objects(listed: Sequence[Any], known: Mapping[str, Any]) -> None:
  """Checks that all are dictionaries without unknown fields."""
  names = known.keys()
  _demand(set(map(type, listed)) <= {dict} and all(each.keys() <= names for each in listed))


def keys(values: Sequence[Any], id_type: str) -> np.ndarray:
  """uint64 keys of ids that are spelled as their type."""
  if id_type == 'integer':
    _demand(set(map(type, values)) <= {int})
    return _array(values, np.int64).view(np.uint64)
  _demand(set(map(type, values)) <= {str})
  try:
    return np.array([id_key(value, id_type) for value in values], np.uint64)
  except UserError:
    raise UnusualError from None


def times(values: Sequence[Any], missing: int) -> np.ndarray:
  """int64 milliseconds; None becomes `missing`."""
  given = [value for value in values if value is not None]
  _demand(set(map(type, given)) <= {int} and (not given or 0 <= min(given) <= max(given) <= MAX_TIME_MS))
  return _array(values if len(given) == len(values) else [missing if v is None else v for v in values], np.int64)


def names(values: Sequence[Any], codes: Mapping[str, int], missing: int | None) -> np.ndarray:
  """int32 codes of names; None becomes `missing`, where there may be such a value."""
  try:  # a type other than a string is no key
    _demand(set(map(type, values)) <= {str, NoneType})
    return np.array([missing if value is None else codes[value] for value in values], np.int32)
  except (KeyError, TypeError):
    raise UnusualError from None


def name_sets(values: Sequence[Any], bits: Mapping[str, int]) -> np.ndarray:
  """uint32 bits of lists of names; each different list is read once."""
  _demand(set(map(type, values)) <= {list})
  read: dict[tuple, int] = {}
  out = []
  try:
    for value in map(tuple, values):
      if value not in read:
        read[value] = 0
        for name in value:
          read[value] |= bits[name]
      out.append(read[value])
  except (KeyError, TypeError):
    raise UnusualError from None
  return np.array(out, np.uint32)


def numbers(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> np.ndarray:
  """float32 [n, F] of several fields; None and NaN are missing values, NaN."""
  values = [row.get(name) for row in rows for name in fields]
  _demand(set(map(type, values)) <= {int, float, NoneType})
  return _finite(values, nan=True).reshape(len(rows), len(fields))


def vectors(values: Sequence[Any], width: int, missing: float) -> np.ndarray:
  """float32 [n, width] of lists; None becomes a row of `missing`."""
  given = [value for value in values if value is not None]
  _demand(set(map(type, given)) <= {list} and set(map(len, given)) <= {width})
  flat = list(chain.from_iterable(given))
  _demand(set(map(type, flat)) <= {int, float})
  rows = _finite(flat, nan=False).reshape(len(given), width)
  if len(given) == len(values):
    return rows
  out = np.full((len(values), width), missing, np.float32)
  out[[value is not None for value in values]] = rows
  return out


def encoded(values: Sequence[Any], read: Callable[[Any], int]) -> np.ndarray:
  """int32 of values that `read` turns into a number; each different one is read once."""
  kinds = set(map(type, values)) - {NoneType}
  try:
    if len(kinds) <= 1 and kinds <= {int, str}:  # of one type: 1 and 1.0, which have different texts, would be equal
      codes = {value: read(value) for value in set(values)}
      return np.array([codes[value] for value in values], np.int32)
    return np.array([read(value) for value in values], np.int32)
  except UserError:
    raise UnusualError from None


def side_by_side(columns: Iterable[np.ndarray], rows: int, dtype: Any) -> np.ndarray:
  """[rows, all widths] of columns [rows] or [rows, width]; no columns are [rows, 0]."""
  parts = [column if column.ndim == 2 else column[:, None] for column in columns]
  return np.concatenate([np.zeros((rows, 0), dtype), *parts], axis=1, dtype=dtype)


def _finite(values: Sequence[Any], nan: bool) -> np.ndarray:
  column = _array(values, np.float64)
  fits = np.abs(column) <= LARGEST_FLOAT  # NaN compares false
  _demand(bool((fits | np.isnan(column) if nan else fits).all()))
  return column.astype(np.float32)


def _array(values: Sequence[Any], dtype: Any) -> np.ndarray:
  try:
    return np.array(values, dtype)
  except OverflowError:
    raise UnusualError from None


def _demand(plain: bool) -> None:
  if not plain:
    raise UnusualError
