"""The catalogue of a bundle: which items there are, so that a user can be given some of them.

  items/catalogue.parquet   item_key uint64, ascending; item_id int64 or text, as the data set spells it

Its rows pass through in blocks: 100 M items take no more memory than a block of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pinfm_jax.data.events import MAX_ID_BYTES, keys_of
from pinfm_jax.data.preparation.reading import column_names, read_batches
from pinfm_jax.errors import UserError

CATALOGUE = 'items/catalogue.parquet'
_ROW_GROUP = 1 << 20
_TEXT_LINES = 1 << 16


def write_catalogue(directory: Path, items: pl.DataFrame) -> str:
  """Writes the items of a bundle; returns the file's name.

  Args:
    directory: the bundle's.
    items: item_key (ascending) and item_id; other columns are left out.
  """
  (directory / CATALOGUE).parent.mkdir(exist_ok=True)
  columns = items.select('item_key', 'item_id')
  columns.write_parquet(directory / CATALOGUE, compression='zstd', compression_level=1, row_group_size=_ROW_GROUP)
  return CATALOGUE


def read_catalogue(directory: Path) -> pl.DataFrame:
  """The items of a bundle: item_key and item_id."""
  return pl.read_parquet(directory / CATALOGUE)


@dataclass(frozen=True)
class ItemFile:
  """Item ids in a file, in the order of its rows.

  Attributes:
    path: .parquet, .csv, .tsv or .jsonl (the last three also with .gz) with the column item_id, or .txt with one id a
      line; blank lines are skipped.
    id_type: 'integer' or 'string', how the bundle's ids are spelled.
    keyed: the file holds item_key too: it is a bundle's own catalogue, whose ids need not be hashed again.
  """

  path: Path
  id_type: str
  keyed: bool = False

  def blocks(self) -> Iterator[tuple[np.ndarray, pl.Series]]:
    """Keys (uint64) and ids (Int64 or String) of consecutive rows, at most about 1 M at a time.

    Raises:
      UserError: the file cannot be read, has no column item_id, or an id is missing or does not fit; the line is named.
    """
    if self.path.suffix.lower() == '.txt':
      yield from (self._checked(*block) for block in self._text())
      return
    if 'item_id' not in column_names(self.path):
      found = ', '.join(column_names(self.path)[:10]) or 'none'
      raise UserError(f'{self.path} has no column item_id (columns: {found}); rename the one that holds the items')
    for batch in read_batches(self.path, ['item_id', 'item_key'] if self.keyed else ['item_id']):
      if batch.broken:
        line, reason, _ = batch.broken[0]
        raise UserError(f'{self.path}, line {line}: {reason}; expected one item a line')
      if self.keyed:
        yield batch.frame['item_key'].to_numpy(), batch.frame['item_id']
      else:
        yield self._checked(batch.frame['item_id'], batch.line)

  def ids(self, rows: np.ndarray) -> list[int | str]:
    """The ids in some rows of the file, counted from 0 over all blocks.

    Args:
      rows: ascending.
    """
    found, first = [], 0
    for _, ids in self.blocks():
      low, high = np.searchsorted(rows, [first, first + len(ids)])
      found += ids.gather(rows[low:high] - first).to_list()
      first += len(ids)
      if high == len(rows):
        break
    return found

  def count(self) -> int | None:
    """How many rows there are, where the file tells at once."""
    if self.path.suffix.lower() != '.parquet' or not self.path.is_file():
      return None
    return pl.scan_parquet(self.path, glob=False).select(pl.len()).collect().item()

  def _text(self) -> Iterator[tuple[pl.Series, np.ndarray]]:
    lines, numbers = [], []
    try:
      with open(self.path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
          if line.strip():
            lines.append(line.rstrip('\r\n'))
            numbers.append(number)
          if len(lines) == _TEXT_LINES:
            yield pl.Series(lines), np.array(numbers)
            lines, numbers = [], []
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{self.path} cannot be read ({error}); expected one item id a line') from None
    if lines:
      yield pl.Series(lines), np.array(numbers)

  def _checked(self, found: pl.Series, line: np.ndarray) -> tuple[np.ndarray, pl.Series]:
    """Keys of ids, and the ids as the data set spells them."""
    if self.id_type == 'integer':
      fits = found.dtype == pl.String or found.dtype.is_integer()
      ids = found.cast(pl.Int64, strict=False) if fits else pl.Series([None] * len(found), dtype=pl.Int64)
      wrong, expected = ids.is_null(), 'a 64-bit integer'
    else:
      ids = found if found.dtype == pl.String else pl.Series([None] * len(found), dtype=pl.String)
      size = ids.str.len_bytes()
      wrong, expected = ids.is_null() | (size == 0) | (size > MAX_ID_BYTES), f'a string of 1 to {MAX_ID_BYTES} bytes'
    if wrong.any():
      place = int(wrong.arg_max())
      raise UserError(f'{self.path}, line {line[place]}: got item_id {found[place]!r}, expected {expected}')
    return keys_of(ids, self.id_type).to_numpy(), ids
