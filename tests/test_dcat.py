"""DCAT against the dense form: the whole sequence re-run for every candidate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
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
