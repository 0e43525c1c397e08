"""Which user's keys and values stand in which slot of the pool: bookkeeping alone, no arrays of the device.

A slot is found by what the model reads of a history (its window's inputs), not by a user's name: equal histories share
a slot, and nobody gets the keys and values of another history. A window that only adds events to one that is held
takes its slot over, and just the new events are computed. Slots that a running batch uses are neither given away nor
extended; of the others the one unused for longest goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
_FIRST_SEED = 1  # a hash only finds a slot, whose window is then compared: collisions cost time, never a wrong answer


@dataclass(frozen=True)
class Window:
  """What the model reads of a history.

  Attributes:
    columns: inputs of its n events, [n, ...] (`featurize.event_inputs` without its mask).
    prefixes: uint64 [n + 1], a hash of the first k events at place k.
  """

  columns: Arrays
  prefixes: np.ndarray

  @classmethod
  def of(cls, columns: Arrays) -> 'Window':
    """The window with its hashes."""
    octets = [np.ascontiguousarray(c).view(np.uint8).reshape(len(c), -1) for c in columns.values() if len(c)]
    if not octets:
      return cls(columns, np.zeros(1, np.uint64))
    event = np.concatenate(octets, axis=1)
    event = np.pad(event, ((0, 0), (0, -event.shape[1] % 4))).view(np.uint32).astype(np.uint64)
    factors = np.random.default_rng(_FIRST_SEED).integers(1, 2**64, event.shape[1], np.uint64) | np.uint64(1)
    mixed = _mix((event * factors).sum(axis=1) + _mix(np.arange(1, len(event) + 1, dtype=np.uint64)))
    return cls(columns, np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed)]))

  def __len__(self) -> int:
    return len(self.prefixes) - 1

  def starts_with(self, other: 'Window') -> bool:
    """Whether its first events are those of the other window."""
    return len(other) <= len(self) and all(
      np.array_equal(self.columns[name][: len(other)], column) for name, column in other.columns.items()
    )


class Assignment(NamedTuple):
  """Slots for the windows of a batch, and what must be computed before they can be read.

  Attributes:
    slot_U: int32, of each window.
    whole: places in the batch of windows to compute whole.
    appended: (place, k) of windows of which the slot holds the first k events.
  """

  slot_U: np.ndarray
  whole: list[int]
  appended: list[tuple[int, int]]


class SlotCache:
  """Least recently used slots go first; see the module."""

  def __init__(self, slots: int, most_appended: int):
    """An empty cache.

    Args:
      slots: P.
      most_appended: a window with more new events than this is computed whole.
    """
    self.slots, self._most_appended = slots, most_appended
    self.hits = self.extended = self.misses = self.evicted = 0
    self.clear()

  def clear(self) -> None:
    """Forgets every slot; the counts stay."""
    self._held: OrderedDict[int, Window] = OrderedDict()  # oldest use first
    self._slots: dict[int, int] = {}  # by the hash of the whole window
    self._free = list(range(self.slots - 1, -1, -1))

  def assign(self, windows: Sequence[Window]) -> Assignment:
    """Gives each window a slot, and takes note that the slot holds it: the caller must compute what is told.

    Args:
      windows: of one batch, at most as many different ones as there are slots.

    Raises:
      ValueError: more different windows than slots.
    """
    slot_U, whole, appended = np.full(len(windows), -1, np.int32), [], []
    used: set[int] = set()
    for place, window in enumerate(windows):  # first of all, so that no held window of the batch is given away
      slot = self._find(window, len(window))
      if slot is not None:
        slot_U[place] = self._use(slot, window, used)
    self.hits += int(np.sum(slot_U >= 0))
    for place in np.flatnonzero(slot_U < 0).tolist():
      window = windows[place]
      slot = self._find(window, len(window))
      if slot is not None:  # a window that an equal one of this batch has just brought in
        self.hits += 1
      else:
        slot = self._find_start(window, used)
        if slot is None:
          slot = self._take(used)
          whole.append(place)
          self.misses += 1
        else:
          appended.append((place, len(self._held[slot])))
          self._forget(slot)
          self.extended += 1
        self._slots[int(window.prefixes[-1])] = slot
      slot_U[place] = self._use(slot, window, used)
    return Assignment(slot_U, whole, appended)

  def _find(self, window: Window, events: int) -> int | None:
    """The slot that holds exactly the window's first events."""
    slot = self._slots.get(int(window.prefixes[events]))
    if slot is None or len(self._held[slot]) != events or not window.starts_with(self._held[slot]):
      return None
    return slot

  def _find_start(self, window: Window, used: set[int]) -> int | None:
    """The slot outside `used` that holds the most of the window's first events."""
    for events in range(len(window) - 1, max(len(window) - self._most_appended, 1) - 1, -1):
      slot = self._find(window, events)
      if slot is not None and slot not in used:
        return slot
    return None

  def _use(self, slot: int, window: Window, used: set[int]) -> int:
    self._held[slot] = window
    self._held.move_to_end(slot)
    used.add(slot)
    return slot

  def _take(self, used: set[int]) -> int:
    """A slot that holds nothing, or else the one outside `used` that was unused for longest."""
    if self._free:
      return self._free.pop()
    slot = next((slot for slot in self._held if slot not in used), None)
    if slot is None:
      raise ValueError(f'got a batch of more different histories than the {self.slots} slots')
    self._forget(slot)
    self.evicted += 1
    return slot

  def _forget(self, slot: int) -> None:
    key = int(self._held.pop(slot).prefixes[-1])
    if self._slots.get(key) == slot:  # another window with the same hash may stand there
      del self._slots[key]


def _mix(h: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser: an input bit flips each output bit half the time."""
  h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return h ^ (h >> np.uint64(31))
