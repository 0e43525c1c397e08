"""The benchmark of rows: what it builds is a bundle of the stated size, and its figures come from what ran."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pinfm_jax.bench import serving_rows, serving_rows_measure
from pinfm_jax.bench.serving_rows import FULL_ROWS, QUICK_ROWS, RowSizes, measure_rows
from pinfm_jax.errors import UserError
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.manifest import Manifest
from pinfm_jax.serve.quantize import dequantise

TINY = RowSizes(sub_tables=2, rows=3000, warm_ids=64, cold_ids=16, batches=2, rounds=3, requests=2)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
  return serving_rows.build_bundle(tmp_path_factory.mktemp('bench') / 'bundle', TINY)


def test_the_full_size_is_the_papers():
  assert FULL_ROWS.sub_tables * FULL_ROWS.rows * FULL_ROWS.width == 20_480_000_000
  assert FULL_ROWS.table_bytes == 12_800_000_000


def test_the_rows_are_those_of_a_trained_tables_size(bundle):
  layout = Manifest.read(bundle).tables
  assert (layout.sub_tables, layout.rows, layout.storage) == (2, 3000, 'int4')
  values = dequantise(np.fromfile(bundle / 'tables.bin', np.uint8).reshape(6000, 20), 'int4')
  assert np.abs(values).max() < 0.08
  assert 0.04 < values.std() < 0.05
  assert len(np.unique(values, axis=0)) == 6000


def test_it_is_measured(bundle):
  found = serving_rows_measure.measure(bundle, TINY)
  assert found['memory']['rows'] <= 4 * 16 * 2
  assert found['cold']['rows'] == 3 * 16 * 2
  assert all(len(found[kind][side]) == 3 for kind in ('cold', 'warm') for side in ('own', 'plain'))
  assert min(found['cold']['own'] + found['warm']['plain'] + [found['open_s'], found['score_s']]) > 0
  assert found['start_s'] > found['open_s']
  figures = {figure.name: figure for figure in serving_rows._figures(found, TINY)}
  expected = np.median([b / a for a, b in zip(found['warm']['own'], found['warm']['plain'], strict=True)])
  assert figures['rows/warm/ratio'].value == pytest.approx(expected)
  assert figures['rows/warm/ratio'].at_least == 0.5
  assert figures['rows/open'].at_most == 5.0
  json.dumps(found)


def test_both_sides_read_the_same_rows(bundle):
  layout = Manifest.read(bundle).tables
  words = serving_rows_measure._words(2, 50, 0)
  own = serving_rows_measure._own(bundle / 'tables.bin', layout, words)
  plain = serving_rows_measure._plain(bundle / 'tables.bin', layout, words)
  for number in range(3):
    np.testing.assert_array_equal(own(number), plain(number))
  np.testing.assert_array_equal(own(0), load_bundle(bundle).rows.rows(words[0]))


def test_a_disk_that_is_too_small_is_named(tmp_path):
  with pytest.raises(UserError, match=r'GB free, the tables need 130560\d\.\d GB'):
    measure_rows(tmp_path, replace(FULL_ROWS, rows=8_000_000_000_000))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('keep', [False, True])
def test_the_whole(tmp_path, keep):
  figures = {figure.name: figure for figure in measure_rows(tmp_path, QUICK_ROWS, keep)}
  assert figures['rows/parameters'].value == 2 * 200_000 * 32
  assert figures['rows/open'].met
  assert figures['rows/memory/file'].met
  assert (tmp_path / 'bundle_rows').exists() == keep
