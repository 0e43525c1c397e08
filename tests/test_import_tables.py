"""Table rows from pretrained vectors: how well they reproduce them, what starts from them, bad input."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import polars as pl
import pytest
import toy
import toy_bundle
from test_loop import WithTables

from pinfm_jax.cli import main
from pinfm_jax.config import FinetuneConfig, PretrainConfig, TableConfig
from pinfm_jax.data import item_vectors
from pinfm_jax.data.events import id_keys
from pinfm_jax.data.info import IdTypes
from pinfm_jax.data.item_vectors import open_item_vectors
from pinfm_jax.errors import UserError
from pinfm_jax.model.hashing import hash_rows, key_words
from pinfm_jax.serve import import_tables as module
from pinfm_jax.serve.import_tables import IMPORTED, ImportedManifest, import_tables, mapped_rows
from pinfm_jax.serve.quantize import dequantise
from pinfm_jax.serve.warm_start import filled_rows, open_start
from pinfm_jax.train.finetune import FinetuneTask
from pinfm_jax.train.pretrain import PretrainTask, pretrain
from pinfm_jax.train.restore import fresh_state
from pinfm_jax.train.sharding import make_mesh
from pinfm_jax.train.stored_tables import StoredState

WIDE = TableConfig(sub_tables=4, rows=100_000, width=8, hash_seed=5)
NARROW = replace(WIDE, rows=40)
INFO = SimpleNamespace(actions=toy_bundle.ACTIONS, surfaces=toy_bundle.SURFACES, id_type=IdTypes('integer', 'string'))


def make_vectors(count=300, width=32, seed=0):
  return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def names(count=300):
  return [f'pin/{i}' for i in range(count)]


@pytest.fixture
def parquet(tmp_path):
  path = tmp_path / 'vectors.parquet'
  pl.DataFrame({'item_id': names(), 'vector': make_vectors().tolist()}).write_parquet(path, row_group_size=70)
  return path


def table_of(directory, config):
  """The whole table, NaN where no item asks for a row."""
  numbers, rows = mapped_rows(directory, ImportedManifest.read(directory))
  assert (np.diff(numbers) > 0).all()
  table = np.full((config.sub_tables * config.rows, config.width), np.nan, np.float32)
  table[numbers] = rows
  return table


def reproduced(directory, config, ids, id_type='string'):
  rows = hash_rows(key_words(id_keys(pl.Series(ids), id_type)), config.sub_tables, config.rows, config.hash_seed)
  return table_of(directory, config)[rows].reshape(len(ids), -1)


def test_vectors_come_back_where_few_items_collide(parquet, tmp_path):
  manifest = import_tables(tmp_path / 'out', open_item_vectors(parquet), WIDE)
  found, given = reproduced(tmp_path / 'out', WIDE, names()), make_vectors()
  exact = (found == given).all(axis=1)
  assert exact.mean() > 0.95
  assert manifest.cosine > 0.995
  assert (manifest.items, manifest.vector_width, manifest.id_type) == (300, 32, 'string')
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [IMPORTED, 'row_numbers.bin', 'rows.bin']


def test_items_that_share_a_row_get_their_mean(parquet, tmp_path):
  """The least-squares solution, against a solver in float64."""
  manifest = import_tables(tmp_path / 'out', open_item_vectors(parquet), NARROW)
  rows_NS = hash_rows(key_words(id_keys(pl.Series(names()), 'string')), 4, 40, 5)
  table, vectors = table_of(tmp_path / 'out', NARROW), make_vectors().astype(np.float64)
  for s in range(4):
    which_NR = (rows_NS[:, s : s + 1] == np.arange(40) + 40 * s).astype(np.float64)
    best_RE = np.linalg.lstsq(which_NR, vectors[:, 8 * s : 8 * s + 8], rcond=None)[0]
    asked = which_NR.any(axis=0)
    np.testing.assert_allclose(table[40 * s : 40 * s + 40][asked], best_RE[asked], atol=1e-6)
    assert np.isnan(table[40 * s : 40 * s + 40][~asked]).all()
  assert 0.2 < manifest.cosine < 0.8


def test_npy_and_any_batch_size_give_the_same_bytes(parquet, tmp_path, monkeypatch):
  import_tables(tmp_path / 'a', open_item_vectors(parquet), NARROW)
  np.save(tmp_path / 'v.npy', make_vectors())
  np.save(tmp_path / 'i.npy', np.array(names()))
  monkeypatch.setattr(item_vectors, '_BATCH', 7)
  monkeypatch.setattr(module, '_BLOCK_ITEMS', 5)  # fewer than share a row
  import_tables(tmp_path / 'b', open_item_vectors(tmp_path / 'v.npy', tmp_path / 'i.npy'), NARROW)
  import_tables(tmp_path / 'c', open_item_vectors(parquet), NARROW)
  for name in ('row_numbers.bin', 'rows.bin'):
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'c' / name).read_bytes()


def test_an_item_given_twice_asks_for_the_mean(tmp_path):
  np.save(tmp_path / 'v.npy', np.repeat(np.array([[1.0], [3.0]], np.float32), 32, axis=1))
  np.save(tmp_path / 'i.npy', np.array([9, 9]))
  import_tables(tmp_path / 'out', open_item_vectors(tmp_path / 'v.npy', tmp_path / 'i.npy'), WIDE)
  np.testing.assert_array_equal(reproduced(tmp_path / 'out', WIDE, [9], 'integer'), np.full((1, 32), 2))


@pytest.mark.parametrize('width', [12, 64])
def test_other_widths_keep_inner_products(width, tmp_path):
  rng = np.random.default_rng(1)
  vectors = (rng.normal(size=(300, 12)) @ rng.normal(size=(12, width))).astype(np.float32)  # of rank 12
  np.save(tmp_path / 'v.npy', vectors)
  np.save(tmp_path / 'i.npy', np.array(names()))
  manifest = import_tables(tmp_path / 'out', open_item_vectors(tmp_path / 'v.npy', tmp_path / 'i.npy'), WIDE)
  mapped = vectors @ np.load(tmp_path / 'out' / 'projection.npy')
  np.testing.assert_allclose(mapped @ mapped.T, vectors @ vectors.T, rtol=1e-3, atol=1e-2)
  # Each sub-table carries a like share of what an item is.
  shares = np.square(mapped.reshape(300, 4, 8)).sum(axis=(0, 2)) / np.square(mapped).sum()
  assert 0.1 < shares.min() < shares.max() < 0.5
  assert manifest.cosine > 0.995


def test_vectors_are_scaled(parquet, tmp_path):
  import_tables(tmp_path / 'out', open_item_vectors(parquet), WIDE, rms=0.02)
  found, given = reproduced(tmp_path / 'out', WIDE, names()), make_vectors()
  exact = np.isclose(found, given * 0.02 / np.sqrt(np.mean(np.square(given))), rtol=1e-4).all(axis=1)
  assert exact.mean() > 0.95


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_run_starts_from_the_rows_and_keeps_the_others_fresh(dtype, parquet, tmp_path):
  config = replace(NARROW, rows=200, dtype=dtype)
  import_tables(tmp_path / 'out', open_item_vectors(parquet), config)
  task = WithTables(tables=config)
  create, abstract = fresh_state(task, make_mesh(toy.EXPERIMENT.mesh), 3, None)
  fresh = create()
  state = open_start(tmp_path / 'out', 'pretrain.start_from', config, INFO).begin(create, abstract)
  rows = np.asarray(state.tables.rows_GE)
  expected = np.array(fresh.tables.rows_GE)
  numbers, given = mapped_rows(tmp_path / 'out', ImportedManifest.read(tmp_path / 'out'))
  expected[numbers] = given if dtype == 'float32' else given.astype(ml_dtypes.bfloat16).view(np.uint16)
  np.testing.assert_array_equal(rows, expected)
  assert 400 < len(numbers) < 800
  assert state.tables.rows_GE.sharding == fresh.tables.rows_GE.sharding
  np.testing.assert_array_equal(state.tables.accumulator_G, 0)
  for found, kept in zip(jax.tree.leaves(state.params), jax.tree.leaves(fresh.params), strict=True):
    np.testing.assert_array_equal(found, kept)


def test_the_table_is_filled_in_place():
  class Rows:
    def between(self, first, last):
      yield np.arange(first, min(last, 10)), np.ones((min(last, 10) - first, 4), np.float32)

  tables = [jnp.zeros((256, 4))]
  address = tables[0].addressable_data(0).unsafe_buffer_pointer()
  table = filled_rows(tables, Rows())
  assert table.addressable_data(0).unsafe_buffer_pointer() == address
  np.testing.assert_array_equal(np.asarray(table).sum(axis=1), [4] * 10 + [0] * 246)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pinfm_jax.serve.programs.export_programs', lambda *_: {})
    return toy_bundle.make_toy().export(tmp_path_factory.mktemp('bundles') / 'bundle')


@pytest.mark.parametrize('kind', ['pretrain', pytest.param('finetune', marks=pytest.mark.slow)])
def test_a_run_starts_from_a_bundle(bundle, kind):
  ranker, constants, schema = toy_bundle.make_toy(), None, None
  task = PretrainTask(toy_bundle.MODEL, PretrainConfig(), 0)
  if kind == 'finetune':
    schema = toy_bundle.SCHEMA
    task = FinetuneTask(toy_bundle.MODEL, ranker.ranker, FinetuneConfig(), schema, 1)
    constants = jax.tree.map(lambda x: x + 7, ranker.stats)
  create, abstract = fresh_state(task, make_mesh(toy.EXPERIMENT.mesh), 3, constants)
  fresh = create()
  tables = toy_bundle.MODEL.tables
  state = open_start(bundle, f'{kind}.start_from', tables, INFO, schema).begin(create, abstract)
  packed = np.fromfile(bundle / 'tables.bin', np.uint8).reshape(100, -1)
  rows = np.asarray(state.tables.rows_GE)
  np.testing.assert_array_equal(rows[:100], dequantise(packed, 'int4'))
  np.testing.assert_array_equal(rows[100:], np.asarray(fresh.tables.rows_GE)[100:])
  for group in state.params:
    taken = group != 'log_temperature' and (kind == 'finetune' or group == 'pinfm')
    expected = ranker.params[group] if taken else fresh.params[group]
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(state.params)[group], expected)), group
  if kind == 'finetune':
    np.testing.assert_array_equal(state.constants.high, ranker.stats.high)


def test_what_does_not_fit_is_refused(bundle, parquet, tmp_path):
  import_tables(tmp_path / 'out', open_item_vectors(parquet), NARROW)
  start = lambda path, tables=NARROW, info=INFO, schema=None: open_start(path, 'x.start_from', tables, info, schema)
  with pytest.raises(UserError, match=r"x.start_from is '.*'; expected a bundle, or what `pinfm import-tables` wrote"):
    start(tmp_path / 'nothing')
  with pytest.raises(UserError, match='was made for rows 40, this run has 41'):
    start(tmp_path / 'out', replace(NARROW, rows=41))
  with pytest.raises(UserError, match='was made for hash_seed 3, this run has 4'):
    start(bundle, replace(toy_bundle.MODEL.tables, hash_seed=4))
  integers = SimpleNamespace(**{**vars(INFO), 'id_type': IdTypes('integer', 'integer')})
  with pytest.raises(UserError, match='was made for item ids string, this run has integer'):
    start(tmp_path / 'out', info=integers)
  swapped = SimpleNamespace(**{**vars(INFO), 'actions': INFO.actions[::-1]})
  with pytest.raises(UserError, match=r"was made for actions \['click', 'save', 'hide'\], this run has \['hide'"):
    start(bundle, toy_bundle.MODEL.tables, swapped)
  schema = replace(toy_bundle.SCHEMA, labels=('hide', 'click'))
  with pytest.raises(UserError, match=r"was made for labels \['click', 'hide'\], this run has \['hide', 'click'\]"):
    start(bundle, toy_bundle.MODEL.tables, schema=schema)
  tower = replace(toy_bundle.MODEL.tower, width=32)
  task = PretrainTask(replace(toy_bundle.MODEL, tower=tower), PretrainConfig(), 0)
  create, abstract = fresh_state(task, make_mesh(toy.EXPERIMENT.mesh), 3, None)
  with pytest.raises(UserError, match=r'holds pinfm/.* as float32\[.*16.*\] where the model has float32\[.*32'):
    start(bundle, toy_bundle.MODEL.tables).begin(create, abstract)


BAD_TABLES = [
  ({'id': ['a'], 'vector': [[1.0]]}, "has no column 'item_id', it has id, vector: name it with --id-column"),
  ({'item_id': ['a'], 'v': [[1.0]]}, "has no column 'vector', it has item_id, v: name it with --vector-column"),
  ({'item_id': [1.5], 'vector': [[1.0]]}, 'item_id is Float64, expected integers or text'),
  ({'item_id': ['a'], 'vector': ['1']}, 'vector is String, expected lists of float32'),
  ({'item_id': ['a', 'b'], 'vector': [[1.0, 2.0], [1.0]]}, 'rows 0 to 1 have the width 2'),
  ({'item_id': ['a', 'b'], 'vector': [[1.0, 2.0], None]}, 'row 1 has no vector'),
  ({'item_id': ['a', 'b'], 'vector': [[1.0], [float('nan')]]}, 'the vector of row 1 has NaN or infinite values'),
  ({'item_id': ['a', None], 'vector': [[1.0], [2.0]]}, 'got 1 missing ids among 2'),
  ({'item_id': ['a', 'b'], 'vector': [[0.0], [0.0]]}, 'all vectors are zeros'),
]


@pytest.mark.parametrize(('columns', 'message'), BAD_TABLES)
def test_bad_parquet(columns, message, tmp_path):
  pl.DataFrame(columns).write_parquet(tmp_path / 'v.parquet')
  with pytest.raises(UserError, match=message) as error:
    import_tables(tmp_path / 'out', open_item_vectors(tmp_path / 'v.parquet'), WIDE)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_bad_files(tmp_path):
  np.save(tmp_path / 'v.npy', make_vectors(3))
  np.save(tmp_path / 'i.npy', np.arange(4))
  np.save(tmp_path / 'x.npy', np.arange(3))
  (tmp_path / 'text.parquet').write_text('nothing')
  (tmp_path / 'text.npy').write_text('nothing')
  for arguments, message in (
    ((tmp_path / 'none',), 'no such file; expected item vectors'),
    ((tmp_path / 'v.npy',), 'has no ids: give a .npy file'),
    ((tmp_path / 'v.npy', tmp_path / 'i.npy'), r'i.npy holds int64\[4\], expected 3 ids, integers or text'),
    ((tmp_path / 'x.npy', tmp_path / 'x.npy'), r'x.npy holds int64\[3\], expected floats \[items, width\]'),
    ((tmp_path / 'text.parquet',), 'cannot be read as Parquet'),
    ((tmp_path / 'text.npy', tmp_path / 'i.npy'), 'cannot be read as .npy'),
  ):
    with pytest.raises(UserError, match=message) as error:
      open_item_vectors(*arguments)
    assert '\n' not in str(error.value)


def test_a_damaged_import_is_refused(parquet, tmp_path):
  import_tables(tmp_path / 'out', open_item_vectors(parquet), NARROW)
  document = json.loads((tmp_path / 'out' / IMPORTED).read_text())
  (tmp_path / 'out' / IMPORTED).write_text(json.dumps(document | {'rows': 41}))
  with pytest.raises(UserError, match='is damaged or of another version than 1: run `pinfm import-tables` again'):
    ImportedManifest.read(tmp_path / 'out')
  (tmp_path / 'out' / IMPORTED).write_text(json.dumps(document))
  (tmp_path / 'out' / 'rows.bin').write_bytes(b'')
  with pytest.raises(UserError, match=r'rows.bin does not hold \d+ rows'):
    ImportedManifest.read(tmp_path / 'out')


@pytest.mark.slow
def test_from_the_command_line_into_a_training_run(toy_run, tmp_path, capsys):
  """The first step of a run whose learning rates are next to nothing: its rows are the imported ones."""
  experiment = toy_run.experiment
  ids, width = toy_run.dataset.items['item_id'], experiment.model.tables.item_width
  vectors = make_vectors(len(ids), width)
  pl.DataFrame({'item_id': ids, 'vector': vectors.tolist()}).write_parquet(tmp_path / 'v.parquet')
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  command = ['import-tables', str(tmp_path / 'v.parquet'), '--experiment', str(launch), '--out', str(tmp_path / 'out')]
  assert main(command) == 0
  assert f'start from it: pretrain.start_from={tmp_path / "out"}' in capsys.readouterr().out
  assert main(command) == 2
  assert 'exists already' in capsys.readouterr().err
  assert main([*command, '--overwrite']) == 0
  update = replace(experiment.pretrain.update, table_learning_rate=1e-9)
  config = replace(experiment.pretrain, steps=1, update=update, start_from=str(tmp_path / 'out'))
  start = open_start(tmp_path / 'out', 'pretrain.start_from', toy_run.model.tables, toy_run.dataset.info)
  until = toy_run.split.pretrain_until
  pretrain(toy_run.dataset, until, toy_run.model, config, toy_run.mesh, tmp_path / 'run', 0, start=start)
  rows = np.concatenate(list(StoredState(tmp_path / 'run' / 'checkpoints').table_rows(1000)))
  table = table_of(tmp_path / 'out', toy_run.model.tables)
  given = ~np.isnan(table[:, 0])
  assert 50 < given.sum() < 1000
  np.testing.assert_allclose(rows[given], table[given], atol=1e-6)
  assert np.abs(rows[~given]).max() < 0.2  # fresh ones


def test_settings_that_exclude_each_other(tmp_path, capsys):
  launch = tmp_path / 'launch.py'
  launch.write_text('from toy import EXPERIMENT as experiment\n')
  assert main(['run', str(launch), '--set', 'pretrain.start_from=a', 'pretrain.continue_from=b']) == 2
  assert 'pretrain.start_from and pretrain.continue_from are both set' in capsys.readouterr().err
  out = ['--experiment', str(launch), '--out', str(tmp_path / 'out')]
  assert main(['import-tables', 'x', *out, '--rms', '-1']) == 2
  assert '--rms is -1.0; expected a positive number' in capsys.readouterr().err


def test_the_whole_table_is_never_in_memory(tmp_path):
  """Eight times the vectors, less than twice the peak."""
  import tracemalloc

  peaks = {}
  for count in (70_000, 560_000):
    vectors = np.lib.format.open_memmap(tmp_path / 'v.npy', 'w+', np.float32, (count, 32))
    vectors[:] = 1
    np.save(tmp_path / 'i.npy', np.arange(count))
    del vectors
    tracemalloc.start()
    import_tables(
      tmp_path / str(count), open_item_vectors(tmp_path / 'v.npy', tmp_path / 'i.npy'), replace(WIDE, rows=1_000_000)
    )
    peaks[count] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peaks[560_000] - peaks[70_000] < 60 * 490_000
