"""Tiles: users' uneven numbers of candidates cut into few rectangular groups of known sizes, with bounded padding.

A crossing program takes M tiles of T candidates of one user each. Both come from short lists, so few programs serve any
request, and yet at most 3 places in 13 are padding. NumPy alone: planning happens on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTHS = (1, 4, 16, 64, 256, 1024)

_TILE_COST = 8  # one more tile (its user's keys and values are copied) costs about as much as so many candidates
_GROUP_COST = 64  # and one more group (a call of a program) as many as these


@dataclass(frozen=True)
class TileGroup:
  """M tiles of one width, M a power of two; tiles that only pad have count 0, start 0 and user 0.

  Attributes:
    width: T, candidates of a tile.
    user_M: int32, index in `counts` of the user whose candidates a tile holds.
    start_M: int64, the tile's first candidate, among those of its user.
    count_M: int64, how many candidates it holds; the rest of the tile is padding.
  """

  width: int
  user_M: np.ndarray
  start_M: np.ndarray
  count_M: np.ndarray

  @property
  def places(self) -> np.ndarray:
    """Each place's candidate, among those of its user, int64 [M, T]; padding repeats the tile's first."""
    place_T = np.arange(self.width)
    return self.start_M[:, None] + np.where(place_T < self.count_M[:, None], place_T, 0)

  @property
  def mask(self) -> np.ndarray:
    """True on places that hold a candidate, bool [M, T]."""
    return np.arange(self.width) < self.count_M[:, None]


def plan_tiles(counts: Sequence[int] | np.ndarray, widths: Sequence[int] = WIDTHS, rows: int = 4096) -> list[TileGroup]:
  """Cuts each user's candidates into tiles.

  A user's candidates fill tiles from the widest width down. A tile that would not be full is used where its padding
  costs less than the narrower tiles in its place, and where all padding stays below 3/10 of the candidates; so the
  places are at most 1.3 times the candidates, and exactly as many up to 3 of them.

  Args:
    counts: candidates of each user; 0 is fine.
    widths: of tiles, ascending powers of two that begin with 1.
    rows: most places (M * T) of a group, a power of two, at least the greatest width.

  Returns:
    Groups, widest first; none without candidates.

  Raises:
    ValueError: negative counts, or widths or rows that are not as described.
  """
  left_U = np.array(counts, np.int64).reshape(-1)
  _check(left_U, widths, rows)
  total = int(left_U.sum())
  spare = 3 * total // 10  # places of padding that are left to spend
  start_U = np.zeros_like(left_U)
  groups: list[TileGroup] = []
  for width, narrower in zip(reversed(widths), [*reversed(widths[:-1]), 0], strict=True):
    tiles_U, padding = _tiles_of(left_U, width, narrower, spare)
    spare -= padding
    user_M = np.repeat(np.arange(len(left_U), dtype=np.int32), tiles_U)
    first_U = np.cumsum(tiles_U) - tiles_U
    start_M = start_U[user_M] + width * (np.arange(len(user_M)) - first_U[user_M])
    count_M = np.minimum(width, (start_U + left_U)[user_M] - start_M)
    covered_U = np.minimum(left_U, tiles_U * width)
    start_U, left_U = start_U + covered_U, left_U - covered_U
    done = 0
    for size in _group_sizes(len(user_M), rows // width, min(spare, max(_GROUP_COST, total // 8)) // width):
      part = slice(done, done + size)
      groups.append(TileGroup(width, *(_pad(x[part], size) for x in (user_M, start_M, count_M))))
      done += size
    spare -= width * (done - len(user_M))
  return groups


def _tiles_of(left_U: np.ndarray, width: int, narrower: int, spare: int) -> tuple[np.ndarray, int]:
  """How many tiles of a width each user gets, and the padding in them."""
  tiles_U, rest_U = np.divmod(left_U, width)
  if not narrower:
    return tiles_U, 0
  padding_U = width - rest_U
  saved_U = -(-rest_U // narrower) - 1  # tiles
  candidates = np.flatnonzero((rest_U > narrower) & (padding_U <= _TILE_COST * saved_U))
  candidates = candidates[np.argsort(padding_U[candidates], kind='stable')]
  candidates = candidates[np.cumsum(padding_U[candidates]) <= spare]
  tiles_U[candidates] += 1
  return tiles_U, int(padding_U[candidates].sum())


def _group_sizes(tiles: int, most: int, spare: int) -> list[int]:
  """Powers of two, at most `most` each, that together hold the tiles and at most `spare` more."""
  sizes = [most] * (tiles // most)
  tiles %= most
  while tiles:
    above = 1 << (tiles - 1).bit_length()
    size = above if above - tiles <= spare else above // 2
    sizes.append(size)
    tiles = max(0, tiles - size)
  return sizes


def _pad(x: np.ndarray, size: int) -> np.ndarray:
  return np.pad(x, (0, size - len(x)))


def _check(count_U: np.ndarray, widths: Sequence[int], rows: int) -> None:
  if np.any(count_U < 0):
    raise ValueError(f'counts hold {count_U.min()}; expected 0 or more candidates a user')
  powers = all(width > 0 and width & (width - 1) == 0 for width in (*widths, rows))
  if not widths or widths[0] != 1 or not powers or any(a >= b for a, b in zip(widths, widths[1:], strict=False)):
    raise ValueError(f'widths are {tuple(widths)} and rows {rows}; expected ascending powers of two that begin with 1')
  if rows < widths[-1]:
    raise ValueError(f'rows is {rows}; expected at least the greatest width, {widths[-1]}')
