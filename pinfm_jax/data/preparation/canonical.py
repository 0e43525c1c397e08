"""Turns source columns (text or typed) into canonical values, and says for every row that cannot be why not."""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from pinfm_jax.data.events import MAX_ID_BYTES, MAX_TIME_MS
from pinfm_jax.errors import UserError

TIME_UNITS = ('auto', 's', 'ms', 'iso', 'order')
SAMPLE_ROWS = 10_000
_MS_FROM = 1e11  # as seconds this is the year 5138, as milliseconds it is 1973
_ORDINAL_BELOW = 1e8  # as seconds this is 1973: such numbers are positions, not times
_MAX_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Field:
  """How one canonical value is computed, and what can be wrong with it.

  Attributes:
    value: the canonical value.
    faults: (the row is wrong, reason); the first that holds is the reason reported.
  """

  value: pl.Expr
  faults: tuple[tuple[pl.Expr, str], ...] = ()


def split(frame: pl.DataFrame, fields: Mapping[str, Field]) -> tuple[pl.DataFrame, pl.Series]:
  """Computes all fields.

  Returns:
    The canonical columns of the good rows, and for every row of `frame` the reason why it is bad (null: it is good).
  """
  faults = [fault for field in fields.values() for fault in field.faults]
  reasons = [pl.when(wrong).then(pl.lit(reason)) for wrong, reason in faults]
  values = [field.value.alias(name) for name, field in fields.items()]
  reason = pl.coalesce(*reasons, pl.lit(None, pl.String)).alias('__reason')
  everything = frame.select(*values, reason)
  reason_column = everything['__reason']
  good = everything.drop('__reason')
  return (good if reason_column.null_count() == len(reason_column) else good.filter(reason_column.is_null())), (
    reason_column
  )


def id_field(column: str, dtype: pl.DataType, id_type: str, what: str) -> Field:
  """An id as int64 or text."""
  text = pl.col(column).cast(pl.String)
  missing = (_missing(column, dtype), f'missing {what}')
  long = (text.str.len_bytes() > MAX_ID_BYTES, f'{what} is longer than {MAX_ID_BYTES} bytes')
  if id_type == 'string':
    return Field(text, (missing, long))
  number = _integer(column, dtype)
  return Field(number, (missing, long, (number.is_null(), f'{what} is not a 64-bit integer')))


def time_field(
  column: str, dtype: pl.DataType, unit: str, what: str, optional: bool = False, sniffed: bool = False
) -> Field:
  """A time as int64 milliseconds since 1970 (unit 'order': the integer itself); null if optional and missing.

  A unit that was sniffed off other rows makes a row malformed that looks like the other unit.
  """
  missing = _missing(column, dtype)
  if unit == 'iso':
    value = _iso_ms(column, dtype)
    raw = value
    unparsed = 'is not an ISO 8601 time'
  else:
    scale = 1000 if unit == 's' else 1
    raw = _text(column, dtype).cast(pl.Float64, strict=False) * scale
    in_range = pl.when(raw.abs() <= MAX_TIME_MS)
    # A float64 holds every millisecond up to the year 9999, so 1506826800.026 s is exactly 1506826800026 ms.
    value = in_range.then(raw.round()).cast(pl.Int64, strict=False)
    unparsed = 'is not a number'
  faults = [
    (missing, f'missing {what}'),
    (~missing & (raw.is_null() | (raw.is_nan() if unit != 'iso' else False)), f'{what} {unparsed}'),
    (raw < 0, f'negative {what}'),
    *(_other_unit(raw, unit, what) if sniffed else ()),
    (raw > MAX_TIME_MS, f'{what} after the year 9999'),
  ]
  return Field(value, tuple(faults[1:] if optional else faults))


def _other_unit(ms: pl.Expr, unit: str, what: str) -> tuple[tuple[pl.Expr, str], ...]:
  if unit == 'ms':
    return ((ms < _MS_FROM, f'{what} is too small for ms, which the log seems to be in: state the time unit'),)
  if unit == 's':
    as_ms = ms.is_between(1000 * _MS_FROM, 1000 * MAX_TIME_MS)
    return ((as_ms, f'{what} is too large for s, which the log seems to be in: state the time unit'),)
  return ()


def text_field(column: str, dtype: pl.DataType, what: str, absent: str | None = None) -> Field:
  """A name, as text; it must be there, unless a null has the name `absent`."""
  text, missing = pl.col(column).cast(pl.String), _missing(column, dtype)
  if absent is None:
    return Field(text, ((missing, f'missing {what}'),))
  return Field(text.fill_null(absent), ((missing & text.is_not_null(), f'missing {what}'),))


def flag_field(column: str, dtype: pl.DataType, what: str) -> Field:
  """A 0/1 column, as Boolean."""
  if dtype == pl.Boolean:
    value = pl.col(column)
  else:
    text = pl.col(column).cast(pl.String).str.strip_chars().str.to_lowercase().str.replace(r'^([01])\.0*$', '${1}')
    value = pl.when(text.is_in(['1', 'true'])).then(True).when(text.is_in(['0', 'false'])).then(False)
  return Field(value, ((value.is_null(), f'{what} is neither 0 nor 1'),))


def number_field(column: str, dtype: pl.DataType, what: str) -> Field:
  """A dense feature, as float32; NaN where missing."""
  missing = _missing(column, dtype)
  value = _text(column, dtype).cast(pl.Float64, strict=False)
  # In Polars NaN is larger than every number.
  infinite = (value.abs() > _MAX_FLOAT32) & ~value.is_nan()
  faults = ((~missing & value.is_null(), f'{what} is not a number'), (infinite, f'infinite {what}'))
  return Field(value.cast(pl.Float32, strict=False).fill_null(float('nan')), faults)


def probability_field(column: str, dtype: pl.DataType, what: str) -> Field:
  """A true probability, as float32."""
  value = _text(column, dtype).cast(pl.Float64, strict=False)
  return Field(value.cast(pl.Float32), ((~value.is_between(0, 1).fill_null(False), f'{what} is no probability'),))


def category_field(column: str) -> Field:
  """A sparse feature, as text; null where missing."""
  text = pl.col(column).cast(pl.String)
  return Field(pl.when(text.str.len_bytes() > 0).then(text))


def vector_field(column: str, dtype: pl.DataType, width: int, what: str) -> Field:
  """An embedding, as Array(Float32, width); null where missing."""
  missing = _missing(column, dtype)
  value = vector_list(column, dtype)
  wrong_width = (~missing & (value.list.len() != width), f'{what} has not the width {width}')
  # All elements must be there and finite: the largest magnitude of a list with a NaN is compared as NaN, hence sum.
  finite = (value.list.len() == value.list.drop_nulls().list.len()) & value.list.sum().is_finite()
  largest = value.list.eval(pl.element().abs()).list.max() <= _MAX_FLOAT32
  bad_number = (~missing & ~(finite & largest).fill_null(False), f'{what} holds a missing or infinite number')
  fitting = pl.when(value.list.len() == width).then(value)
  return Field(fitting.list.to_array(width).cast(pl.Array(pl.Float32, width), strict=False), (wrong_width, bad_number))


def vector_list(column: str, dtype: pl.DataType) -> pl.Expr:
  """A vector column as a list of Float64; text is '[1, 2]' or '1|2'."""
  if isinstance(dtype, pl.Array):
    return pl.col(column).arr.to_list().cast(pl.List(pl.Float64), strict=False)
  if isinstance(dtype, pl.List):
    return pl.col(column).cast(pl.List(pl.Float64), strict=False)
  text = _text(column, dtype).str.strip_chars(' []').str.replace_all(',', '|', literal=True)
  parts = pl.when(text.str.len_bytes() > 0).then(text).str.split('|')
  return parts.list.eval(pl.element().str.strip_chars().cast(pl.Float64, strict=False))


def sniff_id_type(sample: pl.Series, allowed_share: float) -> str:
  """'integer' if at most `allowed_share` of the sample is anything else, else 'string'."""
  present = sample.drop_nulls().head(SAMPLE_ROWS)
  if present.dtype.is_integer() or present.is_empty():
    return 'integer'
  name = present.name
  number = present.to_frame().select(_integer(name, present.dtype)).to_series()
  # '007' is a string id: as an integer it would be another id's twin.
  plain = number.cast(pl.String) == present.cast(pl.String).str.strip_chars().str.replace(r'\.0+$', '')
  others = len(present) - int(plain.fill_null(False).sum())
  return 'integer' if others <= allowed_share * len(present) else 'string'


def sniff_time_unit(sample: pl.Series, what: str) -> str:
  """The unit of a time column: 's', 'ms' or 'iso'.

  Raises:
    UserError: the numbers are too small or too large for a time in seconds or milliseconds.
  """
  present = sample.drop_nulls().head(SAMPLE_ROWS)
  if present.dtype.is_temporal():
    return 'iso'
  numbers = present.cast(pl.String).cast(pl.Float64, strict=False).drop_nulls()
  if len(numbers) * 2 < len(present):
    return 'iso'
  median = numbers.drop_nans().median()
  if median is None:
    return 'ms'
  if median < _ORDINAL_BELOW:
    raise UserError(f'{what} looks like a position (median {median:g}), not a time: say time unit order, s or ms')
  if median >= 1000 * _MS_FROM:
    raise UserError(
      f'{what} looks like micro- or nanoseconds (median {median:g}): convert it to ms, or say time unit ms'
    )
  return 'ms' if median >= _MS_FROM else 's'


def _missing(column: str, dtype: pl.DataType) -> pl.Expr:
  if dtype == pl.String:
    return pl.col(column).is_null() | (pl.col(column).str.strip_chars().str.len_bytes() == 0)
  return pl.col(column).is_null()


def _text(column: str, dtype: pl.DataType) -> pl.Expr:
  if dtype == pl.String:
    return pl.col(column).str.strip_chars()
  return pl.col(column).cast(pl.Int8) if dtype == pl.Boolean else pl.col(column)


def _integer(column: str, dtype: pl.DataType) -> pl.Expr:
  if dtype.is_integer():
    return pl.col(column).cast(pl.Int64, strict=False)
  if dtype.is_float():
    # A float column holds integers where a writer had to store missing values among them.
    whole = pl.col(column).is_finite() & (pl.col(column) == pl.col(column).round()) & (pl.col(column).abs() < 2**53)
    return pl.when(whole).then(pl.col(column)).cast(pl.Int64, strict=False)
  return pl.col(column).cast(pl.String).str.strip_chars().str.replace(r'\.0+$', '').str.to_integer(strict=False)


def _iso_ms(column: str, dtype: pl.DataType) -> pl.Expr:
  if dtype.is_temporal():
    return pl.col(column).cast(pl.Datetime('us'), strict=False).dt.epoch('ms')
  text = pl.col(column).cast(pl.String).str.strip_chars()
  text = text.str.replace(r'^(\d{4}-\d{2}-\d{2}) ', '${1}T').str.replace(r'[Zz]$', '+00:00')
  text = pl.when(text.str.len_bytes() == 10).then(text + 'T00:00:00').otherwise(text)
  text = pl.when(text.str.contains(r'T.*[+-]\d{2}:?\d{2}$')).then(text).otherwise(text + '+00:00')
  text = text.str.replace(r'(T\d{2}:\d{2})([+-])', '${1}:00${2}')
  return text.str.strptime(pl.Datetime('us', 'UTC'), '%Y-%m-%dT%H:%M:%S%.f%z', strict=False).dt.epoch('ms')
