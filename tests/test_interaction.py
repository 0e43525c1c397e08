"""Interaction blocks: each against its NumPy oracle; widths, gradients, and what must be equal to what."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle_interaction as oracle
import pytest
from flax.core import meta

from pinfm_jax.config import InteractionConfig, RankerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.interaction.build import interaction_block, joins_input
from pinfm_jax.model.interaction.ensemble import Beside
from pinfm_jax.model.interaction.fields import Field, FieldInputs, FieldNorm, make_fields, total_width
from pinfm_jax.model.interaction.settings import INTERACTIONS

FIELDS = make_fields([('dense', 3), ('sparse', 4), ('sparse', 4), ('embedding', 5), ('module', 4), ('module', 1)])
F, LAYERS = 21, 2
BLOCK = InteractionConfig(
  rank=3, experts=2, blocks=2, ratio=1.5, width=8, token_width=4, heads=2, maps=3, outputs=3,
  ensemble=('dcnv2', 'masknet_parallel', 'fm'),
)  # fmt: skip
X0 = np.random.default_rng(0).normal(size=(2, 3, F)).astype(np.float32)


def config(name='dcnv2', layers=LAYERS, **changes):
  return RankerConfig(interaction=name, cross_layers=layers, block=replace(BLOCK, **changes))


def random_params(module, x0=X0, seed=1):
  shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x0).get('params', {}))
  rng = np.random.default_rng(seed)
  scale = lambda shape: min(1.0, 2 / np.sqrt(np.prod(shape[:-1])))
  return jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape) * scale(s.shape)), shapes)


def apply(module, params, x0=X0):
  return np.asarray(jax.jit(lambda p, x: module.apply({'params': p}, x))(params, x0))


def doubles(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def by_example(function, x0=X0):
  rows = x0.reshape(-1, x0.shape[-1]).astype(np.float64)
  made = np.array([function(row) for row in rows])
  return made.reshape(*x0.shape[:-1], made.shape[-1])


def dhen_oracle(p, x):
  later = make_fields([('token', 4)] * 2)
  blocks = {
    'dcnv2': lambda q, i, y: oracle.dcnv2(q, y, 1),
    'masknet_parallel': lambda q, i, y: oracle.masknet(q, later if i else FIELDS, y, 2, serial=False),
    'fm': lambda q, i, y: oracle.fm(q, later if i else FIELDS, y),
  }
  return oracle.dhen(p, x, LAYERS, 8, blocks)


GATES = (('dense_0', 'sparse_1'), ())
CASES = {
  'dcnv2': ('dcnv2', {}, lambda p, x: oracle.dcnv2(p, x, LAYERS)),
  'low rank': ('dcnv2_low_rank', {}, lambda p, x: oracle.low_rank(p, x, LAYERS, 'none')),
  'low rank tanh': ('dcnv2_low_rank', {'activation': 'tanh'}, lambda p, x: oracle.low_rank(p, x, LAYERS, 'tanh')),
  'low rank relu': ('dcnv2_low_rank', {'activation': 'relu'}, lambda p, x: oracle.low_rank(p, x, LAYERS, 'relu')),
  'mixture': ('dcnv2_mixture', {}, lambda p, x: oracle.mixture(p, x, LAYERS, 2, 3, 'none', 'softmax')),
  'mixture tanh, sigmoid': (
    'dcnv2_mixture',
    {'activation': 'tanh', 'expert_gate': 'sigmoid'},
    lambda p, x: oracle.mixture(p, x, LAYERS, 2, 3, 'tanh', 'sigmoid'),
  ),
  'gdcn': ('gdcn', {}, lambda p, x: oracle.gdcn(p, x, LAYERS)),
  'masknet serial': ('masknet_serial', {}, lambda p, x: oracle.masknet(p, FIELDS, x, 2, serial=True)),
  'masknet parallel': ('masknet_parallel', {}, lambda p, x: oracle.masknet(p, FIELDS, x, 2, serial=False)),
  'final': ('final', {}, lambda p, x: oracle.final(p, FIELDS, x, 2, LAYERS)),
  'finalmlp': ('finalmlp', {}, lambda p, x: oracle.finalmlp(p, FIELDS, x, 2, ((), ()))),
  'finalmlp gated': ('finalmlp', {'first_gate': GATES[0]}, lambda p, x: oracle.finalmlp(p, FIELDS, x, 2, GATES)),
  'dhen': ('dhen', {}, dhen_oracle),
  'transformer': ('transformer', {}, lambda p, x: oracle.transformer(p, FIELDS, x, LAYERS, 2)),
  'autoint': ('autoint', {}, lambda p, x: oracle.autoint(p, FIELDS, x, LAYERS, 2)),
  'cin': ('cin', {}, lambda p, x: oracle.cin(p, FIELDS, x, LAYERS, 3)),
  'fm': ('fm', {}, lambda p, x: oracle.fm(p, FIELDS, x)),
  'mlp': ('mlp', {}, lambda p, x: oracle.mlp(p, x)),
  'none': ('none', {}, lambda p, x: x),
}


def test_every_block_has_a_case():
  assert {case[0] for case in CASES.values()} == set(INTERACTIONS)
  assert total_width(FIELDS) == F


@pytest.mark.parametrize('case', CASES)
def test_a_block_against_numpy(case):
  name, changes, expected = CASES[case]
  settings = config(name, **changes)
  module = interaction_block(settings, FIELDS)
  params = random_params(module)

  def run(p, x):  # the output and, of a random weighting of it, the gradients: one program
    y = module.apply({'params': p}, x)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  both = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
  (_, found), grads = both(params, X0)
  p = doubles(params)
  np.testing.assert_allclose(found, by_example(lambda x: expected(p, x)), rtol=2e-3, atol=2e-4)
  assert found.shape == (2, 3, oracle.interaction_width(settings, FIELDS))
  for grad in jax.tree.leaves(grads):
    assert np.all(np.isfinite(grad))
    assert np.any(grad != 0)
  zeros = both(params, np.zeros_like(X0))[1]  # a candidate without any feature
  assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(zeros))


def test_the_gradient_of_a_block_is_that_of_its_oracle():
  """By differences in float64, for the block with most parts."""
  module = interaction_block(config('final'), FIELDS)
  params, x0 = random_params(module), X0[:1, :1]
  loss = lambda p, x: jnp.sum(jnp.sin(module.apply({'params': p}, x)))
  grad = np.asarray(jax.jit(jax.grad(loss, argnums=1))(params, x0))[0, 0]
  p, h = doubles(params), 1e-6
  double = lambda x: np.sum(np.sin(oracle.final(p, FIELDS, x, 2, LAYERS)))
  x, steps = x0[0, 0].astype(np.float64), np.eye(F) * h
  expected = [(double(x + step) - double(x - step)) / (2 * h) for step in steps]
  np.testing.assert_allclose(grad, expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())


def test_low_rank_at_full_rank_is_full_rank():
  full = interaction_block(config('dcnv2'), FIELDS)
  params, low = random_params(full), {}
  for i in range(LAYERS):
    u, s, vt = np.linalg.svd(params[f'Dense_{i}']['kernel'].astype(np.float64))
    low[f'v_{i}'] = {'kernel': np.float32(u)}
    low[f'u_{i}'] = {'kernel': np.float32(s[:, None] * vt), 'bias': params[f'Dense_{i}']['bias']}
  found = apply(interaction_block(config('dcnv2_low_rank', rank=F), FIELDS), low)
  np.testing.assert_allclose(found, apply(full, params), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('activation', ['none', 'tanh'])
def test_a_mixture_of_one_expert_is_low_rank(activation):
  settings = config('dcnv2_low_rank', activation=activation)
  low = interaction_block(settings, FIELDS)
  params = random_params(low)
  mixture = interaction_block(replace(config('dcnv2_mixture', activation=activation, experts=1)), FIELDS)
  copied = random_params(mixture, seed=2)
  for i in range(LAYERS):
    copied[f'v_{i}'] = params[f'v_{i}']
    copied[f'u_{i}'] = {'kernel': params[f'u_{i}']['kernel']}
    copied[f'bias_{i}'] = params[f'u_{i}']['bias']
    if activation != 'none':
      copied[f'c_{i}'] = params[f'c_{i}']['kernel'][None]
  np.testing.assert_allclose(apply(mixture, copied), apply(low, params), rtol=1e-5, atol=1e-5)


def test_masknet_of_one_block_is_serial_and_parallel():
  serial, parallel = (interaction_block(config(f'masknet_{kind}', blocks=1), FIELDS) for kind in ('serial', 'parallel'))
  params = random_params(serial)
  np.testing.assert_array_equal(apply(serial, params), apply(parallel, params))


def test_one_block_beside_nothing_is_the_block():
  settings = config('gdcn')
  alone = interaction_block(settings, FIELDS)
  params = random_params(alone)
  beside = Beside(lambda name: interaction_block(settings, FIELDS, name), 1)
  np.testing.assert_array_equal(apply(alone, params), apply(beside, {'copy_0': params}))


def test_blocks_side_by_side_and_an_mlp():
  settings = config('dcnv2', parallel=2, deep=(6, 5))
  module = interaction_block(settings, FIELDS)
  params = random_params(module)
  p = doubles(params)
  parts = lambda x: [*(oracle.dcnv2(p[f'copy_{i}'], x, LAYERS) for i in range(2)), oracle.mlp(p['deep'], x)]
  found = apply(module, params)
  np.testing.assert_allclose(found, by_example(lambda x: np.concatenate(parts(x))), rtol=1e-3, atol=1e-4)
  assert found.shape[-1] == oracle.interaction_width(settings, FIELDS) == 2 * F + 5


def test_the_sum_of_fm_is_that_of_all_inner_products():
  module = interaction_block(config('fm'), FIELDS)
  params = random_params(module)
  e = lambda x: oracle.tokens(doubles(params)['tokens'], FIELDS, x)
  pairs = lambda v: [sum(v[i] @ v[j] for i in range(len(v)) for j in range(i + 1, len(v)))]
  expected = by_example(lambda x: pairs(e(x)))[..., 0]
  np.testing.assert_allclose(apply(module, params).sum(axis=-1), expected, rtol=1e-3, atol=1e-3)


def test_attention_blocks_keep_the_fields_apart():
  """What one field says reaches the tokens of the others, and swapped fields do not give swapped tokens."""
  for name in ('autoint', 'transformer'):
    module = interaction_block(config(name, layers=1), FIELDS)
    params = random_params(module)
    before = apply(module, params).reshape(2, 3, len(FIELDS), 4)
    changed = X0.copy()
    changed[..., 3:7] += 1
    moved = np.abs(apply(module, params, changed).reshape(before.shape) - before).max(axis=(0, 1, 3))
    assert np.all(moved > 1e-5), name
    swapped = np.concatenate([X0[..., :3], X0[..., 7:11], X0[..., 3:7], X0[..., 11:]], axis=-1)
    other = apply(module, params, swapped).reshape(before.shape)
    assert np.abs(other[:, :, [0, 2, 1, 3, 4, 5]] - before).max() > 1e-2, name


def test_the_norm_of_one_field_is_a_layer_norm():
  params = {'scale': np.linspace(0.5, 2, F, dtype=np.float32), 'bias': np.linspace(-1, 1, F, dtype=np.float32)}
  found = apply(FieldNorm(make_fields([('dense', F)])), params, 5 * X0 + 3)
  np.testing.assert_allclose(found, apply(nn.LayerNorm(), params, 5 * X0 + 3), atol=1e-5)


def test_field_inputs_against_numpy():
  module = FieldInputs(FIELDS, most_width=4, norm=True, gates=True)
  assert [f.width for f in module.made] == [3, 4, 4, 4, 4, 1]
  assert [f.name for f in module.made] == [f.name for f in FIELDS]
  params = random_params(module)
  p = doubles(params)
  expected = by_example(lambda x: oracle.field_inputs(p, (FIELDS, module.made), x, 4))
  np.testing.assert_allclose(apply(module, params), expected, rtol=1e-3, atol=1e-4)


def test_field_inputs_that_are_off_do_nothing_and_have_no_parameters():
  module = FieldInputs(FIELDS)
  assert random_params(module) == {}
  assert module.made == FIELDS
  np.testing.assert_array_equal(apply(module, {}), X0)


def test_gates_begin_at_one():
  module = FieldInputs(FIELDS, gates=True)
  y, _ = jax.jit(lambda key: module.init_with_output(key, X0))(jax.random.key(0))
  np.testing.assert_allclose(y, X0, rtol=1e-6)


def test_fields_that_do_not_fit_x0_are_refused():
  with pytest.raises(ValueError, match='x0 has width 20; its fields have 21'):
    FieldInputs(FIELDS).init(jax.random.key(0), X0[..., :-1])


def test_fields_are_named_and_placed():
  assert FIELDS[2] == Field('sparse_1', 'sparse', 7, 4)
  assert FIELDS[-1] == Field('module_1', 'module', 20, 1)


def test_no_layer_of_dcnv2_is_no_crossing():
  for name in ('dcnv2', 'dcnv2_low_rank', 'dcnv2_mixture', 'gdcn', 'mlp', 'none'):
    settings = config(name, layers=0)
    module = interaction_block(settings, FIELDS)
    assert oracle.interaction_width(settings, FIELDS) == F
    np.testing.assert_array_equal(apply(module, random_params(module)), X0)
  assert not joins_input(config('none'))
  assert joins_input(config())
  assert not joins_input(config(concat=False))


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="ranker.interaction is 'dcnv3'; expected one of: dcnv2, dcnv2_low_rank"):
    interaction_block(config('dcnv3'), FIELDS)
  with pytest.raises(UserError, match="second_gate names 'user'; the fields are: dense_0, sparse_0"):
    interaction_block(config('finalmlp', second_gate=('user',)), FIELDS)
