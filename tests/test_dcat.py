"""DCAT against the dense form: the whole sequence re-run for every candidate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.model.dcat import LayerKV, attend_blocks, attend_context, own_part
from pinfm_jax.model.pinfm import EventBatch, PinFM

USERS, LENGTH, CANDIDATES = 4, 9, 5
LENGTHS = np.array([0, 1, 6, LENGTH])


def _model(layers):
  tower = TowerConfig(layers=layers, width=32, heads=4, output_width=16, max_positions=LENGTH + 1)
  config = PinFMConfig(TableConfig(sub_tables=2, rows=10, width=8), tower, num_actions=3, num_surfaces=2)
  model = PinFM(config)
  key = jax.random.split(jax.random.key(layers), 6)
  mask = jnp.arange(LENGTH)[None] < LENGTHS[:, None]
  events = EventBatch(
    jnp.zeros((USERS, LENGTH, 2), jnp.uint32),
    jax.random.randint(key[0], (USERS, LENGTH), 0, 2),
    jax.random.randint(key[1], (USERS, LENGTH), 0, 8).astype(jnp.uint32),
    mask,
  )
  history = jax.random.normal(key[2], (USERS, LENGTH, 16))
  candidates = jax.random.normal(key[3], (USERS, CANDIDATES, 16))
  params = nn.unbox(model.init(key[4], history, events))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key[5], p.shape), params)  # no special zeros or ones
  return model, params, events, history, candidates


def _dcat(model, params, events, history, candidates):
  _, context = model.apply(params, history, events, every_output=False, method='encode')
  return model.apply(params, candidates, context, events.mask_UL, method='cross')


def _dense(model, params, events, history, candidates):
  """For every user and candidate: [history, candidate] through the decoder, read at the candidate's position."""

  def run(module, u):
    length = int(LENGTHS[u])
    bits = jnp.stack([events.actions_UL[u, :length] // 2**a % 2 for a in range(3)], axis=-1)
    tokens = history[u, :length] + module.surface_embedding[events.surface_UL[u, :length]]
    tokens = tokens + bits.astype(jnp.float32) @ module.action_embedding[:3]
    tokens = jnp.broadcast_to(tokens, (CANDIDATES, *tokens.shape))
    tokens = jnp.concatenate([tokens, candidates[u][:, None] + module.action_embedding[3]], axis=1)
    x = module.phi_in(tokens) + module.position_embedding[: length + 1]
    output, _ = module.decoder.context(x, jnp.ones((CANDIDATES, length + 1), bool))
    return module.phi_out(output)[:, -1]

  return jnp.stack([model.apply(params, u, method=run) for u in range(USERS)])


@pytest.mark.parametrize('layers', [1, 3])
def test_equals_the_dense_form_in_values(layers):
  model, params, events, history, candidates = _model(layers)
  got, expected = (
    jax.jit(lambda p, h, c, form=form: form(model, p, events, h, c))(params, history, candidates)
    for form in (_dcat, _dense)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_equals_the_dense_form_in_gradients():
  model, params, events, history, candidates = _model(2)
  weight = jax.random.normal(jax.random.key(9), (USERS, CANDIDATES, 16))

  def gradient(form):
    loss = lambda p, h, c: jnp.sum(weight * form(model, p, events, h, c))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, history, candidates)

  got, expected = gradient(_dcat), gradient(_dense)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_candidates_never_see_each_other_nor_other_users():
  model, params, events, history, candidates = _model(2)
  jacobian = jax.jit(jax.jacrev(lambda c: _dcat(model, params, events, history, c).sum(-1)))(candidates)
  influence = np.abs(np.asarray(jacobian)).sum(-1)  # [U, C, U, C]
  for u in range(USERS):
    for c in range(CANDIDATES):
      own = influence[u, c, u, c]
      assert own > 0
      assert influence[u, c].sum() == own


def test_padding_has_no_influence():
  model, params, events, history, candidates = _model(2)
  noise = jnp.where(events.mask_UL[..., None], 0, 1e3)
  changed = _dcat(model, params, events, history + noise, candidates)
  np.testing.assert_array_equal(changed, _dcat(model, params, events, history, candidates))


def test_history_is_causal():
  model, params, events, history, _ = _model(2)
  encode = lambda h: model.apply(params, h, events, method='encode')[0]
  before = encode(history)
  after = encode(history.at[:, 5].add(1.0))
  earlier = np.asarray(events.mask_UL) & (np.arange(LENGTH) < 5)
  np.testing.assert_array_equal(before[earlier], after[earlier])
  assert np.all(np.any(before[3, 5:] != after[3, 5:], axis=-1))


def test_outputs_have_unit_length_and_finite_gradients_without_events():
  model, params, events, history, candidates = _model(2)
  output = _dcat(model, params, events, history, candidates)
  np.testing.assert_allclose(jnp.linalg.norm(output, axis=-1), 1, rtol=1e-5)
  grads = jax.jit(jax.grad(lambda h: _dcat(model, params, events, h, candidates).sum()))(history)
  assert np.all(np.isfinite(grads))
  assert np.all(np.asarray(grads)[0] == 0)


def test_history_longer_than_the_positions_is_refused():
  model, params, events, _, _ = _model(1)
  longer = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1) if x.ndim > 1 else x, events)
  with pytest.raises(ValueError, match='max_positions'):
    model.apply(params, jnp.zeros((USERS, 2 * LENGTH, 16)), longer, method='encode')


def _attention(query, key, value, mask, own_key, own_value):
  """Softmax attention of each candidate over its user's visible keys and itself, one at a time in float64."""
  output = np.zeros(query.shape)
  for u, c, h in np.ndindex(query.shape[:3]):
    keys = np.concatenate([key[u, mask[u], h], own_key[u, c, h][None]]).astype(np.float64)
    values = np.concatenate([value[u, mask[u], h], own_value[u, c, h][None]]).astype(np.float64)
    scores = keys @ query[u, c, h] / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max())
    output[u, c, h] = weights @ values / weights.sum()
  return output


def _attention_inputs(scale):
  rng = np.random.default_rng(3)
  normal = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  mask = rng.random((4, 11)) < 0.6
  mask[0], mask[1, :8], mask[2] = False, False, True  # no key at all; none in the first blocks; all
  return normal(4, 5, 2, 8), normal(4, 11, 2, 8), normal(4, 11, 2, 8), mask, normal(4, 5, 2, 8), normal(4, 5, 2, 8)


@pytest.mark.parametrize('block', [None, 1, 4, 11])
@pytest.mark.parametrize('scale', [1.0, 30.0])  # scores of thousands: far beyond what exp can hold
def test_merged_parts_equal_one_softmax(block, scale):
  query, key, value, mask, own_key, own_value = inputs = _attention_inputs(scale)
  if block is None:
    got = attend_context(query, LayerKV(key, value), mask, LayerKV(own_key, own_value))
  else:
    own = own_part(query, LayerKV(own_key, own_value), causal=False)
    got = attend_blocks(query, LayerKV(key, value), mask, own, block).output_UCHK
  np.testing.assert_allclose(got, _attention(*inputs), rtol=2e-5, atol=2e-5 * scale)


def test_blocks_of_keys_have_the_gradients_of_the_plain_form():
  query, key, value, mask, own_key, own_value = _attention_inputs(1.0)
  weight = np.random.default_rng(4).normal(size=query.shape)

  def plain(query, context, own):
    return jnp.sum(weight * attend_context(query, context, mask, own))

  def blocks(query, context, own):
    return jnp.sum(weight * attend_blocks(query, context, mask, own_part(query, own, False), 4).output_UCHK)

  arguments = query, LayerKV(key, value), LayerKV(own_key, own_value)
  got, expected = (jax.jit(jax.grad(form, argnums=(0, 1, 2)))(*arguments) for form in (blocks, plain))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('length', 'candidates', 'blocks'), [(256, 100, False), (512, 100, True), (513, 100, True), (2048, 1, False)]
)
def test_many_candidates_read_a_long_history_in_blocks(length, candidates, blocks):
  tokens = lambda count: jax.ShapeDtypeStruct((2, count, 2, 8), jnp.float32)
  context, own = (LayerKV(tokens(count), tokens(count)) for count in (length, candidates))
  mask = jax.ShapeDtypeStruct((2, length), bool)
  program = jax.make_jaxpr(attend_context)(tokens(candidates), context, mask, own)
  assert ('scan' in str(program)) == blocks
