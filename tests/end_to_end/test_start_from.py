"""A run that starts from another run's bundle goes on from the scores that the bundle gives."""

import numpy as np
import pytest

from pinfm_jax.cli import main
from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.scorer import Scorer

LAUNCH = """
from dataclasses import replace
from toy import EXPERIMENT
experiment = replace(EXPERIMENT, arms=EXPERIMENT.arms[1:], baseline=EXPERIMENT.arms[1].name)
"""
STAGES = ('--stages', 'prepare,pretrain,finetune')
STILL = [f'finetune.update.{name}=1e-12' for name in ('learning_rate', 'table_learning_rate')]


@pytest.mark.slow
def test_finetuning_from_a_bundle(tmp_path, capsys):
  launch, first, second = tmp_path / 'launch.py', tmp_path / 'first', tmp_path / 'second'
  launch.write_text(LAUNCH)
  assert main(['run', str(launch), '--workdir', str(first), *STAGES]) == 0
  bundle = tmp_path / 'bundle'
  assert main(['export', str(first), '--out', str(bundle), '--storage', 'float32']) == 0
  settings = [f'finetune.start_from={bundle}', *STILL]
  assert main(['run', str(launch), '--workdir', str(second), *STAGES, '--set', *settings]) == 0
  assert not (second / 'seed0' / 'pretrain').exists()
  assert 'no arm starts from a pretrained tower' in capsys.readouterr().out
  copy = tmp_path / 'copy'
  assert main(['export', str(second), '--out', str(copy), '--storage', 'float32']) == 0
  requests = list(dataset_requests(PreparedDataset.open(first / 'data'), range(20), 8))
  scores = []
  for path in (bundle, copy):
    results = Scorer(load_bundle(path)).score(requests)
    scores.append(np.array([[s['click'], s['save'], s['hide']] for r in results for s in r['scores']]))
  assert np.ptp(scores[0], axis=0).min() > 1e-3  # the comparison can fail
  np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)


@pytest.mark.slow
def test_finetuning_from_the_bundle_of_a_tower(tmp_path, capsys):
  launch, first, second = tmp_path / 'launch.py', tmp_path / 'first', tmp_path / 'second'
  launch.write_text(LAUNCH)
  assert main(['run', str(launch), '--workdir', str(first), '--stages', 'prepare,pretrain']) == 0
  tower, ranker = tmp_path / 'tower', tmp_path / 'ranker'
  assert main(['export', str(first), '--tower', '--out', str(tower), '--storage', 'float32']) == 0
  settings = [f'finetune.start_from={tower}', *STILL]
  assert main(['run', str(launch), '--workdir', str(second), *STAGES, '--set', *settings]) == 0
  assert main(['export', str(second), '--out', str(ranker), '--storage', 'float32']) == 0
  heads = [*settings, 'model.tower.heads=4']
  assert main(['run', str(launch), '--workdir', str(tmp_path / 'third'), *STAGES, '--set', *heads]) == 2
  assert 'was made for model.tower.heads 2, this run has 4' in capsys.readouterr().err
  documents = list(dataset_requests(PreparedDataset.open(first / 'data'), range(20), 8))
  found = []
  for path in (tower, ranker):
    scorer = Scorer(load_bundle(path))
    plain = [{name: document[name] for name in ('request_id', 'history')} for document in documents]
    found.append(scorer.users([scorer.parse({**user, 'candidates': []}) for user in plain]))
  assert np.ptp(found[0], axis=0).min() > 1e-3  # the comparison can fail
  np.testing.assert_allclose(found[1], found[0], atol=1e-5)
