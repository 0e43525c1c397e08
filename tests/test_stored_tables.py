"""Tables are read from a checkpoint block by block, and exported without a copy of them."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from pinfm_jax.errors import UserError
from pinfm_jax.serve.quantize import as_float32, quantise, quantise_parts
from pinfm_jax.train import stored_tables
from pinfm_jax.train.stored_tables import StoredState, chunked_saves

ROWS = np.random.default_rng(0).normal(size=(5120, 8)).astype(np.float32)


def _save(directory: Path, rows, context=None, step=3):
  with ocp.training.Checkpointer(directory, context=context) as checkpointer:
    state = {'params': {'a': jnp.arange(4.0)}, 'opt_state': {'mu': jnp.zeros(4)}, 'tables': {'rows': jnp.asarray(rows)}}
    checkpointer.save_checkpointables(step, {'state': state})
  return directory


@pytest.fixture(scope='module')
def small_pieces(tmp_path_factory):
  previous, stored_tables.CHUNK_BYTES = stored_tables.CHUNK_BYTES, 1 << 13
  yield _save(tmp_path_factory.mktemp('small'), ROWS, chunked_saves())
  stored_tables.CHUNK_BYTES = previous


@pytest.fixture(scope='module')
def one_piece(tmp_path_factory):
  return _save(tmp_path_factory.mktemp('one'), ROWS)


@pytest.mark.parametrize('count', [5120, 5000, 1])
@pytest.mark.parametrize('block_rows', [64, 1000, 100_000])
@pytest.mark.parametrize('stored', ['small_pieces', 'one_piece'])
def test_the_blocks_are_the_table(request, stored, count, block_rows):
  state = StoredState(request.getfixturevalue(stored))
  blocks = list(state.table_rows(count, block_rows))
  np.testing.assert_array_equal(np.concatenate(blocks), ROWS[:count])
  assert max(map(len, blocks)) <= block_rows
  assert state.has_tables


def test_a_save_in_pieces_is_read_in_pieces(small_pieces, monkeypatch):
  reads = []
  real = stored_tables.tensorstore.open

  class Table:
    def __init__(self, table):
      self._table, self.shape, self.chunk_layout = table, table.shape, table.chunk_layout

    def __getitem__(self, rows):
      reads.append(rows.stop - rows.start)
      return self._table[rows]

  class Opened:
    def __init__(self, future):
      self._future = future

    def result(self):
      return Table(self._future.result())

  monkeypatch.setattr(stored_tables.tensorstore, 'open', lambda *a, **k: Opened(real(*a, **k)))
  list(StoredState(small_pieces).table_rows(5120, 300))
  assert max(reads) <= 300
  assert sum(reads) == 5120


def test_only_the_parts_asked_for_are_read(small_pieces):
  state = StoredState(small_pieces)
  parts = state.parts('params', 'constants')
  assert set(parts) == {'params'}
  np.testing.assert_array_equal(parts['params']['a'], np.arange(4.0))


def test_a_table_that_is_too_small_or_missing_is_refused(small_pieces, tmp_path):
  with pytest.raises(UserError, match='has 5120 table rows, the model 6000'):
    next(StoredState(small_pieces).table_rows(6000))
  with pytest.raises(UserError, match='has no checkpoints'):
    StoredState(tmp_path / 'none')
  with pytest.raises(UserError, match='has no checkpoints'):
    StoredState(tmp_path)


def test_bf16_bits_are_read_as_their_values(tmp_path):
  bf16 = ROWS.astype(ml_dtypes.bfloat16)
  stored = _save(tmp_path, jax.lax.bitcast_convert_type(jnp.asarray(bf16), jnp.uint16), chunked_saves())
  blocks = list(StoredState(stored).table_rows(5120, 1000))
  assert {block.dtype for block in blocks} == {np.dtype(np.uint16)}
  packed = np.concatenate(list(quantise_parts(blocks, 'float32')))
  np.testing.assert_array_equal(packed.view('<f4'), bf16.astype(np.float32))
  np.testing.assert_array_equal(as_float32(bf16.view(np.uint16)), bf16.astype(np.float32))
  assert as_float32(ROWS) is ROWS


def test_quantising_holds_a_few_blocks_not_the_table():
  peaks = []
  for rows in (8_000, 64_000):
    blocks = (np.full((1000, 32), start % 16_000, np.uint16) for start in range(0, rows, 1000))
    tracemalloc.start()
    assert sum(len(packed) for packed in quantise_parts(blocks, 'int4')) == rows
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.2 * peaks[0]
  np.testing.assert_array_equal(quantise(np.full((2, 4), 16256, np.uint16), 'float32').view('<f4'), 1.0)


@pytest.mark.slow
def test_reading_a_large_table_takes_the_memory_of_a_piece(tmp_path):
  rows = np.random.default_rng(0).normal(size=(1_500_000, 32)).astype(np.float32)  # 192 MB
  previous, stored_tables.CHUNK_BYTES = stored_tables.CHUNK_BYTES, 4 << 20
  _save(tmp_path, rows, chunked_saves())
  stored_tables.CHUNK_BYTES = previous
  # Not ru_maxrss, which a process inherits from the one that started it.
  program = (
    'import re, sys\n'
    'from pathlib import Path\n'
    'from pinfm_jax.train.stored_tables import StoredState\n'
    'from pinfm_jax.serve.quantize import quantise_parts\n'
    "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    'state = StoredState(Path(sys.argv[1]))\n'
    "list(quantise_parts(state.table_rows(1000), 'int4'))\n"
    'before = peak()\n'
    "rows = sum(len(part) for part in quantise_parts(state.table_rows(1_500_000), 'int4'))\n"
    'print(rows, peak() - before)\n'
  )
  result = subprocess.run([sys.executable, '-c', program, tmp_path], capture_output=True, text=True, check=True)
  count, kilobytes = map(int, result.stdout.split())
  assert count == len(rows)
  assert kilobytes < 96_000, f'{kilobytes} kB'
