"""Public data sets by name: reads the published files and prepares them."""

import inspect
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.prepare import prepare
from pinfm_jax.data.public.globo import load_globo
from pinfm_jax.data.public.kuairand import load_kuairand
from pinfm_jax.data.public.schema import SourceLog
from pinfm_jax.data.public.sequences import load_amazon, load_movielens
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import coerce

SOURCES: Mapping[str, Callable[..., SourceLog]] = {
  'kuairand': load_kuairand,
  'globo': load_globo,
  'movielens': load_movielens,
  'amazon': load_amazon,
}
_PREPARE_OPTIONS = {'cap': int, 'shards': int, 'partitions': int, 'max_rejected_share': float, 'overwrite': bool}


def prepare_source(name: str, path: str | Path, out: str | Path, /, **options: Any) -> PreparedDataset:
  """Prepares a public data set from its published files.

  The files in canonical columns stand beside `out` while it works, about as large as the set itself.

  Args:
    name: kuairand, globo, movielens or amazon.
    path: the folder with the files as published (`pinfm download`), or one file.
    out: the directory to make.
    **options: what the set's loader takes (see `load_kuairand` and the others), and of `PrepareConfig`: cap, shards,
      partitions, max_rejected_share, overwrite.

  Returns:
    The prepared data set.

  Raises:
    UserError: an unknown name or option, or files that are not what they should be.
  """
  settings = {
    option: coerce(options.pop(option), kind, option) for option, kind in _PREPARE_OPTIONS.items() if option in options
  }
  log = load_source(name, path, **options)
  print(f'{log.source}: {log.licence}', file=sys.stderr)
  parent = Path(out).absolute().parent
  parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{Path(out).name}-source-', dir=parent) as scratch:
    with _published_files(name, path):  # frames are lazy: a bad file shows when they are written
      config = canonical_config(log, Path(scratch), out, **settings)
    prepare(config)
  return PreparedDataset.open(out)


def load_source(name: str, path: str | Path, /, **options: Any) -> SourceLog:
  """The canonical frames of a public data set.

  Raises:
    UserError: as `prepare_source`.
  """
  if name not in SOURCES:
    raise UserError(f'no source {name!r}; known: {", ".join(SOURCES)}')
  loader = SOURCES[name]
  known = list(inspect.signature(loader).parameters)[1:]
  for option in options:
    if option not in known:
      raise UserError(f'{name} has no option {option!r}; it has: {", ".join(known + list(_PREPARE_OPTIONS))}')
  kinds = typing.get_type_hints(loader)
  values = {option: coerce(value, kinds[option], option) for option, value in options.items() if value is not None}
  with _published_files(name, path):
    return loader(Path(path), **values)


@contextmanager
def _published_files(name: str, path: str | Path) -> Iterator[None]:
  """Says of a file that cannot be read or has other columns whose it was meant to be."""
  try:
    yield
  except pl.exceptions.PolarsError as error:
    raise UserError(f'{path}: not the files of {name} as published ({str(error).splitlines()[0]})') from None


def canonical_config(log: SourceLog, scratch: Path, out: str | Path, **settings: Any) -> PrepareConfig:
  """Writes the frames as Parquet below `scratch` and says how to prepare them.

  Args:
    log: the canonical frames.
    scratch: an existing directory; its files must live until the preparation has ended.
    out: the directory to make.
    **settings: other fields of `PrepareConfig`.
  """
  impressions = (_write(log.impressions, scratch / 'impressions.parquet'),) if log.impressions is not None else ()
  ordinal = not log.time_known and log.impressions is None
  return PrepareConfig(
    logs=(_write(log.events, scratch / 'events.parquet'),),
    out=out,
    impressions=impressions,
    request_by=log.request_by if impressions else 'request_id',
    labels=log.labels,
    dense=log.dense,
    sparse=log.sparse,
    embedding=log.embedding,
    items=_write(log.items, scratch / 'items.parquet') if log.items is not None else None,
    users=_write(log.users, scratch / 'users.parquet') if log.users is not None else None,
    actions=log.actions or None,
    # Times before a log that has times are ordinals in milliseconds: the two must stay comparable.
    time_unit='order' if ordinal else 'ms',
    impression_time_unit='ms' if impressions else 'auto',
    time_known=None if ordinal else log.time_known,
    source=log.source,
    licence=log.licence,
    notes=' '.join(log.notes),
    **settings,
  )


def _write(frame: pl.LazyFrame, path: Path) -> Path:
  frame.sink_parquet(path)
  return path
