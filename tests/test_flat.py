"""Flat rows: distinct histories found on the host, and the same scores as one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_bundle import MODEL, SPEC, make_toy

from pinfm_jax.model.dcat import LayerKV
from pinfm_jax.model.flat import cross_rows, distinct_histories, distinct_requests, plan_rows
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import CandidateBatch, UserContext

LENGTH, ROWS = 6, 23


def _events(rng, users):
  count = np.append(0, rng.integers(1, LENGTH + 1, users - 1))
  return EventBatch(
    rng.integers(0, 2**32, (users, LENGTH, 2), dtype=np.uint32),
    rng.integers(0, 2, (users, LENGTH)).astype(np.int32),
    rng.integers(0, 8, (users, LENGTH)).astype(np.uint32),
    np.arange(LENGTH) < count[:, None],
  )


def _noisy_padding(rng, events):
  """What stands in padding must not make equal histories different."""
  noise = rng.integers(0, 2, events.surface_UL.shape).astype(np.int32)
  return events._replace(surface_UL=np.where(events.mask_UL, events.surface_UL, noise))


def test_equal_histories_are_found_by_content():
  rng = np.random.default_rng(0)
  events = _events(rng, 5)
  user_B = rng.integers(0, 5, 200)
  rows = _noisy_padding(rng, jax.tree.map(lambda x: x[user_B], events))
  first_U, found_B = distinct_histories(rows._replace(user_UL=rng.integers(0, 9, (200, LENGTH))))
  assert len(first_U) == 5
  np.testing.assert_array_equal(user_B[first_U][found_B], user_B)


@pytest.mark.parametrize('column', ['item_UL2', 'surface_UL', 'actions_UL', 'mask_UL'])
def test_histories_that_differ_in_one_number_stay_apart(column):
  rng = np.random.default_rng(1)
  events = jax.tree.map(lambda x: x[[4, 4]], _events(rng, 5))
  changed = getattr(events, column).copy()
  changed[1, 0] = 0 if column == 'mask_UL' else changed[1, 0] ^ 1
  assert len(distinct_histories(events)[0]) == 1
  assert len(distinct_histories(events._replace(**{column: changed}))[0]) == 2


def test_distinct_requests():
  first_U, user_B = distinct_requests(np.array([7, 2**60, 7, 3]))
  np.testing.assert_array_equal(first_U[user_B], [0, 1, 0, 3])


def test_plan_holds_every_row_once_in_a_tile_of_its_user():
  user_B = np.random.default_rng(2).integers(0, 9, 500)
  user_B[user_B == 4] = 5  # a user without rows
  seen = np.zeros(500, int)
  for tiles in plan_rows(user_B, widths=(1, 4, 16)):
    np.add.at(seen, tiles.row_MT[tiles.mask_MT], 1)
    tile, _ = np.nonzero(tiles.mask_MT)
    np.testing.assert_array_equal(user_B[tiles.row_MT[tiles.mask_MT]], tiles.user_M[tile])
  assert np.all(seen == 1)


@pytest.mark.parametrize('by_request', [True, False])
def test_rows_get_their_own_users_results(by_request):
  rng = np.random.default_rng(3)
  events = _events(rng, 7)
  user_B = rng.integers(0, 7, 300)
  rows = jax.tree.map(lambda x: x[user_B], events)
  candidates = {'a': rng.normal(size=300), 'b': rng.normal(size=(300, 2))}
  histories = []

  def context_pass(events):
    histories.append(len(events.mask_UL))
    return np.where(events.mask_UL, events.surface_UL + 2 * events.actions_UL, 0).sum(1)

  def crossing_pass(context, tile, user_M):
    return np.stack([context[user_M][:, None] * tile['a'], tile['b'].sum(-1)], axis=-1)

  got = cross_rows(context_pass, crossing_pass, rows, candidates, 100 - user_B if by_request else None)
  kept_U = np.where(events.mask_UL, events.surface_UL + 2 * events.actions_UL, 0).sum(1)
  expected = np.stack([kept_U[user_B] * candidates['a'], candidates['b'].sum(-1)], axis=-1)
  np.testing.assert_allclose(got, expected)
  assert histories == [8]  # 7 distinct ones, padded to a power of two: not 300


def test_numbers_of_rows_must_agree():
  events = _events(np.random.default_rng(4), 5)
  with pytest.raises(ValueError, match=r'have \[3, 5\] rows'):
    cross_rows(None, None, events, np.zeros(3))
  with pytest.raises(ValueError, match='at least 1'):
    cross_rows(None, None, jax.tree.map(lambda x: x[:0], events), np.zeros(0))


def test_scores_equal_those_of_rows_one_at_a_time():
  toy = make_toy()
  rng = np.random.default_rng(5)
  user_B = rng.integers(0, 4, ROWS)
  events = jax.tree.map(lambda x: x[user_B], _events(rng, 4))
  candidates = CandidateBatch(
    rng.integers(0, 2**32, (ROWS, 2), dtype=np.uint32),
    np.ones(ROWS, bool),
    np.ones(ROWS, np.float32),
    rng.normal(size=(ROWS, SPEC.num_dense)).astype(np.float32),
    np.stack([rng.integers(0, size, ROWS) for size in SPEC.sparse_sizes], axis=-1).astype(np.int32),
    rng.normal(size=(ROWS, sum(SPEC.embedding_widths))).astype(np.float32),
  )
  projection = rng.normal(size=(2, MODEL.tables.item_width)).astype(np.float32)
  lookup = lambda words: jnp.sin((words / 2.0**32).astype(np.float32) @ projection * 3)

  @jax.jit
  def one_at_a_time(params, history_BLV, items_BCV, events, candidates):
    context = toy.module.apply(params, history_BLV, events, method='context')
    return toy.module.apply(params, items_BCV, context, candidates, toy.stats, method='score')

  params = {'params': jax.tree.map(jnp.asarray, toy.params)}
  alone = jax.tree.map(lambda x: x[:, None], candidates)  # [B, C = 1]: every row its own user
  expected = one_at_a_time(params, lookup(events.item_UL2), lookup(alone.item_UC2), events, alone)[:, 0]

  @jax.jit
  def context_pass(events):
    return toy.module.apply(params, lookup(events.item_UL2), events, method='context')

  @jax.jit
  def crossing_pass(context, tile, user_M):
    kv = LayerKV(*(x[:, user_M] for x in (context.kv.key, context.kv.value)))
    context = UserContext(kv, context.user_UO[user_M], context.events_U[user_M])
    return toy.module.apply(params, lookup(tile.item_UC2), context, tile, toy.stats, method='score')

  got = cross_rows(context_pass, crossing_pass, events, candidates)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert got.std() > 0.01
