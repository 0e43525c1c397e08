"""What a loader of a public data set hands to the preparation: canonical frames, and what to say of them."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pinfm_jax.errors import UserError

STAR_ACTIONS = ('hide', 'click', 'closeup', 'save')
STAR_NOTE = 'Stars stand for actions: 5 save, 4 closeup, 3 click, 1-2 hide (half stars round up).'


@dataclass(frozen=True)
class SourceLog:
  """A public data set in canonical form.

  Attributes:
    source: name and edition.
    licence: its terms, one line.
    events: user_id, timestamp (ms; an ordinal if not time_known), item_id, optional surface, optional actions (list).
    time_known: whether the histories' timestamps are real times.
    actions: names, in the order of their bits; empty if the set knows none.
    impressions: user_id, timestamp (ms), item_id, surface, a 0/1 column for each label and features of the moment.
      None if the set has none.
    labels: names of the label columns.
    dense: names of the numeric features, of the impressions, the items or the users.
    sparse: names of the categorical features, likewise; strings.
    embedding: names of the vector features, likewise.
    request_by: 'user_day' (a request is a user's UTC day), or 'request_id', a column of the impressions.
    items: item_id, created_at (ms) and features; None if nothing is known of the items.
    users: user_id and features; None if nothing is known of the users.
    notes: what a reader of the prepared set must know.
  """

  source: str
  licence: str
  events: pl.LazyFrame
  time_known: bool
  actions: tuple[str, ...] = ()
  impressions: pl.LazyFrame | None = None
  labels: tuple[str, ...] = ()
  dense: tuple[str, ...] = ()
  sparse: tuple[str, ...] = ()
  embedding: tuple[str, ...] = ()
  request_by: str = 'user_day'
  items: pl.LazyFrame | None = None
  users: pl.LazyFrame | None = None
  notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClickRows:
  """A public click-through set as published: rows that stand for themselves, without users' histories.

  Attributes:
    source: name and edition.
    licence: its terms, one line.
    rows: a 0/1 column `label`, the dense (numeric) and sparse (string) columns, and the column `time`, if it has one.
    dense: names of the numeric features.
    sparse: names of the categorical features.
    time: the column that orders the rows in time, '' if nothing does.
    notes: what a reader of results must know.
  """

  source: str
  licence: str
  rows: pl.LazyFrame
  dense: tuple[str, ...] = ()
  sparse: tuple[str, ...] = ()
  time: str = ''
  notes: tuple[str, ...] = ()


def find_files(path: Path, patterns: tuple[str, ...], depth: int = 3) -> list[Path]:
  """Files below `path` that match one of the patterns, in the first of them that matches anything, sorted by name.

  Args:
    path: a directory, or a file, which is then matched itself.
    patterns: shell patterns of file names, most wanted first.
    depth: how many directories deep to look.

  Raises:
    UserError: `path` does not exist.
  """
  if not path.exists():
    raise UserError(f'{path}: no such file or directory; `pinfm download` gets the public data sets')
  for pattern in patterns:
    if path.is_file():
      found = [path] if path.match(pattern) else []
    else:
      found = [p for level in range(depth + 1) for p in path.glob('*/' * level + pattern) if p.is_file()]
    if found:
      return sorted(found, key=lambda p: p.name)
  return []


def star_actions(rating: str) -> pl.Expr:
  """Column `actions`: stars as a list with one action each (see STAR_NOTE)."""
  stars = pl.col(rating).cast(pl.Float64)
  chosen = (
    pl.when(stars >= 4.5)
    .then(pl.lit('save'))
    .when(stars >= 3.5)
    .then(pl.lit('closeup'))
    .when(stars >= 2.5)
    .then(pl.lit('click'))
    .otherwise(pl.lit('hide'))
  )
  return pl.concat_list(chosen).alias('actions')


def k_core(events: pl.DataFrame, k: int) -> pl.DataFrame:
  """Rows of users and items that keep at least k rows each, dropped until nothing changes; k <= 1 drops nothing."""
  while k > 1:
    kept = events.filter((pl.len().over('user_id') >= k) & (pl.len().over('item_id') >= k))
    if kept.height == events.height:
      return kept
    events = kept
  return events
