"""Rankers with TransAct in training and in a run: what is hidden when, and a bundle that scores as the evaluation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax.core import meta

from pinfm_jax.config import Arm
from pinfm_jax.data.pipeline import training_batches
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.export import export_arm, served_predictions
from pinfm_jax.stages.finetune import finetune_stage
from pinfm_jax.train.finetune import dense_stats, ranking_batch

TRANSACT = {
  'ranker.transact.length': 12, 'ranker.transact.width': 4, 'ranker.transact.outputs': 3,
  'ranker.transact.item_buckets': 64,
}  # fmt: skip
ALONE = Arm('TransAct', {**TRANSACT, 'ranker.sequence': 'none'})
BOTH = Arm('TransAct and PinFM', {**TRANSACT, 'finetune.init': 'scratch'})


@pytest.fixture(scope='module')
def made(toy_run):
  """A task without PinFM, a batch, parameters, and logits as a function of the longest window that is hidden."""
  run = toy_run.of_arm(ALONE)
  task, requests = run.task(5), run.requests('finetune')
  stats = dense_stats(requests, 50)
  batch = jax.tree.map(jnp.asarray, next(training_batches(requests, 8, 0, 0)))
  params = meta.unbox(jax.jit(task.init)(jax.random.key(0)))

  def logits(mask_hours, train, batch=batch, seed=3):
    ranker = replace(task.ranker, transact=replace(task.ranker.transact, mask_hours=mask_hours))
    module = replace(task, ranker=ranker).module
    inputs = ranking_batch(batch)
    keys = {'dropout': jax.random.key(0)}
    return np.asarray(module.apply({'params': params}, None, None, inputs, stats, seed, train, rngs=keys).logits_UCT)

  return batch, logits


def test_a_window_is_hidden_in_training_alone(made):
  batch, logits = made
  everything = logits(0.0, train=True)
  np.testing.assert_array_equal(logits(0.0, train=False), everything)
  np.testing.assert_array_equal(logits(1e6, train=False), everything)
  hidden = logits(1e6, train=True)
  events = np.asarray(batch['recent_item'] > 0).any(axis=1)
  changed = np.abs(hidden - everything).max(axis=(1, 2)) > 1e-4
  assert changed[events].mean() > 0.9
  assert not changed[~events].any()
  assert np.any(logits(1e6, train=True, seed=4) != logits(200.0, train=True, seed=4))


def test_events_of_unknown_time_are_never_hidden(made):
  batch, logits = made
  unknown = batch | {'recent_hours': jnp.full_like(batch['recent_hours'], jnp.nan)}
  np.testing.assert_array_equal(logits(1e6, True, unknown), logits(0.0, True))


@pytest.mark.slow
def test_bundles_score_what_a_run_evaluated(toy_run, tmp_path):
  data = replace(toy.EXPERIMENT.data, source='prepared', path=str(toy_run.data_directory))
  run = Run(replace(toy.EXPERIMENT, data=data, arms=(ALONE, BOTH), baseline=ALONE.name), tmp_path / 'run')
  finetune_stage(run)
  for arm in (ALONE, BOTH):
    evaluated = RankingPredictions.load(run.measured_directory(0, arm) / 'predictions.npz')
    bundle = export_arm(run, tmp_path / arm.directory, arm.name, storage='float32')
    np.testing.assert_allclose(served_predictions(run, arm, bundle).scores_MT, evaluated.scores_MT, atol=1e-5)
    assert np.ptp(evaluated.scores_MT, axis=0).min() > 1e-3  # the comparison can fail
