"""Options of the tower: rotary positions, RMSNorm, SwiGLU, bare vectors, inner products, kinds of dropout."""

from dataclasses import replace
from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.model.dcat_forms import dense
from pinfm_jax.model.layers import rotate
from pinfm_jax.model.pinfm import EventBatch, PinFM

USERS, LENGTH, CANDIDATES, WIDTH = 3, 7, 2, 8
MODERN = TowerConfig(
  layers=2, width=WIDTH, heads=2, mlp_ratio=2, output_width=WIDTH, max_positions=LENGTH + 2, rotary=True, rms_norm=True,
  swiglu=True, bare_tokens=True, bare_targets=True, dot_product=True,
)  # fmt: skip


class Case:
  """A model with random parameters, histories of 0, 4 and 7 events, and candidates."""

  def __init__(self, tower: TowerConfig = MODERN):
    self.config = PinFMConfig(TableConfig(1, 10, WIDTH), tower, num_actions=2, num_surfaces=2)
    self.model, rng = PinFM(self.config), np.random.default_rng(0)
    mask = np.arange(LENGTH) < np.array([[0], [4], [LENGTH]])
    self.events = EventBatch(
      jnp.zeros((USERS, LENGTH, 2), jnp.uint32),
      jnp.asarray(rng.integers(0, 2, mask.shape), jnp.int32),
      jnp.asarray(rng.integers(0, 4, mask.shape), jnp.uint32),
      jnp.asarray(mask),
    )
    self.history = jnp.asarray(rng.normal(size=(USERS, LENGTH, WIDTH)), jnp.float32)
    self.candidates = jnp.asarray(rng.normal(size=(USERS, CANDIDATES, WIDTH)), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(self.model.init, jax.random.key(0), self.history, self.events))
    self.params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), jnp.float32), shapes)

  def encode(self, train: bool = False, key: int = 0, **events) -> np.ndarray:
    encode = _program(self.config, 'encode', train=train)
    rngs = {'dropout': jax.random.key(key)} if train else {}
    return np.asarray(encode(rngs, self.params, self.history, self.events._replace(**events))[0])


@lru_cache
def _program(config: PinFMConfig, method, **options):
  return jax.jit(lambda rngs, params, *args: PinFM(config).apply(params, *args, rngs=rngs, method=method, **options))


@pytest.fixture(scope='module', params=['gpt2', 'sasrec'])
def modern(request):
  return Case(replace(MODERN, backbone=request.param))


def test_rotation_turns_pairs_and_keeps_lengths_and_distances():
  rng = np.random.default_rng(1)
  x, place = rng.normal(size=(2, 5, 3, 6)), rng.integers(0, 300, (2, 5))
  found = np.asarray(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(place)))
  for k in range(3):  # element k is the real and k + 3 the imaginary part
    turned = (x[..., k] + 1j * x[..., k + 3]) * np.exp(1j * place[..., None] * 10_000 ** (-k / 3))
    np.testing.assert_allclose(found[..., k] + 1j * found[..., k + 3], turned, atol=1e-4)
  query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 6)), jnp.float32) for _ in range(2))
  at = lambda a, b: float(jnp.vdot(rotate(query, jnp.array([[a]])), rotate(key, jnp.array([[b]]))))
  assert at(9, 4) == pytest.approx(at(105, 100), abs=1e-4)
  assert at(9, 4) != pytest.approx(at(9, 5), abs=1e-2)


def _oracle(case: Case, user: int) -> np.ndarray:
  """The whole tower for one user in float64 NumPy, from the definitions of the papers."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), case.params['params'])
  count = int(case.events.mask_UL[user].sum())
  bits = np.asarray(case.events.actions_UL)[user, :count, None] >> np.arange(2) & 1
  x = np.asarray(case.history, np.float64)[user, :count]
  x = x + p['surface_embedding'][np.asarray(case.events.surface_UL)[user, :count]] + bits @ p['action_embedding'][:2]
  blocks = [jax.tree.map(lambda y: y[0], p['decoder']['blocks']), p['decoder']['last']]
  rms = lambda x, scale: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
  layer = lambda x, w: x @ w['kernel'] + w['bias']
  turn = np.exp(1j * np.arange(count)[:, None] * 10_000.0 ** (-np.arange(2) / 2))

  def turned(y):
    z = (y[:, :2] + 1j * y[:, 2:]) * turn
    return np.concatenate([z.real, z.imag], axis=1)

  for b in blocks:
    normed = rms(x, b['norm_attention']['scale'])
    if case.config.tower.backbone == 'sasrec':
      x, heads = normed, [layer(normed, b['query']), *np.split(layer(x, b['key_value']), 2, axis=1)]
    else:
      heads = np.split(layer(normed, b['query_key_value']), 3, axis=1)
    mixed = []
    for h in (slice(0, 4), slice(4, 8)):
      query, key, value = turned(heads[0][:, h]), turned(heads[1][:, h]), heads[2][:, h]
      scores = np.where(np.tri(count) > 0, query @ key.T / 2, -np.inf)
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      mixed.append(weights / weights.sum(axis=1, keepdims=True) @ value)
    x = x + layer(np.concatenate(mixed, axis=1), b['attention_out'])
    normed = rms(x, b['norm_mlp']['scale'])
    gate, value = np.split(layer(normed, b['mlp_in']), 2, axis=1)
    x = normed if case.config.tower.backbone == 'sasrec' else x
    x = x + layer(gate / (1 + np.exp(-gate)) * value, b['mlp_out'])
  return rms(x, p['decoder']['norm']['scale'])


def test_a_modern_tower_equals_the_oracle(modern):
  found = np.asarray(modern.encode())
  for user, count in ((1, 4), (2, LENGTH)):
    np.testing.assert_allclose(found[user, :count], _oracle(modern, user), rtol=2e-4, atol=2e-4)


def test_candidates_and_later_events_see_the_places_of_the_whole_sequence(modern):
  """Crossing pass, extension, and the last event alone equal the dense form with rotary positions."""
  params, events = modern.params, modern.events
  run = lambda method, *args, **options: _program(modern.config, method, **options)({}, params, *args)
  kv = run('encode', modern.history, events)[1]
  crossed = run('cross', modern.candidates, kv, events.mask_UL)
  users = jnp.repeat(jnp.arange(USERS), CANDIDATES)
  arguments = (modern.history, events, modern.candidates.reshape(-1, WIDTH), users)
  for every_output in (True, False):
    expected = run(dense, *arguments, every_output=every_output)
    np.testing.assert_allclose(crossed.reshape(-1, WIDTH), expected, rtol=1e-4, atol=1e-5)
  kept = jax.tree.map(lambda y: y[:, 2:, :4], kv)  # what precedes does not depend on what follows
  later = jax.tree.map(lambda y: y[2:, 4:], (modern.history, events))
  h, _ = run('extend', *later, kept, events.mask_UL[2:, :4], every_output=True)
  np.testing.assert_allclose(h[0], modern.encode()[2, 4:], rtol=1e-4, atol=1e-5)


def test_packed_segments_do_not_see_each_others_places(modern):
  segments = jnp.asarray([[0] * 3 + [1] * 4] * USERS, jnp.int32)
  full = {'mask_UL': jnp.ones((USERS, LENGTH), bool)}
  packed = modern.encode(segment_UL=segments, **full)
  history, events = jax.tree.map(lambda y: y[:, 3:], (modern.history, modern.events._replace(**full)))
  alone = _program(modern.config, 'encode')({}, modern.params, history, events)[0]
  np.testing.assert_allclose(packed[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_bare_targets_are_the_item_vectors_and_cosines_have_unit_length(modern):
  tower = modern.config.tower
  z = lambda tower, x: PinFM(replace(modern.config, tower=tower)).apply(modern.params, x, method='targets')
  np.testing.assert_array_equal(z(tower, modern.history), modern.history)
  cosine = replace(tower, dot_product=False)
  unit = np.asarray(modern.history) / np.linalg.norm(modern.history, axis=-1, keepdims=True)
  np.testing.assert_allclose(z(cosine, modern.history), unit, rtol=1e-5)
  lengths = np.linalg.norm(Case(cosine).encode(), axis=-1)
  np.testing.assert_allclose(lengths[2], 1, rtol=1e-5)
  assert set(modern.params['params']) == {'surface_embedding', 'action_embedding', 'decoder'}  # no MLPs, no positions


@pytest.mark.parametrize('kind', ['embedding_dropout', 'token_dropout', 'attention_dropout', 'dropout'])
def test_dropout_acts_in_training_alone(modern, kind):
  case = Case(replace(modern.config.tower, **{kind: 0.5}))
  np.testing.assert_array_equal(case.encode(), modern.encode())
  assert not np.allclose(case.encode(train=True, key=1), case.encode(train=True, key=2))


def test_what_each_kind_of_dropout_hides():
  """Without blocks' outputs the decoder normalises its input: zeros of the input stay zeros."""
  for kind, whole in (('token_dropout', True), ('embedding_dropout', False)):
    case = Case(replace(MODERN, **{kind: 0.5}))
    case.params = jax.tree_util.tree_map_with_path(
      lambda path, x: x * (not {'last', 'blocks'} & {key.key for key in path}), case.params
    )
    zero = np.asarray(case.encode(train=True))[2] == 0
    assert 0 < zero.mean() < 1
    assert (set(zero.mean(axis=-1)) <= {0.0, 1.0}) == whole


def test_attention_dropout_is_right_on_average():
  """The mean over many draws of what one layer's attention gives is what it gives without dropout."""
  from pinfm_jax.model.dcat import LayerKV, attend_causal

  rng = np.random.default_rng(2)
  query, key, value = (jnp.asarray(rng.normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(3))
  mask, drop = jnp.ones((1, 6), bool), nn.Dropout(0.3, deterministic=False)

  @jax.vmap
  def draw(seed):
    dropped = lambda w: drop.apply({}, w, rngs={'dropout': jax.random.key(seed)})
    return attend_causal(query, LayerKV(key, value), mask, drop=dropped)

  found = jnp.mean(jax.jit(draw)(jnp.arange(4000)), axis=0)
  np.testing.assert_allclose(found, attend_causal(query, LayerKV(key, value), mask), atol=0.06)
