"""Reads single values of a request's JSON; every error says what was got and what was expected."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pinfm_jax.data.events import MAX_TIME_MS, id_key
from pinfm_jax.data.info import SparseFeature
from pinfm_jax.data.preparation.features import encode_sparse
from pinfm_jax.errors import UserError

_DIGITS = re.compile(r'-?[0-9]{1,19}')
LARGEST_FLOAT = 3.4e38


def check_names(value: Any, known: Iterable[str], what: str) -> None:
  """Raises UserError unless the value is an object with known fields only."""
  if not isinstance(value, Mapping):
    raise UserError(f'got {show(value)}, expected {what} (a JSON object)')
  for name in value:
    if name not in known:
      near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
      raise UserError(f"got the field '{name}', which {what} does not have; the nearest is '{near[0]}'")


def read_list(document: Mapping, name: str, default: list | None = None) -> list:
  """A field that is a list."""
  value = document.get(name, default)
  if not isinstance(value, list):
    raise UserError(f'got {name} {show(value)}, expected a list')
  return value


def read_name(codes: Mapping[str, int], value: Any, what: str) -> int:
  """The code of a name of a vocabulary."""
  if not isinstance(value, str) or value not in codes:
    known = ', '.join(list(codes)[:20]) + (f' and {len(codes) - 20} more' if len(codes) > 20 else '')
    raise UserError(f'got the {what} {show(value)}, expected one of {known}')
  return codes[value]


def read_key(value: Any, id_type: str) -> int:
  """The key of an item id; integer ids may be spelled as a string of digits."""
  if id_type == 'integer':
    fits = isinstance(value, int) and not isinstance(value, bool)
    fits = fits or (isinstance(value, str) and _DIGITS.fullmatch(value) is not None)
  else:
    fits = isinstance(value, str)
  if not fits:
    expected = 'an integer' if id_type == 'integer' else 'a string'
    raise UserError(f'got item_id {show(value)}, expected {expected}, as in the data the model was trained on')
  return id_key(value, id_type)


def read_time(value: Any, name: str) -> int | None:
  """Milliseconds since 1970; None stays None."""
  if value is None:
    return None
  time = value
  if isinstance(value, str):
    try:
      moment = datetime.fromisoformat(value)
    except ValueError:
      raise UserError(f'got {name} {show(value)}, expected milliseconds since 1970 or an ISO time') from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    time = round(moment.timestamp() * 1000)
  if isinstance(time, bool) or not isinstance(time, int) or not 0 <= time <= MAX_TIME_MS:
    raise UserError(f'got {name} {show(value)}, expected milliseconds from 1970 to the year 9999, or an ISO time')
  return time


def read_number(value: Any, name: str) -> float:
  """A dense feature; None (or NaN) is a missing value, NaN."""
  if value is None or value != value:
    return math.nan
  if not isinstance(value, int | float) or abs(value) > LARGEST_FLOAT:
    raise UserError(f'got {name} {show(value)}, expected a finite number')
  return float(value)


def read_sparse(feature: SparseFeature, value: Any) -> int:
  """A sparse feature's index, from its value or from {"index": i} (a data set keeps no values of hashed features)."""
  if isinstance(value, Mapping) and list(value) == ['index']:
    index = value['index']
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < feature.size:
      return index
    raise UserError(f'got {feature.name} index {show(index)}, expected an integer from 0 to {feature.size - 1}')
  if value is not None and not isinstance(value, str | int | float):
    raise UserError(f'got {feature.name} {show(value)}, expected a string, a number or {{"index": i}}')
  if isinstance(value, float) and value.is_integer() and str(value) not in feature.codes:
    value = int(value)  # many clients write 4 as 4.0
  if not is_unicode(value):
    raise UserError(f'got {feature.name} {show(value)}, which is no valid Unicode: spell it in UTF-8')
  return encode_sparse(feature, value)


def is_unicode(value: Any) -> bool:
  """False for text with half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
  try:
    return not isinstance(value, str) or value.encode() is not None
  except UnicodeEncodeError:
    return False


def read_vector(value: Any, name: str, width: int) -> list[float]:
  """An embedding feature; None is a missing value, a zero vector."""
  if value is None:
    return [0.0] * width
  if not isinstance(value, list) or len(value) != width or not all(type(x) in (int, float) for x in value):
    raise UserError(f'got {name} {show(value)}, expected a list of {width} numbers')
  if not all(abs(x) <= LARGEST_FLOAT for x in value):  # NaN compares false
    raise UserError(f'got {name} with a value that is not finite, expected {width} finite numbers')
  return value


def show(value: Any) -> str:
  """The value as one short piece of text."""
  try:
    text = repr(value)
  except RecursionError:
    return 'a deeply nested value'
  return text if len(text) <= 60 else text[:57] + '...'
