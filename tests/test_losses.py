"""The three sequence losses, with and without their options, against a plain float64 loop over Eq. 2 of the paper."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.hashing import fold_seed, hash_uniform
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train.losses import Extra, sequence_losses

ROWS, LENGTH, WIDTH, ITEMS = 6, 12, 8, 30
CONFIG = PretrainConfig(positive_actions=('save',), downstream_length=4, window=4, pairs=3, max_columns=1000)
BITS = 2
TEMPERATURE = 0.2
OPTIONS = {
  'plain': CONFIG,
  'uniform': replace(CONFIG, uniform_negatives=12),
  'impressions': replace(CONFIG, impression_negatives=2),
  'log_q': replace(CONFIG, log_q='counts'),
  'all': replace(CONFIG, uniform_negatives=12, impression_negatives=3, log_q='counts'),
}


class Case:
  """A random batch: rows pack segments of users that appear in several rows, padding last."""

  def __init__(self, seed: int, packed: bool = True):
    rng = np.random.default_rng(seed)
    self.item = rng.integers(0, ITEMS, (ROWS, LENGTH))
    self.bits = rng.integers(0, 4, (ROWS, LENGTH))
    real = np.array([LENGTH, 9, 2, LENGTH, 8, 11])
    self.mask = np.arange(LENGTH)[None] < real[:, None]
    if packed:
      new = rng.random((ROWS, LENGTH)) < 0.2
      new[:, 0] = True
      self.segment = np.cumsum(new, axis=1)
      users = rng.integers(0, 5, (ROWS, LENGTH + 1))
      self.user = np.take_along_axis(users, self.segment, axis=1)
    else:
      self.segment = np.ones((ROWS, LENGTH), int)
      self.user = np.repeat(np.array([[7], [8], [9], [7], [5], [9]]), LENGTH, axis=1)
    self.packed = packed
    self.drawn = rng.integers(0, ITEMS, (ROWS, 2))
    self.h = _unit(rng.normal(size=(ROWS, LENGTH, WIDTH)))
    self.table = _unit(rng.normal(size=(ITEMS, WIDTH)))
    self.frequency = rng.dirichlet(np.ones(ITEMS))

  @property
  def events(self) -> EventBatch:
    return EventBatch(
      _words(self.item),
      jnp.zeros((ROWS, LENGTH), jnp.int32),
      jnp.asarray(self.bits, jnp.uint32),
      jnp.asarray(self.mask),
      jnp.asarray(self.user, jnp.uint32),
      jnp.asarray(self.segment, jnp.int32) if self.packed else None,
    )

  def extra(self, config: PretrainConfig) -> Extra:
    uniform, log_q = config.uniform_negatives > 0, config.log_q != 'none'
    floats = [jnp.asarray(x, jnp.float32) for x in
              (self.table[self.drawn], self.frequency[self.item], self.frequency[self.drawn])]  # fmt: skip
    return Extra(
      _words(self.drawn) if uniform else None,
      floats[0] if uniform else None,
      floats[1] if log_q else None,
      floats[2] if uniform and log_q else None,
      ITEMS,
    )

  def losses(self, config: PretrainConfig, step: int = 0, bits: int = BITS):
    h, z = (jnp.asarray(x, jnp.float32) for x in (self.h, self.table[self.item]))
    total, figures = _program(config, bits)(h, z, self.events, fold_seed(5, step), self.extra(config))
    return float(total), {name: float(value) for name, value in figures.items()}


@lru_cache
def _program(config, bits):
  def losses(h, z, events, seed, extra):
    extra = extra._replace(catalogue=ITEMS)
    return sequence_losses(h, z, jnp.log(TEMPERATURE), events, config, bits, seed, jnp.arange(ROWS), extra)

  return jax.jit(losses)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _words(item):
  return jnp.asarray(np.stack([item, item * 0 + 3], axis=-1), jnp.uint32)


def _log_q(case: Case, config: PretrainConfig, positive: np.ndarray, item: int) -> float:
  """log of the probability that an item is a column, by its definition."""
  absent = 1.0
  if positive.any():
    absent = (1 - case.frequency[item]) ** positive.sum()  # all of the batch's distinct items are columns here
  if config.uniform_negatives:
    absent *= (1 - 1 / ITEMS) ** config.uniform_negatives
  return np.log(1 - absent)


def _oracle(case: Case, config: PretrainConfig, step: int = 0, bits: int = BITS) -> dict[str, float]:
  positive = case.mask & ((case.bits & bits > 0) | (bits == 0))
  columns = set(case.item[positive].tolist())
  if config.uniform_negatives:
    columns |= set(case.drawn.ravel().tolist())
  liked = {user: set(case.item[positive & (case.user == user)].tolist()) for user in np.unique(case.user)}

  def together(u, i, j):
    return j < LENGTH and case.mask[u, i] and case.mask[u, j] and case.segment[u, i] == case.segment[u, j]

  def score(u, i, item):
    return case.h[u, i] @ case.table[item] / TEMPERATURE

  def pair(u, i, j, more=()):
    own = liked[case.user[u, i]]
    correction = {k: _log_q(case, config, positive, k) if config.log_q != 'none' else 0.0 for k in columns - own}
    others = sum(np.exp(score(u, i, k) - q) for k, q in correction.items())
    others += sum(np.exp(score(u, i, k)) for k in more)
    mine = np.exp(score(u, i, case.item[u, j]))
    return -np.log(mine / (mine + others))

  def impressions(u, i):
    after = [j for j in range(i + 1, i + 1 + config.window) if together(u, i, j) and not positive[u, j]]
    shown = [case.item[u, j] for j in after if case.item[u, j] not in liked[case.user[u, i]]]
    return shown[: config.impression_negatives]

  ntl, mtl, ftl = [], [], []
  pair_seed = fold_seed(fold_seed(5, step), 1)
  place = jnp.arange(ROWS * LENGTH * config.pairs)
  draws = np.asarray(hash_uniform(place, pair_seed)).reshape(ROWS, LENGTH, config.pairs) % config.window
  for u, i in np.ndindex(ROWS, LENGTH):
    targets = [j for j in range(i + 1, i + 1 + config.window) if together(u, i, j) and positive[u, j]]
    if i + 1 in targets:
      ntl.append(pair(u, i, i + 1, impressions(u, i)))
    mtl += [pair(u, i, i + 1 + d) for d in draws[u, i] if i + 1 + d in targets]
    if np.sum(case.segment[u, :i] == case.segment[u, i]) == config.downstream_length - 1:
      ftl += [pair(u, i, j) for j in targets]
  return {'ntl': np.mean(ntl), 'mtl': np.mean(mtl), 'ftl': np.mean(ftl), 'columns': len(columns)}


@pytest.mark.parametrize(('option', 'packed'), [*((option, True) for option in OPTIONS), ('all', False)])
def test_each_loss_equals_the_oracle(option, packed):
  for seed in range(3):
    case, config = Case(seed, packed), OPTIONS[option]
    total, figures = case.losses(config, step=seed)
    expected = _oracle(case, config, step=seed)
    for name, value in expected.items():
      np.testing.assert_allclose(figures[name], value, rtol=3e-5, err_msg=name)
    np.testing.assert_allclose(total, expected['ntl'] + expected['mtl'] + expected['ftl'], rtol=3e-5)


def test_every_event_is_positive_without_a_positive_set():
  case = Case(0)
  figures = case.losses(CONFIG, bits=0)[1]
  for name, value in _oracle(case, CONFIG, bits=0).items():
    np.testing.assert_allclose(figures[name], value, rtol=3e-5, err_msg=name)


@pytest.mark.parametrize('option', ['uniform', 'impressions', 'log_q'])
def test_an_option_changes_the_losses_that_it_concerns(option):
  case = Case(0)
  plain, found = (case.losses(OPTIONS[name])[1] for name in ('plain', option))
  assert found['ntl'] > plain['ntl']  # more negatives, or each stands for several
  assert (found['mtl'] == plain['mtl']) == (option == 'impressions')


def test_weights_scale_and_switch_off():
  config = replace(CONFIG, ntl_weight=2.0, mtl_weight=0.0, ftl_weight=0.5)
  total, figures = Case(0).losses(config)
  assert 'mtl' not in figures
  np.testing.assert_allclose(total, 2 * figures['ntl'] + 0.5 * figures['ftl'], rtol=1e-6)
  only = replace(CONFIG, mtl_weight=0.0, ftl_weight=0.0)  # its window is one event
  np.testing.assert_allclose(Case(0).losses(only)[0], figures['ntl'], rtol=1e-6)


def test_the_seed_and_the_step_change_pairs_and_a_sample_of_columns():
  case, config = Case(0), replace(CONFIG, max_columns=8)
  h, z = (jnp.asarray(x, jnp.float32) for x in (case.h, case.table[case.item]))
  run = lambda seed, step: _program(config, BITS)(h, z, case.events, fold_seed(seed, step), Extra(catalogue=ITEMS))[1]
  found = [run(seed, step) for seed, step in ((0, 0), (1, 0), (0, 1), (0, 0))]
  for name in ('ntl', 'mtl'):
    values = [float(f[name]) for f in found]
    assert len(set(values)) == 3
    assert values[0] == values[3]


@lru_cache
def _gradients(config):
  """h, table, events, places of events and draws -> loss, gradients of H and of the items' vectors."""

  def loss(h, table, events, item, drawn, extra):
    extra = extra._replace(z_UNO=table[drawn], catalogue=ITEMS)
    return sequence_losses(
      h, table[item], jnp.log(TEMPERATURE), events, config, BITS, fold_seed(5, 0), jnp.arange(ROWS), extra
    )[0]

  compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return lambda case: compute(
    jnp.asarray(case.h, jnp.float32), jnp.asarray(case.table, jnp.float32), case.events, case.item, case.drawn,
    case.extra(config)._replace(catalogue=0),
  )  # fmt: skip


def test_gradients_are_finite_when_nobody_has_a_positive():
  case = Case(0)
  case.bits[:] = 0
  value, grads = _gradients(OPTIONS['all'])(case)
  assert value == 0
  assert all(np.all(np.isfinite(g)) for g in grads)


def test_gradients_equal_finite_differences_of_the_oracle():
  """Of H and of z (through pairs, in-batch columns and uniform columns alike)."""
  case, config = Case(1), OPTIONS['all']
  rng = np.random.default_rng(3)
  _, grads = _gradients(config)(case)
  for name, grad in zip(('h', 'table'), grads, strict=True):
    start, values = getattr(case, name), []
    direction = rng.normal(size=start.shape)
    for side in (1e-5, -1e-5):
      setattr(case, name, start + side * direction)
      found = _oracle(case, config)
      values.append(found['ntl'] + found['mtl'] + found['ftl'])
    setattr(case, name, start)
    np.testing.assert_allclose(np.vdot(grad, direction), (values[0] - values[1]) / 2e-5, rtol=1e-4)
