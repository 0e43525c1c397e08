"""The columns of InfoNCE: distinct, a uniform sample, and excluded for exactly the users who like them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.model.hashing import fold_seed, permute_words
from pinfm_jax.train.negatives import choose_columns, excluded, liked_elsewhere, reduce_negatives

TOKENS, ITEMS, USERS = 96, 30, 7

choose = jax.jit(choose_columns, static_argnames='max_columns')


def _batch(seed=0, uniforms=0):
  rng = np.random.default_rng(seed)
  item, user = rng.integers(0, ITEMS, TOKENS), np.sort(rng.integers(0, USERS, TOKENS))
  user[TOKENS // 2 :] = rng.permutation(user[TOKENS // 2 :])  # some users come in runs, some return
  user = np.where(user == 3, 2**32 - 1, user)  # the largest user is one like any other
  positive, drawn = rng.random(TOKENS) < 0.5, rng.integers(0, ITEMS, uniforms)
  return item, user.astype(np.uint32), positive, drawn


def _columns(batch, max_columns=1000, seed=0):
  item, user, positive, drawn = batch
  return choose(_words(item), jnp.asarray(user), jnp.asarray(positive), _words(drawn), max_columns, jnp.uint32(seed))


def _words(item):
  """Ids that differ in one word alone, half of them in the low and half in the high one."""
  return jnp.asarray(np.stack([np.where(item % 2, 5, item), np.where(item % 2, item, 5)], axis=-1), jnp.uint32)


def _items(columns, batch):
  return np.concatenate([batch[0], batch[3]])[np.asarray(columns.token_K)[np.asarray(columns.valid_K)]].tolist()


def test_the_permutation_of_ids_is_one_to_one_and_uniform():
  low, high = np.meshgrid(np.arange(300), np.arange(300))
  words = jnp.asarray(np.stack([low.ravel(), high.ravel()], axis=-1), jnp.uint32)
  found = [np.stack(permute_words(words, fold_seed(seed, 2)), axis=-1) for seed in (0, 1)]
  for permuted in found:
    assert len(np.unique(permuted, axis=0)) == len(words)
    bits = (permuted[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(words))
  assert np.mean(found[0] == found[1]) < 1e-3


@pytest.mark.parametrize('uniforms', [0, 9])
def test_without_a_limit_the_columns_are_the_distinct_positive_and_drawn_items(uniforms):
  for seed in range(4):
    batch = _batch(seed, uniforms)
    columns = _columns(batch, seed=seed)
    assert sorted(_items(columns, batch)) == sorted(set(batch[0][batch[2]].tolist()) | set(batch[3].tolist()))
    assert float(columns.positives) == batch[2].sum()
    assert float(columns.share) == 1


@pytest.mark.parametrize(('uniforms', 'most'), [(0, 1000), (0, 6), (9, 1000), (9, 6)])
def test_users_may_not_use_columns_of_items_that_they_like(uniforms, most):
  for seed in range(4):
    batch = item, user, positive, drawn = _batch(seed, uniforms)
    columns = _columns(batch, most, seed)
    valid = np.asarray(columns.valid_K)
    mask = np.asarray(jax.jit(excluded)(jnp.asarray(user), columns))
    liked = {u: set(item[positive & (user == u)].tolist()) for u in set(user.tolist())}
    expected = [[k in liked[u] for k in _items(columns, batch)] for u in user.tolist()]
    np.testing.assert_array_equal(mask[:, valid], expected)
    assert not mask[:, ~valid].any()


def test_a_sample_of_columns_is_distinct_and_every_item_has_the_same_chance():
  batch = _batch(0)
  steps, most = 600, 8
  distinct = set(batch[0][batch[2]].tolist())
  drawn = np.zeros(ITEMS)
  for step in range(steps):
    columns = _columns(batch, most, int(fold_seed(0, step)))
    items = _items(columns, batch)
    assert len(set(items)) == most
    drawn[items] += 1
  assert float(columns.share) == pytest.approx(most / len(distinct))
  rate = most / len(distinct)
  expected = np.array([steps * rate if k in distinct else 0 for k in range(ITEMS)])
  assert np.abs(drawn - expected).max() < 4.5 * np.sqrt(steps * rate * (1 - rate))  # frequent items no more than rare


def test_the_sample_does_not_depend_on_where_the_events_lie():
  batch = _batch(1, 5)
  order = np.random.default_rng(0).permutation(TOKENS)
  moved = (*(x[order] for x in batch[:3]), batch[3])
  assert _items(_columns(batch, 8, 3), batch) == _items(_columns(moved, 8, 3), moved)


def test_a_uniform_draw_of_a_column_or_of_a_drawn_item_adds_nothing():
  item, user, positive, _ = _batch(0)
  drawn = np.array([item[positive][0]] * 3 + [ITEMS + 1] * 3)
  batch = (item, user, positive, drawn)
  assert sorted(_items(_columns(batch), batch)) == sorted(set(item[positive].tolist()) | {ITEMS + 1})


def test_nobody_positive():
  item, user, positive, drawn = _batch(0)
  columns = _columns((item, user, positive & False, drawn))
  assert not np.any(columns.valid_K)
  h = jnp.ones((TOKENS, 4))
  found = reduce_negatives(h, jnp.asarray(user), columns, jnp.ones((TOKENS, 4)), jnp.zeros(TOKENS), jnp.float32(1))
  assert np.all(np.asarray(found) <= -1e29)


def test_events_of_items_liked_elsewhere():
  for seed in range(4):
    item, user, positive, _ = _batch(seed)
    found = jax.jit(liked_elsewhere)(_words(item), jnp.asarray(user), jnp.asarray(positive))
    pairs = set(zip(user[positive].tolist(), item[positive].tolist(), strict=True))
    np.testing.assert_array_equal(found, [p in pairs for p in zip(user.tolist(), item.tolist(), strict=True)])


def test_the_log_sum_over_columns_and_any_chunking_of_it():
  batch = item, user, *_ = _batch(2, 7)
  columns = _columns(batch, 12)
  rng = np.random.default_rng(0)
  count = len(columns.valid_K)
  h, z, correction = rng.normal(size=(TOKENS, 5)), rng.normal(size=(count, 5)), rng.normal(size=count)
  allowed = np.asarray(columns.valid_K) & ~np.asarray(excluded(jnp.asarray(user), columns))
  expected = np.log(np.where(allowed, np.exp(2.0 * h @ z.T - correction), 0).sum(axis=1))
  arrays = [jnp.asarray(x, jnp.float32) for x in (h, z, correction)]
  for chunk in (0, 7, 1000):
    found = reduce_negatives(arrays[0], jnp.asarray(user), columns, *arrays[1:], jnp.float32(2.0), chunk)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_batch_of_a_million_tokens_is_bounded_by_its_inputs():
  """2,048 rows of 512 events, O = 256, K = 16,384: besides H, z and their gradients less than 3.5 GiB, and no more for
  more columns: logits exist in chunks alone. The compiled program is read, not run."""
  from pinfm_jax.config import PretrainConfig
  from pinfm_jax.model.pinfm import EventBatch
  from pinfm_jax.train.losses import sequence_losses

  rows, length, width = 2048, 512, 256

  def temporary(max_columns):
    config = PretrainConfig(positive_actions=('save',), max_columns=max_columns)

    def loss(h, z, events):
      return sequence_losses(h, z, jnp.float32(-3), events, config, 1, jnp.uint32(3), jnp.arange(rows))[0]

    shape = lambda dtype, *more: jax.ShapeDtypeStruct((rows, length, *more), dtype)
    ids = [shape(dtype) for dtype in (jnp.int32, jnp.uint32, bool, jnp.uint32, jnp.int32)]
    vectors = [shape(jnp.float32, width)] * 2
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*vectors, EventBatch(shape(jnp.uint32, 2), *ids)).compile()
    return program.memory_analysis().temp_size_in_bytes

  few, many = temporary(1024), temporary(16_384)
  assert many < 3.5 * 2**30
  assert many - few < 0.2 * 2**30
