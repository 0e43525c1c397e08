"""Streams CSV, JSONL (both also gzipped) and Parquet files as batches of rows with their line numbers.

Text stays text here: every column of a CSV or JSONL batch is a string, what it means is `canonical.py`'s business. One
row is one line: a quoted CSV field that spans lines makes broken rows, so that a stray quote cannot swallow a file.
"""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.errors import UserError

BLOCK_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
PARQUET_ROWS = 1_000_000
NESTED_PARQUET_ROWS = 65_536
_HEAD_LINES = 1000
_SEPARATORS = {'.csv': ',', '.tsv': '\t'}
_JSON = ('.jsonl', '.ndjson')
_POLARS_ERRORS = (pl.exceptions.PolarsError, OSError, pl.exceptions.PanicException)


@dataclass(frozen=True)
class Batch:
  """Consecutive rows of one file.

  Attributes:
    file: the file's path as it was given.
    frame: the requested columns; strings for text formats, the stored types for Parquet.
    line: int64 [rows], 1-based line in the file (a CSV header is line 1; a Parquet row counts as a line).
    broken: (line, reason, text) of the lines that are no rows at all.
  """

  file: str
  frame: pl.DataFrame
  line: np.ndarray
  broken: tuple[tuple[int, str, str], ...] = ()

  @property
  def rows(self) -> int:
    """How many rows were read, broken ones included."""
    return self.frame.height + len(self.broken)


def is_jsonl(path: Path) -> bool:
  """Whether a file's rows may have other keys than the first 1,000 that `column_names` has seen."""
  return _kind(path) in _JSON


def column_names(path: Path) -> list[str]:
  """The names of a file's columns (JSONL: the keys of the first 1,000 lines).

  Raises:
    UserError: the file is missing, empty, unreadable or of an unknown kind.
  """
  kind = _kind(path)
  if kind == '.parquet':
    return list(_parquet_schema(path))
  if kind in _SEPARATORS:
    return _header(path, _SEPARATORS[kind])
  names: dict[str, None] = {}
  for _, lines in _text_blocks(path, lambda done: None, block_bytes=1 << 20):
    for start in range(min(len(lines), _HEAD_LINES)):
      parsed = _parse_json([lines[start].decode('utf-8', 'replace')], None)[0]
      names.update(dict.fromkeys(parsed.columns))
    break
  return list(names)


def read_batches(
  path: Path, columns: Sequence[str], on_bytes: Callable[[float], None] = lambda done: None
) -> Iterator[Batch]:
  """Streams the columns of a file in file order; memory does not grow with the file.

  Args:
    path: the file.
    columns: names of the columns wanted, all of which a CSV or Parquet file must have.
    on_bytes: called with the bytes of the file that are done.

  Yields:
    Batches of at most about 1 M rows.

  Raises:
    UserError: the file cannot be read (truncated gzip, not Parquet, ..).
  """
  columns = list(dict.fromkeys(columns))
  kind = _kind(path)
  if kind == '.parquet':
    yield from _read_parquet(path, columns, on_bytes)
    return
  header = _header(path, _SEPARATORS[kind]) if kind in _SEPARATORS else None
  for first_line, raw in _text_blocks(path, on_bytes):
    line, text, broken = _decode_lines(raw, first_line, skip_first=header is not None and first_line == 1)
    if header is None:
      frame, bad = _parse_json(text, columns)
    else:
      frame, bad = _parse_csv(text, header, columns, _SEPARATORS[kind])
    broken += [(int(line[i]), reason, text[i]) for i, reason in bad]
    good = np.delete(line, [i for i, _ in bad]) if bad else line
    yield Batch(str(path), frame, good, tuple(sorted(broken)))


def _kind(path: Path) -> str:
  if not path.is_file():
    raise UserError(f'{path} does not exist' if not path.exists() else f'{path} is a directory, expected a file')
  suffixes = [suffix.lower() for suffix in path.suffixes]
  kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == '.gz' else (suffixes or [''])[-1]
  if kind not in (*_SEPARATORS, *_JSON, '.parquet') or (kind == '.parquet' and suffixes[-1] == '.gz'):
    raise UserError(f'{path} is of an unknown kind, expected .csv, .tsv or .jsonl (these also with .gz) or .parquet')
  return kind


def _parquet_schema(path: Path) -> dict[str, pl.DataType]:
  try:
    return dict(pl.scan_parquet(path, glob=False).collect_schema())
  except _POLARS_ERRORS as error:
    raise _unreadable(path, 'Parquet', error) from None


def _read_parquet(path: Path, columns: list[str], on_bytes: Callable[[float], None]) -> Iterator[Batch]:
  schema = _parquet_schema(path)
  step = NESTED_PARQUET_ROWS if any(schema[name].is_nested() for name in columns) else PARQUET_ROWS
  size = path.stat().st_size
  try:
    total = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    # A slice is pushed down to the row groups: faster and far smaller than collect_batches on large row groups.
    for start in range(0, total, step):
      frame = pl.scan_parquet(path, glob=False).select(columns).slice(start, step).collect()
      yield Batch(str(path), frame, np.arange(start + 1, start + 1 + frame.height))
      on_bytes(size * min(start + step, total) / total)
  except _POLARS_ERRORS as error:
    raise _unreadable(path, 'Parquet', error) from None


def _header(path: Path, separator: str) -> list[str]:
  for _, lines in _text_blocks(path, lambda done: None, block_bytes=1 << 16):
    try:
      names = next(csv.reader([lines[0].decode().rstrip('\r')], delimiter=separator, strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
      raise _unreadable(path, 'a CSV header', error) from None
    if len(set(names)) < len(names):
      twice = next(name for name in names if names.count(name) > 1)
      raise UserError(f'{path} has two columns named {twice!r}: rename one of them')
    return names
  raise UserError(f'{path} is empty: expected a header line and rows')


def _text_blocks(
  path: Path, on_bytes: Callable[[float], None], block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, list[bytes]]]:
  """Yields (1-based number of the first line, lines without their newlines)."""
  line, rest, mark = 1, b'', codecs.BOM_UTF8
  with open(path, 'rb') as raw:
    stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == '.gz' else raw
    while True:
      try:
        block = stream.read(block_bytes)
      except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, 'gzip (is the file truncated?)', error) from None
      if not block:
        break
      block, mark = block.removeprefix(mark), b''
      lines = (rest + block).split(b'\n')
      rest = lines.pop()
      if len(rest) > MAX_LINE_BYTES:
        raise UserError(
          f'{path} line {line + len(lines)} is longer than {MAX_LINE_BYTES >> 20} MiB: is it a text file?'
        )
      if lines:
        yield line, lines
        line += len(lines)
      on_bytes(raw.tell())
    if rest:
      yield line, [rest]


def _decode_lines(
  raw: list[bytes], first_line: int, skip_first: bool
) -> tuple[np.ndarray, list[str], list[tuple[int, str, str]]]:
  """Line numbers and text of the lines that are not blank, and the lines that are not UTF-8."""
  numbers, text, broken = [], [], []
  for number, data in enumerate(raw[skip_first:], first_line + skip_first):
    try:
      line = data.decode().rstrip('\r')
    except UnicodeDecodeError:
      broken.append((number, 'not UTF-8', data.decode('utf-8', 'replace')))
      continue
    if line and not line.isspace():
      numbers.append(number)
      text.append(line)
  return np.array(numbers, np.int64), text, broken


def _parse_csv(
  text: list[str], header: list[str], columns: list[str], separator: str
) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
  """The columns of the whole lines, and (index, reason) of the others."""
  lines = pl.Series('line', text, pl.String)
  if lines.str.contains('"', literal=True).any():
    return _parse_quoted_csv(text, header, columns, separator)
  separators = lines.str.count_matches(separator, literal=True)
  wrong = (separators != len(header) - 1).arg_true().to_list()
  bad = [(i, f'{separators[i] + 1} fields instead of {len(header)}') for i in wrong]
  good = lines.filter(separators == len(header) - 1) if wrong else lines
  if good.is_empty():
    return pl.DataFrame(schema=dict.fromkeys(columns, pl.String)), bad
  frame = pl.read_csv(
    '\n'.join(good.to_list()).encode(),
    has_header=False,
    schema=dict.fromkeys(header, pl.String),
    columns=sorted(header.index(name) for name in columns),
    separator=separator,
    quote_char=None,
  )
  return frame.select(columns), bad


def _parse_quoted_csv(
  text: list[str], header: list[str], columns: list[str], separator: str
) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
  rows, bad = [], []
  for i, line in enumerate(text):
    try:
      fields = next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
      bad.append((i, 'unbalanced quote (a field that spans lines is not supported)'))
      continue
    if len(fields) == len(header):
      rows.append(fields)
    else:
      bad.append((i, f'{len(fields)} fields instead of {len(header)}'))
  places = [header.index(name) for name in columns]
  data = {name: [row[place] or None for row in rows] for name, place in zip(columns, places, strict=True)}
  return pl.DataFrame(data, schema=dict.fromkeys(columns, pl.String)), bad


def _parse_json(text: list[str], columns: list[str] | None) -> tuple[pl.DataFrame, list[tuple[int, str]]]:
  """The columns of the lines that are JSON objects (None: whatever keys they have), and (index, reason) of the rest."""
  schema = None if columns is None else dict.fromkeys(columns, pl.String)
  if not text:
    return pl.DataFrame(schema=schema), []
  try:
    frame = pl.read_ndjson('\n'.join(text).encode(), schema=schema)
    if frame.height == len(text):
      return frame, []
  except _POLARS_ERRORS:
    pass
  if len(text) == 1:
    return pl.DataFrame(schema=schema), [(0, 'not a JSON object')]
  # Halving finds the few bad lines of a block without parsing every line on its own.
  half = len(text) // 2
  left, left_bad = _parse_json(text[:half], columns)
  right, right_bad = _parse_json(text[half:], columns)
  return pl.concat([left, right]), left_bad + [(i + half, reason) for i, reason in right_bad]


def _unreadable(path: Path, what: str, error: BaseException) -> UserError:
  return UserError(f'{path} cannot be read as {what}: {str(error).splitlines()[0][:160] if str(error) else error!r}')
