"""Packs several short segments into one row of length L, so that a batch holds fewer padded places.

Segments are placed longest first, each into the fullest row that still has room (best fit, decreasing). Which
segments share a row is a pure function of the data set; the rows are shuffled each epoch, not made anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from pinfm_jax.data.featurize import event_inputs
from pinfm_jax.data.pipeline import Segments
from pinfm_jax.data.records import History


@dataclass(frozen=True)
class PackedSegments:
  """Random access to packed rows; makes the columns of `Segments`, and 'segment'.

  Attributes:
    segments: the segments that are packed.
    order: segments by row; a row's segments stand together.
    first: where each row starts in `order`, and the end.
  """

  segments: Segments
  order: np.ndarray
  first: np.ndarray

  @classmethod
  def of(cls, segments: Segments) -> 'PackedSegments':
    """Packs all segments into rows of `segments.length`."""
    row = pack(segments.stop - segments.start, segments.length)
    order = np.argsort(row, kind='stable')
    return cls(segments, order, np.searchsorted(row[order], np.arange(row.max() + 2)))

  def __len__(self) -> int:
    return len(self.first) - 1

  def __getitem__(self, index: SupportsIndex) -> Mapping[str, np.ndarray]:
    """A row: each segment's events one after the other, then padding.

    Returns:
      `event_inputs` of the events; user uint32 [L]; segment int32 [L], 1, 2, .. for the segments and 0 for padding.
    """
    index, length = int(index), self.segments.length
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} is outside the {len(self)} packed rows')
    chosen, segments = self.order[self.first[index] : self.first[index + 1]], self.segments
    users, starts, stops = (column[chosen] for column in (segments.user_row, segments.start, segments.stop))
    parts = [
      segments.dataset.history(int(user)).between(int(start), int(stop))
      for user, start, stop in zip(users, starts, stops, strict=True)
    ]
    counts, total = stops - starts, int(np.sum(stops - starts))
    # All segments at once, since a call costs more than its events.
    columns = event_inputs(History.joined(parts), slice(0, total), length, segments.tokens)
    if 'gap' in columns:
      columns['gap'][np.cumsum(counts) - counts] = 0  # the event before is of another segment
    columns['user'], columns['segment'] = np.zeros(length, np.uint32), np.zeros(length, np.int32)
    columns['user'][:total] = np.repeat(users, counts)
    columns['segment'][:total] = np.repeat(np.arange(1, len(chosen) + 1), counts)
    return columns


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
  """Best-fit decreasing bin packing: the row of each segment, rows numbered from 0 in the order they are opened.

  Takes time in proportion to the number of segments: rows with room are kept by the room they have, and a bit set
  says which rooms occur.

  Args:
    sizes: events of each segment, 1 to `length`.
    length: L.
  """
  row_of = np.empty(len(sizes), np.int64)
  order = np.argsort(-sizes, kind='stable')
  rows_with_room: list[list[int]] = [[] for _ in range(length + 1)]
  occurs, rows = 0, 0  # bit r of `occurs` is set where some row has room r
  for which, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
    fitting = occurs >> size
    if fitting:
      room = size + (fitting & -fitting).bit_length() - 1
      row = rows_with_room[room].pop()
      if not rows_with_room[room]:
        occurs &= ~(1 << room)
    else:
      row, room, rows = rows, length, rows + 1
    row_of[which] = row
    if room > size:
      rows_with_room[room - size].append(row)
      occurs |= 1 << (room - size)
  return row_of
