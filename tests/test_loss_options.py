"""The other losses and columns of pretraining against float64 loops: full softmax, drawn items, BCE, temperature."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PretrainConfig
from pinfm_jax.data.negatives import NegativeSource
from pinfm_jax.data.records import History
from pinfm_jax.data.tokens import PLAIN
from pinfm_jax.model.hashing import fold_seed, key_words
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train.losses import Extra, sequence_losses
from pinfm_jax.train.pairs import pair_loss

ROWS, LENGTH, WIDTH, ITEMS, TEMPERATURE = 4, 6, 5, 20, 0.7
CONFIG = PretrainConfig(max_columns=0, mtl_weight=0.0, ftl_weight=0.0, batch_segments=ROWS)
DRAWN = replace(CONFIG, uniform_negatives=12)
OPTIONS = {
  'drawn': DRAWN,
  'drawn, positives stay': replace(DRAWN, keep_positives=True),
  'all': replace(CONFIG, full_catalogue=True),
  'cross-entropy': replace(CONFIG, full_catalogue=True, keep_positives=True),
  'drawn, as fewer': replace(DRAWN, count_as=3, keep_positives=True),
  'all, as fewer': replace(CONFIG, full_catalogue=True, count_as=3),
  'SASRec': replace(DRAWN, bce_negatives=1),
  'gSASRec': replace(DRAWN, bce_negatives=5, bce_calibration=0.75, keep_positives=True),
  'by popularity': replace(DRAWN, negative_power=0.75, log_q='counts'),
  'by popularity and batch': replace(DRAWN, negative_power=0.5, log_q='counts', max_columns=100),
  'windows': replace(DRAWN, bce_negatives=2, mtl_weight=1.0, window=3, pairs=2),
}


class Case:
  """A random batch of four users, with items of the catalogue that are drawn for it."""

  def __init__(self, seed: int, config: PretrainConfig):
    rng = np.random.default_rng(seed)
    self.config = config
    self.item, self.mask = rng.integers(0, ITEMS, (ROWS, LENGTH)), np.arange(LENGTH) < np.array([[6], [4], [2], [6]])
    drawn = np.arange(ROWS * 6).reshape(ROWS, 6) % ITEMS if config.full_catalogue else rng.integers(0, ITEMS, (ROWS, 3))
    self.drawn, self.frequency = drawn, rng.dirichlet(np.ones(ITEMS))
    self.h, self.table = 1.5 * rng.normal(size=(ROWS, LENGTH, WIDTH)), rng.normal(size=(ITEMS, WIDTH))

  def arrays(self):
    numbers = (self.h, self.table, self.frequency)
    events = EventBatch(
      _words(self.item),
      jnp.zeros((ROWS, LENGTH), jnp.int32),
      jnp.zeros((ROWS, LENGTH), jnp.uint32),
      jnp.asarray(self.mask),
      jnp.repeat(jnp.arange(ROWS, dtype=jnp.uint32)[:, None], LENGTH, axis=1),
    )
    return (*(jnp.asarray(x, jnp.float32) for x in numbers), events, jnp.asarray(self.item), jnp.asarray(self.drawn))

  @property
  def power_sum(self) -> float:
    return float(np.sum(self.frequency**self.config.negative_power))

  def oracle(self) -> float:
    """The next-token loss by loops over anchors and items."""
    config, columns = self.config, set(self.drawn.ravel().tolist())
    if config.max_columns:
      columns |= set(self.item[self.mask].tolist())
    losses = []
    for u, i in np.ndindex(ROWS, LENGTH - 1):
      if not self.mask[u, i + 1]:
        continue
      own = set() if config.keep_positives else set(self.item[u][self.mask[u]].tolist())
      score = lambda item, u=u, i=i: self.h[u, i] @ self.table[item] / TEMPERATURE
      negatives, positive = [score(k) - self._log_q(k) for k in sorted(columns - own)], score(self.item[u, i + 1])
      if config.bce_negatives:
        share = config.bce_negatives / (ITEMS - 1)
        weight = share * (config.bce_calibration * (1 - 1 / share) + 1 / share)  # as the paper writes it
        missed = config.bce_negatives * np.mean([np.log1p(np.exp(s)) for s in negatives])
        losses.append(weight * np.log1p(np.exp(-positive)) + missed)
      else:
        others = sum(np.exp(s) for s in negatives)
        others *= config.count_as / len(columns) if config.count_as else 1
        twice = config.full_catalogue and config.keep_positives  # the target is among the columns
        losses.append(-np.log(np.exp(positive) / (others + (0 if twice else np.exp(positive)))))
    return float(np.mean(losses))

  def _log_q(self, item: int) -> float:
    if self.config.log_q == 'none':
      return 0.0
    absent = (1 - self.frequency[item] ** self.config.negative_power / self.power_sum) ** self.drawn.size
    if self.config.max_columns:
      absent *= (1 - self.frequency[item]) ** self.mask.sum()
    return np.log(1 - absent)


def _words(item):
  return jnp.asarray(np.stack([item, item * 0], axis=-1), jnp.uint32)


@lru_cache
def _program(config: PretrainConfig):
  def loss(h, table, log_temperature, frequency, events, item, drawn, power_sum):
    log_q = config.log_q != 'none'
    words = jnp.stack([drawn, drawn * 0], axis=-1).astype(jnp.uint32)
    extra = Extra(
      words, table[drawn], frequency[item] if log_q else None, frequency[drawn] if log_q else None, ITEMS, power_sum
    )
    total, figures = sequence_losses(
      h, table[item], log_temperature, events, config, 0, fold_seed(1, 0), jnp.arange(ROWS), extra
    )
    return figures['ntl'], (total, figures)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _run(case: Case):
  h, table, frequency, *events = case.arrays()
  power_sum = jnp.float32(case.power_sum)
  return _program(case.config)(h, table, jnp.log(jnp.float32(TEMPERATURE)), frequency, *events, power_sum)


@pytest.mark.parametrize('option', OPTIONS)
def test_the_loss_equals_the_oracle_and_so_does_its_gradient(option):
  for seed in range(2):
    case = Case(seed, OPTIONS[option])
    (ntl, _), grads = _run(case)
    assert float(ntl) == pytest.approx(case.oracle(), rel=2e-5)
  rng = np.random.default_rng(3)
  for name, grad in zip(('h', 'table'), grads[:2], strict=True):
    start, values = getattr(case, name), []
    direction = rng.normal(size=start.shape)
    for side in (1e-5, -1e-5):
      setattr(case, name, start + side * direction)
      values.append(case.oracle())
    setattr(case, name, start)
    assert np.vdot(grad, direction) == pytest.approx((values[0] - values[1]) / 2e-5, rel=2e-3, abs=1e-5)


def test_the_full_softmax_is_the_cross_entropy_of_the_catalogue():
  case = Case(5, OPTIONS['cross-entropy'])
  logits = case.h @ case.table.T / TEMPERATURE
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  each = [-log_p[u, i, case.item[u, i + 1]] for u, i in np.ndindex(ROWS, LENGTH - 1) if case.mask[u, i + 1]]
  assert float(_run(case)[0][0]) == pytest.approx(np.mean(each), rel=1e-5)


def test_the_calibration_weighs_positives_by_the_share_that_is_drawn():
  def loss(t: float, k: int) -> float:
    config = replace(DRAWN, bce_negatives=k, bce_calibration=t)
    return float(pair_loss(jnp.float32(0.3), jnp.float32(2.0), config, ITEMS))

  positive = np.log1p(np.exp(-0.3))
  for k in (1, 5):
    assert loss(0.0, k) == pytest.approx(positive + 2, rel=1e-6)
    assert loss(1.0, k) == pytest.approx(positive * k / (ITEMS - 1) + 2, rel=1e-6)
    assert loss(0.5, k) == pytest.approx((loss(0.0, k) + loss(1.0, k)) / 2, rel=1e-6)
  assert loss(1.0, ITEMS - 1) == pytest.approx(positive + 2, rel=1e-6)  # all are drawn: nothing to take out


@pytest.mark.parametrize('fixed', [True, False])
def test_a_fixed_temperature_does_not_learn(fixed):
  _, grads = _run(Case(0, replace(DRAWN, fixed_temperature=True) if fixed else DRAWN))
  assert (float(grads[2]) == 0) == fixed


KEYS = np.arange(10, 17, dtype=np.uint64)
COUNTS = np.array([0, 1, 2, 4, 8, 16, 0])


class _Events:
  """Examples in which the items occur as often as counted."""

  tokens = PLAIN

  def __len__(self):
    return 1

  def __getitem__(self, row):
    item = np.repeat(KEYS, COUNTS)
    return {'item': key_words(item), 'actions': np.zeros(len(item), np.uint32), 'mask': np.ones(len(item), bool)}


class _Log:
  """Two users, whose last events are of items that no other event has."""

  def histories(self):
    for items in ([*KEYS, 98], [99]):
      places = np.arange(len(items))
      yield History(places, np.array(items, np.uint64), places.astype(np.uint16), places.astype(np.uint32))


def _source(**options) -> NegativeSource:
  return NegativeSource.of(_Log(), _Events(), replace(CONFIG, **options), 0, None, 3)


@pytest.mark.parametrize('power', [0.5, 1.0])
def test_items_are_drawn_by_the_power_of_their_counts(power):
  source = _source(uniform_negatives=2000, negative_power=power)
  drawn = np.concatenate([source.keys[source._places(step)].ravel() for step in range(10)])
  share = np.bincount((drawn - 10).astype(int), minlength=7) / len(drawn)
  expected = np.where(COUNTS > 0, COUNTS.astype(float), 0) ** power * (COUNTS > 0)
  np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)
  assert share[0] == share[-1] == 0
  assert source.power_sum == pytest.approx(np.sum((COUNTS[COUNTS > 0] / COUNTS.sum()) ** power))


def test_the_whole_catalogue_is_carried_by_the_rows():
  source = _source(full_catalogue=True)
  batches = source.add(iter([{'item': np.zeros((2, 3, 2), np.uint32)}] * 2), 0, np.array([2, 3]))
  for batch in batches:  # of process 1: rows 2 and 3; the last place is filled with the first item
    np.testing.assert_array_equal(batch['negative_item'], key_words(KEYS[[4, 5, 6, 0]]).reshape(2, 2, 2))
    assert set(batch) == {'item', 'negative_item'}
