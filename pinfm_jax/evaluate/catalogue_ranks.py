"""Ranks of targets in a whole catalogue, a block of items at a time."""

from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

_BLOCK = 32_768  # most items whose scores exist at once


@partial(jax.jit, static_argnames='block')
def catalogue_ranks(
  h_QO: Array,
  z_VO: Array,
  target_Q: Array,
  seen_QM: Array | None = None,
  trained_V: Array | None = None,
  block: int = _BLOCK,
) -> tuple[Array, Array]:
  """The rank of each user's target by <H, z> among the items of a catalogue, 1 = first.

  Ties are counted against the target: it ranks behind every other item whose score is not lower (so does a target whose
  score is NaN, and an item whose score is NaN stands before any target). All scores are from the same products, so
  that items with equal vectors tie exactly. No [Q, V] array exists.

  Args:
    h_QO: users.
    z_VO: items.
    target_Q: int32 places of the targets.
    seen_QM: int32 places of items that are not ranked for a user, the target excepted; V and more = none. None = all
      items are ranked.
    trained_V: True on the items that the second rank is among; None = all.
    block: most items whose scores are computed at once.

  Returns:
    int32 [Q] ranks among all items, and among those of `trained_V` (and the target).
  """
  items, width = z_VO.shape
  count = -(-items // block)
  size = -(-items // count)
  trained_V = jnp.ones(items, bool) if trained_V is None else jnp.asarray(trained_V)
  target_Q = jnp.asarray(target_Q)

  def scores(z_BO: Array) -> Array:
    return jnp.einsum('qo,bo->qb', h_QO, z_BO, precision=jax.lax.Precision.HIGHEST)

  ahead = partial(_ahead, items=items, target_Q=target_Q, seen_QM=seen_QM)
  if count == 1:  # the products serve twice
    scores_QB = scores(z_VO)
    score_Q1 = jnp.take_along_axis(scores_QB, target_Q[:, None], axis=1)
    before_2Q = ahead(scores_QB, score_Q1, jnp.int32(0), trained_V)
    return 1 + before_2Q[0], 1 + before_2Q[1]

  def find(score_Q1: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
    first, z_BO = part
    place_Q1 = (target_Q - first)[:, None]
    here_Q1 = jnp.take_along_axis(scores(z_BO), jnp.clip(place_Q1, 0, size - 1), axis=1)
    return jnp.where((place_Q1 >= 0) & (place_Q1 < size), here_Q1, score_Q1), None

  def add(before_2Q: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
    first, z_BO, trained_B = part
    return before_2Q + ahead(scores(z_BO), score_Q1, first, trained_B), None

  z_NBO = jnp.pad(z_VO, ((0, count * size - items), (0, 0))).reshape(count, size, width)
  trained_NB = jnp.pad(trained_V, (0, count * size - items)).reshape(count, size)
  first_N = jnp.arange(count, dtype=jnp.int32) * size
  score_Q1 = jax.lax.scan(find, jnp.zeros((len(target_Q), 1), jnp.float32), (first_N, z_NBO))[0]
  before_2Q = jax.lax.scan(add, jnp.zeros((2, len(target_Q)), jnp.int32), (first_N, z_NBO, trained_NB))[0]
  return 1 + before_2Q[0], 1 + before_2Q[1]


def _ahead(
  scores_QB: Array, score_Q1: Array, first: Array, trained_B: Array, items: int, target_Q: Array, seen_QM: Array | None
) -> Array:
  """How many items of a block stand before the target, among all and among the trained ones: int32 [2, Q]."""
  size = scores_QB.shape[1]
  place_B = first + jnp.arange(size, dtype=jnp.int32)
  ahead_QB = ~(scores_QB < score_Q1) & (place_B < items) & (place_B != target_Q[:, None])
  if seen_QM is not None:
    ahead_QB &= ~_marked(seen_QM - first, size)
  return jnp.stack([jnp.sum(ahead_QB, axis=1), jnp.sum(ahead_QB & trained_B, axis=1)])


def _marked(place_QM: Array, size: int) -> Array:
  """bool [Q, size], True at each row's places; those outside mark nothing."""
  place_QM = jnp.where(place_QM < 0, size, place_QM)  # a negative place would count from the end
  row_Q1 = jnp.arange(place_QM.shape[0])[:, None]
  return jnp.zeros((place_QM.shape[0], size), bool).at[row_Q1, place_QM].set(True, mode='drop')
