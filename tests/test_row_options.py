"""Exact rows, Adam for table rows, running averages of the weights, and what ends a run early."""

import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import load_arrays

from pinfm_jax.config import MeshConfig, TableConfig, UpdateConfig
from pinfm_jax.model.hashing import EXACT_ROWS, hash_rows, key_words
from pinfm_jax.serve import reader
from pinfm_jax.train.checkpoint import Keep, plain
from pinfm_jax.train.loop import LoopConfig, train
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.restore import WarmStart, fresh_state, warm_started
from pinfm_jax.train.sharding import make_mesh
from pinfm_jax.train.step import evaluated, init_state, make_step
from pinfm_jax.train.stored_tables import StoredState

TABLES = TableConfig(sub_tables=1, rows=40, width=4, hash_seed=EXACT_ROWS)
ADAM = UpdateConfig(learning_rate=0.1, table_learning_rate=0.05, table_rule='adam', warmup_steps=0, clip_norm=0.0)


@dataclass(frozen=True)
class Rows:
  """Pulls the rows of the batch's ids, and one number, towards 1."""

  update: Update = Update(ADAM, 100, ema_decay=0.7, ema_tables=True)
  tables: TableConfig = TABLES

  def init(self, key):
    return {'pinfm': {'x': jax.random.normal(key)}, 'log_temperature': jnp.zeros(())}

  def ids(self, batch, step):
    return (batch['id'],)

  def observe(self, constants, batch, step):
    return constants

  def loss(self, params, vectors, batch, step, key, constants):
    loss = jnp.sum(jnp.square(vectors[0] - batch['y'])) + jnp.square(params['pinfm']['x'] - 1)
    return loss, {}


def _batches(first_step):
  step = first_step
  while True:
    rng = np.random.default_rng(step)
    ids = rng.integers(0, 38, (2, 3)).astype(np.uint64)
    yield {'id': key_words(ids), 'y': rng.normal(size=(2, 3, 1)).astype(np.float32)}
    step += 1


def test_exact_rows_are_the_ids():
  keys = np.array([0, 1, 37, 38, 39, 40, 2**32, 2**32 + 1, 2**64 - 1], np.uint64)
  for sub_tables in (1, 2):
    expected = np.array([0, 1, 37, 38, 39, 39, 39, 39, 39])[:, None] + 40 * np.arange(sub_tables)
    np.testing.assert_array_equal(hash_rows(key_words(keys), sub_tables, 40, EXACT_ROWS), expected)
    np.testing.assert_array_equal(hash_rows(jnp.asarray(key_words(keys)), sub_tables, 40, EXACT_ROWS), expected)
    np.testing.assert_array_equal(reader.hash_rows(keys, sub_tables, 40, EXACT_ROWS), expected)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig())


@pytest.fixture(scope='module')
def history(mesh):
  """States after each of six steps, and the batches."""
  task, states = Rows(), []
  state, step = init_state(task, mesh, 0)(), make_step(Rows())
  stream, batches = _batches(0), []
  for _ in range(6):
    states.append(jax.tree.map(np.array, state))
    batches.append(next(stream))
    state, _ = step(state, {name: jnp.asarray(x) for name, x in batches[-1].items()})
  return [*states, jax.tree.map(np.array, state)], batches


def test_adam_moves_all_rows_as_optax_does(history):
  states, batches = history
  adam = optax.scale_by_adam(ADAM.beta1, ADAM.beta2)
  rows = jnp.asarray(states[0].tables.rows_GE)
  moments = adam.init(rows)
  for step, batch in enumerate(batches):
    loss = lambda r, b=batch: jnp.sum(jnp.square(r[b['id'][..., 0]] - b['y']))
    direction, moments = adam.update(jax.grad(loss)(rows), moments)
    rows = rows - 0.05 * Rows().update.schedule(jnp.int32(step)) * direction
    np.testing.assert_allclose(states[step + 1].tables.rows_GE, rows, rtol=2e-5, atol=2e-6)
  idle = np.setdiff1d(batches[0]['id'][..., 0], batches[1]['id'][..., 0])
  moved = states[2].tables.rows_GE[idle] - states[1].tables.rows_GE[idle]
  assert np.all(moved != 0)  # their moments last


def test_rows_are_corrected_by_the_age_of_the_moments():
  """A continued run counts its steps anew, and goes on with moments that have seen more."""
  update, params = Rows().update, {'x': {'kernel': jnp.ones(2)}}
  state = update.init(params)
  for count in range(1, 4):
    _, state, row_step, _ = update.apply(params, state, params, 0.0, jnp.int32(0))
    np.testing.assert_allclose(row_step.adam.correction1, 1 - ADAM.beta1**count, rtol=1e-6)
    np.testing.assert_allclose(row_step.adam.correction2, 1 - ADAM.beta2**count, rtol=1e-4)


def test_the_average_is_the_weighted_sum_of_the_states(history):
  states, _ = history
  average = np.array(states[0].tables.rows_GE, np.float64)
  number = float(states[0].params['pinfm']['x'])
  for t, state in enumerate(states[1:]):
    decay = min(0.7, (1 + t) / (10 + t))
    average = decay * average + (1 - decay) * state.tables.rows_GE
    number = decay * number + (1 - decay) * float(state.params['pinfm']['x'])
    np.testing.assert_allclose(state.average['rows'], average, rtol=1e-5, atol=1e-6)
    assert float(state.average['params']['pinfm']['x']) == pytest.approx(number, rel=1e-5)
  used = evaluated(states[-1])
  np.testing.assert_array_equal(used.tables.rows_GE, states[-1].average['rows'])
  assert used.params is states[-1].average['params']
  alone = states[-1].replace(average=None)
  assert evaluated(alone) is alone


CONFIG = LoopConfig('run', 6, 0, 2, 2, 1, {'seed': 0}, keep=Keep(1, 1))


def test_averages_are_saved_and_taken_by_what_comes_after(mesh, tmp_path):
  task = Rows()
  state = train(task, mesh, tmp_path, CONFIG, _batches)
  stored = StoredState(tmp_path / 'checkpoints')
  np.testing.assert_array_equal(stored.parts('params')['params']['pinfm']['x'], state.average['params']['pinfm']['x'])
  np.testing.assert_array_equal(np.concatenate(list(stored.table_rows(40))), state.average['rows'][:40])
  adagrad = replace(task, update=Update(replace(ADAM, table_rule='adagrad'), 100))
  create, abstract = fresh_state(adagrad, mesh, 1, None)
  warm = warm_started(create, abstract, WarmStart(tmp_path))  # another rule, no averages of its own
  np.testing.assert_array_equal(warm.tables.rows_GE, state.average['rows'])
  np.testing.assert_array_equal(warm.params['pinfm']['x'], state.average['params']['pinfm']['x'])
  np.testing.assert_array_equal(warm.tables.accumulator_G, 0)
  assert warm.average is None
  assert warm.tables.moments_G2E is None


class Measured:
  """Gives one score after another; notes the steps."""

  def __init__(self, *scores):
    self.scores, self.steps = list(scores), []

  def __call__(self, state):
    self.steps.append(int(state.step))
    return {'ndcg@10': self.scores[len(self.steps) - 1]}


def _train(mesh, directory, measured, **options):
  how = {'eval_every': 1, 'checkpoint_every': 1, 'best_by': '-ndcg@10', 'use_checkpoint': 'best', 'patience': 2}
  return train(Rows(), mesh, directory, replace(CONFIG, **(how | options)), _batches, evaluate=measured)


def test_a_run_without_progress_ends_and_gives_back_its_best_state(mesh, tmp_path, capsys):
  measured = Measured(0.1, 0.3, 0.2, 0.25)
  state = _train(mesh, tmp_path, measured)
  assert measured.steps == [1, 2, 3, 4]
  assert int(state.step) == 2
  assert 'no better in 2 measurements: stops at step 4' in capsys.readouterr().out
  again = Measured()
  assert int(_train(mesh, tmp_path, again).step) == 2
  assert again.steps == []  # what ended stays ended
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['eval/ndcg@10'] for row in rows if 'eval/ndcg@10' in row] == measured.scores


def test_progress_goes_on_and_a_resumed_run_remembers(mesh, tmp_path):
  measured = Measured(0.3, 0.2, 0.4, 0.3, 0.5, 0.1)
  assert int(_train(mesh, tmp_path / 'whole', measured).step) == 5
  assert measured.steps == [1, 2, 3, 4, 5, 6]
  _train(mesh, tmp_path / 'parts', Measured(0.3, 0.2), steps=2)
  later = Measured(0.2, 0.9, 0.9, 0.9)
  assert int(_train(mesh, tmp_path / 'parts', later).step) == 1
  assert later.steps == [3]  # the second one in a row that is no better than 0.3


def test_the_state_that_is_measured_has_the_averages(mesh, tmp_path):
  seen = []
  measured = lambda state: seen.append(np.array(state.params['pinfm']['x'])) or {'loss': 1.0}
  train(Rows(), mesh, tmp_path, replace(CONFIG, eval_every=2), _batches, evaluate=measured)
  saved = load_arrays(tmp_path / 'checkpoints')
  np.testing.assert_array_equal(seen[-1], saved['average']['params']['pinfm']['x'])
  assert seen[-1] != saved['params']['pinfm']['x']


def test_a_state_without_options_is_laid_out_as_before(mesh):
  task = Rows(Update(replace(ADAM, table_rule='adagrad'), 100))
  _, abstract = fresh_state(task, mesh, 0, None)
  assert set(plain(abstract)) == {'step', 'rng', 'params', 'opt_state', 'tables'}
  assert set(plain(abstract)['tables']) == {'rows', 'accumulator'}
