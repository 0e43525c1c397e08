"""Repair of event embeddings: the forward pass is the model's own, the losses are pretraining's, an example's own."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import meta

from pinfm_jax.config import PretrainConfig
from pinfm_jax.data.pipeline import Requests, action_bits
from pinfm_jax.evaluate.predict import scoring_program
from pinfm_jax.evaluate.retrieval import Retrieval, item_targets, retrieval_task
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.model.ranker import DenseStats
from pinfm_jax.robustness.event_noise import Injection, event_pool
from pinfm_jax.robustness.repair import repair
from pinfm_jax.robustness.sequence_terms import (
  NAMES,
  Bank,
  histories_of,
  sequence_losses_each,
)
from pinfm_jax.robustness.sequences import SequenceConfig, embedding_attack, greedy_choice, row_weights
from pinfm_jax.robustness.subjects import NextItemSubject, RankingSubject, bank_of
from pinfm_jax.train.finetune import without_randomness
from pinfm_jax.train.pairs import Anchors, pair_sums

CONFIG = SequenceConfig(bank=32, injected=2, tried=4, steps=4)
SIZE = 8


def _random(shapes, seed: int):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), meta.unbox(shapes))


def _one_layer(model):
  """Compiles in half the time."""
  return replace(model, tower=replace(model.tower, layers=1))


@pytest.fixture(scope='module')
def ranking(toy_run):
  """A ranker that nobody trained, over requests of the toy data: (subject, weights)."""
  finetune = replace(without_randomness(toy_run.experiment.finetune), candidates=12)
  ranker = replace(toy_run.experiment.ranker, learnable_token=True, user_output=True)
  task = replace(toy_run.task(1), config=finetune, ranker=ranker, model=_one_layer(toy_run.model))
  requests = Requests.between(toy_run.dataset, toy_run.schema, finetune, toy_run.split.test, 4, toy_run.tokens)
  requests = replace(requests, request_row=requests.request_row[:SIZE], first=np.zeros(SIZE, np.int64))
  params = _random(jax.eval_shape(task.init, jax.random.key(0)), 1)
  rows_GE = 50 * toy.tables(task.model.tables).rows_GE
  width = len(toy_run.schema.dense_names)
  zeros = jnp.zeros(width)
  weights = {
    'ranker': {name: value for name, value in params.items() if name != 'log_temperature'},
    'stats': DenseStats(zeros, zeros + 100, zeros, zeros + 0.1),
    'bank': bank_of(toy_run.pretrained_items, CONFIG.bank, task.model, params['pinfm'], rows_GE, toy_run.tokens),
    'pinfm': params['pinfm'],
    'rows': rows_GE,
    'log_temperature': jnp.log(0.3),
  }
  return RankingSubject(task, requests, toy_run.experiment.pretrain, 1), weights


@pytest.fixture(scope='module')
def next_item(toy_run):
  until, model = toy_run.split.pretrain_until, _one_layer(toy_run.model)
  bits = action_bits(toy_run.experiment.pretrain, toy_run.dataset.info.actions)
  collect = lambda change=None: retrieval_task(toy_run.dataset, until, 8, 4, bits, 30, change=change)
  subject = NextItemSubject(
    model, toy_run.experiment.pretrain, collect, until, toy_run.dataset, toy_run.tokens, (8, 4), bits
  )
  shapes = jax.eval_shape(
    PinFM(model).init, jax.random.key(0), jnp.zeros((1, 2, model.tables.item_width)), _events(1, 2)
  )['params']
  params, rows_GE = _random(shapes, 2), 50 * toy.tables(model.tables).rows_GE
  weights = {
    'z_VO': item_targets(subject.clean.catalogue_V, None, model, params, rows_GE),
    'bank': bank_of(subject.clean.catalogue_V, CONFIG.bank, model, params, rows_GE, toy_run.tokens),
    'pinfm': params,
    'rows': rows_GE,
    'log_temperature': jnp.log(0.3),
  }
  return subject, weights


@pytest.fixture(scope='module')
def bound(ranking):
  """(of a batch, x) everything that the tests need of the ranking subject, compiled once."""
  subject, weights = ranking

  @jax.jit
  def everything(batch, index_B, weight_K):
    b = subject.bind(weights, batch)
    terms = b.terms(subject.pretrain, weight_K)
    found = repair(terms, b.x_ULD, replace(CONFIG.repair, steps=6), index_B)
    attacked = embedding_attack('pgd-l2', b, CONFIG, index_B)
    return {
      'x': b.x_ULD,
      'p': b.outcome(b.x_ULD),
      'loss': b.loss(b.x_ULD),
      'repaired': found,
      'attacked': attacked,
      'attacked_loss': b.loss(attacked),
      'mask': b.histories.mask_UL,
      'positive': b.histories.positive_UL,
    }

  return everything


@pytest.fixture(scope='module')
def batch(ranking):
  return ranking[0].examples()


def _events(users: int, length: int) -> EventBatch:
  return EventBatch(
    jnp.zeros((users, length, 2), jnp.uint32), jnp.zeros((users, length), jnp.int32),
    jnp.zeros((users, length), jnp.uint32), jnp.ones((users, length), bool),
  )  # fmt: skip


def test_given_embeddings_are_the_ranker_on_ids(ranking, bound, batch) -> None:
  subject, weights = ranking
  found = bound(batch, subject.rows, np.ones(3, np.float32))
  # Training's and evaluation's own path, which nobody gave embeddings to.
  expected = scoring_program(subject.task)(weights['ranker'], weights['rows'], weights['stats'], batch)
  np.testing.assert_allclose(found['p'], expected, atol=1e-6)
  p = np.clip(np.asarray(found['p'])[..., 1], 1e-6, 1 - 1e-6)
  label, mask = batch['candidate_labels'][..., 1], batch['candidate_mask']
  entropy = -np.where(label > 0, np.log(p), np.log1p(-p)) * mask
  np.testing.assert_allclose(found['loss'], entropy.sum(1) / mask.sum(1), rtol=1e-4)


def test_context_of_embedded_is_the_context_to_the_last_bit(ranking, batch) -> None:
  subject, weights = ranking
  events = EventBatch(*(jnp.asarray(batch[f'history_{name}']) for name in ('item', 'surface', 'actions', 'mask')))
  vectors = jnp.asarray(np.random.default_rng(3).normal(size=(*events.mask_UL.shape, 16)), jnp.float32)
  apply = partial(subject.task.module.apply, {'params': weights['ranker']})
  direct = jax.jit(lambda: apply(vectors, events, method='context'))()
  x_ULD = jax.jit(lambda: apply(vectors, events, method='embed_events'))()
  given = jax.jit(lambda x: apply(x, events, method='context_of_embedded'))(x_ULD)
  for ours, theirs in zip(jax.tree.leaves(given), jax.tree.leaves(direct), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_next_item_ranks_are_the_evaluators(next_item) -> None:
  subject, weights = next_item
  batch = subject.examples()
  rank = np.asarray(jax.jit(lambda b: (bound := subject.bind(weights, b)).outcome(bound.x_ULD))(batch))
  expected = Retrieval(subject.clean, subject.model, (10,))(weights['pinfm'], weights['rows'])
  assert np.where(rank <= 10, 1 / np.log2(1 + rank), 0).mean() == pytest.approx(expected['tower/ndcg@10'], abs=1e-9)
  assert (1 / rank).mean() == pytest.approx(expected['tower/mrr'], rel=1e-6)
  assert (np.diff(subject.rows) > 0).all()
  np.testing.assert_array_equal(np.minimum(subject.lengths, 8) >= batch['mask'].sum(1), True)


def test_histories_owe_nothing_to_their_batch(ranking, bound, batch) -> None:
  rows, weight_K = ranking[0].rows, np.ones(3, np.float32)
  whole = bound(batch, rows, weight_K)
  order = np.random.default_rng(0).permutation(SIZE)
  moved = bound({name: value[order] for name, value in batch.items()}, rows[order], weight_K)
  mates = np.concatenate([np.arange(4), np.arange(4)])  # the first half beside itself
  other = bound({name: value[mates] for name, value in batch.items()}, rows[mates], weight_K)
  for name in ('x', 'p', 'loss', 'attacked'):
    np.testing.assert_allclose(moved[name], np.asarray(whole[name])[order], atol=1e-5)
    np.testing.assert_allclose(np.asarray(other[name])[:4], np.asarray(whole[name])[:4], atol=1e-5)
  for ours, halves, expected in zip(moved['repaired'][:3], other['repaired'], whole['repaired'], strict=False):
    np.testing.assert_allclose(ours, np.asarray(expected)[order], atol=1e-4)
    np.testing.assert_allclose(np.asarray(halves)[:4], np.asarray(expected)[:4], atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_repair_lowers_each_term_and_stays_in_its_ball(ranking, bound, batch, name: str) -> None:
  subject = ranking[0]
  found = bound(batch, subject.rows, np.array([name == n for n in NAMES], np.float32))
  before_B, after_B = (np.asarray(x)[:, NAMES.index(name)] for x in found['repaired'][1:3])
  has_pairs_B = before_B > 0
  assert has_pairs_B.sum() >= SIZE // 2
  assert after_B.mean() < before_B.mean()
  change = np.linalg.norm(np.asarray(found['repaired'].x) - np.asarray(found['x']), axis=-1)
  assert change.max() <= CONFIG.main + 1e-5
  assert change[np.asarray(found['mask'])].mean() > 0.3 * CONFIG.main


def test_attack_on_embeddings_raises_the_rankers_loss_within_its_ball(ranking, bound, batch) -> None:
  found = bound(batch, ranking[0].rows, np.ones(3, np.float32))
  assert (np.asarray(found['attacked_loss']) >= np.asarray(found['loss'])).all()
  assert np.mean(found['attacked_loss']) > np.mean(found['loss']) + 1e-3
  change = np.linalg.norm(np.asarray(found['attacked']) - np.asarray(found['x']), axis=-1)
  assert change.max() <= CONFIG.radius_l2 + 1e-5
  assert change[~np.asarray(found['mask'])].max(initial=0) <= CONFIG.radius_l2 + 1e-5


@pytest.mark.slow
def test_greedy_injection_is_what_the_model_then_reads(ranking, toy_run) -> None:
  subject, weights = ranking
  pool = event_pool(toy_run.dataset, toy_run.split.pretrain_until, 24)
  injection = Injection(2, pool, *subject.window)
  rows, lengths = subject.rows, subject.lengths
  start = np.stack([injection.choice(int(row)) for row in rows]).astype(np.int32)
  slots = np.stack([injection.slots(int(row), int(n)) for row, n in zip(rows, lengths, strict=True)])

  @jax.jit
  def choose(batch):
    bound = subject.bind(weights, batch)
    pool_PD = subject.pool_tokens(weights, pool)
    return greedy_choice(bound, pool_PD, start, slots, 4), bound.loss(bound.x_ULD), bound.x_ULD, pool_PD

  choice, drawn_loss, x_ULD, pool_PD = choose(subject.examples(injection))
  again = subject.examples(replace(injection, choices=np.asarray(choice), rows=rows))
  _, chosen_loss, chosen_x, _ = choose(again)
  # The history that is told of the chosen events has just those embeddings that the attack put in place.
  expected = np.array(x_ULD)
  for u in range(SIZE):
    for k in range(2):
      if slots[u, k] >= 0:
        expected[u, slots[u, k]] += np.asarray(pool_PD)[choice[u, k]] - np.asarray(pool_PD)[start[u, k]]
  np.testing.assert_allclose(chosen_x, expected, atol=1e-5)
  assert (np.asarray(chosen_loss) >= np.asarray(drawn_loss) - 1e-6).all()
  assert np.mean(chosen_loss) > np.mean(drawn_loss)


def _toy_losses(config: PretrainConfig):
  rng = np.random.default_rng(5)
  unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
  events, length, width = np.array([9, 4, 1, 0]), 9, 4
  mask = np.arange(length) < events[:, None]
  item = rng.integers(1, 12, (4, length, 2)).astype(np.uint32) * [[[1, 0]]]
  actions = rng.integers(0, 2, (4, length)).astype(np.uint32)
  batch = EventBatch(jnp.asarray(item, jnp.uint32), jnp.zeros((4, length), jnp.int32), jnp.asarray(actions), mask)
  bank = Bank(jnp.asarray([[k, 0] for k in range(1, 7)], jnp.uint32), jnp.asarray(unit(6, width), jnp.float32))
  h, z = (jnp.asarray(unit(4, length, width), jnp.float32) for _ in range(2))
  histories = jax.jit(histories_of, static_argnums=3)(batch, z, bank, 1)
  found = jax.jit(lambda h, histories: sequence_losses_each(h, histories, bank, jnp.log(0.5), config))(h, histories)
  return h, z, batch, bank, histories, found


def test_losses_against_loops() -> None:
  config = PretrainConfig(window=3, downstream_length=5, impression_negatives=2)
  h, z, batch, bank, histories, found = _toy_losses(config)
  item, positive = np.asarray(batch.item_UL2)[..., 0], np.asarray(batch.mask_UL) & (np.asarray(batch.actions_UL) > 0)
  for u, n in enumerate((9, 4, 1, 0)):
    liked = set(item[u][positive[u]])
    own_h, own_z, bank_z = (np.asarray(x, np.float64) for x in (h[u], z[u], bank.z_KO))
    dots = np.exp(own_h @ own_z.T / 0.5)
    of_bank = sum(np.exp(own_h @ bank_z[k] / 0.5) for k in range(6) if k + 1 not in liked)
    values = {name: [] for name in NAMES}
    anchor = max(min(5, n - 3) - 1, 0)
    for at in range(n):
      window = range(at + 1, min(at + 4, n))
      shown = [t for t in window if item[u, t] not in liked][:2]
      for t in (t for t in window if positive[u, t]):
        plain = np.log1p(of_bank[at] / dots[at, t])
        values['mtl'].append(plain)
        if at == anchor:
          values['ftl'].append(plain)
        if t == at + 1:
          values['ntl'].append(np.log1p((of_bank[at] + dots[at, shown].sum()) / dots[at, t]))
    for name in NAMES:
      expected = np.mean(values[name]) if values[name] else 0.0
      assert float(found[name][u]) == pytest.approx(expected, rel=1e-4), (name, u)


def test_losses_are_those_of_pretraining() -> None:
  """Given the same sum over negatives, L_ntl and L_ftl are what `pair_sums` trains on."""
  config = PretrainConfig(window=3, downstream_length=5, mtl_weight=0.0)
  h, z, batch, bank, histories, found = _toy_losses(config)
  logits = jnp.where(histories.allowed_UK[:, None], jnp.einsum('ulo,ko->ulk', h, bank.z_KO) / 0.5, -1e30)
  one = lambda x: x[:1]  # long enough for the anchor of L_ftl
  anchors = Anchors(
    *map(one, (h, z, batch.mask_UL, histories.positive_UL)), jnp.zeros((1, 9), jnp.int32), jnp.zeros(1, jnp.int32)
  )
  sums = pair_sums(anchors, one(jax.nn.logsumexp(logits, axis=-1)), jnp.float32(2.0), config, jnp.uint32(0))
  for name in ('ntl', 'ftl'):
    assert float(found[name][0]) == pytest.approx(float(sums[name][0] / sums[name][1]), rel=1e-5)


def test_rows_weigh_what_pretraining_did() -> None:
  pretrain = PretrainConfig(ntl_weight=2.0, mtl_weight=0.0, ftl_weight=0.5)
  np.testing.assert_array_equal(row_weights('all', pretrain), [2.0, 1.0, 0.5])
  np.testing.assert_array_equal(row_weights('ftl', pretrain), [0.0, 0.0, 0.5])
  np.testing.assert_array_equal(row_weights('none', pretrain), 0)
