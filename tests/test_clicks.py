"""Rankers on click-through tables: what is learned, the penalty, when training stops, what is kept, what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_click_through import write_criteo

from pinfm_jax.cli import main
from pinfm_jax.clicks import compare
from pinfm_jax.clicks import train as train_module
from pinfm_jax.clicks.config import ClickData, ClickExperiment, ClickTraining, check_clicks, load_clicks
from pinfm_jax.clicks.train import Rates, click_spec, click_stats, measure_clicks, penalty, score_clicks, train_clicks
from pinfm_jax.config import Arm, RankerConfig
from pinfm_jax.data.click_through import ClickTable, SplitOptions, load_click_table
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.model.features import CandidateBatch, FeatureLayer, ranker_fields
from pinfm_jax.model.ranker import Ranker

RANKER = RankerConfig(sequence='none', cross_layers=1, mlp=(8,), sparse_width=4, raw_embeddings=True)
TRAINING = ClickTraining(epochs=6, batch=128, learning_rate=0.02, patience=2)
LAUNCH = """
from pinfm_jax.clicks.config import ClickExperiment
from test_clicks import RANKER, TRAINING
from pinfm_jax.config import Arm
clicks = ClickExperiment(
  name='x', ranker=RANKER, training=TRAINING, arms=(Arm('cross'), Arm('none', {'ranker.interaction': 'none'})),
  baseline='cross', seeds=(0,),
)
"""


@pytest.fixture(scope='module')
def table():
  """Clicks that the product of two categories decides, with a dense feature that has missing values."""
  rng = np.random.default_rng(0)
  rows = 3000
  sparse_NF = rng.integers(2, 6, (rows, 2)).astype(np.int32)
  dense_NF = rng.lognormal(0, 2, (rows, 2)).astype(np.float32)
  dense_NF[rng.random((rows, 2)) < 0.1] = np.nan
  sign = np.where(sparse_NF[:, 0] % 2 == 0, 1, -1) * np.where(sparse_NF[:, 1] < 4, 1, -1)
  label_N = (rng.random(rows) < 1 / (1 + np.exp(-2.0 * sign))).astype(np.uint8)
  part_N = np.repeat(np.arange(3), (2000, 500, 500)).astype(np.uint8)[rng.permutation(rows)]
  names = {'a': range(4), 'b': range(4)}
  return ClickTable(dense_NF, sparse_NF, label_N, part_N, ('x', 'y'), names, 'made', 'none', (), SplitOptions())


@pytest.fixture(scope='module')
def trained(table):
  return train_clicks(table, RANKER, TRAINING, 0, 'test')


def test_a_product_of_categories_is_learned(table, trained):
  found = measure_clicks(table, RANKER, trained.params, click_stats(table), 'validation')
  rows = table.rows_of('validation')
  sign = np.where(table.sparse_NF[rows, 0] % 2 == 0, 1, -1) * np.where(table.sparse_NF[rows, 1] < 4, 1, -1)
  best = metrics.auc(table.label_N[rows], sign.astype(float))
  assert found['auc'] > best - 0.02
  assert found['logloss'] == pytest.approx(trained.looks[trained.best]['logloss'], abs=1e-6)
  assert trained.best == int(np.argmin([look['logloss'] for look in trained.looks]))


def test_scores_are_the_rankers_whatever_the_batch(table, trained):
  """Against the module applied to each row as a request of its own."""
  rows = table.rows_of('test')[:5]
  found = score_clicks(table, RANKER, trained.params, click_stats(table), rows)
  module = Ranker(click_spec(table), RANKER)
  for row, score in zip(rows, found, strict=True):
    dense, sparse = jnp.asarray(table.dense_NF[row][None, None]), jnp.asarray(table.sparse_NF[row][None, None])
    one = CandidateBatch(None, None, None, dense, sparse, jnp.zeros((1, 1, 0)))
    logit = module.apply({'params': trained.params}, one, click_stats(table), None)[0, 0, 0]
    assert score == pytest.approx(1 / (1 + np.exp(-float(logit))), rel=1e-5)


@pytest.mark.parametrize('raw', [False, True])
def test_embeddings_of_one_width_enter_as_they_are_or_at_unit_length(table, raw):
  config, rows = replace(RANKER, sparse_width=5, raw_embeddings=raw), table.sparse_NF[:7]
  layer, stats = FeatureLayer(click_spec(table), config), click_stats(table)
  one = CandidateBatch(None, None, None, jnp.asarray(table.dense_NF[:7]), jnp.asarray(rows), jnp.zeros((7, 0)))
  x0, variables = layer.init_with_output(jax.random.key(0), one, stats)
  assert x0.shape == (7, 2 + 2 * 5)
  fields = ranker_fields(click_spec(table), config, modules=False)
  assert [(field.kind, field.start, field.width) for field in fields] == [
    ('dense', 0, 2),
    ('sparse', 2, 5),
    ('sparse', 7, 5),
  ]
  for i in range(2):
    expected = np.asarray(variables['params'][f'sparse_{i}'], np.float64)[rows[:, i]]
    if not raw:
      expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(x0[:, 2 + 5 * i : 7 + 5 * i], expected, rtol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(table, trained):
  short = replace(TRAINING, epochs=1)
  first, second, third = (train_clicks(table, RANKER, short, seed, 'test').params for seed in (0, 0, 1))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b)
  assert any((a != c).any() for a, c in zip(jax.tree.leaves(first), jax.tree.leaves(third), strict=True))


def test_the_penalty_is_half_the_squares_of_embeddings_and_kernels(trained):
  params = trained.params
  rates = Rates(jnp.float32(0), jnp.float32(0.3), jnp.float32(0.07))
  flat = {'/'.join(key.key for key in path): np.asarray(value, np.float64)
          for path, value in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
  tables = sum((value**2).sum() for name, value in flat.items() if name.startswith('features/sparse_'))
  kernels = sum((value**2).sum() for name, value in flat.items() if name.endswith('kernel'))
  assert sum(name.startswith('features/sparse_') for name in flat) == 2
  assert float(penalty(params, rates)) == pytest.approx(0.15 * tables + 0.035 * kernels, rel=1e-5)
  grads = jax.grad(penalty)(params, rates)
  np.testing.assert_allclose(grads['features']['sparse_0'], 0.3 * params['features']['sparse_0'], rtol=1e-5)
  np.testing.assert_array_equal(grads['heads']['bias'], 0)


def test_a_large_penalty_makes_small_embeddings(table, trained):
  small = train_clicks(table, RANKER, replace(TRAINING, epochs=2, embedding_l2=0.1), 0, 'test').params
  norms = [float(np.square(params['features']['sparse_0']).sum()) for params in (small, trained.params)]
  assert norms[0] < 0.1 * norms[1]


def test_training_stops_after_patience_and_keeps_the_best(table, monkeypatch):
  """The logloss of the looks is made up: the rate is multiplied at each look that is no better."""
  values, rates, weights = iter([0.6, 0.5, 0.55, 0.52, 0.4]), [], []
  programs = train_module._programs(RANKER, click_spec(table))

  def step(params, state, batch, stats, given, key):
    rates.append(float(given.learning_rate))
    return programs.step(params, state, batch, stats, given, key)

  def measure(table, ranker, params, stats, part):
    assert part == 'validation'
    weights.append(np.array(params['heads']['bias']))
    return {'auc': 0.5, 'logloss': next(values)}

  monkeypatch.setattr(train_module, '_programs', lambda *words: replace(programs, step=step))
  monkeypatch.setattr(train_module, 'measure_clicks', measure)
  found = train_clicks(table, RANKER, replace(TRAINING, decay=0.5), 0, 'test')
  assert [look['logloss'] for look in found.looks] == [0.6, 0.5, 0.55, 0.52]
  assert found.best == 1
  np.testing.assert_array_equal(found.params['heads']['bias'], weights[1])
  assert found.steps == 4 * (2000 // 128 + 1)
  look = 2000 // 128 + 1
  np.testing.assert_allclose(rates, [0.02] * 3 * look + [0.01] * look, rtol=1e-6)


def test_a_divergence_and_a_batch_that_is_too_large_are_told(table):
  with pytest.raises(UserError, match='the training diverged'):
    train_clicks(table, RANKER, replace(TRAINING, learning_rate=1e30, epochs=1), 0, 'test')
  with pytest.raises(UserError, match='training.batch is 5000, but there are 2000 training rows'):
    train_clicks(table, RANKER, replace(TRAINING, batch=5000), 0, 'test')


def test_a_run_is_kept_and_the_test_part_is_read_when_asked_for(table, tmp_path, monkeypatch, capsys):
  parts = []
  monkeypatch.setattr(compare, 'load_click_table', lambda *words, **options: table)
  monkeypatch.setattr(compare, 'measure_clicks', lambda *words: parts.append(words[-1]) or measure_clicks(*words))
  arms = (Arm('cross', {}, '.89'), Arm('none', {'ranker.interaction': 'none'}))
  training = replace(TRAINING, epochs=1)
  clicks = ClickExperiment('x', ClickData(path='there'), RANKER, training, arms, 'cross', seeds=(0, 1))
  first = compare.run_clicks(clicks, tmp_path, 'validation')
  assert set(parts) == {'validation'}
  written = {path: path.stat().st_mtime_ns for path in tmp_path.glob('seed*/*/weights.npz')}
  assert len(written) == 4
  assert compare.run_clicks(clicks, tmp_path, 'validation') == first
  assert len(parts) == 4
  compare.run_clicks(clicks, tmp_path, 'test')
  assert parts[4:] == ['test'] * 4
  assert {path: path.stat().st_mtime_ns for path in written} == written
  page = (tmp_path / 'validation' / 'results.md').read_text()
  for words in ('The test part was not read.', 'AUC against cross', 'seed noise', '.89', 'ranker.interaction=none'):
    assert words in page
  runs = json.loads((tmp_path / 'test' / 'results.json').read_text())['runs']
  assert [(one['arm'], one['seed']) for one in runs] == [('cross', 0), ('cross', 1), ('none', 0), ('none', 1)]
  assert 'The test part was not read' not in (tmp_path / 'test' / 'results.md').read_text()
  with pytest.raises(UserError, match=r'training.epochs=1, now it is 2'):
    compare.run_clicks(replace(clicks, training=replace(training, epochs=2)), tmp_path, 'test')


@pytest.mark.slow
def test_criteo_from_the_command_line(tmp_path, capsys):
  (tmp_path / 'launch.py').write_text(LAUNCH)
  (tmp_path / 'data').mkdir()
  folder = write_criteo(tmp_path / 'data', rows=400)[0]
  command = ['clicks', str(tmp_path / 'launch.py'), '--workdir', str(tmp_path / 'work'), '--only', 'cross', '--set',
             'data.source=criteo', f'data.path={folder}', 'data.options={"min_count": 2}', 'training.batch=64',
             'training.epochs=1', '--grid', 'training.learning_rate=0.01,0.02']  # fmt: skip
  assert main(command) == 0
  output = capsys.readouterr().out
  assert 'rows: 320 train, 40 validation, 40 test' in output
  runs = json.loads((tmp_path / 'work' / 'validation' / 'results.json').read_text())['runs']
  assert [one['arm'] for one in runs] == [f'cross training.learning_rate={rate}' for rate in ('0.01', '0.02')]
  assert load_click_table('criteo', folder, min_count=2).sparse_sizes[0] > 2


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--set', 'data.source=kaggle'], "data.source is 'kaggle'; expected one of: criteo, avazu, movielens"),
    (['--set', 'arms='], 'arms is empty'),
    (['--set', 'ranker.sequence=pinfm'], 'click-through tables have no histories'),
    (['--set', 'training.patience=0'], 'training.patience is 0; expected a positive number'),
    (['--set', 'training.learning_rate=-1'], 'training.learning_rate is -1.0; expected a finite number'),
    (['--set', 'training.decay=2'], 'training.decay is 2.0; expected at most 1'),
    (['--set', 'ranker.mlp=0'], 'ranker.mlp is (0,); expected numbers of at least 1'),
    (['--set', 'ranker.interaction=fmm'], "ranker.interaction is 'fmm'"),
    (['--grid', 'data.source=criteo,avazu'], '--grid changes data.source'),
    (['--only', 'x'], "--only got 'x'; the arms are: cross, none"),
    (['--seeds', '0'], '--seeds is 0'),
    ([], 'data.path is empty'),
  ],
)
def test_a_users_mistake_is_one_line(tmp_path, capsys, words, message):
  (tmp_path / 'launch.py').write_text(LAUNCH)
  assert main(['clicks', str(tmp_path / 'launch.py'), '--workdir', str(tmp_path / 'work'), *words]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_launch_files_of_another_kind_are_refused(tmp_path):
  with pytest.raises(UserError, match='is no file'):
    load_clicks(tmp_path / 'nothing.py')
  (tmp_path / 'other.py').write_text('experiment = 1')
  with pytest.raises(UserError, match='defines no `clicks`'):
    load_clicks(tmp_path / 'other.py')
  with pytest.raises(UserError, match='an arm may change'):
    check_clicks(ClickExperiment('x', arms=(Arm('a', {'data.path': 'b'}),), baseline='a'))
