"""Flat rows, one (history, candidate) pair each, for callers who do not group candidates by user.

The host finds the distinct histories (by request, or by content) and cuts the candidates into tiles; each history then
goes through one context pass, each tile through the crossing pass, and the results return to the rows' order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.tiles import WIDTHS, plan_tiles


@dataclass(frozen=True)
class RowTiles:
  """A group of tiles (see `tiles.TileGroup`) over flat rows.

  Attributes:
    user_M: int32, which distinct history each tile belongs to.
    row_MT: int64, the row that stands at each place.
    mask_MT: True where a place is not padding.
  """

  user_M: np.ndarray
  row_MT: np.ndarray
  mask_MT: np.ndarray


def cross_rows(
  context_pass: Callable[[EventBatch], Any],
  crossing_pass: Callable[[Any, Any, np.ndarray], jax.Array],
  events: EventBatch,
  candidates: Any,
  request_B: np.ndarray | None = None,
) -> np.ndarray:
  """Runs both passes for flat rows.

  Give jitted functions: the number of histories is padded to a power of two and tiles come in few sizes, so that few
  programs are compiled whatever the rows.

  Args:
    context_pass: histories of U distinct users, NumPy -> what is kept of them.
    crossing_pass: what is kept, candidates of M tiles of T, user_M -> an array [M, T, ...].
    events: NumPy, [B, L, ...]: each row's history.
    candidates: NumPy arrays [B, ...], any pytree.
    request_B: rows with the same number share a history, that of the first of them; None = equal histories are found
      by their content.

  Returns:
    [B, ...], in the rows' order.

  Raises:
    ValueError: no rows, or numbers of rows that differ.
  """
  lengths = {len(x) for x in jax.tree.leaves((events, candidates, request_B))}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(f'events, candidates and request_B have {sorted(lengths)} rows; expected one number, at least 1')
  first_U, user_B = distinct_histories(events) if request_B is None else distinct_requests(request_B)
  padded_U = np.pad(first_U, (0, (1 << (len(first_U) - 1).bit_length()) - len(first_U)))
  context = context_pass(jax.tree.map(lambda x: x[padded_U], events))
  results = []
  for tiles in plan_rows(user_B):  # dispatched one after another, read when all are under way
    tile = jax.tree.map(lambda x, tiles=tiles: x[tiles.row_MT], candidates)
    results.append((tiles, crossing_pass(context, tile, tiles.user_M)))
  shape = results[0][1].shape[2:]
  flat = np.empty((len(user_B), *shape), results[0][1].dtype)
  for tiles, result in results:
    flat[tiles.row_MT[tiles.mask_MT]] = np.asarray(result)[tiles.mask_MT]
  return flat


def distinct_requests(request_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A row of each distinct request, int64 [U], and which of them each row belongs to, int32 [B]."""
  _, first_U, user_B = np.unique(request_B, return_index=True, return_inverse=True)
  return first_U, user_B.reshape(-1).astype(np.int32)


def distinct_histories(events: EventBatch) -> tuple[np.ndarray, np.ndarray]:
  """As `distinct_requests`, by content: the bytes of all columns that the model reads, padding left out.

  Bytes are compared, not a hash of them, so different histories are never taken for one. Whose the events are
  (`user_UL`) does not count: serving does not read it.
  """
  mask_BL = np.asarray(events.mask_UL)
  columns = [x for name, x in events._asdict().items() if x is not None and name != 'user_UL']
  parts = []
  for column in map(np.asarray, columns):
    real = np.where(mask_BL.reshape(*mask_BL.shape, *[1] * (column.ndim - 2)), column, np.zeros((), column.dtype))
    parts.append(np.ascontiguousarray(real).reshape(len(mask_BL), -1).view(np.uint8))
  content = np.ascontiguousarray(np.concatenate(parts, axis=1))
  return distinct_requests(content.view(np.dtype((np.void, content.shape[1])))[:, 0])


def plan_rows(user_B: np.ndarray, widths: Sequence[int] = WIDTHS, rows: int = 4096) -> list[RowTiles]:
  """Tiles (see `tiles.plan_tiles`) that together hold every row once, each of one user's rows."""
  order_B = np.argsort(user_B, kind='stable')
  count_U = np.bincount(user_B)
  first_U = np.cumsum(count_U) - count_U  # of each user's rows, in `order_B`
  return [
    RowTiles(group.user_M, order_B[first_U[group.user_M][:, None] + group.places], group.mask)
    for group in plan_tiles(count_U, widths, rows)
  ]
