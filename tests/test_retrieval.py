"""Whole-catalogue retrieval: ranks against a brute-force loop, pessimistic ties, and no look beyond the split."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import meta

from pinfm_jax.config import Arm
from pinfm_jax.data.featurize import window_start
from pinfm_jax.data.records import History
from pinfm_jax.data.splits import pretrained_items
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.retrieval import Retrieval, RetrievalTask, _crop, retrieval_task
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.pretrain import retrieval_of

KS = (1, 5, 20)


@pytest.fixture(scope='module')
def model(toy_run):
  return toy_run.model


@pytest.fixture(scope='module')
def params(model):
  events = EventBatch(
    jnp.zeros((1, 2, 2), jnp.uint32), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.uint32),
    jnp.ones((1, 2), bool),
  )  # fmt: skip
  vectors = jnp.zeros((1, 2, model.tables.item_width))
  shapes = meta.unbox(jax.eval_shape(PinFM(model).init, jax.random.key(0), vectors, events))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


@pytest.fixture(scope='module')
def rows(model):
  return 50 * toy.tables(model.tables).rows_GE


@pytest.fixture(scope='module')
def task(toy_run):
  return retrieval_task(toy_run.dataset, toy_run.split.pretrain_until, 8, 4, 0, 1000)


def _brute_force(task, model, params, rows_GE):
  """Rank of each target by a loop over users and items, in float64 from unit vectors."""
  sizes, rows = (model.tables.sub_tables, model.tables.rows, model.tables.hash_seed), np.asarray(rows_GE)
  vectors = lambda words: jnp.asarray(rows[hash_rows(np.asarray(words), *sizes)].reshape(*words.shape[:-1], -1))
  apply = jax.jit(lambda v, e: PinFM(model).apply({'params': params}, v, e, method='encode')[0])
  targets = jax.jit(lambda v: PinFM(model).apply({'params': params}, v, method='targets'))
  z_VO = np.asarray(targets(vectors(key_words(task.catalogue_V))), np.float64)
  histories = {name: np.asarray(value) for name, value in task.histories.items()}
  users = len(task.target_Q)
  events = EventBatch(*(jnp.asarray(histories[n]) for n in ('item', 'surface', 'actions', 'mask')))
  h_QLO = np.asarray(apply(vectors(histories['item']), events), np.float64)
  ranks = []
  for query in range(users):
    h_O = h_QLO[query, histories['mask'][query].sum() - 1]
    scores = [float(h_O @ z_O) for z_O in z_VO]
    target = scores[task.target_Q[query]]
    ranks.append(1 + sum(score >= target for i, score in enumerate(scores) if i != task.target_Q[query]))
  return np.array(ranks)


def _figures(ranks, ks):
  figures = {'mrr': np.mean([1 / rank for rank in ranks])}
  for k in ks:
    figures[f'hr@{k}'] = np.mean([rank <= k for rank in ranks])
    figures[f'ndcg@{k}'] = np.mean([1 / np.log2(1 + rank) if rank <= k else 0 for rank in ranks])
  return figures


@pytest.mark.parametrize('chunk', [7, 256])
def test_ranks_against_a_loop(task, model, params, rows, chunk):
  found = Retrieval(task, model, KS, chunk)(params, rows)
  ranks = _brute_force(task, model, params, rows)
  assert 1 < np.median(ranks) < len(task.catalogue_V)  # nothing degenerate is compared
  for name, value in _figures(ranks, KS).items():
    # Two scores that float32 cannot tell apart may change places: one rank of one user.
    assert found[f'tower/{name}'] == pytest.approx(value, abs=1.5 / len(ranks) if 'mrr' not in name else 5e-3), name
  assert found['users'] == len(ranks)
  assert found['catalogue'] == len(task.catalogue_V)
  assert found['unseen_share'] == task.unseen


def test_the_popularity_row(task, model, params, rows):
  found = Retrieval(task, model, KS)(params, rows)
  count = task.popularity_V
  ranks = [1 + sum(c >= count[t] for i, c in enumerate(count) if i != t) for t in task.target_Q]
  assert {name: found[f'popularity/{name}'] for name in _figures(ranks, KS)} == pytest.approx(_figures(ranks, KS))


def test_ties_count_against_the_model(task, model, params):
  """All items share one row, so all scores tie; and all popularities are equal."""
  tables = replace(model.tables, rows=1)
  tied = replace(task, popularity_V=np.full_like(task.popularity_V, 3))
  found = Retrieval(tied, replace(model, tables=tables), KS)(params, jnp.ones((2, 8)))
  for row in ('tower', 'popularity'):
    assert found[f'{row}/hr@20'] == 0
    assert found[f'{row}/ndcg@20'] == 0
    assert found[f'{row}/mrr'] == pytest.approx(1 / len(task.catalogue_V))


def test_a_perfect_tower(model, params, rows, task):
  """The target is the item whose score is highest, so every figure is 1."""
  ranks = _brute_force(task, model, params, rows)
  best = np.flatnonzero(ranks == 1)
  if not len(best):
    pytest.skip('no target happens to be first')
  chosen = RetrievalTask(task.catalogue_V, task.popularity_V, {n: v[best] for n, v in task.histories.items()},
                         task.target_Q[best], 0.0)  # fmt: skip
  found = Retrieval(chosen, model, (1,))(params, rows)
  assert (found['tower/hr@1'], found['tower/ndcg@1'], found['tower/mrr']) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize('bits', [0, 5])
def test_no_event_after_the_split_is_an_input_and_targets_are_the_next_positives(toy_run, bits):
  dataset, until, length, block = toy_run.dataset, toy_run.split.pretrain_until, 8, 4
  task = retrieval_task(dataset, until, length, block, bits, 1000)
  seen, popular, expected, unseen = set(), {}, [], 0
  positive = lambda actions: bits == 0 or bool(int(actions) & bits)
  for history in dataset.histories():
    for time, item, actions in zip(history.timestamp, history.item, history.actions, strict=True):
      if time < until:
        seen.add(int(item))
        popular[int(item)] = popular.get(int(item), 0) + positive(actions)
  assert task.catalogue_V.tolist() == sorted(seen)
  assert task.popularity_V.tolist() == [popular[item] for item in sorted(seen)]
  for history in dataset.histories():
    before = [int(i) for i, t in zip(history.item, history.timestamp, strict=True) if t < until]
    later = [
      int(i)
      for i, t, a in zip(history.item, history.timestamp, history.actions, strict=True)
      if t >= until and positive(a)
    ]
    if before and later:
      unseen += later[0] not in seen
      if later[0] in seen:
        expected.append((before[window_start(len(before), length, block) :], later[0]))
  assert len(task.target_Q) == len(expected)
  assert task.unseen == pytest.approx(unseen / (unseen + len(expected)))
  for query, (before, target) in enumerate(expected):
    mask = task.histories['mask'][query]
    assert mask.sum() == len(before)
    np.testing.assert_array_equal(task.histories['item'][query][mask], key_words(np.array(before, np.uint64)))
    assert int(task.catalogue_V[task.target_Q[query]]) == target


class _Histories:
  """Users with given (time, item, action bits) events."""

  def __init__(self, *users):
    self._users = []
    for user in users:
      time, item, bits = (np.array(column) for column in zip(*user, strict=True))
      surface = np.zeros(len(time), np.uint16)
      self._users.append(History(time, item.astype(np.uint64), surface, bits.astype(np.uint32)))

  def histories(self):
    return iter(self._users)

  def history(self, row):
    return self._users[row]


def test_targets_that_were_never_seen_are_left_out_and_counted():
  dataset = _Histories(
    [(1, 10, 1), (2, 11, 1), (9, 12, 1)],  # 12 is new after the split: left out
    [(1, 10, 1), (9, 99, 0), (10, 11, 1)],  # 99 is no positive, 11 is the target
    [(1, 10, 1)],  # nothing after
    [(9, 10, 1)],  # nothing before
    [(3, 7, 0), (9, 10, 1)],
  )
  task = retrieval_task(dataset, 5, 4, 2, 1, 100)
  assert task.catalogue_V.tolist() == [7, 10, 11]
  assert task.popularity_V.tolist() == [0, 3, 1]
  assert task.target_Q.tolist() == [2, 1]
  assert task.unseen == pytest.approx(1 / 3)
  assert task.histories['mask'].sum(axis=1).tolist() == [1, 1]


def test_what_a_spared_user_did_later_is_not_trained():
  """Items and popularity are of the events before a time of each user's own; what is predicted stays the same."""
  dataset = _Histories([(1, 10, 1), (4, 12, 1), (9, 10, 1)], [(1, 11, 1), (4, 11, 1), (9, 10, 1)])
  plain = retrieval_task(dataset, 5, 4, 2, 0, 100)
  spared = retrieval_task(dataset, 5, 4, 2, 0, 100, until_U=np.array([3, 5]))
  assert plain.catalogue_V.tolist() == [10, 11, 12]
  assert spared.catalogue_V.tolist() == [10, 11]
  assert spared.popularity_V.tolist() == [1, 2]
  assert spared.end_Q.tolist() == plain.end_Q.tolist() == [2, 2]


def test_pretrained_items_are_those_of_events_before_the_split():
  histories = _Histories([(1, 7, 1), (4, 3, 1), (5, 9, 1)], [(2, 3, 0), (8, 8, 1)], [(6, 6, 1)])
  assert pretrained_items(histories, 5).tolist() == [3, 7]  # whatever their actions
  assert pretrained_items(histories, None).tolist() == [3, 7]  # the last event of each user is held out
  assert pretrained_items(histories, 0).tolist() == []


def test_an_arm_with_shorter_histories_is_measured_in_shorter_blocks(toy_run):
  """Else a window would begin behind the newest event."""
  launch = apply_overrides(toy_run.experiment, {'finetune.history_block': 8, 'pretrain.downstream_length': 8})
  arm = Arm('short', {'pretrain.downstream_length': 4, 'finetune.history_block': 4})
  run = Run(launch, toy_run.workdir).of_arm(arm)
  assert run.retrieval_settings()['finetune.history_block'] == 4
  assert retrieval_of(run, 'test', (5,)).task.histories['mask'].any(axis=1).all()


def test_an_event_at_the_split_is_after_it():
  task = retrieval_task(_Histories([(4, 1, 1), (5, 1, 1)]), 5, 4, 2, 0, 10)
  assert task.histories['mask'].sum() == 1
  assert task.target_Q.tolist() == [0]


def test_a_task_without_users_is_refused():
  with pytest.raises(UserError, match='no user has events both before and after'):
    retrieval_task(_Histories([(1, 1, 1)], [(9, 1, 1)]), 5, 4, 2, 0, 10)
  with pytest.raises(UserError, match='first seen after'):
    retrieval_task(_Histories([(1, 1, 1), (9, 2, 1)]), 5, 4, 2, 0, 10)


def test_the_users_are_drawn_by_seed(toy_run):
  draw = lambda users, seed: retrieval_task(toy_run.dataset, toy_run.split.pretrain_until, 8, 4, 0, users, seed)
  whole, a, b, other = draw(10_000, 0), draw(20, 0), draw(20, 0), draw(20, 1)
  assert len(a.target_Q) <= 20 < len(whole.target_Q)
  np.testing.assert_array_equal(a.target_Q, b.target_Q)
  assert not np.array_equal(a.histories['item'], other.histories['item'])
  np.testing.assert_array_equal(a.catalogue_V, whole.catalogue_V)  # the catalogue does not depend on the draw


def test_histories_are_cropped_to_few_sizes():
  assert [_crop(events, 50) for events in (0, 1, 16, 17, 32, 33, 50)] == [16, 16, 16, 32, 32, 50, 50]
  assert _crop(3, 8) == 8
