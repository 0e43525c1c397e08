"""Every exact form of DCAT against the history re-run per candidate, and rotate-replace against what it loses."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.model import dcat_forms
from pinfm_jax.model.pinfm import EventBatch, PinFM, key_mask, l2_normalise

LENGTH = 9
LENGTHS = np.array([0, 1, 6, LENGTH])
USERS, WIDTH, CONTENT = len(LENGTHS), 16, 5
USER_B = np.random.default_rng(5).permutation(np.repeat(np.arange(USERS), [3, 2, 4, 4])).astype(np.int32)
ROWS = len(USER_B)
EXACT = ('tiles', 'gather')


def _config(backbone, dtype='float32'):
  tower = TowerConfig(
    layers=2, width=32, heads=4, output_width=16, max_positions=LENGTH + 2, backbone=backbone, dtype=dtype
  )
  return PinFMConfig(TableConfig(sub_tables=2, rows=10, width=8), tower, num_actions=3, num_surfaces=2)


def _inputs(token):
  """What the loss is differentiated by: item vectors, the content that candidates get, and the learnable token."""
  rng = np.random.default_rng(7)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  events = EventBatch(
    None,
    rng.integers(0, 2, (USERS, LENGTH)).astype(np.int32),
    rng.integers(0, 8, (USERS, LENGTH)).astype(np.uint32),
    np.arange(LENGTH) < LENGTHS[:, None],
  )
  inputs = {
    'history': normal(USERS, LENGTH, WIDTH),
    'candidates': normal(ROWS, WIDTH),
    'project': normal(CONTENT, WIDTH),
  }
  if token:
    inputs['token'] = normal(WIDTH)
  return inputs, events, normal(ROWS, CONTENT)


def _run(form, model, params, inputs, events, content_BW):
  """Outputs [B, O] of one form; the candidates' token gets the content, as in `RankerConfig.candidate_content`."""
  vectors_BV = inputs['candidates'] + l2_normalise(content_BW) @ inputs['project']
  token_V = inputs.get('token')
  apply = partial(model.apply, params)
  if form.startswith('dense'):
    full = form == 'dense'
    return apply(inputs['history'], events, vectors_BV, USER_B, token_V, every_output=full, method=dcat_forms.dense)
  _, context = apply(inputs['history'], events, every_output=False, token_V=token_V, method='encode')
  mask_UL = key_mask(jnp.asarray(LENGTHS), context.key.shape[2], int(token_V is not None))
  if form != 'tiles':
    layout = {'gather': dcat_forms.gather, 'rotate': dcat_forms.rotate_replace, 'oldest hidden': _without_oldest}[form]
    return apply(vectors_BV[:, None], context, mask_UL, user_M=USER_B, layout=layout, method='cross')[:, 0]
  user_M, row_MT = _tiles()
  output_MTO = apply(vectors_BV[row_MT], context, mask_UL, user_M=user_M, method='cross')
  return jnp.zeros((ROWS, 16)).at[row_MT].set(output_MTO)  # a row that pads a tile has the same output twice


def _tiles():
  """Tiles of 2 of one user's rows, several a user, in no order; the last one of a user is padded with its first row."""
  tiles = []
  for user in range(USERS):
    rows = np.flatnonzero(user == USER_B)
    rows = np.append(rows, rows[:1]) if len(rows) % 2 else rows
    tiles += [(user, pair) for pair in rows.reshape(-1, 2)]
  order = np.random.default_rng(6).permutation(len(tiles))
  return np.array([tiles[i][0] for i in order]), np.array([tiles[i][1] for i in order])


def _without_oldest(view, context, own):
  """The exact form over the same keys, computed with the oldest event in sight, without that event's key if full."""
  rows = dcat_forms.gather(view, context, own)
  full_B = jnp.all(view.mask_UL, axis=1)[view.user_M]
  oldest_BX = full_B[:, None] & (jnp.arange(rows.visible_BX.shape[1]) == 0)
  return rows.replace(visible_BX=rows.visible_BX & ~oldest_BX)


CASES = [('gpt2', True), ('sasrec', True), ('hstu', True), pytest.param(('gpt2', False), marks=pytest.mark.slow)]


@pytest.fixture(scope='module', params=CASES, ids=str)
def case(request):
  """Outputs of every form and the gradients of the exact ones, in one compiled program."""
  backbone, token = request.param
  model = PinFM(_config(backbone))
  inputs, events, content_BW = _inputs(token)
  shapes = jax.eval_shape(lambda k: model.init(k, inputs['history'], events), jax.random.key(0))
  rng = np.random.default_rng(11)  # no special zeros or ones
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), nn.unbox(shapes))
  weight_BO = rng.normal(size=(ROWS, 16)).astype(np.float32)

  @jax.jit
  def everything(params, inputs):
    def loss(params, inputs, form):
      output_BO = _run(form, model, params, inputs, events, content_BW)
      return jnp.sum(weight_BO * output_BO), output_BO

    exact = {form: jax.grad(loss, argnums=(0, 1), has_aux=True)(params, inputs, form) for form in ('dense', *EXACT)}
    others = {f: loss(params, inputs, f)[1] for f in ('dense, last output', 'rotate', 'oldest hidden')}
    return {f: x[0] for f, x in exact.items()}, {f: x[1] for f, x in exact.items()} | others

  gradients, outputs = everything(params, inputs)
  return model, params, inputs, events, content_BW, gradients, jax.tree.map(np.asarray, outputs)


@pytest.mark.parametrize('form', [*EXACT, 'dense, last output'])
def test_exact_forms_equal_dense_in_values(case, form):
  outputs = case[-1]
  assert outputs['dense'].std() > 0.1
  np.testing.assert_allclose(outputs[form], outputs['dense'], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('form', EXACT)
def test_exact_forms_equal_dense_in_gradients(case, form):
  gradients = case[-2]
  leaves = zip(jax.tree.leaves(gradients[form]), jax.tree.leaves(gradients['dense']), strict=True)
  for got, expected in leaves:
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-3)
    assert error < 1e-5


def test_rotate_replace_loses_the_oldest_key_of_a_full_window_alone(case):
  outputs = case[-1]
  full_B = LENGTHS[USER_B] == LENGTH
  np.testing.assert_allclose(outputs['rotate'], outputs['oldest hidden'], rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(outputs['rotate'][~full_B], outputs['dense'][~full_B], rtol=1e-5, atol=2e-6)
  assert np.abs(outputs['rotate'] - outputs['dense'])[full_B].max() > 1e-3


@pytest.mark.parametrize('backbone', ['gpt2', 'hstu'])
def test_bfloat16_agrees_to_its_precision(backbone):
  """Both differ from float32 by at most 4 % of the unit-length outputs, and from each other by no more."""
  inputs, events, content_BW = _inputs(token=False)
  model, exact = PinFM(_config(backbone, 'bfloat16')), PinFM(_config(backbone))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs['history'], events))

  @jax.jit
  def run(params):
    cases = {'float32': ('dense', exact), 'dense': ('dense', model), 'tiles': ('tiles', model)}
    return {name: _run(form, m, params, inputs, events, content_BW) for name, (form, m) in cases.items()}

  outputs = jax.tree.map(np.asarray, run(params))
  for a, b in (('dense', 'float32'), ('tiles', 'float32'), ('tiles', 'dense')):
    assert 1e-5 < np.linalg.norm(outputs[a] - outputs[b], axis=1).max() < 0.04
