"""The training loop on a model of two numbers: order of things, what is kept, where it starts, how it breaks."""

import json
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import load_arrays

from pinfm_jax.config import MeshConfig, TableConfig, UpdateConfig
from pinfm_jax.errors import UserError
from pinfm_jax.model.tables import Tables
from pinfm_jax.train import loop
from pinfm_jax.train.checkpoint import Checkpoints, Keep
from pinfm_jax.train.loop import LoopConfig, non_finite, train
from pinfm_jax.train.metrics_log import MetricsLog
from pinfm_jax.train.optimizer import Update
from pinfm_jax.train.prefetch import Prefetch
from pinfm_jax.train.profiling import Window
from pinfm_jax.train.restore import WarmStart, stored_state, warm_started
from pinfm_jax.train.sharding import make_mesh


@dataclass(frozen=True)
class Line:
  """Fits y = slope * x + offset; a batch whose x is NaN breaks it."""

  update: Update = Update(UpdateConfig(learning_rate=0.1, warmup_steps=1), 100)
  tables: TableConfig | None = None

  def init(self, key):
    return {'pinfm': {'slope': jnp.zeros(()), 'offset': jax.random.normal(key)}, 'log_temperature': jnp.zeros(())}

  def ids(self, batch, step):
    return ()

  def observe(self, constants, batch, step):
    return constants

  def loss(self, params, vectors, batch, step, key, constants):
    line = params['pinfm']
    loss = jnp.mean(jnp.square(line['slope'] * batch['x'] + line['offset'] - batch['y']))
    return loss, {'slope': line['slope']}


@dataclass(frozen=True)
class WithTables(Line):
  """Besides, pulls the rows of the batch's ids towards 1."""

  tables: TableConfig | None = TableConfig(sub_tables=2, rows=1000, width=4)

  def ids(self, batch, step):
    return (batch['id'][:, None] + step.astype(jnp.uint32),)

  def loss(self, params, vectors, batch, step, key, constants):
    loss, figures = super().loss(params, None, batch, step, key, constants)
    return loss + jnp.mean(jnp.square(vectors[0] - 1)), figures


@flax.struct.dataclass
class Constants:
  """Stands for normalisation statistics."""

  mean: jax.Array


CONFIG = LoopConfig('line', 6, 0, 4, 2, 1, {'seed': 0, 'data': 'd'})
TASK = Line()


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig())


def batches(first, bad=None):
  step = first
  while True:
    x = np.random.default_rng(step).normal(size=4).astype(np.float32)
    step += 1
    yield {'x': np.full(4, np.nan, np.float32) if step == bad else x, 'y': 3 * x + 1, 'id': np.zeros((4, 2), np.uint32)}


def rows(directory):
  return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def kept(directory):
  return sorted(int(path.name) for path in (directory / 'checkpoints').iterdir())


# --- the order of things --------------------------------------------------------------------------------------------


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(mesh, tmp_path, monkeypatch):
  events, make, read = [], loop.make_step, MetricsLog.read

  def spied(task, layout):
    step = make(task, layout)

    def run(state, batch):
      events.append(f'dispatch {sum(e.startswith("d") for e in events) + 1}')
      return step(state, batch)

    return run

  monkeypatch.setattr(loop, 'make_step', spied)
  monkeypatch.setattr(
    MetricsLog, 'read', lambda log, step, figures: (events.append(f'read {step}'), read(log, step, figures))
  )
  train(TASK, mesh, tmp_path, replace(CONFIG, steps=4, checkpoint_every=4), batches)
  assert events == [
    'dispatch 1', 'dispatch 2', 'read 1', 'dispatch 3', 'read 2', 'dispatch 4', 'read 3', 'read 4',
  ]  # fmt: skip
  assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_batches_are_placed_ahead_in_order_and_no_further_than_asked():
  placed = []
  stream = Prefetch(iter(range(100)), lambda item: placed.append(item) or 10 * item, ahead=2)
  assert next(stream) == 0
  time.sleep(0.2)
  assert placed == [0, 1, 2, 3]  # one taken, two waiting, one in the thread's hand
  assert [next(stream) for _ in range(5)] == [10, 20, 30, 40, 50]
  stream.close()
  assert len(placed) < 12


def test_what_goes_wrong_in_the_thread_is_raised_in_its_place():
  def source():
    yield 1
    raise OSError('disk')

  stream = Prefetch(source(), lambda item: item)
  assert next(stream) == 1
  for _ in range(2):
    with pytest.raises(OSError, match='disk'):
      next(stream)
  stream.close()
  assert list(Prefetch(iter([1, 2]), lambda item: -item)) == [-1, -2]


def test_no_thread_is_left_however_a_run_ends(mesh, tmp_path, monkeypatch):
  alive = lambda: [t for t in threading.enumerate() if t.name == 'pinfm-prefetch' and t.is_alive()]
  train(TASK, mesh, tmp_path / 'good', CONFIG, batches)
  assert alive() == []
  monkeypatch.setattr(MetricsLog, 'waited', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    train(TASK, mesh, tmp_path / 'interrupted', CONFIG, batches)
  assert alive() == []


# --- a loss or a state that is not finite ---------------------------------------------------------------------------


def test_a_broken_loss_names_the_steps_and_the_checkpoint_that_is_kept(mesh, tmp_path):
  with pytest.raises(UserError) as error:
    train(TASK, mesh, tmp_path, replace(CONFIG, steps=9, checkpoint_every=3), lambda first: batches(first, bad=5))
  message = str(error.value)
  assert 'line: the loss became nan at step 5 (the last finite loss: step 4)' in message
  assert 'between step 4 and step 5' in message
  assert 'the checkpoint of step 3 is kept' in message
  assert '\n' not in message
  assert kept(tmp_path) == [3]
  state = train(TASK, mesh, tmp_path, replace(CONFIG, steps=9, checkpoint_every=3), batches)  # the data was mended
  assert int(state.step) == 9


def test_a_finite_loss_does_not_save_a_broken_state(mesh, tmp_path):
  """The rate overflows: the loss of step 2 is still finite, what step 2 makes of the parameters is not."""
  task = replace(TASK, update=Update(UpdateConfig(learning_rate=1e38, warmup_steps=1, clip_norm=0, weight_decay=0), 2))
  with pytest.raises(UserError, match=r'holds NaN or infinity|loss became') as error:
    train(task, mesh, tmp_path, replace(CONFIG, steps=5, checkpoint_every=1), batches)
  assert 'checkpoint' in str(error.value)
  for step in kept(tmp_path):
    assert step < 5
  if kept(tmp_path):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(load_arrays(tmp_path / 'checkpoints')))


@pytest.mark.parametrize('dtype', ['float32', 'bits'])
def test_non_finite_rows_and_accumulators_are_found(mesh, dtype):
  with jax.set_mesh(mesh):
    state = loop.fresh_state(TASK, mesh, 0, None)[0]()
  rows_GE = np.ones((4, 2), np.float32) if dtype == 'float32' else np.full((4, 2), 0x3F80, np.uint16)
  tables = Tables(jnp.asarray(rows_GE), jnp.ones(4))
  assert non_finite(state.replace(tables=tables)) is None
  assert non_finite(state.replace(tables=tables._replace(accumulator_G=None))) is None  # SGD has none
  rows_GE[2, 1] = np.nan if dtype == 'float32' else 0xFF80  # -inf as bfloat16
  assert non_finite(state.replace(tables=tables._replace(rows_GE=jnp.asarray(rows_GE)))) == 'tables/rows'
  bad = jnp.array([1.0, jnp.inf, 1.0, 1.0])
  assert non_finite(state.replace(tables=tables._replace(accumulator_G=bad))) == 'tables/accumulator'


def test_looking_for_non_finite_rows_takes_no_memory_of_a_tables_size(mesh):
  with jax.set_mesh(mesh):
    state = loop.fresh_state(TASK, mesh, 0, None)[0]()
  for table in (jnp.zeros((1_000_000, 8)), jnp.zeros((1_000_000, 8), jnp.uint16)):
    arrays = loop.plain(state.replace(tables=Tables(table, None)))
    temporary = loop._finite.lower(arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporary < (0.15 if table.dtype == jnp.uint16 else 0.01) * table.nbytes  # a value a row of 8


# --- held-out loss and which checkpoints stay -----------------------------------------------------------------------

HELD_OUT = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 6.0, 6: 7.0, 7: 8.0, 8: 9.0}


def _evaluate(state):
  return {'loss': HELD_OUT[int(state.step)], 'ntl': 0.5}


def test_the_best_and_the_newest_stay_and_the_best_is_returned(mesh, tmp_path):
  config = replace(CONFIG, steps=8, checkpoint_every=1, eval_every=1, keep=Keep(2, 1), use_checkpoint='best')
  state = train(TASK, mesh, tmp_path, config, batches, evaluate=_evaluate)
  assert kept(tmp_path) == [4, 7, 8]
  assert int(state.step) == 4
  again = train(TASK, mesh, tmp_path, config, batches, evaluate=_evaluate)  # finished: read from the disk
  jax.tree.map(np.testing.assert_array_equal, state, again)
  newest = train(TASK, mesh, tmp_path, replace(config, use_checkpoint='newest'), batches)
  assert int(newest.step) == 8


def test_the_held_out_loss_is_logged_when_due_and_before_each_checkpoint(mesh, tmp_path):
  train(TASK, mesh, tmp_path, replace(CONFIG, steps=8, checkpoint_every=5, eval_every=3), batches, evaluate=_evaluate)
  found = {row['step']: row['eval/loss'] for row in rows(tmp_path) if 'eval/loss' in row}
  assert found == {step: HELD_OUT[step] for step in (3, 5, 6, 8)}
  assert all(row['eval/ntl'] == 0.5 for row in rows(tmp_path) if 'eval/loss' in row)
  assert [row['step'] for row in rows(tmp_path) if 'loss' in row] == list(range(1, 9))


def test_a_held_out_loss_that_is_not_finite_stops_before_the_save(mesh, tmp_path):
  bad = lambda state: {'loss': float('nan') if int(state.step) == 4 else 1.0}
  with pytest.raises(UserError, match='the held-out loss became nan at step 4.*the checkpoint of step 2 is kept'):
    train(TASK, mesh, tmp_path, replace(CONFIG, eval_every=2), batches, evaluate=bad)
  assert kept(tmp_path) == [2]


# --- where a run starts ---------------------------------------------------------------------------------------------


def test_own_checkpoint_before_resume_before_warm_start_before_scratch(mesh, tmp_path):
  scratch = train(TASK, mesh, tmp_path / 'source', replace(CONFIG, steps=4), batches)
  other = replace(TASK, update=Update(UpdateConfig(learning_rate=1e-3, warmup_steps=1), 100))
  none = replace(CONFIG, steps=4)
  # 2: the other run's state as it is, its step too: nothing is left to do
  resumed = train(other, mesh, tmp_path / 'a', replace(none, resume=str(tmp_path / 'source')), batches)
  jax.tree.map(np.testing.assert_array_equal, resumed, scratch)
  assert kept(tmp_path / 'a') == [4]  # and it is this run's own now
  # 2 before 3: the warm start's directory is not even looked at
  resume = replace(none, resume=str(tmp_path / 'source' / 'checkpoints'))
  train(other, mesh, tmp_path / 'b', resume, batches, warm_start=WarmStart(tmp_path / 'nowhere'))
  # 3: the parameters, but none of the moments and steps
  seen = []
  train(TASK, mesh, tmp_path / 'c', replace(none, steps=1), _spy(seen), warm_start=WarmStart(tmp_path / 'source'))
  assert seen == [0]
  assert rows(tmp_path / 'c')[0]['slope'] == float(scratch.params['pinfm']['slope'])
  assert int(load_arrays(tmp_path / 'c' / 'checkpoints')['opt_state']['count']) == 1
  # 1 before 2 and 3: the own checkpoint, of step 1
  seen.clear()
  train(TASK, mesh, tmp_path / 'c', replace(resume, steps=5), _spy(seen), warm_start=WarmStart(tmp_path / 'source'))
  assert seen == [1]
  # 4
  train(TASK, mesh, tmp_path / 'd', replace(none, steps=1), batches)
  assert rows(tmp_path / 'd')[0]['slope'] == 0


def _spy(seen):
  return lambda first: seen.append(first) or batches(first)


def test_a_resumed_run_continues_the_order_and_equals_the_uninterrupted_one(mesh, tmp_path):
  whole = train(TASK, mesh, tmp_path / 'whole', CONFIG, batches)
  train(TASK, mesh, tmp_path / 'half', replace(CONFIG, steps=4), batches)
  found = train(TASK, mesh, tmp_path / 'rest', replace(CONFIG, resume=str(tmp_path / 'half')), batches)
  jax.tree.map(np.testing.assert_array_equal, found, whole)
  assert [row['step'] for row in rows(tmp_path / 'rest')] == [5, 6]
  assert kept(tmp_path / 'half') == [2, 4]  # the other run's are left alone


@pytest.mark.parametrize(
  'position', [{'seed': 1, 'data': 'd'}, {'seed': 0}, {'seed': 0, 'data': 'd', 'eval_share': 0.1}]
)
def test_resuming_with_another_data_order_is_refused(mesh, tmp_path, position):
  train(TASK, mesh, tmp_path / 'source', replace(CONFIG, steps=2), batches)
  config = replace(CONFIG, position=position, resume=str(tmp_path / 'source'))
  with pytest.raises(UserError, match=r'was written with (seed|data|eval_share)'):
    train(TASK, mesh, tmp_path / 'other', config, batches)


def test_a_run_to_resume_that_is_not_there_is_named(mesh, tmp_path):
  with pytest.raises(UserError, match=r'nowhere/checkpoints has no checkpoints'):
    train(TASK, mesh, tmp_path / 'a', replace(CONFIG, resume=str(tmp_path / 'nowhere')), batches)
  train(TASK, mesh, tmp_path / 's', CONFIG, batches)
  with pytest.raises(UserError, match='no checkpoint of .* was measured.*use_checkpoint=newest'):
    train(TASK, mesh, tmp_path / 'b', CONFIG, batches, warm_start=WarmStart(tmp_path / 's', 'best'))
  with pytest.raises(UserError, match='no checkpoint of .* was measured'):
    stored_state(tmp_path / 's', 'best')


def test_the_best_checkpoint_warms_up_another_run(mesh, tmp_path):
  config = replace(CONFIG, steps=8, checkpoint_every=1, eval_every=1, keep=Keep(1, 1))
  train(TASK, mesh, tmp_path / 'source', config, batches, evaluate=_evaluate)
  slope = next(row['slope'] for row in rows(tmp_path / 'source') if row['step'] == 5 and 'slope' in row)  # of step 4
  one = replace(CONFIG, steps=1)
  train(TASK, mesh, tmp_path / 'a', one, batches, warm_start=WarmStart(tmp_path / 'source', 'best'))
  assert rows(tmp_path / 'a')[0]['slope'] == slope
  steps = {use: int(stored_state(tmp_path / 'source', use).parts('step')['step']) for use in ('best', 'newest')}
  assert steps == {'best': 4, 'newest': 8}


def test_the_tables_stay_in_place_over_steps_measurements_and_saves(mesh, tmp_path, monkeypatch):
  addresses, make = [], loop.make_step

  def spied(task, layout):
    step = make(task, layout)

    def run(state, batch):
      addresses.append(state.tables.rows_GE.unsafe_buffer_pointer())
      return step(state, batch)

    return run

  monkeypatch.setattr(loop, 'make_step', spied)
  config = replace(CONFIG, eval_every=1, keep=Keep(1, 1))
  state = train(WithTables(), mesh, tmp_path, config, batches, evaluate=_evaluate)
  addresses.append(state.tables.rows_GE.unsafe_buffer_pointer())
  assert len(addresses) == 7
  assert len(set(addresses)) == 1


def test_a_warm_start_takes_tables_and_accumulators_if_there_are_any(mesh, tmp_path):
  source = train(WithTables(), mesh, tmp_path / 'source', CONFIG, batches)
  with jax.set_mesh(mesh):
    create, abstract = loop.fresh_state(WithTables(), mesh, 1, None)
    found = warm_started(create, abstract, WarmStart(tmp_path / 'source'))
    fresh = create()
    np.testing.assert_array_equal(found.tables.rows_GE, source.tables.rows_GE)
    np.testing.assert_array_equal(found.tables.accumulator_G, source.tables.accumulator_G)
    assert np.any(source.tables.accumulator_G != fresh.tables.accumulator_G)
    # Tables that learned by SGD have no accumulator: the model's own starts fresh.
    with closing(Checkpoints(tmp_path / 'sgd' / 'checkpoints')) as checkpoints:
      checkpoints.save(source.replace(tables=source.tables._replace(accumulator_G=None)), {'seed': 0})
    found = warm_started(create, abstract, WarmStart(tmp_path / 'sgd'))
    np.testing.assert_array_equal(found.tables.rows_GE, source.tables.rows_GE)
    np.testing.assert_array_equal(found.tables.accumulator_G, fresh.tables.accumulator_G)
    # Rows of another type are not cast.
    bits = abstract.tables.rows_GE.update(dtype=jnp.uint16)
    other = abstract.replace(tables=abstract.tables._replace(rows_GE=bits))
    with pytest.raises(UserError, match=r'holds tables/rows as float32.* where the model has uint16'):
      warm_started(create, other, WarmStart(tmp_path / 'source'))


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saves_block_on_cpu(tmp_path):
  assert Checkpoints(tmp_path / 'cpu').blocking is True


def test_a_save_in_the_background_writes_the_same_values(mesh, tmp_path):
  with jax.set_mesh(mesh):
    create, abstract = loop.fresh_state(TASK, mesh, 0, Constants(np.arange(3, dtype=np.float32)))
    state = create()
  found = {}
  for blocking in (True, False):
    checkpoints = Checkpoints(tmp_path / str(blocking), blocking=blocking)
    checkpoints.save(state, {'seed': 0}, 1.0)
    checkpoints.save(state.replace(step=state.step + 1), {'seed': 0}, 2.0)
    checkpoints.close()
    again = Checkpoints(tmp_path / str(blocking), read_only=True)
    assert (again.best_step, again.latest_step) == (0, 1)
    found[blocking] = again.restore(abstract, {'seed': 0})
    again.close()
  jax.tree.map(np.testing.assert_array_equal, found[True], found[False])


# --- the profiler ---------------------------------------------------------------------------------------------------


def test_a_window_is_traced_and_the_place_is_told(mesh, tmp_path, capsys):
  train(TASK, mesh, tmp_path, replace(CONFIG, profile=Window(2, 3)), batches)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert f'trace of steps 2 to 3: {tmp_path}/profile; open' in capsys.readouterr().out


def test_a_run_that_breaks_off_ends_its_trace(mesh, tmp_path):
  for name in ('a', 'b'):  # a trace left open would refuse the second
    with pytest.raises(UserError, match='loss became nan'):
      train(TASK, mesh, tmp_path / name, replace(CONFIG, profile=Window(2, 6)), lambda first: batches(first, bad=4))


def test_a_window_that_the_run_does_not_meet_is_told(mesh, tmp_path, capsys):
  train(TASK, mesh, tmp_path, replace(CONFIG, profile=Window(20, 25)), batches)
  assert 'no trace, step 20 is not among those that run (1 to 6)' in capsys.readouterr().out
  assert not (tmp_path / 'profile').exists()


@pytest.mark.parametrize('text', ['', '20', '25:20', '0:3', '-1:2', 'a:b', '1:2:3', '1.5:2', '20:'])
def test_a_bad_window_is_refused(text):
  with pytest.raises(UserError, match=r"--profile is '.*'; expected FIRST:LAST"):
    Window.parse(text)


def test_a_window_is_parsed():
  assert Window.parse('20:25') == Window(20, 25)
  assert Window.parse('7:7') == Window(7, 7)
