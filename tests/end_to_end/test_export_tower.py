"""Towers of runs that are no sequential recommenders: with content and hidden ids, of arms, unfinished ones."""

from dataclasses import replace

import numpy as np
import pytest
from toy import EXPERIMENT

from pinfm_jax.config import Arm
from pinfm_jax.errors import UserError
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.run import run as run_experiment
from pinfm_jax.serve.bundle import load_bundle
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.export import export_arm
from pinfm_jax.workdir import read_results

CONTENT = {'model.content': True, 'model.id_mask': 0.2, 'model.tower.time_gap_buckets': 8, 'pretrain.steps': 24}


@pytest.mark.slow
def test_content_hidden_ids_and_time_gaps_through_the_bundle(tmp_path):
  experiment = replace(apply_overrides(EXPERIMENT, CONTENT), arms=())
  run_experiment(experiment, tmp_path / 'run')
  results = read_results(tmp_path / 'run')
  for name in ('hr@5', 'ndcg@5'):
    assert results[f'bundle/float32/tower/{name}'] == pytest.approx(results[f'retrieval/tower/{name}'], abs=1e-6)
  assert 'bundle/int4/tower/hr@5' in results
  run, items = Run(experiment, tmp_path / 'run'), load_bundle(tmp_path / 'run' / 'bundle').items
  np.testing.assert_array_equal(items.keys_V[items.known_V], run.pretrained_items)
  assert not items.known_V.all()
  changed = apply_overrides(experiment, {'serve.storage': 'int8'})
  run_experiment(changed, tmp_path / 'run', ('export',))
  assert not [name for name in read_results(tmp_path / 'run') if name.startswith('bundle/int4')]
  fewer = apply_overrides(experiment, {'evaluate.retrieval_users': 10})
  with pytest.raises(UserError, match='no figures with evaluate.retrieval_users=10; run the pretrain stage too'):
    run_experiment(fewer, tmp_path / 'run', ('export',))
  sliding = apply_overrides(experiment, {'finetune.history_block': 2})
  with pytest.raises(UserError, match='no figures with finetune.history_block=2'):
    run_experiment(sliding, tmp_path / 'run', ('export',))
  run_experiment(sliding, tmp_path / 'run', ('pretrain', 'evaluate', 'export'))
  results = read_results(tmp_path / 'run')
  assert results['bundle/float32/tower/ndcg@5'] == pytest.approx(results['retrieval/tower/ndcg@5'], abs=1e-6)


@pytest.mark.slow
def test_the_tower_of_an_arm_and_its_card(tmp_path):
  arms = (Arm('without', {'ranker.sequence': 'none'}), Arm('short', {'pretrain.steps': 4, 'ranker.sequence': 'pinfm'}))
  experiment = apply_overrides(EXPERIMENT, {'ranker.sequence': 'none', 'finetune.history_length': 6})
  experiment = replace(experiment, arms=arms, baseline='without', challenger='')
  run = Run(experiment, tmp_path / 'run')
  run_experiment(experiment, run.workdir, ('prepare', 'pretrain'))
  with pytest.raises(UserError, match='if just arms pretrain, name one: --arm NAME --tower'):
    export_arm(run, tmp_path / 'bundle', tower=True)
  export_arm(run, tmp_path / 'bundle', 'short', tower=True)
  card = (tmp_path / 'bundle' / 'MODEL_CARD.md').read_text()
  length = experiment.pretrain.downstream_length
  assert load_bundle(tmp_path / 'bundle').manifest.schema.history_length == length != 6
  for fact in (f'Window: the newest {length} events', 'Pretraining: steps 4,', 'PinFM tower ', 'stored as int4'):
    assert fact in card, fact
  own = read_results(run.of_arm(arms[1]).tower_results(0))
  assert f'| pretrained tower | {own["retrieval/tower/hr@5"]:.4f} |' in card
  for other in ('Fine-tuned on', 'Features of the ranker', 'Utility', 'pinfm score', 'requests.jsonl'):
    assert other not in card, other
  (run.of_arm(arms[1]).pretrain_directory(0) / 'results.json').unlink()  # as if it still trained
  with pytest.raises(UserError, match='is not pretrained to its end'):
    export_arm(run, tmp_path / 'again', 'short', tower=True)
