"""HSTU in every form of the decoder, against a dense oracle in float64 that re-runs the sequence for each candidate."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import TowerConfig
from pinfm_jax.model.dcat import View
from pinfm_jax.model.hstu import relative_bias
from pinfm_jax.model.transformer import Decoder, last_event

USERS, LENGTH, CANDIDATES, WIDTH, HEADS = 4, 9, 3, 16, 2
LENGTHS = np.array([0, 1, 6, LENGTH])
CONFIG = TowerConfig(backbone='hstu', layers=2, width=WIDTH, heads=HEADS, max_positions=LENGTH + 3)
MASK = jnp.arange(LENGTH)[None] < LENGTHS[:, None]


@pytest.fixture(scope='module')
def inputs():
  """Parameters without special zeros or ones, histories, candidates and a cotangent."""
  key = jax.random.split(jax.random.key(0), 5)
  history = jax.random.normal(key[0], (USERS, LENGTH, WIDTH))
  candidates = jax.random.normal(key[1], (USERS, CANDIDATES, WIDTH))
  params = nn.unbox(jax.jit(lambda k, x: Decoder(CONFIG).init(k, x, MASK, method='context'))(key[2], history))
  params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(key[3], p.shape), params)
  return params, history, candidates, jax.random.normal(key[4], (USERS, CANDIDATES, WIDTH))


@jax.jit
def dcat(params, history, candidates):
  """The context pass, then the crossing pass."""
  model = Decoder(CONFIG)
  _, context = model.apply(params, history, MASK, output_at_U=last_event(MASK), method='context')
  return model.apply(params, candidates, context, View(MASK), method='crossing')


def oracle(params, history, candidates):
  """The same function from the paper's equations: plain loops over users and layers, arrays of any precision."""
  layers = [jax.tree.map(lambda p, i=i: p[i], params['params']['blocks']) for i in range(CONFIG.layers - 1)]
  layers.append(params['params']['last'])
  outputs = []
  for user in range(USERS):
    events = jnp.broadcast_to(history[user, : LENGTHS[user]], (CANDIDATES, int(LENGTHS[user]), WIDTH))
    x = jnp.concatenate([events, candidates[user][:, None]], axis=1)
    for layer in layers:
      x = x + _layer(layer, x)
    final = params['params']['norm']
    outputs.append((_normalise(x) * final['scale'] + final['bias'])[:, -1])
  return jnp.stack(outputs)


def _layer(params, x):
  length = x.shape[1]
  normed = _normalise(x) * params['norm']['scale'] + params['norm']['bias']
  projected = normed @ params['gate_value_query_key']['kernel'] + params['gate_value_query_key']['bias']
  gate, value, query, key = jnp.split(projected / (1 + jnp.exp(-projected)), 4, axis=-1)
  mixed = []
  for head in range(HEADS):
    part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
    scores = query[..., part] @ key[..., part].swapaxes(1, 2)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    scores = scores + params['position_bias'][np.maximum(distance, 0), head]
    weights = jnp.where(distance >= 0, scores / (1 + jnp.exp(-scores)) / CONFIG.max_positions, 0)
    mixed.append(weights @ value[..., part])
  gated = gate * _normalise(jnp.concatenate(mixed, axis=-1))
  return gated @ params['out']['kernel'] + params['out']['bias']


def _normalise(x):
  mean = jnp.mean(x, axis=-1, keepdims=True)
  return (x - mean) / jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + 1e-6)


def test_equals_the_dense_oracle_in_values_and_gradients(inputs):
  *arguments, weight = inputs
  with jax.enable_x64(True):
    doubles = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), arguments)
    w64 = jnp.asarray(np.asarray(weight), jnp.float64)

    def loss(*a):
      output = oracle(*a)
      return jnp.sum(w64 * output), output

    gradients, expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*doubles)
    assert expected.dtype == jnp.float64
  np.testing.assert_allclose(dcat(*arguments), expected, rtol=1e-4, atol=2e-5)
  got = jax.jit(jax.grad(lambda *a: jnp.sum(weight * dcat(*a)), argnums=(0, 1, 2)))(*arguments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(np.abs(b).max())))


def test_the_last_event_alone_equals_its_output_in_the_whole_pass(inputs):
  """`output_at_U` runs an event as a query behind the events before it, at the right distances."""
  params, history, *_ = inputs
  outputs, _ = jax.jit(lambda h: Decoder(CONFIG).apply(params, h, MASK, method='context'))(history)
  alone = lambda h: Decoder(CONFIG).apply(params, h, MASK, output_at_U=last_event(MASK), method='context')[0]
  last = jax.jit(alone)(history)
  for user in (1, 2, 3):
    np.testing.assert_allclose(last[user, 0], outputs[user, LENGTHS[user] - 1], rtol=1e-5, atol=1e-6)


def test_candidates_never_see_each_other_nor_other_users(inputs):
  params, history, candidates, _ = inputs
  jacobian = jax.jit(jax.jacrev(lambda c: dcat(params, history, c).sum(-1)))(candidates)
  influence = np.abs(np.asarray(jacobian)).sum(-1)  # [U, C, U, C]
  own = np.einsum('ucuc->uc', influence)
  assert np.all(own > 0)
  np.testing.assert_array_equal(influence.sum((2, 3)), own)


def test_padding_has_no_influence_whatever_its_length(inputs):
  params, history, candidates, _ = inputs
  expected = dcat(params, history, candidates)
  noise = jnp.where(MASK[..., None], 0, 1e3)
  np.testing.assert_array_equal(dcat(params, history + noise, candidates), expected)
  # Two columns less of padding: the normaliser is a constant of the model, not of the batch.
  model, shorter = Decoder(CONFIG), MASK[:3, :7]

  @jax.jit
  def run(h, c):
    _, context = model.apply(params, h, shorter, output_at_U=last_event(shorter), method='context')
    return model.apply(params, c, context, View(shorter), method='crossing')

  got = run(history[:3, :7], candidates[:3])
  np.testing.assert_allclose(got, expected[:3], rtol=1e-5, atol=1e-6)


def test_history_is_causal(inputs):
  params, history, *_ = inputs
  encode = jax.jit(lambda h: Decoder(CONFIG).apply(params, h, MASK, method='context')[0])
  before, after = encode(history), encode(history.at[:, 5].add(1.0))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[3, 5:] != after[3, 5:], axis=-1))


def test_the_distance_counts(inputs):
  """Swapping two events changes the candidate's output through the relative position bias alone."""
  params, history, candidates, _ = inputs
  swapped = history.at[3, 2].set(history[3, 5]).at[3, 5].set(history[3, 2])
  one = replace(CONFIG, layers=1)
  alone = {'params': {'last': params['params']['last'], 'norm': params['params']['norm']}}

  @jax.jit
  def run(p, h):
    _, context = Decoder(one).apply(p, h, MASK, output_at_U=last_event(MASK), method='context')
    return Decoder(one).apply(p, candidates, context, View(MASK), method='crossing')[3]

  assert np.any(np.abs(run(alone, history) - run(alone, swapped)) > 1e-4)
  flat = jax.tree.map(lambda p: p, alone)
  flat['params']['last']['position_bias'] = jnp.zeros_like(flat['params']['last']['position_bias'])
  np.testing.assert_allclose(run(flat, history), run(flat, swapped), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('length', [1, 2, 7])
def test_the_bias_of_a_pair_is_that_of_its_distance(length):
  table = np.arange(20.0).reshape(10, 2) + 1
  bias = relative_bias(jnp.asarray(table), length)
  for i, j in np.ndindex(length, length):
    np.testing.assert_array_equal(bias[:, i, j], table[i - j] if j <= i else [0, 0])


def test_exports_with_symbolic_sizes_for_all_platforms(inputs):
  """As `serve.programs` does: one program for any number of users, candidates and events."""
  params, history, candidates, _ = inputs
  model = Decoder(CONFIG)
  users, count, length = jax.export.symbolic_shape('U, C, L', constraints=[f'L <= {LENGTH}'])

  def run(x, c, mask):
    _, context = model.apply(params, x, mask, output_at_U=last_event(mask), method='context')
    return model.apply(params, c, context, View(mask), method='crossing')

  shapes = ((users, length, WIDTH), jnp.float32), ((users, count, WIDTH), jnp.float32), ((users, length), bool)
  shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  exported = jax.export.export(jax.jit(run), platforms=('cpu', 'cuda', 'tpu'))(*shapes)
  got = jax.jit(exported.call)(history, candidates, MASK)
  np.testing.assert_allclose(got, dcat(params, history, candidates), rtol=1e-5, atol=1e-6)
