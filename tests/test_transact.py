"""TransAct against NumPy in float64, and what must not change its output: padding, other candidates, hidden events."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from pinfm_jax.config import TransActConfig
from pinfm_jax.model.hashing import fold_seed
from pinfm_jax.model.transact import RecentEvents, TransAct, hide_newest

CONFIG = TransActConfig(length=7, width=4, layers=2, heads=3, feedforward=5, outputs=3, item_buckets=20)
ACTIONS, CONTENT, CANDIDATES = 3, 6, 3
LENGTHS = (7, 2, 0, 5)  # events of the users


def _inputs(rng):
  shape = (len(LENGTHS), CONFIG.length)
  mask = np.arange(CONFIG.length) < np.array(LENGTHS)[:, None]
  actions = np.where(mask, rng.integers(0, 1 << ACTIONS, shape), 0).astype(np.uint32)
  actions[0, 1] = 0  # an event without actions
  events = RecentEvents(
    np.where(mask, rng.integers(1, 21, shape), 0).astype(np.int32),
    actions,
    content_ULW=(rng.normal(size=(*shape, CONTENT)) * mask[..., None]).astype(np.float16),
  )
  item = rng.integers(1, 21, (len(LENGTHS), CANDIDATES)).astype(np.int32)
  return events, item, rng.normal(size=(*item.shape, CONTENT)).astype(np.float16)


@pytest.fixture(scope='module')
def made():
  """The module with random parameters, inputs, and one compiled program."""
  rng, module = np.random.default_rng(0), TransAct(CONFIG, ACTIONS, CONTENT)
  inputs = _inputs(rng)
  shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)['params'])
  params = jax.tree.map(lambda s: rng.normal(0, 1 if len(s.shape) == 1 else 0.3, s.shape).astype(np.float32), shapes)
  call = jax.jit(lambda p, e, i, c, h: module.apply({'params': p}, e, i, c, h))
  nothing = np.zeros(inputs[0].item_UL.shape, bool)
  gradient = jax.jit(jax.grad(lambda p, e, i, c, h, w: jnp.sum(module.apply({'params': p}, e, i, c, h) * w)))
  return SimpleNamespace(params=params, inputs=inputs, call=call, gradient=gradient, nothing=nothing, rng=rng)


def _output(made, events=None, item=None, content=None, hidden=None):
  given = (events, item, content)
  some = [known if new is None else new for known, new in zip(made.inputs, given, strict=True)]
  return np.asarray(made.call(made.params, *some, made.nothing if hidden is None else hidden))


def _norm(x, weights):
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-6) * weights['scale'] + weights['bias']


def _linear(x, weights):
  return x @ weights['kernel'] + weights['bias']


def _layer(x_LD, weights, first, rng):
  """A post-LN encoder layer over the whole input, each position a concatenation."""
  width, heads = x_LD.shape[1], CONFIG.heads
  kernel, bias = weights['query_key_value']['kernel'], weights['query_key_value']['bias']
  if first:  # of the candidate's part of the keys nothing depends: any kernel will do
    query, value = np.split(weights['candidate_query_value']['kernel'], 2, axis=1)
    kernel = np.concatenate([kernel, np.concatenate([query, rng.normal(size=query.shape), value], axis=1)])
  query, key, value = np.split(x_LD @ kernel + bias, 3, axis=1)
  attended = []
  for h in range(heads):
    part = slice(h * width // heads, (h + 1) * width // heads)
    scores = np.exp(query[:, part] @ key[:, part].T / np.sqrt(width // heads))
    attended.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
  x_LD = _norm(x_LD + _linear(np.concatenate(attended, axis=1), weights['attention_out']), weights['norm_attention'])
  hidden = np.maximum(_linear(x_LD, weights['mlp_in']), 0)
  return _norm(x_LD + _linear(hidden, weights['mlp_out']), weights['norm_mlp'])


def _oracle(params, events, item_UC, content_UCW, hidden_UL):
  params = jax.tree.map(lambda x: x.astype(np.float64), params)
  rng, width = np.random.default_rng(5), 3 * CONFIG.width
  out = np.zeros((*item_UC.shape, CONFIG.outputs + 1, width))

  def vector(item, content):
    x = params['item_embedding'][item] + content.astype(np.float64) @ params['content_projection']
    return x / np.linalg.norm(x)

  for u, c in np.ndindex(item_UC.shape):
    places = [i for i in range(CONFIG.length) if events.item_UL[u, i] and not hidden_UL[u, i]]
    rows = []
    for i in places:
      taken = [a for a in range(ACTIONS) if events.actions_UL[u, i] >> a & 1] or [ACTIONS]
      actions = params['action_embedding'][taken].sum(axis=0)
      candidate = vector(item_UC[u, c], content_UCW[u, c])
      rows.append(np.concatenate([vector(events.item_UL[u, i], events.content_ULW[u, i]), actions, candidate]))
    if rows:
      x = np.stack(rows)
      for i in range(CONFIG.layers):
        x = _layer(x, params[f'encoder_{i}'], i == 0, rng)
      out[u, c, 0] = _linear(x.max(axis=0), params['pool_out'])
      for i, place in enumerate(places):
        if place < CONFIG.outputs:
          out[u, c, 1 + place] = x[i]
  return out.reshape(*item_UC.shape, -1)


def test_the_module_against_numpy(made):
  hidden = made.rng.random(made.nothing.shape) < 0.3
  assert hidden[0].any()
  assert not hidden[0].all()
  for each in (made.nothing, hidden):
    expected = _oracle(made.params, *made.inputs, each)
    np.testing.assert_allclose(_output(made, hidden=each), expected, rtol=2e-4, atol=2e-5)


def test_a_user_without_events_gets_zeros_and_finite_gradients(made):
  assert not _output(made)[LENGTHS.index(0)].any()
  everything = np.ones_like(made.nothing)
  assert not _output(made, hidden=everything).any()
  weight = made.rng.normal(size=_output(made).shape).astype(np.float32)
  for hidden in (made.nothing, everything):
    gradient = made.gradient(made.params, *made.inputs, hidden, weight)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))  # of hidden events nothing is learnt
  gradient = made.gradient(made.params, *made.inputs, made.nothing, weight)
  missing = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not np.any(leaf)]
  assert not missing  # every parameter takes part
  assert not np.asarray(gradient['item_embedding'])[0].any()  # but not the row that marks padding


def test_what_stands_in_padding_does_not_matter(made):
  events, padding = made.inputs[0], made.inputs[0].item_UL == 0
  other = events._replace(
    actions_UL=np.where(padding, 5, events.actions_UL).astype(np.uint32),
    content_ULW=np.where(padding[..., None], 7, events.content_ULW).astype(np.float16),
  )
  np.testing.assert_array_equal(_output(made, other), _output(made))


def test_hidden_events_do_not_matter(made):
  events, hidden = made.inputs[0], np.zeros_like(made.nothing)
  hidden[:, :2] = True
  other = events._replace(item_UL=np.where(hidden & (events.item_UL > 0), 20, events.item_UL).astype(np.int32))
  np.testing.assert_array_equal(_output(made, other, hidden=hidden), _output(made, hidden=hidden))
  assert np.any(_output(made, other) != _output(made))


def test_the_order_of_the_events_enters_by_the_first_outputs_alone(made):
  events, count, width = made.inputs[0], CONFIG.length, 3 * CONFIG.width
  order = np.r_[1, 0, 2, np.arange(count - 1, 2, -1)]  # of the first user, whose window is full
  swapped = events._replace(**{n: np.take(x, order, axis=1) for n, x in events._asdict().items() if x is not None})
  found, expected = (_output(made, e)[0].reshape(CANDIDATES, -1, width) for e in (swapped, events))
  np.testing.assert_allclose(found, expected[:, [0, 2, 1, 3]], atol=2e-5)
  assert np.abs(expected[:, 1] - expected[:, 2]).max() > 0.1


def test_candidates_do_not_see_each_other(made):
  _, item, content = made.inputs
  other_item, other_content = item.copy(), content.copy()
  other_item[:, 1], other_content[:, 1] = 1 + item[:, 1] % 20, -content[:, 1]
  found, expected = _output(made, item=other_item, content=other_content), _output(made)
  np.testing.assert_array_equal(found[:, [0, 2]], expected[:, [0, 2]])
  assert np.all(np.abs(found[:, 1] - expected[:, 1]).max(axis=-1)[np.array(LENGTHS) > 0] > 1e-3)


def test_gradients_against_finite_differences(made):
  weight = made.rng.normal(size=_output(made).shape)
  gradient = made.gradient(made.params, *made.inputs, made.nothing, weight.astype(np.float32))

  def loss(params):
    return np.sum(_oracle(params, *made.inputs, made.nothing) * weight)

  direction = jax.tree.map(lambda x: made.rng.normal(size=x.shape), made.params)
  step = 1e-5
  ends = [jax.tree.map(lambda x, d, s=s: x + s * d, made.params, direction) for s in (step, -step)]
  expected = (loss(ends[0]) - loss(ends[1])) / (2 * step)
  found = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_module_without_content(made):
  events, item, _ = made.inputs
  module = TransAct(CONFIG, ACTIONS)
  params = {name: x for name, x in made.params.items() if name != 'content_projection'}
  zeros = events._replace(content_ULW=np.zeros_like(events.content_ULW))
  bare = module.apply({'params': params}, events._replace(content_ULW=None), item)
  np.testing.assert_allclose(bare, _output(made, zeros, content=np.zeros_like(made.inputs[2])), atol=1e-6)
  with pytest.raises(ValueError, match='reads content vectors'):
    TransAct(CONFIG, ACTIONS, CONTENT).apply({'params': made.params}, events._replace(content_ULW=None), item)


HOURS = np.tile(np.array([0.001, 0.2, 0.5, 0.999, 1.0, 30, np.nan], np.float32), (4000, 1))
PLACE = np.arange(len(HOURS), dtype=np.int32)
TIMED = RecentEvents(jnp.ones(HOURS.shape, jnp.int32), jnp.zeros(HOURS.shape, jnp.uint32), jnp.asarray(HOURS))


def test_the_window_hides_what_came_just_before():
  hidden = np.asarray(hide_newest(TIMED, PLACE, fold_seed(0, 3), 1.0))
  share = hidden.mean(axis=0)
  np.testing.assert_allclose(share[:4], 1 - HOURS[0, :4], atol=4 * 0.5 / np.sqrt(len(HOURS)))
  assert not hidden[:, 4:].any()  # an hour and older, and where the time is not known
  assert np.all(hidden[:, :-1].astype(int) >= hidden[:, 1:])  # never an older event without the newer ones
  assert np.asarray(hide_newest(TIMED, PLACE, fold_seed(0, 3), 50.0))[:, 5].any()
  assert not np.asarray(hide_newest(TIMED, PLACE, fold_seed(0, 3), 0.0)).any()


def test_the_window_is_a_function_of_seed_step_and_place():
  first = np.asarray(hide_newest(TIMED, PLACE, fold_seed(0, 3), 1.0))
  for rows in np.split(PLACE, [100, 1500]):
    part = jax.tree.map(lambda x, rows=rows: x[rows], TIMED)
    np.testing.assert_array_equal(hide_newest(part, rows, fold_seed(0, 3), 1.0), first[rows])
  for seed, step in ((0, 4), (1, 3)):
    other = np.asarray(hide_newest(TIMED, PLACE, fold_seed(seed, step), 1.0))
    assert abs(np.corrcoef(first[:, 2], other[:, 2])[0, 1]) < 4 / np.sqrt(len(HOURS))


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (TransActConfig(length=20, width=5, heads=2), r'3 x ranker.transact.width 5 is not a multiple'),
    (TransActConfig(length=8, outputs=10), r'expected 0 <= outputs <= length'),
    (TransActConfig(length=20, layers=0), r'at least one layer'),
  ],
)
def test_sizes_that_cannot_be(config, message):
  events = RecentEvents(jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.uint32))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(TransAct(config, 2).init, jax.random.key(0), events, jnp.ones((1, 1), jnp.int32))
