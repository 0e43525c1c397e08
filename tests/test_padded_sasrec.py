"""The backbone of padded windows against the published form: zero vectors before the events, attended to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Arm, Experiment, PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.pinfm import PinFM, no_events
from pinfm_jax.overrides import apply_overrides

WINDOW, WIDTH, HEADS = 9, 8, 2
CONFIG = PinFMConfig(
  tables=TableConfig(sub_tables=1, rows=64, width=WIDTH),
  tower=TowerConfig(
    backbone='padded_sasrec', layers=2, width=WIDTH, heads=HEADS, output_width=WIDTH, mlp_ratio=1, bare_tokens=True,
    max_positions=WINDOW, bare_targets=True, dot_product=True, dropout=0.5, attention_dropout=0.5,
  ),
  num_actions=1,
  num_surfaces=1,
)  # fmt: skip


def _parameters():
  model = PinFM(CONFIG)
  params = model.init(jax.random.key(0), jnp.zeros((1, 4, WIDTH)), no_events(1, 4, CONFIG))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)  # biases too: padding acts through them
  return model, jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32) for x in leaves])


def _window_oracle(params, vectors_LV):
  """The last event's output of one history, in float64 on the padded window, as RecTools computes it."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.tree.map(lambda x: x, params['params']))
  count = len(vectors_LV)
  x_PD = np.zeros((WINDOW, WIDTH))
  x_PD[WINDOW - count :] = vectors_LV + p['surface_embedding'][0]  # the event terms of surface 0 and no action
  x_PD[WINDOW - count :] += p['position_embedding'][:count][::-1]
  real_P1 = (np.arange(WINDOW) >= WINDOW - count)[:, None]
  blocks = [jax.tree.map(lambda x: x[0], p['decoder']['blocks']), p['decoder']['last']]
  for block in blocks:
    x_PD = _block(block, x_PD * real_P1)
  return _norm(p['decoder']['norm'], x_PD)[-1]


def _block(p, x_PD):
  normed = _norm(p['norm_attention'], x_PD)
  query, key_value = _dense(p['query'], normed), _dense(p['key_value'], x_PD)
  out = np.zeros_like(x_PD)
  for h in range(HEADS):
    part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
    key, value = key_value[:, :WIDTH][:, part], key_value[:, WIDTH:][:, part]
    scores = query[:, part] @ key.T / np.sqrt(WIDTH / HEADS)
    weights = np.where(np.tril(np.ones_like(scores)) > 0, np.exp(scores), 0)
    out[:, part] = weights / weights.sum(1, keepdims=True) @ value
  normed = _norm(p['norm_mlp'], normed + _dense(p['attention_out'], out))
  return normed + _dense(p['mlp_out'], np.maximum(_dense(p['mlp_in'], normed), 0))


def _dense(p, x):
  return x @ p['kernel'] + p['bias']


def _norm(p, x):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


@pytest.mark.parametrize('every_output', [False, True])
def test_the_last_output_is_that_of_the_padded_window(every_output):
  model, params = _parameters()
  params = jax.tree.map(lambda x: getattr(x, 'value', x), params, is_leaf=lambda x: hasattr(x, 'value'))
  counts = np.array([1, 3, WINDOW])
  vectors = np.random.default_rng(0).normal(size=(3, WINDOW, WIDTH)).astype(np.float32)
  events = no_events(3, WINDOW, CONFIG)._replace(mask_UL=jnp.arange(WINDOW) < counts[:, None])
  encode = jax.jit(lambda p: model.apply(p, vectors, events, every_output=every_output, method=PinFM.encode)[0])
  output = np.asarray(encode(params))
  for u, count in enumerate(counts):
    expected = _window_oracle(params, vectors[u, :count])
    np.testing.assert_allclose(output[u, count - 1 if every_output else 0], expected, rtol=2e-4, atol=2e-5)


def test_a_packed_segment_is_a_window_whose_last_event_is_no_input():
  model, params = _parameters()
  vectors = np.random.default_rng(0).normal(size=(1, 8, WIDTH)).astype(np.float32)
  packed = no_events(1, 8, CONFIG)._replace(
    segment_UL=jnp.array([[0, 0, 0, 0, 1, 1, 1, 2]]), mask_UL=jnp.arange(8)[None] < 7
  )
  output = model.apply(params, vectors, packed, method=PinFM.encode)[0]
  for start, inputs in ((0, 3), (4, 2)):  # segments of 4 and 3 events
    alone = no_events(1, inputs, CONFIG)
    own = model.apply(params, vectors[:, start : start + inputs], alone, method=PinFM.encode)[0]
    np.testing.assert_allclose(output[:, start : start + inputs], own, rtol=1e-4, atol=1e-5)


def test_candidates_and_appended_events_are_refused():
  model, params = _parameters()
  events = no_events(1, 4, CONFIG)
  kv = model.apply(params, jnp.zeros((1, 4, WIDTH)), events, method=PinFM.encode)[1]
  with pytest.raises(ValueError, match='in no other way'):
    model.apply(params, jnp.zeros((1, 2, WIDTH)), kv, events.mask_UL, method=PinFM.cross)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.tower.rotary': True}, "rotary is True, but model.tower.backbone 'padded_sasrec' has none"),
    ({'model.tower.attention': 'flash'}, "model.tower.attention is 'flash', but flash kernels"),
    ({'pretrain.pack': False}, 'trains on packed rows; set pretrain.pack=true'),
    ({'ranker.sequence': 'pinfm'}, 'has no pass for candidates'),
  ],
)
def test_settings_that_it_has_not(changes, message):
  right = {'model.tower.backbone': 'padded_sasrec', 'pretrain.pack': True, 'ranker.sequence': 'none'}
  experiment = replace(Experiment('one'), arms=(Arm('plain', {}),), baseline='plain', challenger='')
  check_experiment(apply_overrides(experiment, right))
  with pytest.raises(UserError, match=message):
    check_experiment(apply_overrides(experiment, right | changes))


def test_the_arms_of_a_launch_file_without_rankers_may_be_such_towers():
  arm = Arm('padded', {'model.tower.backbone': 'padded_sasrec', 'pretrain.pack': True})
  experiment = replace(Experiment('one'), arms=(arm,), baseline='padded', challenger='')
  check_experiment(experiment, towers_alone=True)
  with pytest.raises(UserError, match='has no pass for candidates'):
    check_experiment(experiment)
