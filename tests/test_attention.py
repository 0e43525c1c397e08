"""The forms of causal attention: equal to a NumPy oracle, chosen as documented, lowered for platforms not at hand."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.model import attention
from pinfm_jax.model.dcat import LayerKV, attend_causal, attend_context

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 10], np.int32)


def _arrays(users, length, heads, width, dtype=jnp.float32, scale=1.0):
  keys = jax.random.split(jax.random.key(0), 3)
  return [scale * jax.random.normal(key, (users, length, heads, width), dtype) for key in keys]


def _oracle(query, key, value, mask, segment):
  """float64, one query at a time."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  output = np.zeros_like(query)
  for u, i, h in np.ndindex(query.shape[:3]):
    seen = [m for m in range(i + 1) if mask[u, m] and segment[u, m] == segment[u, i]]
    if seen:
      scores = key[u, seen, h] @ query[u, i, h] / math.sqrt(query.shape[-1])
      weights = np.exp(scores - scores.max())
      output[u, i, h] = weights @ value[u, seen, h] / weights.sum()
  return output


@pytest.mark.parametrize('packed', [False, True])
def test_plain_attention_equals_the_oracle(packed):
  query, key, value = _arrays(2, 10, 2, 8)
  mask = SEGMENTS > 0
  segment = SEGMENTS if packed else np.ones_like(SEGMENTS)
  got = attend_causal(query, LayerKV(key, value), jnp.asarray(mask), jnp.asarray(segment) if packed else None)
  expected = _oracle(query, key, value, mask, segment)
  np.testing.assert_allclose(np.asarray(got)[mask], expected[mask], rtol=1e-5, atol=1e-6)
  assert np.all(np.isfinite(got))


@pytest.mark.slow  # interpreted kernels
def test_the_tpu_kernel_equals_the_plain_form_in_values_and_gradients():
  """Its program, interpreted: the layout, scaling, causality and segments that we ask of it."""
  length = 128
  query, key, value = _arrays(2, length, 2, 64)
  segment = jnp.asarray(np.stack([np.repeat([1, 2, 0], [50, 30, 48]), np.ones(length, int)]), jnp.int32)
  mask = segment > 0
  weight = jax.random.normal(jax.random.key(1), query.shape) * mask[..., None, None]
  splash = lambda q, k, v: attention.attend_splash(q, k, v, segment, interpret=True)
  plain = lambda q, k, v: attend_causal(q, LayerKV(k, v), mask, segment)
  results = []
  for form in (splash, plain):
    loss = lambda q, k, v, form=form: jnp.sum(weight * form(q, k, v))
    results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value))
  for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _lowered(kernel, platform, packed, width=64):
  query = jax.ShapeDtypeStruct((2, 128, 2, width), jnp.bfloat16)
  segment = jax.ShapeDtypeStruct((2, 128), jnp.int32) if packed else None
  loss = lambda q, k, v, s: jnp.sum(kernel(q, k, v, s).astype(jnp.float32))
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, query, query, segment)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('packed', [False, True])
def test_cuda_programs_call_cudnn_forward_and_backward(monkeypatch, packed):
  import jax._src.cudnn.fused_attention_stablehlo as fused

  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91100)  # this machine has none
  text = _lowered(attention.attend_cudnn, 'cuda', packed)
  bias = 'ScaleBias' if packed else ''  # only packed rows pay for a mask
  assert set(re.findall(r'__cudnn\$\w+', text)) == {f'__cudnn$fmha{bias}Softmax', f'__cudnn$fmha{bias}SoftmaxBackward'}
  assert 'CAUSAL' in text


@pytest.mark.parametrize('packed', [False, True])
def test_tpu_programs_call_the_splash_kernels(packed):
  text = _lowered(attention.attend_splash, 'tpu', packed)
  kernels = set(re.findall(r'kernel_name = "(splash_mha_(?:fwd|dq|dkv)(?:_segmented)?)', text))
  suffix = '_segmented' if packed else ''
  assert kernels == {f'splash_mha_{part}{suffix}' for part in ('fwd', 'dq', 'dkv')}


@pytest.mark.parametrize(
  ('kind', 'platform', 'dtype', 'length', 'head', 'form'),
  [
    ('auto', 'cpu', 'bfloat16', 256, 64, 'xla'),
    ('auto', 'rocm', 'bfloat16', 256, 64, 'xla'),
    ('auto', 'cuda', 'bfloat16', 256, 64, 'cudnn'),
    ('auto', 'cuda', 'float32', 256, 64, 'xla'),
    ('auto', 'cuda', 'bfloat16', 256, 20, 'xla'),
    ('auto', 'cuda', 'bfloat16', 256, 256, 'xla'),
    ('auto', 'cuda', 'bfloat16', 255, 64, 'xla'),
    ('auto', 'tpu', 'float32', 384, 64, 'splash'),
    ('auto', 'tpu', 'bfloat16', 200, 64, 'xla'),
    ('xla', 'cuda', 'bfloat16', 256, 64, 'xla'),
    ('xla', 'tpu', 'bfloat16', 256, 64, 'xla'),
    ('flash', 'cuda', 'bfloat16', 256, 64, 'cudnn'),
    ('flash', 'tpu', 'bfloat16', 256, 64, 'splash'),
  ],
)
def test_the_form_follows_platform_type_and_sizes(kind, platform, dtype, length, head, form):
  assert attention.choose_form(kind, platform, dtype, length, head) == form


def test_a_symbolic_length_takes_the_plain_form():
  length = jax.export.symbolic_shape('L')[0]
  assert attention.choose_form('auto', 'tpu', 'bfloat16', length, 64) == 'xla'


@pytest.mark.parametrize(
  ('platform', 'dtype', 'length', 'head', 'reason'),
  [
    ('cpu', 'bfloat16', 256, 64, 'this is cpu'),
    ('cuda', 'float32', 256, 64, 'got float32'),
    ('cuda', 'bfloat16', 256, 20, 'got 20'),
    ('cuda', 'bfloat16', 255, 64, 'got 255'),
    ('tpu', 'bfloat16', 200, 64, 'got 200'),
  ],
)
def test_flash_where_there_is_none_is_refused_in_one_line(platform, dtype, length, head, reason):
  with pytest.raises(UserError, match=reason) as error:
    attention.choose_form('flash', platform, dtype, length, head)
  assert 'set model.tower.attention=auto' in str(error.value)
  assert '\n' not in str(error.value)


def test_under_a_mesh_the_kernel_runs_on_shards():
  """It sees manual axes, and everything is put together again."""
  query, key, value = _arrays(2, 10, 2, 8)
  seen = []

  def kernel(q, k, v, segment):
    seen.append(set(jax.typeof(q).sharding.mesh.manual_axes))
    return attend_causal(q, LayerKV(k, v), segment > 0, segment)

  expected = attend_causal(query, LayerKV(key, value), jnp.asarray(SEGMENTS > 0), jnp.asarray(SEGMENTS))
  axes = ('data', 'fsdp', 'model')
  with jax.set_mesh(jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)):
    run = jax.jit(lambda q, k, v, s: attention.on_shards(kernel, q, LayerKV(k, v), s))
    got = run(query, key, value, SEGMENTS)
  assert seen == [set(axes)]
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', ['context', 'crossing'])
def test_the_softmax_of_bfloat16_is_computed_in_float32(form):
  """Many equal small weights beside one large: bfloat16 sums stop growing at 256 equal terms, float32 sums do not."""
  length, width = 1024, 8
  query = jnp.ones((1, length, 1, width), jnp.bfloat16)
  key = jnp.zeros((1, length, 1, width), jnp.bfloat16)
  value = jnp.ones((1, length, 1, width), jnp.bfloat16)
  mask = jnp.ones((1, length), bool)
  kv = LayerKV(key, value)
  if form == 'context':
    got = attend_causal(query, kv, mask)
    text = str(jax.make_jaxpr(lambda q: attend_causal(q, kv, mask))(query))
  else:
    one = LayerKV(key[:, :1], value[:, :1])
    got = attend_context(query[:, :1], kv, mask, one)
    text = str(jax.make_jaxpr(lambda q: attend_context(q, kv, mask, one))(query[:, :1]))
  np.testing.assert_allclose(np.asarray(got, np.float32), 1, atol=0.01)
  exponents = re.findall(r'(\w+)\[[\d,]*\] = exp ', text)
  assert set(exponents) == {'f32'}
  sums = re.findall(r'(\w+)\[[\d,]*\] = reduce_sum', text)
  assert set(sums) == {'f32'}


_SHARDS = """
import jax, jax.numpy as jnp, numpy as np
from pinfm_jax.model.attention import on_shards
from pinfm_jax.model.dcat import LayerKV, attend_causal
query, key, value = (jax.random.normal(k, (4, 6, 4, 8)) for k in jax.random.split(jax.random.key(0), 3))
segment = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2]], 2, axis=0), jnp.int32)
expected = attend_causal(query, LayerKV(key, value), segment > 0, segment)
for sizes, users, heads in (((2, 2, 2), 1, 2), ((4, 1, 2), 1, 2), ((1, 1, 8), 4, 4), ((8, 1, 1), 4, 4)):
  seen = set()
  def kernel(q, k, v, s):
    seen.add(q.shape)
    return attend_causal(q, LayerKV(k, v), s > 0, s)
  with jax.set_mesh(jax.make_mesh(sizes, ('data', 'fsdp', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 3)):
    got = jax.jit(lambda q, k, v, s: on_shards(kernel, q, LayerKV(k, v), s))(query, key, value, segment)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert seen == {(users, 6, heads, 8)}, (sizes, seen)
on_shards(lambda q, k, v, s: seen.add(bool(jax.typeof(q).sharding.mesh.manual_axes)), query, LayerKV(key, value), None)
assert False in seen, 'without a mesh the kernel is called as it is'
print('equal')
"""


def test_each_of_eight_devices_runs_the_kernel_on_its_users_and_heads():
  """Axes that divide split users and heads; those that do not leave them whole."""
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  done = subprocess.run(
    [sys.executable, '-c', _SHARDS], env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=300
  )
  assert done.stdout.strip() == 'equal', done.stderr[-2000:]
