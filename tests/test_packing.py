"""Packed rows: every segment once and whole, few padded places, and no attention across segments."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pinfm_jax.config import PinFMConfig, TableConfig, TowerConfig
from pinfm_jax.data.packing import PackedSegments, pack
from pinfm_jax.data.pipeline import Segments, training_batches
from pinfm_jax.data.tokens import PLAIN, TokenInputs
from pinfm_jax.errors import UserError
from pinfm_jax.model.pinfm import EventBatch, PinFM, segment_places
from pinfm_jax.train.pretrain import pretrain

LENGTH = 12
SIZES = ((4, 5, 2), (12,), (3, 3, 3))  # segments of three rows


def long_tailed(count, length, seed=0):
  """Sizes like those of a real log: most histories are short, some fill whole segments."""
  return np.clip(np.random.default_rng(seed).lognormal(3.0, 1.3, count).astype(np.int64), 2, length)


def test_rows_hold_what_fits_and_every_segment_once():
  sizes = long_tailed(3000, 256)
  row = pack(sizes, 256)
  load = np.bincount(row, weights=sizes)
  assert len(row) == len(sizes)
  assert load.max() <= 256
  assert load.min() > 0  # rows are numbered without gaps
  np.testing.assert_array_equal(row, pack(sizes, 256))


def test_packing_removes_the_padding_of_a_long_tailed_set():
  sizes = long_tailed(3000, 256)
  alone = 1 - sizes.sum() / (len(sizes) * 256)
  packed = 1 - sizes.sum() / ((pack(sizes, 256).max() + 1) * 256)
  assert alone > 0.8
  assert packed < 0.01


@pytest.mark.parametrize(
  ('sizes', 'rows'), [([12, 12], 2), ([6, 6, 6, 6], 2), ([7, 7, 5, 5], 2), ([12], 1), ([8, 3, 4, 9], 2)]
)
def test_small_sets_pack_as_well_as_can_be(sizes, rows):
  assert pack(np.array(sizes), LENGTH).max() + 1 == rows


@pytest.mark.parametrize('tokens', [PLAIN, TokenInputs(gap_buckets=64)], ids=['plain', 'time gaps'])
def test_packed_rows_hold_every_event_of_the_segments(toy_run, tokens):
  segments = Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16, tokens)
  packed = PackedSegments.of(segments)
  assert len(packed) < len(segments)
  np.testing.assert_array_equal(np.sort(packed.order), np.arange(len(segments)))
  found = 0
  for index in range(len(packed)):
    row = packed[index]
    assert {name: column.shape[0] for name, column in row.items()} == dict.fromkeys(row, 16)
    assert row['segment'].dtype == np.int32
    assert row['user'].dtype == np.uint32
    np.testing.assert_array_equal(row['mask'], row['segment'] > 0)
    for number, which in enumerate(packed.order[packed.first[index] : packed.first[index + 1]], start=1):
      alone, here = segments[int(which)], row['segment'] == number
      for name in alone:
        np.testing.assert_array_equal(row[name][here], alone[name][alone['mask']], err_msg=name)
      found += int(here.sum())
    assert np.all(np.diff(row['segment'][row['mask']]) >= 0)  # a segment's events stand together
  assert found == int(np.sum(segments.stop - segments.start))
  with pytest.raises(IndexError):
    packed[len(packed)]


def test_packed_batches_have_the_columns_of_the_model(toy_run):
  packed = PackedSegments.of(Segments.before(toy_run.dataset, toy_run.split.pretrain_until, 16))
  batch = next(training_batches(packed, 4, 0, 0))
  assert batch['item'].shape == (4, 16, 2)
  assert batch['segment'].shape == batch['user'].shape == batch['mask'].shape == (4, 16)


def test_places_restart_with_each_segment():
  segment = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], jnp.int32)
  np.testing.assert_array_equal(segment_places(segment), [[0, 1, 2, 0, 1, 0, 0, 1], np.arange(8)])


@pytest.fixture(scope='module', params=['gpt2', 'hstu'])
def packed_and_alone(request):
  """(model, params, packed events, their vectors, the same segments one a row, where each event went)."""
  tower = TowerConfig(request.param, layers=2, width=16, heads=2, output_width=8, max_positions=LENGTH)
  model = PinFM(PinFMConfig(TableConfig(sub_tables=2, rows=10, width=4), tower, num_actions=3, num_surfaces=2))
  rows = len(SIZES)
  segment = np.zeros((rows, LENGTH), np.int32)
  for row, sizes in enumerate(SIZES):
    segment[row, : sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
  generator = np.random.default_rng(0)
  vectors = generator.normal(size=(rows, LENGTH, 8)).astype(np.float32)
  events = EventBatch(
    np.zeros((rows, LENGTH, 2), np.uint32),
    generator.integers(0, 2, (rows, LENGTH), dtype=np.int32),
    generator.integers(0, 8, (rows, LENGTH)).astype(np.uint32),
    segment > 0,
    None,
    segment,
  )
  source = [(row, np.flatnonzero(segment[row] == s)) for row in range(rows) for s in range(1, segment[row].max() + 1)]

  def take(array):
    tail = [(0, 0)] * (array.ndim - 2)
    return np.stack([np.pad(array[row, places], [(0, LENGTH - len(places)), *tail]) for row, places in source])

  alone = EventBatch(*(take(column) for column in events[:4]))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), vectors, events))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
  return model, params, events, vectors, alone, take


def test_packed_segments_equal_each_segment_alone_in_values_and_gradients(packed_and_alone):
  model, params, events, vectors, alone, take = packed_and_alone
  weight = np.random.default_rng(1).normal(size=(*vectors.shape[:2], 8)).astype(np.float32)

  def loss(params, vectors, events, weight):
    output = model.apply(params, vectors, events, method='encode')[0]
    return jnp.sum(weight * events.mask_UL[..., None] * output), output

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (got_params, got_vectors), got = run(params, vectors, events, weight)
  (expected_params, expected_vectors), expected = run(params, take(vectors), alone, take(weight))
  real = np.asarray(alone.mask_UL)
  np.testing.assert_allclose(take(np.asarray(got))[real], np.asarray(expected)[real], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(take(np.asarray(got_vectors))[real], expected_vectors[real], rtol=1e-3, atol=1e-5)
  for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_segments_have_no_influence_on_each_other(packed_and_alone):
  model, params, events, vectors, *_ = packed_and_alone
  encode = jax.jit(lambda v: model.apply(params, v, events, method='encode')[0])
  second = (np.asarray(events.segment_UL) == 2)[..., None]
  before, after = np.asarray(encode(vectors)), np.asarray(encode(np.where(second, vectors + 1, vectors)))
  others = events.mask_UL & (events.segment_UL != 2)
  np.testing.assert_array_equal(before[others], after[others])
  assert np.all(np.any(before[events.segment_UL == 2] != after[events.segment_UL == 2], axis=-1))


def test_the_last_event_alone_needs_one_history_a_row(packed_and_alone):
  model, params, events, vectors, *_ = packed_and_alone
  with pytest.raises(ValueError, match='one history a row'):
    model.apply(params, vectors, events, every_output=False, method='encode')


def test_packed_pretraining_runs_and_is_not_resumed_unpacked(toy_run, tmp_path):
  tower = replace(toy_run.model.tower, backbone='hstu', remat='full')
  model = replace(toy_run.model, tower=tower)
  config = replace(toy_run.experiment.pretrain, pack=True, steps=2)
  until = toy_run.split.pretrain_until
  state = pretrain(toy_run.dataset, until, model, config, toy_run.mesh, tmp_path, seed=0)
  assert int(state.step) == 2
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
  with pytest.raises(UserError, match='with pack True, this run has False'):
    pretrain(toy_run.dataset, until, model, replace(config, pack=False), toy_run.mesh, tmp_path, seed=0)
