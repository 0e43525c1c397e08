"""The three sequence losses against a plain float64 loop over Eq. 2 of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PretrainConfig
from pinfm_jax.model.hashing import hash_uniform
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.train.losses import choose_negatives, log_sum_negatives, positive_mask, sequence_losses

USERS, LENGTH, WIDTH = 5, 12, 8
CONFIG = PretrainConfig(downstream_length=7, window=4, pairs=3, max_columns=1000)
TEMPERATURE = 0.2


def _batch(seed=0, items=15, same_user=True):
  rng = np.random.default_rng(seed)
  lengths = np.array([LENGTH, 9, 2, LENGTH, 8])
  users = np.array([7, 8, 9, 7 if same_user else 6, 5], np.uint32)
  item = rng.integers(0, items, (USERS, LENGTH), dtype=np.uint32)
  events = EventBatch(
    jnp.asarray(np.stack([item, item * 0 + 3], axis=-1)),
    jnp.zeros((USERS, LENGTH), jnp.int32),
    jnp.asarray(rng.integers(0, 4, (USERS, LENGTH), dtype=np.uint32)),
    jnp.arange(LENGTH)[None] < lengths[:, None],
    jnp.asarray(np.repeat(users[:, None], LENGTH, axis=1)),
  )
  h, table = rng.normal(size=(USERS, LENGTH, WIDTH)), rng.normal(size=(items, WIDTH))
  h /= np.linalg.norm(h, axis=-1, keepdims=True)
  table /= np.linalg.norm(table, axis=-1, keepdims=True)
  return events, h, table[item], table, item


def _losses(events, h, z, config, bits=2, step=0):
  total, figures = sequence_losses(
    jnp.asarray(h, jnp.float32),
    jnp.asarray(z, jnp.float32),
    jnp.log(TEMPERATURE),
    events,
    config,
    bits,
    jnp.int32(step),
    jnp.arange(USERS),
  )
  return float(total), {name: float(value) for name, value in figures.items()}


def _oracle(events, h, table, item, config, bits=2, step=0):
  mask, users = np.asarray(events.mask_UL), np.asarray(events.user_UL)[:, 0]
  positive = mask & (np.asarray(events.actions_UL) & bits > 0)
  columns = sorted(set(item[positive].tolist()))
  of_user = {user: set(item[users == user][positive[users == user]].tolist()) for user in users}

  def pair(u, i, j):
    scores = np.array([h[u, i] @ table[k] for k in columns if k not in of_user[users[u]]]) / TEMPERATURE
    positive_score = h[u, i] @ table[item[u, j]] / TEMPERATURE
    return -np.log(np.exp(positive_score) / (np.exp(positive_score) + np.exp(scores).sum()))

  next_token = [pair(u, i, i + 1) for u in range(USERS) for i in range(LENGTH - 1) if positive[u, i + 1]]
  anchor = config.downstream_length - 1
  future = [
    pair(u, anchor, j)
    for u in range(USERS)
    for j in range(anchor + 1, min(anchor + 1 + config.window, LENGTH))
    if positive[u, j]
  ]
  multi = []
  for u in range(USERS):
    for i in range(LENGTH):
      for p in range(config.pairs):
        place = jnp.uint32((u * LENGTH + i) * config.pairs + p)
        j = i + 1 + int(hash_uniform(place, jnp.int32(step + 1))) % config.window
        if j < LENGTH and positive[u, j]:
          multi.append(pair(u, i, j))
  return {'ntl': np.mean(next_token), 'mtl': np.mean(multi), 'ftl': np.mean(future), 'columns': len(columns)}


@pytest.mark.parametrize('seed', range(4))
def test_each_loss_equals_the_oracle(seed):
  events, h, z, table, item = _batch(seed)
  total, figures = _losses(events, h, z, CONFIG, step=seed)
  expected = _oracle(events, h, table, item, CONFIG, step=seed)
  for name, value in expected.items():
    np.testing.assert_allclose(figures[name], value, rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(total, expected['ntl'] + expected['mtl'] + expected['ftl'], rtol=2e-5)


def test_weights_scale_and_switch_off():
  events, h, z, *_ = _batch()
  config = PretrainConfig(downstream_length=7, window=4, ntl_weight=2.0, mtl_weight=0.0, ftl_weight=0.5)
  total, figures = _losses(events, h, z, config)
  assert 'mtl' not in figures
  np.testing.assert_allclose(total, 2 * figures['ntl'] + 0.5 * figures['ftl'], rtol=1e-6)


def test_segments_of_one_user_exclude_each_others_positives():
  together, apart = _batch(same_user=True), _batch(same_user=False)
  positive = positive_mask(together[0], 0)
  excluded = [choose_negatives(b[0], positive, 1000, jnp.int32(0)) for b in (together, apart)]
  assert np.array_equal(excluded[0].token_K, excluded[1].token_K)
  first = [np.asarray(n.excluded_GK)[int(n.group_U[3])] for n in excluded]
  assert first[0].sum() > first[1].sum()
  assert int(excluded[0].group_U[3]) == 0


def test_a_smaller_sample_of_columns_is_distinct_and_changes_with_the_step():
  events, *_, item = _batch(items=40)
  positive = positive_mask(events, 0)
  chosen = []
  for step in range(30):
    negatives = choose_negatives(events, positive, 8, jnp.int32(step))
    ids = item.reshape(-1)[np.asarray(negatives.token_K)]
    assert np.all(negatives.valid_K)
    assert len(set(ids.tolist())) == 8
    chosen.append(frozenset(ids.tolist()))
  assert len(set(chosen)) > 20
  drawn = np.bincount([i for ids in chosen for i in ids], minlength=40)
  assert drawn.max() < 20  # no item is always drawn


def test_chunk_size_does_not_change_the_result():
  events, h, z, *_ = _batch()
  negatives = choose_negatives(events, positive_mask(events, 0), 1000, jnp.int32(0))
  results = [
    log_sum_negatives(jnp.asarray(h, jnp.float32), jnp.asarray(z, jnp.float32), negatives, 5.0, chunk)
    for chunk in (1, 2, 5)
  ]
  np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
  np.testing.assert_allclose(results[0], results[2], rtol=1e-6)


def test_gradients_are_finite_when_nobody_has_a_positive():
  events, h, z, *_ = _batch()
  events = events._replace(actions_UL=jnp.zeros_like(events.actions_UL))
  loss = lambda h, z: sequence_losses(h, z, jnp.log(0.1), events, CONFIG, 2, jnp.int32(0), jnp.arange(USERS))[0]
  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(h, jnp.float32), jnp.asarray(z, jnp.float32))
  assert value == 0
  assert all(np.all(np.isfinite(g)) for g in grads)


def test_gradient_equals_finite_differences():
  events, h, z, *_ = _batch()
  direction = np.random.default_rng(3).normal(size=h.shape)

  def loss(h):
    return sequence_losses(
      h, jnp.asarray(z, jnp.float32), jnp.log(TEMPERATURE), events, CONFIG, 2, jnp.int32(0), jnp.arange(USERS)
    )[0]

  slope = float(jnp.vdot(jax.grad(loss)(jnp.asarray(h, jnp.float32)), direction))
  step = 1e-2
  numeric = float(
    loss(jnp.asarray(h + step * direction, jnp.float32)) - loss(jnp.asarray(h - step * direction, jnp.float32))
  )
  np.testing.assert_allclose(slope, numeric / (2 * step), rtol=5e-3)
