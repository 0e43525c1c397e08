"""Sizes of the programs' calls: few, so that all are compiled before the first request; how work is cut to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.model.tiles import TileGroup, plan_tiles
from pinfm_jax.serve.cache import Arrays

MOST_APPENDED = 32  # a history with more new events is computed whole
_APPENDED_EVENTS = (4, MOST_APPENDED)
# One user alone is padded to two: XLA reads a single slot in place, and then copies the whole pool before writing it.
APPENDED_USERS = (2, 8)
CONTEXT_USERS = (1, 4, 16)
ITEMS = (64, 4096)
_WIDTHS = (1, 4, 32, 256)
_TILES = (1, 2, 8, 32)  # of a call


@dataclass(frozen=True)
class Sizes:
  """What bounds the memory of a scorer.

  Attributes:
    cache_users: slots of the pool, histories whose keys and values are kept; None = as many as fit in 1 GiB, at most
      1,024.
    max_users: requests that are scored together; more are scored one batch after another.
    max_rows: places for candidates in one call of a program, a power of two.
  """

  cache_users: int | None = None
  max_users: int = 32
  max_rows: int = 2048

  def __post_init__(self) -> None:
    """Checks the values."""
    for name in ('cache_users', 'max_users', 'max_rows'):
      value = getattr(self, name)
      if not (value is None and name == 'cache_users') and (not isinstance(value, int) or value < 1):
        raise UserError(f'got {name} {value!r}, expected an integer of at least 1')
    if self.max_rows & (self.max_rows - 1):
      raise UserError(f'got max_rows {self.max_rows}, expected a power of two')

  @property
  def widths(self) -> tuple[int, ...]:
    """Widths of tiles."""
    return tuple(width for width in _WIDTHS if width <= self.max_rows)

  def tile_counts(self, width: int) -> tuple[int, ...]:
    """M of the calls with tiles of a width."""
    return tuple(count for count in _TILES if count * width <= self.max_rows)

  @property
  def batch_rows(self) -> int:
    """Candidates of the requests that are scored together, which bounds their inputs; a longer request stands alone."""
    return 8 * self.max_rows

  def slots(self, slot_bytes: int) -> int:
    """Slots of the pool."""
    return self.cache_users or max(1, min(1024, (1 << 30) // slot_bytes))

  def tiles(self) -> Iterator[tuple[int, int]]:
    """Every (M, T) that `tile_groups` makes."""
    for width in self.widths:
      for count in self.tile_counts(width):
        yield count, width

  def tile_groups(self, counts: Sequence[int]) -> tuple[TileGroup, ...]:
    """Cuts each user's candidates into tiles; see `plan_tiles`. Clients tend to ask for the same numbers again."""
    return _tile_groups(self, tuple(map(int, counts)))


DEFAULT_SIZES = Sizes()


@lru_cache(maxsize=256)
def _tile_groups(sizes: Sizes, counts: tuple[int, ...]) -> tuple[TileGroup, ...]:
  groups = []
  for group in plan_tiles(counts, sizes.widths, sizes.max_rows):
    tiles = len(group.user_M)  # a power of two, and so are the counts: the parts fill it
    size = max(count for count in sizes.tile_counts(group.width) if count <= tiles)
    for start in range(0, tiles, size):
      part = slice(start, start + size)
      if group.count_M[part].any():
        groups.append(TileGroup(group.width, group.user_M[part], group.start_M[part], group.count_M[part]))
  return tuple(groups)


def event_sizes(history_length: int) -> tuple[int, ...]:
  """K of the context program: short histories do not pay for long ones."""
  quarter = -(-history_length // 4)
  return (quarter, history_length) if quarter >= 16 else (history_length,)


def appended_sizes(history_length: int) -> tuple[int, ...]:
  """K of the extend program."""
  return tuple(sorted({min(size, history_length) for size in _APPENDED_EVENTS}))


def cut(count: int, sizes: Sequence[int]) -> list[int]:
  """Sizes, largest first, of the calls that take `count` rows; the last one may be padded, by less than half of it."""
  calls = []
  while count > 0:
    size = next((s for s in sizes if s < 2 * count and s >= count), None)  # padded
    size = size or max((s for s in sizes if s <= count), default=sizes[0])
    calls.append(size)
    count -= size
  return calls


def padded(flat: Arrays, counts: Sequence[int], rows: int, width: int) -> Arrays:
  """Rows of a ragged batch, one after another in `flat`, as [rows, width, ...] with a mask; the rest is zeros."""
  count_R = np.pad(np.asarray(counts, np.int64), (0, rows - len(counts)))
  mask = np.arange(width) < count_R[:, None]
  batch: Arrays = {'mask': mask}
  for name, column in flat.items():
    batch[name] = np.zeros((rows, width, *column.shape[1:]), column.dtype)
    batch[name][mask] = column
  return batch


def joined(parts: Sequence[Arrays]) -> Arrays:
  """Columns of several, one after another."""
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
