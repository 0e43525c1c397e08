"""The options of the pretraining losses in a training run: what the host adds to batches, and the running counts."""

import itertools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import load_arrays

from pinfm_jax.data.negatives import ItemCounts, NegativeSource
from pinfm_jax.data.pipeline import Segments, action_bits, training_batches
from pinfm_jax.data.splits import pretrained_items
from pinfm_jax.model.hashing import fold_seed, key_words
from pinfm_jax.model.masking import drop_elements
from pinfm_jax.model.pinfm import PinFM
from pinfm_jax.train import loop
from pinfm_jax.train.popularity import ItemSketch, empty_sketch, sketch_frequency
from pinfm_jax.train.pretrain import PretrainTask, pretrain

UNIFORM = 16


@pytest.fixture(scope='module')
def config(toy_run):
  """All options on; the sketch is wide enough for the toy catalogue to be counted exactly."""
  options = {'uniform_negatives': UNIFORM, 'impression_negatives': 2, 'log_q': 'sketch', 'sketch_width': 1 << 14}
  return replace(toy_run.experiment.pretrain, **options, sketch_decay=0.5)


@pytest.fixture(scope='module')
def segments(toy_run):
  return Segments.before(toy_run.dataset, toy_run.split.pretrain_until, toy_run.experiment.pretrain.segment_length)


def _source(run, segments, config, seed=0):
  bits = action_bits(config, run.dataset.info.actions)
  return NegativeSource.of(run.dataset, segments, config, bits, run.split.pretrain_until, seed)


def _batches(run, segments, config, seed=0, first_step=0, own=None, count=2):
  stream = training_batches(segments, config.batch_segments, seed, first_step, own)
  return list(itertools.islice(_source(run, segments, config, seed).add(stream, first_step, own), count))


def _exact(segments, bits):
  """Positive events of each item over all segments, by hand."""
  counts = {}
  for segment in (segments[i] for i in range(len(segments))):
    for words, actions, real in zip(segment['item'], segment['actions'], segment['mask'], strict=True):
      if real and (bits == 0 or actions & bits):
        counts[tuple(words.tolist())] = counts.get(tuple(words.tolist()), 0) + 1
  return counts


@pytest.mark.parametrize('bits', [0, 3])
def test_counts_are_those_of_the_training_segments(segments, bits, monkeypatch):
  exact = _exact(segments, bits)
  for merge_at in (1 << 22, 50):  # merged once, and many times
    monkeypatch.setattr('pinfm_jax.data.negatives._MERGE_AT', merge_at)
    counts = ItemCounts.of(segments, bits)
    assert np.all(counts.keys[1:] > counts.keys[:-1])
    found = {tuple(w): n for w, n in zip(key_words(counts.keys).tolist(), counts.counts.tolist(), strict=True)}
    assert found == exact
  words = np.array([*exact][:6]).astype(np.uint32).reshape(2, 3, 2)
  expected = np.array([*exact.values()][:6]).reshape(2, 3) / sum(exact.values())
  np.testing.assert_allclose(counts.frequency(words), expected, rtol=1e-6)
  assert counts.frequency(np.array([[2**32 - 1, 2**32 - 1]], np.uint32)) == 0


def test_nothing_counted():
  counts = ItemCounts(np.zeros(0, np.uint64), np.zeros(0, np.int64))
  np.testing.assert_array_equal(counts.frequency(np.zeros((3, 2), np.uint32)), np.zeros(3))


def test_the_columns_that_the_options_need_are_added(toy_run, segments, config):
  plain = _batches(toy_run, segments, toy_run.experiment.pretrain)[0]
  both = _batches(toy_run, segments, replace(config, log_q='counts'))[0]
  assert both.keys() - plain.keys() == {'negative_item', 'frequency', 'negative_frequency'}
  assert both['negative_item'].shape == (8, UNIFORM // 8, 2)
  for name, value in plain.items():
    np.testing.assert_array_equal(both[name], value)
  exact = _exact(segments, action_bits(config, toy_run.dataset.info.actions))
  for ids, column in (('item', 'frequency'), ('negative_item', 'negative_frequency')):
    expected = [exact.get(tuple(w), 0) / sum(exact.values()) for w in both[ids].reshape(-1, 2).tolist()]
    np.testing.assert_allclose(both[column].ravel(), expected, rtol=1e-6)
  assert not _batches(toy_run, segments, replace(config, uniform_negatives=0))[0].keys() - plain.keys()


def test_uniform_negatives_are_a_function_of_seed_step_and_place(toy_run, segments, config):
  first, second = (b['negative_item'] for b in _batches(toy_run, segments, config))
  assert np.any(first != second)
  np.testing.assert_array_equal(_batches(toy_run, segments, config, first_step=1)[0]['negative_item'], second)
  assert np.any(_batches(toy_run, segments, config, seed=1)[0]['negative_item'] != first)
  parts = [_batches(toy_run, segments, config, own=own)[0]['negative_item'] for own in np.arange(8).reshape(2, 4)]
  np.testing.assert_array_equal(np.concatenate(parts), first)


def test_uniform_negatives_are_uniform_over_the_items_of_the_past(toy_run, segments, config):
  source = _source(toy_run, segments, replace(config, uniform_negatives=8 * 100))
  items = toy_run.dataset.items
  past = items['item_key'].to_numpy()[items['first_seen'].to_numpy() < toy_run.split.pretrain_until]
  np.testing.assert_array_equal(source.keys, past)
  assert source.catalogue == len(past)
  assert len(past) < len(items)  # there are later ones to leave out
  drawn = [b['negative_item'] for b in source.add(({} for _ in range(30)), 0)]
  words, counts = np.unique(np.concatenate(drawn).reshape(-1, 2), axis=0, return_counts=True)
  assert {*map(tuple, words.tolist())} == {*map(tuple, key_words(past).tolist())}
  mean = counts.sum() / len(past)
  assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)
  whole = NegativeSource.of(toy_run.dataset, segments, config, 0, None, 0)
  np.testing.assert_array_equal(whole.keys, pretrained_items(toy_run.dataset, None))
  assert len(whole.keys) < len(items)  # some are in last events alone


class _KilledError(Exception):
  pass


def _train(run, config, directory):
  return pretrain(run.dataset, run.split.pretrain_until, run.model, config, run.mesh, directory, seed=0)


def test_a_run_with_all_options_counts_items_and_resumes_bit_identically(
  toy_run, segments, config, tmp_path, monkeypatch
):
  whole = _train(toy_run, config, tmp_path / 'whole')
  put, served = loop.put_batch, iter(range(4))

  def killed(batch, mesh):
    if next(served, None) is None:
      raise _KilledError
    return put(batch, mesh)

  monkeypatch.setattr(loop, 'put_batch', killed)
  with pytest.raises(_KilledError):
    _train(toy_run, config, tmp_path / 'killed')
  monkeypatch.setattr(loop, 'put_batch', put)
  resumed = _train(toy_run, config, tmp_path / 'killed')
  for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (whole, resumed)), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

  saved = ItemSketch(*(load_arrays(tmp_path / 'whole' / 'checkpoints')['constants'][n] for n in ('counts_C', 'total')))
  np.testing.assert_array_equal(saved.counts_C, whole.constants.counts_C)
  bits, exact, total = action_bits(config, toy_run.dataset.info.actions), {}, 0.0
  for batch in itertools.islice(training_batches(segments, 8, 0, 0), 6):
    positive = batch['mask'] & (batch['actions'] & bits > 0)
    exact, total = {k: n / 2 for k, n in exact.items()}, total / 2 + positive.sum()
    for words in batch['item'][positive].tolist():
      exact[tuple(words)] = exact.get(tuple(words), 0) + 1
  found = sketch_frequency(jax.tree.map(jnp.asarray, saved), jnp.asarray([*exact], jnp.uint32))
  np.testing.assert_allclose(found, np.array([*exact.values()]) / total, rtol=1e-5)


@pytest.mark.parametrize('log_q', ['counts', 'sketch'])
def test_the_task_hands_the_losses_what_belongs_together(toy_run, segments, config, monkeypatch, log_q):
  """Vectors and frequencies of events and of draws come from their own ids."""
  config = replace(config, log_q=log_q, item_dropout=0.3)
  source, batch = _source(toy_run, segments, config), _batches(toy_run, segments, config)[0]
  bits = action_bits(config, toy_run.dataset.info.actions)
  task = PretrainTask(toy_run.model, config, bits, seed=3, catalogue=source.catalogue)
  seen = []
  monkeypatch.setattr('pinfm_jax.train.pretrain.sequence_losses', lambda *args: (0.0, seen.append(args)))
  ids, width, rng = task.ids(batch, 0), toy_run.model.tables.item_width, np.random.default_rng(0)
  vectors = tuple(jnp.asarray(rng.normal(size=(*part.shape[:2], width)), jnp.float32) for part in ids)
  params = nn.unbox(task.init(jax.random.key(0)))
  sketch = task.observe(empty_sketch(1 << 14) if log_q == 'sketch' else None, batch, 0)
  task.loss(params, vectors, batch, jnp.int32(5), jax.random.key(0), sketch)
  _, z_ULO, _, _, _, _, seed, _, extra = seen[0]
  assert int(seed) == int(fold_seed(3, 5))
  assert extra.catalogue == source.catalogue
  for part, name in zip(ids, ('item', 'negative_item'), strict=True):
    np.testing.assert_array_equal(part, batch[name])
  np.testing.assert_array_equal(extra.item_UN2, batch['negative_item'])
  for part, item, found in zip(vectors, ids, (z_ULO, extra.z_UNO), strict=True):
    part = drop_elements(part, item, 0.3, 3, jnp.int32(5))
    expected = PinFM(toy_run.model).apply({'params': params['pinfm']}, part, method='targets')
    np.testing.assert_allclose(found, expected, atol=1e-6)
  positive = batch['mask'] & (batch['actions'] & bits > 0)
  exact = source.counts or ItemCounts(*np.unique(_key(batch['item'][positive]), return_counts=True))
  assert (sketch is None) == (log_q == 'counts')
  np.testing.assert_allclose(extra.frequency_UL, exact.frequency(batch['item']), rtol=1e-5)
  np.testing.assert_allclose(extra.frequency_UN, exact.frequency(batch['negative_item']), rtol=1e-5)


def _key(words):
  return words[..., 0].astype(np.uint64) | (words[..., 1].astype(np.uint64) << np.uint64(32))
