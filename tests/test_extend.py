"""Events appended to kept keys and values, and a token behind the history, against the whole pass."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.core import meta
from toy_bundle import MODEL, SPEC

from pinfm_jax.config import RankerConfig
from pinfm_jax.model.pinfm import EventBatch
from pinfm_jax.model.ranker import RankingModel

USERS, LENGTH, NEW = 4, 9, 3
KEPT = np.array([0, 1, 4, 6])
APPENDED = np.array([3, 2, 1, 3])


def _model(backbone, token):
  model = replace(MODEL, tower=replace(MODEL.tower, backbone=backbone, layers=3))
  config = RankerConfig(cross_layers=1, mlp=(8,), module_width=8, embedding_width=4, learnable_token=token)
  return RankingModel(model, config, SPEC)


def _inputs():
  rng = np.random.default_rng(3)
  vectors = rng.normal(size=(USERS, LENGTH, 16)).astype(np.float32)
  surface, actions = rng.integers(0, 2, (USERS, LENGTH)), rng.integers(0, 8, (USERS, LENGTH))
  return vectors, surface.astype(np.int32), actions.astype(np.uint32)


def _events(columns, start, count, length):
  """`count` events from `start` on of each user, padded to `length` with noise: padding must not matter."""
  vectors, surface, actions = columns
  place = np.minimum(start[:, None] + np.arange(length), LENGTH - 1)
  take = lambda x: np.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)
  mask = np.arange(length) < count[:, None]
  return take(vectors), EventBatch(None, take(surface), take(actions), mask)


@pytest.mark.parametrize('backbone', ['gpt2', 'hstu'])
@pytest.mark.parametrize('token', [False, True])
def test_extending_equals_the_whole_pass(backbone, token):
  module, columns = _model(backbone, token), _inputs()
  total = KEPT + APPENDED
  whole, kept, new = (
    _events(columns, start, count, length)
    for start, count, length in ((0 * KEPT, total, LENGTH), (0 * KEPT, KEPT, LENGTH), (KEPT, APPENDED, NEW))
  )

  @jax.jit
  def run(params):
    expected, earlier = (module.apply(params, *inputs, method='context') for inputs in (whole, kept))
    return expected, earlier, module.apply(params, *new, earlier, method='extend')

  shapes = jax.eval_shape(lambda k: module.init(k, *whole, method='context'), jax.random.key(0))
  rng = np.random.default_rng(4)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), meta.unbox(shapes))
  expected, earlier, added = run(params)
  np.testing.assert_array_equal(added.events_U, APPENDED)
  np.testing.assert_allclose(added.user_UO, expected.user_UO, rtol=1e-5, atol=1e-6)
  behind = int(token)
  for got, first, want in zip(
    jax.tree.leaves(added.kv), jax.tree.leaves(earlier.kv), jax.tree.leaves(expected.kv), strict=True
  ):
    assert got.shape[2] == NEW + behind
    assert want.shape[2] == LENGTH + behind
    for u in range(USERS):
      joined = np.concatenate([first[:, u, : KEPT[u]], got[:, u, : APPENDED[u] + behind]], axis=1)
      np.testing.assert_allclose(joined, want[:, u, : total[u] + behind], rtol=1e-5, atol=1e-6)
