"""A run with gaps, content, hidden ids and hidden actions: pretraining, retrieval, fine-tuning, export, scoring."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy

from pinfm_jax.config import Arm
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.export import export_stage
from pinfm_jax.stages.finetune import finetune_stage
from pinfm_jax.stages.pretrain import pretrain_stage
from pinfm_jax.train.pretrain import pretrain
from pinfm_jax.workdir import OtherSettingsError, read_results

OPTIONS = {
  'model.tower.time_gap_buckets': 24,
  'model.content': True,
  'model.id_mask': 0.3,
  'pretrain.action_mask': 0.2,
}
pytestmark = pytest.mark.slow


def _run(toy_run, workdir, options):
  data = replace(toy.EXPERIMENT.data, source='prepared', path=str(toy_run.data_directory))
  experiment = replace(toy.EXPERIMENT, data=data, arms=(Arm('with PinFM'),), baseline='with PinFM')
  return Run(apply_overrides(experiment, options), workdir)


@pytest.fixture(scope='module')
def finished(toy_run, tmp_path_factory):
  run = _run(toy_run, tmp_path_factory.mktemp('options'), OPTIONS)
  for stage in (pretrain_stage, finetune_stage, export_stage):
    stage(run)
  return run


def _metrics(directory):
  return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def test_the_losses_are_there_and_finite(finished):
  rows = _metrics(finished.pretrain_directory(0))
  assert all(np.isfinite(row[name]) for row in rows for name in ('loss', 'ntl', 'mtl', 'ftl', 'action'))
  assert rows[-1]['action'] < rows[0]['action']
  assert all('action' not in row for row in _metrics(finished.arm_directory(0, Arm('with PinFM'))))
  results = read_results(finished.pretrain_directory(0))
  assert 0 < results['retrieval/tower/mrr'] <= 1


def test_the_bundle_scores_what_the_evaluation_scored(finished):
  results = read_results(finished.workdir)
  assert results['bundle/float32/max_difference'] <= 1e-5
  predictions = RankingPredictions.load(finished.measured_directory(0, Arm('with PinFM')) / 'predictions.npz')
  assert np.ptp(predictions.scores_MT, axis=0).min() > 1e-3  # the comparison can fail


def test_work_of_one_setting_is_refused_with_another(finished, toy_run):
  for name, value in {'model.id_mask': 0.2, 'pretrain.action_mask': 0.0, 'model.tower.time_gap_buckets': 0}.items():
    other = _run(toy_run, finished.workdir, OPTIONS | {name: value})
    with pytest.raises(OtherSettingsError, match=name):
      pretrain_stage(other)
  plain = _run(toy_run, finished.workdir, {})
  arguments = (plain.dataset, plain.split.pretrain_until, plain.model, plain.experiment.pretrain, plain.mesh)
  with pytest.raises(UserError, match='does not fit this configuration'):
    pretrain(*arguments, finished.pretrain_directory(0), 0)
