"""The decoder's options change memory and speed, not results: rematerialisation, bfloat16, flash attention."""

import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.bench.tower import block_products, measure_tower, plain_matmuls, plain_operands
from pinfm_jax.checks import check_experiment
from pinfm_jax.config import Experiment, PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model import attention
from pinfm_jax.model.pinfm import EventBatch, PinFM
from pinfm_jax.model.transformer import Decoder

USERS, LENGTH = 2, 64
TOWERS = {
  backbone: TowerConfig(backbone, layers=4, width=32, heads=2, max_positions=LENGTH, output_width=16)
  for backbone in ('gpt2', 'sasrec', 'hstu')
}


def _inputs(tower, users=USERS, length=LENGTH):
  x = jax.random.normal(jax.random.key(0), (users, length, tower.width))
  mask = jnp.arange(length)[None] < jnp.linspace(length // 2, length, users, dtype=jnp.int32)[:, None]
  params = jax.jit(lambda x: Decoder(tower).init(jax.random.key(1), x, mask, method='context'))(x)
  return nn.unbox(params), x, mask


def _gradients(tower, mask):
  """Parameters and inputs -> loss and its gradients."""

  def loss(params, x):
    output, _ = Decoder(tower).apply(
      params, x.astype(tower.dtype), mask, train=True, rngs={'dropout': jax.random.key(3)}, method='context'
    )
    weight = jax.random.normal(jax.random.key(2), output.shape) * mask[..., None]
    return jnp.sum(weight * output.astype(jnp.float32))

  return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize('backbone', ['gpt2', 'sasrec', 'hstu'])
def test_rematerialisation_saves_memory_and_changes_nothing(backbone):
  tower = replace(TOWERS[backbone], dropout=0.1)  # the same elements must drop out again
  params, x, mask = _inputs(tower)
  results, memory = {}, {}
  for remat in ('none', 'dots', 'full'):
    compiled = jax.jit(_gradients(replace(tower, remat=remat), mask)).lower(params, x).compile()
    memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    results[remat] = compiled(params, x)
  assert memory['full'] < memory['dots'] < memory['none']
  assert memory['full'] < memory['none'] / 2
  for remat in ('dots', 'full'):
    assert jax.tree.structure(results[remat]) == jax.tree.structure(results['none'])  # the layout too
    for a, b in zip(jax.tree.leaves(results[remat]), jax.tree.leaves(results['none']), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('backbone', 'tolerance'), [('gpt2', 0.02), ('sasrec', 0.02), ('hstu', 0.04)])
def test_bfloat16_stays_near_float32(backbone, tolerance):
  """Root mean square over that of the outputs, after 4 layers.

  A layer rounds its activations about 8 times by at most 2^-9. HSTU's second norm takes out a mean that is larger
  than what is left, so the same roundings weigh more.
  """
  tower = TOWERS[backbone]
  config = PinFMConfig(TableConfig(sub_tables=2, rows=10, width=8), tower, num_actions=3, num_surfaces=2)
  mask = jnp.arange(LENGTH)[None] < jnp.array([[40], [LENGTH]])
  events = EventBatch(
    jnp.zeros((USERS, LENGTH, 2), jnp.uint32),
    jnp.zeros((USERS, LENGTH), jnp.int32),
    jnp.ones((USERS, LENGTH), jnp.uint32),
    mask,
  )
  vectors = jax.random.normal(jax.random.key(0), (USERS, LENGTH, 16))
  params = nn.unbox(jax.jit(PinFM(config).init)(jax.random.key(1), vectors, events))
  outputs = {}
  for dtype in ('float32', 'bfloat16'):
    model = PinFM(replace(config, tower=replace(tower, dtype=dtype)))
    h, kv = jax.jit(lambda p, v, model=model: model.apply(p, v, events, method='encode'))(params, vectors)
    crossed = jax.jit(lambda p, v, kv, model=model: model.apply(p, v, kv, mask, method='cross'))
    outputs[dtype] = (h[mask], crossed(params, vectors[:, :3], kv))
    assert kv.key.dtype == dtype
    assert h.dtype == jnp.float32  # what the losses see
  for low, full in zip(outputs['bfloat16'], outputs['float32'], strict=True):
    error = np.sqrt(np.mean(np.square(low - full)) / np.mean(np.square(full)))
    assert 1e-4 < error < tolerance


@pytest.mark.parametrize('backbone', ['gpt2', 'hstu'])
def test_bfloat16_keeps_statistics_and_weights_in_float32(backbone):
  """No sum, mean, exponential or square root of the traced program is of bfloat16; its matmuls are."""
  tower = replace(TOWERS[backbone], layers=1, dtype='bfloat16')
  params, x, mask = _inputs(tower)
  text = str(jax.make_jaxpr(lambda p, x: Decoder(tower).apply(p, x, mask, method='context')[0])(params, x))
  low = set(re.findall(r'bf16\[[\d,]*\] = (\w+)', text))
  assert 'dot_general' in low
  assert not low & {'exp', 'rsqrt', 'sqrt', 'reduce_sum', 'reduce_max', 'cumsum', 'div'}
  # Users and heads are one axis. GPT-2's scores are made in four blocks of queries, each with the keys up to its end.
  shapes = ['4,64,64'] if backbone == 'hstu' else [f'4,16,{keys}' for keys in (16, 32, 48, 64)]
  for shape in shapes:
    assert f'f32[{shape}] = dot_general' in text


@pytest.mark.parametrize(('platform', 'call'), [('cuda', '__cudnn$fmhaSoftmaxBackward'), ('tpu', 'splash_mha_dkv')])
def test_the_whole_decoder_lowers_with_the_flash_kernel(monkeypatch, platform, call):
  import jax._src.cudnn.fused_attention_stablehlo as fused

  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91100)
  tower = replace(TOWERS['gpt2'], width=128, layers=2, dtype='bfloat16', remat='dots', attention='flash')
  params, x, mask = _inputs(tower, length=256)  # `init` needs no kernel
  monkeypatch.setattr(attention, 'current_platform', lambda: platform)
  mesh = jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    text = jax.jit(_gradients(tower, mask)).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
  assert call in text
  assert '2x2x256x256' not in text  # no scores [U, H, L, L]


def test_flash_on_this_machine_is_refused():
  tower = replace(TOWERS['gpt2'], attention='flash')
  params, x, mask = _inputs(tower)
  with pytest.raises(UserError, match="attention is 'flash', but .* this is cpu"):
    Decoder(tower).apply(params, x, mask, method='context')


@pytest.mark.parametrize(
  ('tower', 'message'),
  [
    (TowerConfig(backbone='gpt3'), 'expected one of: gpt2, sasrec, padded_sasrec, hstu'),
    (TowerConfig(remat='some'), 'expected one of: none, full, dots'),
    (TowerConfig(attention='fast'), 'expected one of: auto, xla, flash'),
    (TowerConfig(backbone='hstu', attention='flash'), "'hstu' has none"),
  ],
)
def test_settings_that_cannot_work_are_refused(tower, message):
  with pytest.raises(UserError, match=message):
    check_experiment(Experiment('x', model=PinFMConfig(tower=tower)))


def test_the_layout_of_gpt2_parameters_is_that_of_earlier_checkpoints():
  params, _, _ = _inputs(TOWERS['gpt2'])
  block = {
    'norm_attention': {'scale', 'bias'},
    'query_key_value': {'kernel', 'bias'},
    'attention_out': {'kernel', 'bias'},
    'norm_mlp': {'scale', 'bias'},
    'mlp_in': {'kernel', 'bias'},
    'mlp_out': {'kernel', 'bias'},
  }
  found = params['params']
  assert set(found) == {'blocks', 'last', 'norm'}
  for part in ('blocks', 'last'):
    assert {name: set(layer) for name, layer in found[part].items()} == block
  assert found['blocks']['query_key_value']['kernel'].shape == (3, 32, 96)


@pytest.mark.parametrize('backbone', ['gpt2', 'hstu'])
def test_the_bench_counts_what_it_runs(backbone):
  tower = replace(TOWERS[backbone], layers=2)
  products = block_products(tower, USERS, 16)
  counted = sum(product.flops for product in products)
  cost = jax.jit(plain_matmuls).lower(plain_operands(products, jnp.float32)).compile().cost_analysis()
  assert cost['flops'] == counted
  tokens, width = USERS * 16, tower.width
  expected = {'gpt2': 12, 'hstu': 5}[backbone] * width**2 * tokens + 2 * tokens * 16 * width
  assert counted == 6 * expected
  figures = measure_tower(tower, users=USERS, length=16, repeats=2)
  assert figures['flops'] == 2 * counted
  assert figures['ratio_min'] <= figures['ratio_median'] <= figures['ratio_max']
  assert figures['ratio'] == figures['plain_seconds'] / figures['tower_seconds']
