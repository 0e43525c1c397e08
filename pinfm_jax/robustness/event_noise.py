"""Histories that are not as they were: natural noise without an adversary, and events that somebody injects.

All of it happens to a user's events before they become model inputs, so that windows, time gaps and content follow as
they do in serving. What is drawn for a history depends on the seed and its own row alone.
"""

from dataclasses import dataclass

import numpy as np

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.data.featurize import window_start
from pinfm_jax.data.records import History
from pinfm_jax.data.splits import usable_events
from pinfm_jax.errors import UserError

KINDS = ('replaced', 'dropped', 'misordered')
_INJECT = 101  # keeps the draws of injections apart from those of noise


@dataclass(frozen=True)
class Noise:
  """A `HistoryChange`: a share of a history's events is replaced by events of the pool, dropped or misordered.

  Attributes:
    kind: one of KINDS.
    share: the chance of each event.
    pool: events of other histories.
    seed: of the draws.
  """

  kind: str
  share: float
  pool: History
  seed: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"noise is '{self.kind}'; expected one of {', '.join(KINDS)}")
    if not 0 <= self.share <= 1:
      raise UserError(f'the share of events with noise is {self.share}; expected 0 to 1')

  def __call__(self, row: int, events: History) -> History:
    """The events with noise; at least one is never dropped."""
    rng = np.random.default_rng((self.seed, KINDS.index(self.kind), row))
    hit = np.flatnonzero(rng.random(len(events)) < self.share)
    if self.kind == 'replaced':
      return _with(events, hit, _at(self.pool, rng.integers(0, len(self.pool), len(hit))))
    if self.kind == 'misordered':  # times belong to places, and stay sorted
      return _with(events, hit, _at(events, rng.permutation(hit)))
    if len(hit) == len(events):
      hit = np.delete(hit, rng.integers(len(hit))) if len(hit) else hit
    return _at(events, np.setdiff1d(np.arange(len(events)), hit))


@dataclass(frozen=True)
class Injection:
  """A `HistoryChange`: K events of the pool are put between a history's own, which keep their order and times.

  The places are drawn, behind the first event that the model reads: an injected event happens right after the one
  before it, at its very time. A history without events stays as it is.

  Attributes:
    count: K.
    pool: what may be injected.
    length: events that the model reads.
    block: by which its window moves.
    seed: of the places, and of the events where none are chosen.
    choices: [rows, K] places in the pool, of the rows in `rows`; None = drawn.
    rows: ascending.
  """

  count: int
  pool: History
  length: int
  block: int
  seed: int = 0
  choices: np.ndarray | None = None
  rows: np.ndarray | None = None

  def __post_init__(self):
    if not 0 < self.count <= self.length - self.block:
      raise UserError(
        f'{self.count} events are to be injected; expected 1 to {self.length - self.block}, so that they fit into a '
        f'window of {self.length} events that moves by {self.block}'
      )

  def __call__(self, row: int, events: History) -> History:
    """The events with those injected."""
    if not len(events):
      return events
    places_K = self._places(row, len(events))
    new = _at(self.pool, self.choice(row))
    columns = {'timestamp': events.timestamp[places_K - 1], 'item': new.item, 'surface': new.surface}
    columns['actions'] = new.actions
    return History(**{name: np.insert(getattr(events, name), places_K, value) for name, value in columns.items()})

  def choice(self, row: int) -> np.ndarray:
    """[K]: which events of the pool a history gets, oldest first."""
    if self.choices is not None:
      return self.choices[np.searchsorted(self.rows, row)]
    return np.random.default_rng((self.seed, _INJECT, row, 1)).integers(0, len(self.pool), self.count)

  def slots(self, row: int, events: int) -> np.ndarray:
    """[K] int32: where the injected events stand in the window that the model reads; -1 for a history without any."""
    if not events:
      return np.full(self.count, -1, np.int32)
    start = window_start(events + self.count, self.length, self.block)
    return (self._places(row, events) + np.arange(self.count) - start).astype(np.int32)

  def _places(self, row: int, events: int) -> np.ndarray:
    """Before which of the own events they are put, ascending."""
    first = min(window_start(events + self.count, self.length, self.block) + 1, events)
    rng = np.random.default_rng((self.seed, _INJECT, row, 0))
    return np.sort(rng.integers(first, events + 1, self.count))


def event_pool(dataset: PreparedDataset, until_ms: int | None, size: int) -> History:
  """Events that pretraining may read (`usable_events`), one a user, of as many users as needed; drawn.

  Raises:
    UserError: no user has an event before it.
  """
  rng, chosen = np.random.default_rng(0), []
  for row in rng.permutation(dataset.num_users):
    history = dataset.history(int(row))
    usable = usable_events(history, until_ms)
    if usable:
      chosen.append(_at(history, np.array([rng.integers(usable)])))
    if len(chosen) == size:
      break
  if not chosen:
    raise UserError(f'{dataset.path} has no event before {until_ms} ms to take noise from')
  names = ('timestamp', 'item', 'surface', 'actions')
  return History(*(np.concatenate([getattr(event, name) for event in chosen]) for name in names))


def _at(events: History, places: np.ndarray) -> History:
  return History(events.timestamp[places], events.item[places], events.surface[places], events.actions[places])


def _with(events: History, places: np.ndarray, others: History) -> History:
  """The events with others at some places, at the same times."""
  columns = {name: getattr(events, name).copy() for name in ('item', 'surface', 'actions')}
  for name, column in columns.items():
    column[places] = getattr(others, name)
  return History(events.timestamp, **columns)
