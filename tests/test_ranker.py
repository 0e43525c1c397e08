"""The ranking model: features, crossing, the module in it; serving's two passes equal training's one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from oracle_interaction import interaction_width
from toy_bundle import LENGTH, MODEL, SCHEMA, SPEC, make_content, make_history, make_request, make_toy, ranking_batch
from toy_bundle import vectors as item_vectors

from pinfm_jax.config import ColdStartConfig, InteractionConfig, RankerConfig, TransActConfig
from pinfm_jax.model.features import ranker_fields, sparse_width
from pinfm_jax.model.interaction.cross import CrossNetwork
from pinfm_jax.model.interaction.fields import FieldInputs, total_width
from pinfm_jax.model.interaction.settings import INTERACTIONS
from pinfm_jax.model.ranker import DenseStats, FeatureLayer, FeatureSpec, Ranker, RankingModel

# One position more than events and candidate need: a token may stand between them.
LONGER = replace(MODEL, tower=replace(MODEL.tower, max_positions=LENGTH + 2))
LENGTHS = (0, 1, 7, 30)  # events before the request; the window holds 20


@pytest.fixture(scope='module')
def toy():
  return _toy()


@pytest.fixture(scope='module')
def batch():
  examples = [
    (make_history(i, length + 2), make_request(i, length, i), make_content(i)) for i, length in enumerate(LENGTHS)
  ]
  return jax.tree.map(jnp.asarray, ranking_batch(examples))


def _toy(**arguments):
  made = make_toy(**arguments)
  return replace(made, params=jax.tree.map(jnp.asarray, made.params))


def _apply(toy, batch, vectors=None, **changes):
  vectors = vectors or item_vectors(toy.rows_GE, batch)
  return jax.jit(lambda p, v, b: toy.module.apply({'params': p}, *v, b, toy.stats, **changes))(
    toy.params, vectors, batch
  )


def _unit(x):
  return x / np.sqrt(np.maximum(np.sum(np.square(x), axis=-1, keepdims=True), 1e-12))


def test_dense_stats_against_numpy():
  low, high = np.array([0, -1, 2, 5.0]), np.array([10, 1, 2, 8.0])  # wide, narrow, constant, wide
  mean, scale = np.array([1.5, 0.2, 0, 0.7]), np.array([2.0, 3.0, 0, 0.5])
  stats = DenseStats(*(jnp.asarray(x, jnp.float32) for x in (low, high, mean, scale)))
  x = np.random.default_rng(0).normal(3, 6, (5, 7, 4))
  x[0, 0], x[1, 1, 0], x[1, 2, 0], x[2, :, 2] = np.nan, np.inf, -np.inf, 77
  found = np.asarray(stats.apply(jnp.asarray(x, jnp.float32)))
  expected = np.zeros_like(x)
  for place in np.ndindex(x.shape):
    f, value = place[-1], x[place]
    if not np.isnan(value):
      shifted = min(max(value, low[f]), high[f]) - low[f]
      expected[place] = ((np.log1p(shifted) if high[f] - low[f] > 2 else shifted) - mean[f]) * scale[f]
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert not found[0, 0].any()  # missing = the mean
  assert not found[..., 2].any()  # constant


def test_the_feature_layer_against_numpy(toy, batch):
  layer, params = FeatureLayer(SPEC, toy.ranker), toy.params['ranker']['features']
  found = jax.jit(lambda p, c: layer.apply({'params': p}, c, toy.stats))(params, batch.candidates)
  parts = [np.asarray(toy.stats.apply(batch.candidates.dense_UCF))]
  for i, size in enumerate(SPEC.sparse_sizes):
    table = params[f'sparse_{i}']
    assert table.shape == (size, sparse_width(size, toy.ranker.max_sparse_width))
    parts.append(_unit(table[np.asarray(batch.candidates.sparse_UCF)[..., i]]))
  start = 0
  for i, width in enumerate(SPEC.embedding_widths):
    x = _unit(np.asarray(batch.candidates.embedding_UCF)[..., start : start + width])
    weights = params[f'embedding_{i}']
    parts.append(_unit(x @ weights['kernel'] + weights['bias']))
    start += width
  np.testing.assert_allclose(found, np.concatenate(parts, axis=-1), atol=2e-6)


@pytest.mark.parametrize('spec', [FeatureSpec(3, (), (), 2), FeatureSpec(0, (5,), (), 2), FeatureSpec(0, (), (4,), 2)])
def test_any_kind_of_feature_may_be_absent(batch, spec):
  candidates = batch.candidates._replace(
    dense_UCF=np.ones((4, 5, spec.num_dense), np.float32),
    sparse_UCF=np.ones((4, 5, len(spec.sparse_sizes)), np.int32),
    embedding_UCF=np.ones((4, 5, sum(spec.embedding_widths)), np.float32),
  )
  stats = DenseStats(*([jnp.ones(spec.num_dense)] * 4))
  logits, _ = jax.jit(lambda key: Ranker(spec, RankerConfig(mlp=(4,))).init_with_output(key, candidates, stats, None))(
    jax.random.key(0)
  )
  assert logits.shape == (4, 5, 2)
  assert np.all(np.isfinite(logits))


@pytest.mark.parametrize('layers', [0, 1, 3])
def test_the_cross_network_against_numpy(layers):
  x0 = np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float32)
  shapes = jax.eval_shape(CrossNetwork(layers).init, jax.random.key(0), x0).get('params', {})
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
  assert len(params) == layers
  x = x0
  for i in range(layers):
    weights = jax.tree.leaves(params[f'Dense_{i}'])  # bias, kernel
    x = x0 * (x @ weights[1] + weights[0]) + x
  found = CrossNetwork(layers).apply({'params': params}, x0)
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def test_the_default_block_has_the_parameters_and_numbers_of_before(batch):
  """Bundles and checkpoints hold them: x0 beside the crossed x0, bit for bit."""
  ranker, stats = RankerConfig(cross_layers=2, mlp=(6,)), DenseStats(*([jnp.ones(SPEC.num_dense)] * 4))
  modules_UCM = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 129)), jnp.float32)
  module = Ranker(SPEC, ranker)
  params = meta.unbox(jax.jit(module.init)(jax.random.key(0), batch.candidates, stats, modules_UCM)['params'])
  assert set(params) == {'features', 'cross', 'mlp_0', 'heads'}
  assert list(params['cross']) == ['Dense_0', 'Dense_1']

  def before(p):
    x0 = FeatureLayer(SPEC, ranker).apply({'params': p['features']}, batch.candidates, stats)
    x = x0 = jnp.concatenate([x0, modules_UCM], axis=-1)
    for weights in p['cross'].values():
      x = x0 * (x @ weights['kernel'] + weights['bias']) + x
    x = jax.nn.relu(jnp.concatenate([x0, x], axis=-1) @ p['mlp_0']['kernel'] + p['mlp_0']['bias'])
    return x @ p['heads']['kernel'] + p['heads']['bias']

  found = jax.jit(lambda p: module.apply({'params': p}, batch.candidates, stats, modules_UCM))(params)
  np.testing.assert_array_equal(found, jax.jit(before)(params))


@pytest.mark.parametrize('concat', [True, False])
def test_the_mlp_reads_the_block_and_maybe_its_input(batch, concat):
  spec, stats = replace(SPEC, embedding_widths=(4, 4)), DenseStats(*([jnp.ones(SPEC.num_dense)] * 4))
  candidates = batch.candidates._replace(embedding_UCF=jnp.zeros((4, 5, 8)))
  for name in INTERACTIONS:
    block = InteractionConfig(concat=concat, most_field_width=16, field_norm=True, field_gates=True)
    ranker = RankerConfig(interaction=name, mlp=(6,), block=block)
    init = lambda key, ranker=ranker: Ranker(spec, ranker).init(key, candidates, stats, jnp.zeros((4, 5, 129)))
    params = meta.unbox(jax.eval_shape(init, jax.random.key(0))['params'])
    fields = FieldInputs(ranker_fields(spec, ranker, True), 16).made
    assert {field.width for field in fields if field.kind in ('embedding', 'module')} == {16, 1}
    width = interaction_width(ranker, fields) + (total_width(fields) if concat and name != 'none' else 0)
    assert params['mlp_0']['kernel'].shape == (width, 6), name


def test_the_fields_of_a_ranker_are_its_inputs_one_by_one():
  ranker = RankerConfig(embedding_width=6, module_width=5, transact=TransActConfig(length=9, width=2, outputs=2))
  fields = ranker_fields(FeatureSpec(3, (5, 10**6), (7, 7), 1), ranker, True)
  assert [(f.name, f.width) for f in fields] == [
    ('dense_0', 3), ('sparse_0', 4), ('sparse_1', 32), ('embedding_0', 6), ('embedding_1', 6),
    ('module_0', 5), ('module_1', 5), ('module_2', 1), ('module_3', 6), ('module_4', 6), ('module_5', 6),
  ]  # fmt: skip
  assert [f.start for f in fields] == [0, 3, 7, 39, 45, 51, 56, 61, 62, 68, 74]
  assert [f.kind for f in ranker_fields(FeatureSpec(0, (), (7,), 1), ranker, False)] == ['embedding']


@pytest.mark.parametrize(
  ('size', 'most', 'width'), [(2, 32, 4), (10, 32, 4), (100, 32, 8), (65_537, 32, 32), (10**9, 16, 16)]
)
def test_sparse_width(size, most, width):
  assert sparse_width(size, most) == width


VARIANTS = {
  'base': {},
  'content': {'candidate_content': True},
  'token': {'learnable_token': True, 'similarity_width': 6},
  'both': {'candidate_content': True, 'learnable_token': True, 'user_output': True},
  'mean': {'fusion': 'mean', 'similarity_width': 6, 'user_output': True},
  'last': {'fusion': 'last', 'similarity': False},
  'bidirectional': {'bidirectional': True, 'learnable_token': True},
}


@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_context_and_score_equal_the_training_path(batch, options):
  toy = _toy(model=LONGER, **options)
  vectors_ULV, vectors_UCV = item_vectors(toy.rows_GE, batch)
  weights = {'params': toy.params}
  context = jax.jit(lambda v, e: toy.module.apply(weights, v, e, method='context'))(vectors_ULV, batch.events)
  found = jax.jit(lambda v, c, b: toy.module.apply(weights, v, c, b, toy.stats, method='score'))(
    vectors_UCV, context, batch.candidates
  )
  np.testing.assert_allclose(found, jax.nn.sigmoid(_apply(toy, batch).logits_UCT), atol=1e-6, rtol=0)
  with_history = _apply(toy, batch, need_history_output=True)
  np.testing.assert_allclose(found, jax.nn.sigmoid(with_history.logits_UCT), atol=1e-6, rtol=0)
  assert with_history.h_ULO.shape == (4, LENGTH, MODEL.tower.output_width)


def test_the_user_and_the_similarity_are_inputs(batch):
  toy = _toy(similarity_width=6, user_output=True)
  draw, width = np.random.default_rng(0).normal, MODEL.tower.output_width
  output_UCO, z_UCO, user_UO = draw(size=(2, 3, width)), draw(size=(2, 3, width)), draw(size=(2, width))
  items_UCV = draw(size=(2, 3, MODEL.tables.item_width))
  found = toy.module.apply({'params': toy.params}, output_UCO, items_UCV, z_UCO, user_UO, method='_module')
  layer = jax.tree.map(np.asarray, toy.params['project_similarity'])
  terms_UCO = user_UO[:, None] * z_UCO
  own = jax.tree.map(np.asarray, toy.params['project_user'])
  user_UO = np.broadcast_to((user_UO @ own['kernel'] + own['bias'])[:, None], (2, 3, 8))
  np.testing.assert_allclose(found[..., -15:-7], user_UO, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[..., -7], terms_UCO.sum(axis=-1), rtol=1e-5)
  np.testing.assert_allclose(found[..., -6:], terms_UCO @ layer['kernel'] + layer['bias'], rtol=1e-4, atol=1e-5)


def test_the_token_variants_learn(batch):
  toy = _toy(model=LONGER, **VARIANTS['both'])
  loss = lambda p, v: toy.module.apply({'params': p}, *v, batch, toy.stats).logits_UCT.sum()
  grads = jax.jit(jax.grad(loss))(toy.params, item_vectors(toy.rows_GE, batch))
  for name, shape in (('learnable_token', (16,)), ('candidate_content', (2, 16))):
    assert grads[name].shape == shape
    assert np.all(np.isfinite(grads[name]))
    assert np.all(grads[name] != 0)


def test_the_token_leaves_the_representation_of_the_history_alone(batch):
  """It stands behind the events, so no event sees it: what pretraining taught stays."""
  toy = _toy(model=LONGER, **VARIANTS['token'])
  base = replace(toy, ranker=replace(toy.ranker, learnable_token=False))
  with_token, without = (_apply(t, batch, need_history_output=True) for t in (toy, base))
  real = np.asarray(batch.events.mask_UL)
  np.testing.assert_allclose(with_token.h_ULO[real], without.h_ULO[real], atol=1e-6)
  assert np.all(np.abs(with_token.logits_UCT - without.logits_UCT) > 1e-6)


def test_candidate_content_needs_content(batch):
  module = RankingModel(MODEL, RankerConfig(candidate_content=True), replace(SPEC, content_width=0))
  arrays = (jnp.zeros((4, LENGTH, 16)), jnp.zeros((4, 5, 16)))
  with pytest.raises(ValueError, match='content vectors'):
    jax.eval_shape(lambda key: module.init(key, *arrays, batch, None), jax.random.key(0))


def test_a_user_without_events_works_and_padding_means_nothing(toy, batch):
  assert not np.asarray(batch.events.mask_UL)[0].any()
  vectors_ULV, vectors_UCV = item_vectors(toy.rows_GE, batch)
  expected = _apply(toy, batch)
  assert np.all(np.isfinite(expected.logits_UCT))
  padded = ~np.asarray(batch.events.mask_UL)
  garbage = np.where(padded[..., None], 1e3 * np.cos(np.arange(vectors_ULV.shape[-1])), vectors_ULV)
  events = batch.events._replace(
    surface_UL=np.where(padded, 1, batch.events.surface_UL),
    actions_UL=np.where(padded, np.uint32(7), batch.events.actions_UL),
  )
  found = _apply(toy, batch._replace(events=events), (garbage.astype(np.float32), vectors_UCV))
  np.testing.assert_allclose(found.logits_UCT, expected.logits_UCT, atol=1e-5)
  context = jax.jit(lambda v, e: toy.module.apply({'params': toy.params}, v, e, method='context'))(
    vectors_ULV, batch.events
  )
  assert not np.any(context.user_UO[0])
  np.testing.assert_allclose(np.linalg.norm(context.user_UO[1:], axis=-1), 1, atol=1e-5)


def test_the_history_changes_the_scores_and_candidates_do_not_see_each_other(toy, batch):
  expected = np.asarray(_apply(toy, batch).logits_UCT)
  vectors_ULV, vectors_UCV = item_vectors(toy.rows_GE, batch)
  found = np.asarray(_apply(toy, batch, (vectors_ULV[::-1].copy(), vectors_UCV)).logits_UCT)
  assert np.abs(found - expected)[1:].max() > 1e-2
  other = np.array(vectors_UCV)
  other[:, 2] += 1
  found = np.asarray(_apply(toy, batch, (vectors_ULV, other)).logits_UCT)
  np.testing.assert_allclose(np.delete(found, 2, axis=1), np.delete(expected, 2, axis=1), atol=1e-5)
  assert np.abs(found - expected)[:, 2].max() > 1e-2


def test_a_ranker_without_pinfm_ignores_the_history(batch):
  toy = make_toy('none')
  assert set(toy.params) == {'ranker'}
  output = _apply(toy, batch, (None, None))
  assert output.module_logits_UCT is None
  assert output.h_ULO is None
  events = jax.tree.map(lambda x: np.zeros_like(x), batch.events)
  np.testing.assert_array_equal(output.logits_UCT, _apply(toy, batch._replace(events=events), (None, None)).logits_UCT)
  dense = batch.candidates._replace(dense_UCF=batch.candidates.dense_UCF + 2)
  assert np.any(output.logits_UCT != _apply(toy, batch._replace(candidates=dense), (None, None)).logits_UCT)


def test_an_unknown_module_is_refused(batch):
  model = RankingModel(MODEL, RankerConfig(sequence='gru'), SPEC)
  with pytest.raises(ValueError, match="ranker.sequence is 'gru'; expected 'pinfm' or 'none'"):
    model.init(jax.random.key(0), None, None, batch, DenseStats(*([jnp.zeros(4)] * 4)))


def test_dropout_by_age_acts_in_training_alone(toy, batch):
  model = RankingModel(MODEL, toy.ranker, SPEC, ColdStartConfig(age_edges_hours=(1e9,), age_dropout=(0.9,)))
  ages = np.full(batch.candidates.mask_UC.shape, 5.0, np.float32)
  batch = batch._replace(candidates=batch.candidates._replace(age_hours_UC=ages))
  vectors = item_vectors(toy.rows_GE, batch)
  run = jax.jit(
    lambda train, step: model.apply({'params': toy.params}, *vectors, batch, toy.stats, step, train).logits_UCT,
    static_argnums=0,
  )
  np.testing.assert_allclose(run(False, 0), _apply(toy, batch).logits_UCT, atol=1e-6)
  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  assert np.any(run(True, 0) != run(False, 0))
  assert np.any(run(True, 0) != run(True, 1))


def test_the_schema_sizes_the_layers(toy):
  heads = toy.params['ranker']['heads']['kernel']
  assert heads.shape[-1] == len(SCHEMA.labels)
  assert SPEC.num_dense == len(SCHEMA.dense_names) == 4
