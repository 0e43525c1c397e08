"""Single functions through the ONNX converter and ONNX Runtime, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from pinfm_jax.errors import UserError

pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')

from pinfm_jax.serve.portable.onnx.convert import to_onnx  # noqa: E402


def run(function, inputs, symbolic=None, params=()):
  """Outputs of ONNX Runtime and of JAX; `symbolic` gives input shapes as text."""
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs.items()}
  if symbolic:
    scope = export.SymbolicScope()
    for name, text in symbolic.items():
      dims = export.symbolic_shape(text, scope=scope)
      shapes[name] = jax.ShapeDtypeStruct(dims, inputs[name].dtype)
  wrapped = lambda weights, given: {'out': function(weights, **given)}
  model = to_onnx(wrapped, params, shapes, 'test')
  session = ort.InferenceSession(model.SerializeToString())
  found = session.run(['out'], {i.name: inputs[i.name] for i in session.get_inputs()})[0]
  return found, np.asarray(jax.jit(wrapped)(params, inputs)['out'])


def check(function, inputs, symbolic=None, params=(), **tolerance):
  found, expected = run(function, inputs, symbolic, params)
  assert found.dtype == expected.dtype
  assert found.shape == expected.shape
  np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), **tolerance)


def test_every_finite_half_has_its_value():
  bits = np.arange(1 << 16, dtype=np.uint16)
  bits = bits[np.isfinite(bits.view(np.float16))]
  found, _ = run(lambda _, x: lax.bitcast_convert_type(x, jnp.float16).astype(jnp.float32), {'x': bits})
  np.testing.assert_array_equal(found, bits.view(np.float16).astype(np.float32))


def test_random_floats_have_their_values():
  x = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 10.0 ** np.arange(-30, 20, 0.05).astype(
    np.float32
  )
  x = np.concatenate([x, -x, np.array([0, 1, -2, np.finfo(np.float32).max, np.finfo(np.float32).tiny], np.float32)])
  found, _ = run(lambda _, x: lax.bitcast_convert_type(x, jnp.float32), {'x': x.view(np.uint32)})
  np.testing.assert_array_equal(found, x)


def test_unsigned_arithmetic_wraps():
  rng = np.random.default_rng(1)
  for dtype in (np.uint8, np.uint16, np.uint32):
    x, y = (rng.integers(0, np.iinfo(dtype).max, 100, dtype, endpoint=True) for _ in range(2))
    for function in (
      lambda _, x, y: x + y,
      lambda _, x, y: x - y,
      lambda _, x, y: (x * y) >> 3,
      lambda _, x, y: (x << 5) & y,
      lambda _, x, y: x.astype(jnp.uint8) | y.astype(jnp.uint8),
    ):
      check(function, {'x': x, 'y': y})


SHAPES = {
  'merge and split': (lambda _, x: x.reshape(-1, x.shape[2]) * 2, 'U, L, 4'),
  'new order': (lambda _, x: x.transpose(1, 0, 2).reshape(x.shape[1], -1), 'U, L, 4'),
  'stack': (lambda _, x: jnp.stack([x, x + 1], axis=-1).reshape(*x.shape[:2], 8), 'U, L, 4'),
  'grow': (lambda _, x: jnp.concatenate([x, x[:, :1]], axis=1), 'U, L, 4'),
  'pad': (lambda _, x: jnp.pad(x, ((0, 0), (2, 1), (0, 0)), constant_values=3.0), 'U, L, 4'),
  'reverse': (lambda _, x: x[:, ::-1], 'U, L, 4'),
  'triangle': (lambda _, x: jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, :, :, None], x[:, None], 0), 'U, L, 4'),
  'split': (lambda _, x: sum(jnp.split(x, 2, axis=-1)), 'U, L, 4'),
  'sums': (lambda _, x: x.sum(axis=(0, 2)) + jnp.cumsum(x.max(axis=-1), axis=1)[0], 'U, L, 4'),
  'any': (lambda _, x: jnp.any(x > 1, axis=1) & jnp.all(x > -3, axis=1), 'U, L, 4'),
  'size': (lambda _, x: x * x.shape[1], 'U, L, 4'),
  'tile': (lambda _, x: jnp.tile(x, (1, 2, 1)), 'U, L, 4'),
}


@pytest.mark.parametrize('name', SHAPES)
def test_shapes(name):
  function, symbolic = SHAPES[name]
  x = np.random.default_rng(2).normal(size=(3, 5, 4)).astype(np.float32)
  check(function, {'x': x}, {'x': symbolic}, rtol=1e-6)


PRODUCTS = ['ulk,kd->uld', 'uchk,ulhk->uhcl', 'uhcl,ulhk->uchk', 'uchk,uchk->uhc', 'uo,uco->uc', 'ulk,umk->ulm']


@pytest.mark.parametrize('equation', PRODUCTS)
def test_products(equation):
  sizes = dict(zip('ulkdchmo', (2, 3, 4, 5, 6, 7, 8, 4), strict=True))
  left, right, _ = equation.replace('->', ',').split(',')
  rng = np.random.default_rng(3)
  x, y = (rng.normal(size=[sizes[c] for c in letters]).astype(np.float32) for letters in (left, right))
  check(lambda _, x, y: jnp.einsum(equation, x, y), {'x': x, 'y': y}, rtol=1e-5, atol=1e-6)


def test_gathers():
  rng = np.random.default_rng(4)
  table = rng.normal(size=(9, 4)).astype(np.float32)
  index = rng.integers(0, 9, (3, 5)).astype(np.int32)
  check(lambda weights, i: weights[i], {'i': index}, {'i': 'U, L'}, table)
  x = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  check(lambda _, x, i: x[:, i], {'x': x, 'i': np.array([2, 0, 0, 1], np.int32)}, {'x': '2, U, L, 4', 'i': 'M'})
  last = np.array([[4], [0], [2]], np.int32)
  take = lambda _, x, i: jnp.take_along_axis(x, i[..., None], axis=1)
  check(take, {'x': x[0], 'i': last}, {'x': 'U, L, 4', 'i': 'U, 1'})


@pytest.mark.parametrize('reverse', [False, True])
def test_a_scan_is_unrolled(reverse):
  rng = np.random.default_rng(5)
  weights, x = rng.normal(size=(3, 4, 4)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)

  def function(weights, x):
    carry, all_ = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum(axis=1)), x, weights, reverse=reverse)
    return jnp.concatenate([carry, all_.T], axis=1)

  check(function, {'x': x}, {'x': 'U, 4'}, weights, rtol=1e-5, atol=1e-6)


def test_functions():
  x = np.random.default_rng(6).normal(size=(4, 5)).astype(np.float32)
  for function in (
    jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jax.nn.softmax, jax.nn.relu, jnp.abs, jnp.sign, jnp.square,
    lambda x: jnp.log1p(jnp.abs(x)), lambda x: lax.rsqrt(x * x + 1), lambda x: lax.integer_pow(x, 3),
    lambda x: lax.integer_pow(x, -2), lambda x: jnp.clip(x, -0.5, 0.5), lambda x: jnp.nan_to_num(jnp.log(x)),
    lambda x: jnp.where(jnp.isfinite(jnp.log(x)), x, 7), lambda x: x.astype(jnp.int32).astype(jnp.uint8),
  ):  # fmt: skip
    check(lambda _, x, function=function: function(x), {'x': x}, rtol=2e-6, atol=1e-6)


def test_inputs_that_are_not_read_are_left_out():
  shapes = {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in 'ab'}
  model = to_onnx(lambda _, given: {'y': given['a'] + 1}, (), shapes, 'test')
  assert [i.name for i in model.graph.input] == ['a']


def test_what_has_no_form_is_refused():
  shapes = {'x': jax.ShapeDtypeStruct((4,), jnp.float32)}
  with pytest.raises(UserError, match=r"uses JAX's sort, which has no ONNX form here: export a bundle"):
    to_onnx(lambda _, given: {'y': jnp.sort(given['x'])}, (), shapes, 'test')
