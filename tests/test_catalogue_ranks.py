"""Ranks in a whole catalogue against a brute-force loop, and the leave-one-out protocol on histories made by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.data.records import History
from pinfm_jax.data.splits import Split, pretrained_items
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.catalogue_ranks import catalogue_ranks
from pinfm_jax.evaluate.retrieval import Retrieval, RetrievalProtocol, retrieval_task
from pinfm_jax.model.hashing import EXACT_ROWS

USERS, ITEMS, WIDTH = 9, 37, 3


def _brute_force(h, z, target, seen, trained):
  """Ranks by a loop over users and items; scores in float64 of small whole numbers, hence exact in both."""
  ranks = []
  for query in range(len(h)):
    scores = [float(np.dot(h[query].astype(np.float64), z[item].astype(np.float64))) for item in range(len(z))]
    ahead = [
      item
      for item in range(len(z))
      if item != target[query] and item not in seen[query] and not scores[item] < scores[target[query]]
    ]
    ranks.append((1 + len(ahead), 1 + sum(trained[item] for item in ahead)))
  return np.array(ranks).T


@pytest.mark.parametrize('block', [1, 8, ITEMS, 1000])
def test_ranks_equal_a_loop_over_the_catalogue(block):
  """Whole numbers from a small range: many ties; some targets are seen items, which are ranked all the same."""
  rng = np.random.default_rng(block)
  h, z = (rng.integers(-2, 3, (count, WIDTH)).astype(np.float32) for count in (USERS, ITEMS))
  target, trained = rng.integers(0, ITEMS, USERS), rng.random(ITEMS) < 0.7
  seen = [set(rng.integers(0, ITEMS, 5).tolist()) | ({int(t)} if u % 2 else set()) for u, t in enumerate(target)]
  padded = np.full((USERS, 8), ITEMS, np.int32)
  for line, places in zip(padded, seen, strict=True):
    line[: len(places)] = sorted(places)
  found = catalogue_ranks(jnp.asarray(h), jnp.asarray(z), jnp.asarray(target), padded, trained, block=block)
  expected = _brute_force(h, z, target, seen, trained)
  np.testing.assert_array_equal(np.stack(found), expected)
  assert len(np.unique(expected[0])) > 3
  nothing = [set()] * USERS
  plain = catalogue_ranks(jnp.asarray(h), jnp.asarray(z), jnp.asarray(target), block=block)
  np.testing.assert_array_equal(plain[0], _brute_force(h, z, target, nothing, trained)[0])
  np.testing.assert_array_equal(plain[0], plain[1])


def test_equal_vectors_tie_whatever_block_they_are_in():
  rng = np.random.default_rng(0)
  z = np.tile(rng.normal(size=(1, WIDTH)), (ITEMS, 1)).astype(np.float32)
  h = rng.normal(size=(4, WIDTH)).astype(np.float32)
  ranks, _ = catalogue_ranks(jnp.asarray(h), jnp.asarray(z), jnp.arange(4), block=5)
  np.testing.assert_array_equal(ranks, ITEMS)  # the last place: ties count against the target


def test_a_broken_tower_is_last():
  ranks, _ = catalogue_ranks(jnp.full((2, WIDTH), jnp.nan), jnp.ones((ITEMS, WIDTH)), jnp.arange(2), block=7)
  np.testing.assert_array_equal(ranks, ITEMS)


class _Order:
  """An order-only log: users' items, oldest first."""

  def __init__(self, *users):
    self._users = [
      History(np.arange(len(u)), np.array(u, np.uint64), np.zeros(len(u), np.uint16), np.zeros(len(u), np.uint32))
      for u in users
    ]
    self.info = SimpleNamespace(actions=())

  def histories(self):
    return iter(self._users)

  def history(self, row):
    return self._users[row]


# Item 9 is trained by nobody, 8 by the first user alone; the third user has no event before the validation event.
LOG = _Order([8, 1, 2, 3, 4], [1, 2, 2, 9, 1], [3, 1], [4, 3, 1, 2])


def _task(events_back, **options):
  return retrieval_task(LOG, None, 2, 1, 0, 100, protocol=RetrievalProtocol(2, events_back, **options))


def _queries(task):
  items = [h['item'][h['mask']][:, 0].tolist() for h in _rows(task)]
  return list(zip(items, task.catalogue_V[task.target_Q].tolist(), strict=True))


def _rows(task):
  return [{name: value[i] for name, value in task.histories.items()} for i in range(len(task.target_Q))]


def test_leave_one_out():
  """The window is two events; the test query reads the validation event, which has not trained."""
  validation, test = _task(2), _task(1)
  for task in (validation, test):
    assert task.catalogue_V.tolist() == [1, 2, 3, 4, 8]  # of the events but the last two
    assert task.popularity_V.tolist() == [2, 3, 1, 1, 1]
  assert _queries(validation) == [([1, 2], 3), ([4, 3], 1)]
  assert validation.unseen == pytest.approx(1 / 3)  # of three users with a history; 9 was not seen
  assert _queries(test) == [([2, 3], 4), ([2, 9], 1), ([3], 1), ([3, 1], 2)]
  assert test.unseen == 0
  assert pretrained_items(LOG, None, held_out=2).tolist() == [1, 2, 3, 4, 8]


def test_seen_items_are_those_of_the_whole_history_before_the_target():
  test = _task(1, filter_seen=True)
  assert [test.catalogue_V[places].tolist() for places in test.seen] == [[1, 2, 3, 8], [1, 2], [3], [1, 3, 4]]
  whole = _task(1, filter_seen=True, whole_catalogue=True)
  assert [whole.catalogue_V[places].tolist() for places in whole.seen] == [[1, 2, 3, 8], [1, 2, 9], [3], [1, 3, 4]]


def test_the_whole_catalogue_has_what_training_never_saw():
  task = _task(2, whole_catalogue=True)
  assert task.catalogue_V.tolist() == [1, 2, 3, 4, 8, 9]
  assert task.trained_V.tolist() == [True] * 5 + [False]
  assert _queries(task) == [([1, 2], 3), ([2, 2], 9), ([4, 3], 1)]
  assert task.unseen == pytest.approx(1 / 3)


def test_an_action_set_counts_the_predicted_event_alone():
  """Whoever's predicted event is no positive is left out: the event behind it must not take its place."""
  log = _Order([1, 2, 3], [1, 3, 2], [3, 2, 1])
  log._users[0].actions[2] = log._users[1].actions[1] = 1
  task = retrieval_task(log, None, 2, 1, 1, 100, protocol=RetrievalProtocol(2, 2, whole_catalogue=True))
  assert _queries(task) == [([1], 3)]


@pytest.mark.parametrize('whole', [True, False])
def test_nothing_to_predict_is_an_error(whole):
  protocol = RetrievalProtocol(2, 2, whole_catalogue=whole)
  for users, words in (([[1], [2, 1]], 'expected histories of several events'), ([[1, 2, 3]], 'every next item')):
    with pytest.raises(UserError, match=words):
      retrieval_task(_Order(*users), None, 2, 1, 0, 100, protocol=protocol)


def test_which_event_a_split_predicts():
  two, one = (Split(None, (0, 0), (0, 0), (0, 0), held_out=count) for count in (2, 1))
  assert [two.events_back(name) for name in ('validation', 'test')] == [2, 1]
  assert [one.events_back(name) for name in ('validation', 'test')] == [1, 1]


def test_both_holdouts_are_measured():
  """Items are their own vectors, a user is its last item: all ranks can be told by hand."""
  tower = TowerConfig(layers=1, width=4, heads=1, output_width=4, max_positions=3, mlp_ratio=1, bare_targets=True)
  model = PinFMConfig(TableConfig(1, 16, 4, hash_seed=EXACT_ROWS), tower, num_surfaces=1)
  task = _task(2, filter_seen=True, whole_catalogue=True)
  retrieval = Retrieval(task, model, (1, 5), 2)
  h = {3: [0, 0, 1, 0], 9: [0, 0, 0, 0], 1: [1, 0, 0, 0]}  # by target
  z = jnp.asarray(np.eye(6, 4) + 0.5 * np.eye(6, 4, k=-4), jnp.float32)  # items 1, 2, 3, 4, 8 (= item 1 / 2), 9
  queries = [int(task.catalogue_V[t]) for t in task.target_Q]
  retrieval._users = lambda *_: (jnp.asarray([h[queries[i]] for i in retrieval._filled(p)]) for p in retrieval._parts)
  retrieval._items = lambda *_: z
  found = retrieval({}, None)
  # Target 3 and target 1 are first in both catalogues; target 9 ties with all that are not seen: 1, 3, 4, 8 (not 2).
  # With 1 seen too by that user, 3, 4 and 8 are before it.
  assert (found['users'], found['catalogue'], found['all/users'], found['all/catalogue']) == (2, 5, 3, 6)
  assert found['tower/hr@1'] == 1
  assert found['all/tower/hr@1'] == pytest.approx(2 / 3)
  assert found['all/tower/mrr'] == pytest.approx((1 + 1 + 1 / 4) / 3)
  # By popularity (2, 3, 1, 1, 1, 0): target 3 has 1, 2 and 8 seen, 4 ties; target 1 has 3, 4 seen, and 2 before it.
  assert found['popularity/mrr'] == pytest.approx(1 / 2)
