"""Click-through tables: rows of features with one 0/1 label, split and encoded, for models that read no histories."""

import tempfile
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pinfm_jax.data.public.click_through import load_avazu, load_criteo, load_movielens_clicks
from pinfm_jax.data.public.schema import ClickRows
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import coerce

CLICK_SOURCES: Mapping[str, Callable[..., ClickRows]] = {
  'criteo': load_criteo,
  'avazu': load_avazu,
  'movielens': load_movielens_clicks,
}
PARTS = ('train', 'validation', 'test')
MISSING, UNKNOWN, FIRST = 0, 1, 2  # indices of sparse features; those of the vocabulary begin at FIRST


@dataclass(frozen=True)
class SplitOptions:
  """How rows are divided, and which values get an index of their own.

  Attributes:
    split: 'random', or 'time': the first rows train, the last ones test; rows of one moment stay together.
    shares: of the parts train, validation, test.
    seed: of the random split.
    min_count: rows of the training part that a value of a sparse feature needs; rarer ones are unknown.

  Raises:
    UserError: a value that cannot be.
  """

  split: str = 'random'
  shares: tuple[float, ...] = (0.8, 0.1, 0.1)
  seed: int = 0
  min_count: int = 1

  def __post_init__(self):
    if self.split not in ('random', 'time'):
      raise UserError(f"split is {self.split!r}; expected 'random' or 'time'")
    if len(self.shares) != 3 or min(self.shares) <= 0 or not np.isclose(sum(self.shares), 1):
      raise UserError(f'shares are {self.shares}; expected three positive ones that sum to 1: {", ".join(PARTS)}')
    if self.seed < 0:
      raise UserError(f'seed is {self.seed}; expected a number that is not negative')
    if self.min_count < 1:
      raise UserError(f'min_count is {self.min_count}; expected at least 1')


@dataclass(frozen=True)
class ClickTable:
  """n rows of a click-through set.

  Attributes:
    dense_NF: float32 as published, NaN = missing.
    sparse_NF: int32, 0 = missing, 1 = rare or unseen in training, from 2 on the values of the vocabulary.
    label_N: uint8, 0 or 1.
    part_N: uint8, the place in PARTS.
    dense_names: of the dense features.
    vocabularies: sparse feature -> its values in the order of their indices, most frequent first.
    source, licence, notes: of `ClickRows`.
    options: how the rows were divided and encoded.
  """

  dense_NF: np.ndarray
  sparse_NF: np.ndarray
  label_N: np.ndarray
  part_N: np.ndarray
  dense_names: tuple[str, ...]
  vocabularies: Mapping[str, pl.Series]
  source: str
  licence: str
  notes: tuple[str, ...]
  options: SplitOptions

  def __len__(self) -> int:
    return len(self.label_N)

  @property
  def sparse_sizes(self) -> tuple[int, ...]:
    """Cardinality of each sparse feature: its indices are smaller."""
    return tuple(FIRST + len(values) for values in self.vocabularies.values())

  def rows_of(self, part: str) -> np.ndarray:
    """Places of the rows of a part, ascending."""
    return np.flatnonzero(self.part_N == PARTS.index(part))


def load_click_table(name: str, path: str | Path, **options: Any) -> ClickTable:
  """Reads, divides and encodes a public click-through set.

  The rows stand in a temporary Parquet file while it works (TMPDIR says where); the result takes 4 bytes a feature and
  row: 8 GB for all of Criteo.

  Args:
    name: criteo, avazu or movielens.
    path: the folder of the published files, or one file.
    **options: what the set's loader takes (`load_criteo` and the others), and those of `SplitOptions`.

  Raises:
    UserError: an unknown name or option, or files that are not what they should be.
  """
  if name not in CLICK_SOURCES:
    raise UserError(f'no click-through set {name!r}; known: {", ".join(CLICK_SOURCES)}')
  loader = CLICK_SOURCES[name]
  split = typing.get_type_hints(SplitOptions)
  own = {option: kind for option, kind in typing.get_type_hints(loader).items() if option not in ('path', 'return')}
  known = own | split
  for option in options:
    if option not in known:
      raise UserError(f'{name} has no option {option!r}; it has: {", ".join(known)}')
  values = {option: coerce(value, known[option], option) for option, value in options.items()}
  try:
    loaded = loader(Path(path), **{option: value for option, value in values.items() if option in own})
    return make_table(loaded, SplitOptions(**{option: value for option, value in values.items() if option in split}))
  except pl.exceptions.PolarsError as error:
    raise UserError(f'{path}: not the files of {name} as published ({str(error).splitlines()[0]})') from None


def make_table(loaded: ClickRows, options: SplitOptions) -> ClickTable:
  """Divides and encodes rows: vocabularies see the training part alone.

  Raises:
    UserError: no rows, a label that is neither 0 nor 1, no times to divide by, or a part without rows.
  """
  with tempfile.TemporaryDirectory(prefix='pinfm-clicks-') as folder:
    file = Path(folder) / 'rows.parquet'
    loaded.rows.sink_parquet(file)  # parsed once, then read column by column
    label = _column(file, 'label')
    if not len(label):
      raise UserError(f'{loaded.source}: there are no rows')
    wrong = label.filter(~((label == 0) | (label == 1)).fill_null(False))
    if len(wrong):
      raise UserError(f'{loaded.source}: a label is {wrong[0]}, expected 0 or 1; is it the file with labels?')
    part_N = _parts(len(label), _column(file, loaded.time).to_numpy() if loaded.time else None, options, loaded.source)
    dense_NF = np.empty((len(label), len(loaded.dense)), np.float32)
    for i, name in enumerate(loaded.dense):
      dense_NF[:, i] = _column(file, name).cast(pl.Float32).to_numpy()
    sparse_NF, vocabularies = np.empty((len(label), len(loaded.sparse)), np.int32), {}
    for i, name in enumerate(loaded.sparse):
      sparse_NF[:, i], vocabularies[name] = encode_column(_column(file, name), part_N == 0, options.min_count)
  return ClickTable(
    dense_NF, sparse_NF, label.to_numpy().astype(np.uint8), part_N, loaded.dense, vocabularies,
    loaded.source, loaded.licence, loaded.notes, options,
  )  # fmt: skip


def _column(file: Path, name: str) -> pl.Series:
  return pl.read_parquet(file, columns=[name])[name]


def encode_column(texts: pl.Series, train_N: np.ndarray, min_count: int) -> tuple[np.ndarray, pl.Series]:
  """Indices of a categorical column, and its vocabulary.

  Args:
    texts: the values; null or '' = missing.
    train_N: rows that the vocabulary is made of.
    min_count: how many of them a value needs.

  Returns:
    int32 [N] as in `ClickTable.sparse_NF`, and the values, most frequent first, equally frequent ones in their order.
  """
  texts = texts.rename('value')
  missing = (texts.is_null() | (texts == '')).fill_null(True)
  counts = texts.filter(pl.Series(train_N) & ~missing).value_counts(name='rows')
  counts = counts.filter(pl.col('rows') >= min_count).sort('rows', 'value', descending=[True, False])
  values = counts['value']
  if values.is_empty():
    codes = np.full(len(texts), UNKNOWN, np.int32)
  else:
    index = pl.Series(np.arange(FIRST, FIRST + len(values), dtype=np.int32))
    codes = texts.replace_strict(values, index, default=UNKNOWN, return_dtype=pl.Int32).to_numpy().copy()
  codes[missing.to_numpy()] = MISSING
  return codes, values


def _parts(rows: int, time_N: np.ndarray | None, options: SplitOptions, source: str) -> np.ndarray:
  """Place in PARTS of every row, uint8."""
  ends = np.round(np.cumsum(options.shares)[:2] * rows).astype(np.int64)
  if options.split == 'time':
    if time_N is None:
      raise UserError(f"{source} has no times; use split='random'")
    borders = np.sort(time_N)[np.minimum(ends, rows - 1)]  # what happened at a border is of the later part
    part_N = np.searchsorted(borders, time_N, side='right').astype(np.uint8)
  else:
    part_N = np.empty(rows, np.uint8)
    order = np.random.default_rng(options.seed).permutation(rows)
    part_N[order] = np.searchsorted(ends, np.arange(rows), side='right')
  for i, name in enumerate(PARTS):
    if not np.any(part_N == i):
      raise UserError(f'{source}: {rows} rows, none of them for {name}; give more rows or other shares')
  return part_N
