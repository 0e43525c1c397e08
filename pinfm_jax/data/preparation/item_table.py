"""The table of items while it grows part by part, and its finished form."""

from pathlib import Path

import polars as pl

from pinfm_jax.data.info import TimeKnown
from pinfm_jax.data.preparation.config import PrepareConfig
from pinfm_jax.data.preparation.features import SideTable, load_content

_FOLD_ROWS = 4_000_000


class ItemTable:
  """Collects what parts of the log say about items; memory is proportional to the number of distinct items."""

  def __init__(self):
    self._frames: list[pl.DataFrame] = []
    self._new_rows = 0

  def add(self, frame: pl.DataFrame) -> None:
    """Adds rows of item_key, first_seen, and maybe events, first_shown, created_at, item_id."""
    self._frames.append(frame)
    self._new_rows += frame.height
    if self._new_rows > _FOLD_ROWS:
      self._frames = [self._fold()]
      self._new_rows = 0

  def finish(
    self, config: PrepareConfig, id_type: str, time_known: TimeKnown, sides: list[SideTable]
  ) -> tuple[pl.DataFrame, int]:
    """The table as it is stored, by ascending key, and the width of its content (0: none).

    Args:
      config: names the item file, if there is one.
      id_type: of the items.
      time_known: a time seen in an impression beats the ordinals of an order-only history.
      sides: loaded item and user files.
    """
    items = self._fold()
    if 'item_id' not in items.columns:
      items = items.with_columns(pl.col('item_key').reinterpret(signed=True).alias('item_id'))
    if 'first_shown' in items.columns and time_known.impressions and not time_known.histories:
      items = items.with_columns(pl.coalesce('first_shown', 'first_seen').alias('first_seen'))
    side = next((side.frame for side in sides if side.key == 'item_key'), None)
    known = [name for name in ('created_at',) if name in items.columns]
    if side is not None and 'created_at' in side.columns:
      items = items.join(side.select('item_key', created_at_file='created_at'), on='item_key', how='left')
      known.insert(0, 'created_at_file')
    items = items.with_columns(pl.coalesce(*known, pl.lit(None, pl.Int64)).alias('created_at'))
    names = ['item_key', 'item_id', 'first_seen', 'created_at', 'events']
    width = 0
    if config.items is not None:
      content = load_content(Path(config.items), id_type, config.item_columns, items['item_key'])
      if content is not None:
        items = items.join(content, on='item_key', how='left')
        width = content.schema['content'].size
        names.append('content')
    events = pl.col('events').fill_null(0).cast(pl.UInt64)
    return items.with_columns(events).select(names).sort('item_key'), width

  def _fold(self) -> pl.DataFrame:
    table = pl.concat(self._frames, how='diagonal')
    rules = {
      'events': pl.col('events').sum(),
      'first_seen': pl.col('first_seen').min(),
      'first_shown': pl.col('first_shown').min(),
      'created_at': pl.col('created_at').min(),
      'item_id': pl.col('item_id').drop_nulls().first(),
    }
    return table.group_by('item_key').agg(rule for name, rule in rules.items() if name in table.columns)
