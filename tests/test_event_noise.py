"""Noise and injected events: what they keep of a history, and that draws are the history's own."""

import numpy as np
import pytest

from pinfm_jax.data.featurize import event_inputs, window_start
from pinfm_jax.data.records import History
from pinfm_jax.data.tokens import TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import key_words
from pinfm_jax.robustness.event_noise import KINDS, Injection, Noise, event_pool

LENGTH, BLOCK = 12, 4


def _history(events: int, first_item: int = 1) -> History:
  number = np.arange(events)
  time = 1000 + 60_000 * number.astype(np.int64)
  return History(
    time, (first_item + number).astype(np.uint64), (number % 3).astype(np.uint16), number.astype(np.uint32)
  )


POOL = _history(20, 1001)


def _equal(a: History, b: History) -> None:
  for name in ('timestamp', 'item', 'surface', 'actions'):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize('kind', KINDS)
def test_no_share_is_no_change_and_draws_are_the_rows_own(kind: str) -> None:
  events = _history(40)
  _equal(Noise(kind, 0.0, POOL)(3, events), events)
  noise = Noise(kind, 0.3, POOL, seed=1)
  _equal(noise(3, events), noise(3, events))
  different = [noise(4, events).item, Noise(kind, 0.3, POOL, seed=2)(3, events).item]
  assert all(not np.array_equal(noise(3, events).item, other) for other in different)
  assert len(noise(3, _history(0))) == 0


def test_replaced_events_are_the_pools_at_the_same_times() -> None:
  events, shares = _history(200), []
  for row in range(20):
    found = Noise('replaced', 0.25, POOL)(row, events)
    np.testing.assert_array_equal(found.timestamp, events.timestamp)
    new = found.item > 1000
    shares.append(new.mean())
    np.testing.assert_array_equal(found.item[~new], events.item[~new])
    np.testing.assert_array_equal(found.actions[new], POOL.actions[found.item[new].astype(int) - 1001])
    np.testing.assert_array_equal(found.surface[new], POOL.surface[found.item[new].astype(int) - 1001])
  assert abs(np.mean(shares) - 0.25) < 0.03
  assert (Noise('replaced', 1.0, POOL)(0, events).item > 1000).all()


def test_dropped_events_leave_the_others_in_order() -> None:
  events, left = _history(200), []
  for row in range(20):
    found = Noise('dropped', 0.25, POOL)(row, events)
    place = found.item.astype(int) - 1
    assert (np.diff(place) > 0).all()
    _equal(found, History(*(getattr(events, n)[place] for n in ('timestamp', 'item', 'surface', 'actions'))))
    left.append(len(found) / 200)
  assert abs(np.mean(left) - 0.75) < 0.03
  assert len(Noise('dropped', 1.0, POOL)(0, events)) == 1


def test_misordered_events_trade_places() -> None:
  events = _history(100)
  found = Noise('misordered', 0.3, POOL)(7, events)
  np.testing.assert_array_equal(found.timestamp, events.timestamp)  # time belongs to the place
  np.testing.assert_array_equal(np.sort(found.item), events.item)
  moved = found.item != events.item
  assert 0.1 < moved.mean() <= 0.45
  np.testing.assert_array_equal(found.actions, found.item.astype(int) - 1)  # an event moves as a whole


@pytest.mark.parametrize('events', [1, 2, 9, 12, 13, 30])
def test_injected_events_stand_between_the_own_which_keep_order_and_time(events: int) -> None:
  history, injection = _history(events), Injection(3, POOL, LENGTH, BLOCK, seed=5)
  for row in range(8):
    found = injection(row, history)
    assert len(found) == events + 3
    own = found.item < 1000
    _equal(History(*(getattr(found, n)[own] for n in ('timestamp', 'item', 'surface', 'actions'))), history)
    np.testing.assert_array_equal(found.item[~own], POOL.item[injection.choice(row)])
    assert (np.diff(found.timestamp) >= 0).all()
    after = np.flatnonzero(~own)
    np.testing.assert_array_equal(found.timestamp[after], found.timestamp[after - 1])
    # The slots say where the model meets them, and their time gap is none.
    window = slice(window_start(len(found), LENGTH, BLOCK), len(found))
    inputs = event_inputs(found, window, LENGTH, TokenInputs(gap_buckets=8))
    slots = injection.slots(row, events)
    np.testing.assert_array_equal(inputs['item'][slots], key_words(POOL.item[injection.choice(row)]))
    assert inputs['mask'][slots].all()
    assert (inputs['gap'][slots] == 1).all()


def test_chosen_events_are_injected_at_the_same_places() -> None:
  history, drawn = _history(10), Injection(2, POOL, LENGTH, BLOCK)
  chosen = Injection(2, POOL, LENGTH, BLOCK, choices=np.array([[0, 1], [7, 5]]), rows=np.array([3, 8]))
  found = chosen(8, history)
  np.testing.assert_array_equal(found.item[found.item > 1000], [1008, 1006])
  np.testing.assert_array_equal(found.item > 1000, drawn(8, history).item > 1000)
  _equal(chosen(8, _history(0)), _history(0))
  np.testing.assert_array_equal(chosen.slots(8, 0), [-1, -1])


def test_pool_holds_events_before_the_split(toy_run) -> None:
  until = toy_run.split.pretrain_until
  pool = event_pool(toy_run.dataset, until, 30)
  assert len(pool) == 30
  assert (pool.timestamp < until).all()
  _equal(pool, event_pool(toy_run.dataset, until, 30))
  with pytest.raises(UserError, match='no event before'):
    event_pool(toy_run.dataset, 0, 30)


def test_wrong_settings() -> None:
  for make, message in (
    (lambda: Noise('lost', 0.1, POOL), "noise is 'lost'"),
    (lambda: Noise('dropped', 1.5, POOL), 'is 1.5; expected 0 to 1'),
    (lambda: Injection(9, POOL, LENGTH, BLOCK), 'expected 1 to 8'),
    (lambda: Injection(0, POOL, LENGTH, BLOCK), 'expected 1 to 8'),
  ):
    with pytest.raises(UserError, match=message):
      make()
