"""A sequential recommender from a file of lines to both splits: prepared, trained, stopped early, measured twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pinfm_jax.config import DataConfig
from pinfm_jax.errors import UserError
from pinfm_jax.launch import run_file
from pinfm_jax.overrides import apply_overrides
from pinfm_jax.pretrained import load_pretrained
from pinfm_jax.run import run as run_experiment
from pinfm_jax.sequential import SequenceData, sasrec, sequential_experiment
from pinfm_jax.serve.offline.recommend import recommend_file
from pinfm_jax.serve.scorer import Scorer
from pinfm_jax.train.stored_tables import StoredState

ITEMS = 30


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  """Users who walk through the items in order, from anywhere: easy to learn."""
  rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('log') / 'Toy.txt'
  walks = [1 + (rng.integers(ITEMS) + np.arange(rng.integers(5, 12))) % ITEMS for _ in range(120)]
  path.write_text(''.join(f'{user} {" ".join(map(str, walk))}\n' for user, walk in enumerate(walks)))
  data = DataConfig(source='amazon', path=str(path))
  made = sequential_experiment('walks', data, SequenceData(ITEMS, 720, 8, 4), 12, {'model.tower.layers': 1})
  small = {'model.tower.width': 16, 'model.tower.output_width': 16, 'model.tables.width': 16, 'pretrain.ema_decay': 0.9}
  small['pretrain.eval_metric'] = 'mrr'
  small |= {'pretrain.update.learning_rate': 0.01, 'pretrain.update.table_learning_rate': 0.01}
  small |= {f'model.tower.{kind}': 0.0 for kind in ('dropout', 'embedding_dropout', 'attention_dropout')}
  return replace(apply_overrides(made, small), seeds=(0,))


def _results(workdir, split):
  return json.loads((workdir / 'seed0' / 'pretrain' / split / 'results.json').read_text())


def _recommends(workdir, hit_rate):
  """`pinfm recommend` finds the held-out items as often as the evaluation."""
  log = Path(json.loads((workdir / 'experiment.json').read_text())['data']['path'])
  lines = [line.split()[1:] for line in log.read_text().splitlines()]
  users = [{'history': [{'item_id': int(item)} for item in line[:-1]]} for line in lines]
  (workdir / 'users.jsonl').write_text('\n'.join(map(json.dumps, users)))
  recommend_file(Scorer.load(workdir / 'bundle'), workdir / 'users.jsonl', 5, None, True, workdir / 'top.jsonl')
  found = [json.loads(line)['items'] for line in (workdir / 'top.jsonl').read_text().splitlines()]
  hits = [int(line[-1]) in [item['item_id'] for item in items] for line, items in zip(lines, found, strict=True)]
  assert sum(hits) / len(hits) == pytest.approx(hit_rate, abs=0.05)


def _script(name):
  return run_file(Path(__file__).resolve().parents[2] / 'experiments' / 'sequential' / f'{name}.py', 'script')


def test_actions_that_the_log_has_not_are_not_predicted(experiment, tmp_path):
  with pytest.raises(UserError, match=r'action_mask is 0\.2, but the events of this data set have no actions'):
    run_experiment(apply_overrides(experiment, {'pretrain.action_mask': 0.2}), tmp_path / 'hidden')


@pytest.mark.slow
def test_trained_once_and_measured_on_both_splits(experiment, tmp_path, capsys):
  workdir = tmp_path / 'run'
  run_experiment(apply_overrides(experiment, {'evaluate.split': 'validation'}), workdir)
  validation = _results(workdir, 'validation')
  assert not (workdir / 'seed0' / 'pretrain' / 'test').exists()  # nothing of the test split was read
  metrics = [json.loads(line) for line in (workdir / 'seed0' / 'pretrain' / 'metrics.jsonl').read_text().splitlines()]
  measured = [row['eval/mrr'] for row in metrics if 'eval/mrr' in row]
  assert validation['retrieval/tower/mrr'] == pytest.approx(max(measured))  # the best checkpoint was taken
  assert measured[-1] > measured[0]
  checkpoints = workdir / 'seed0' / 'pretrain' / 'checkpoints'
  equal = [row['step'] for row in metrics if row.get('eval/mrr') == max(measured)]
  best = StoredState(checkpoints, next(step for step in equal if (checkpoints / str(step)).exists()))
  np.testing.assert_array_equal(load_pretrained(workdir).rows, np.concatenate(list(best.table_rows(ITEMS + 2))))
  steps = max(row['step'] for row in metrics)
  run_experiment(experiment, workdir)
  metrics = [json.loads(line) for line in (workdir / 'seed0' / 'pretrain' / 'metrics.jsonl').read_text().splitlines()]
  assert max(row['step'] for row in metrics) == steps  # nothing was trained again
  test = _results(workdir, 'test')
  assert test['retrieval/all/users'] == 120
  assert test['retrieval/tower/hr@10'] > 2 * test['retrieval/popularity/hr@10']
  assert test['retrieval/popularity/mrr'] != validation['retrieval/popularity/mrr']
  printed = capsys.readouterr().out
  assert "validation split: each user's second last event" in printed
  assert "test split: each user's last event" in printed
  assert 'popularity, all users and items' in printed
  with pytest.raises(UserError, match='no figures with evaluate.ks=7'):
    run_experiment(apply_overrides(experiment, {'evaluate.ks': '7'}), workdir, ('evaluate',))
  with pytest.raises(UserError, match='filter_seen'):
    run_experiment(apply_overrides(experiment, {'evaluate.filter_seen': False}), workdir, ('evaluate',))
  results = json.loads((workdir / 'results.json').read_text())
  for name in ('hr@10', 'ndcg@10', 'ndcg@5'):
    measured = test[f'retrieval/tower/{name}']
    assert results[f'bundle/float32/tower/{name}'] == pytest.approx(measured, rel=1e-5)
    assert results[f'bundle/int4/tower/{name}'] == pytest.approx(measured, rel=0.1)
  _recommends(workdir, test['retrieval/all/tower/hr@5'])
  write = _script('rival_data')['write_rival_data']
  with pytest.raises(UserError, match=r'results.json.* cannot be written'):
    write(workdir, workdir / 'results.json')  # a file
  write(workdir, tmp_path / 'rival')
  read = lambda name: (tmp_path / 'rival' / name).read_text().splitlines()
  lines = [line.split()[1:] for line in Path(experiment.data.path).read_text().splitlines()]
  assert sorted(read('train/input.txt')) == sorted(' '.join(line[:-2]) for line in lines)
  asked = zip(read('test/input.txt'), read('test/output.txt'), strict=True)
  assert sorted(' '.join(pair) for pair in asked) == sorted(' '.join(line) for line in lines)
  assert json.loads((tmp_path / 'rival' / 'dataset_stats.json').read_text())['num_items'] == ITEMS


def test_too_few_rows_for_exact_ids_are_refused(experiment, tmp_path):
  few = apply_overrides(experiment, {**sasrec(experiment), 'model.tables.rows': ITEMS + 1})
  with pytest.raises(UserError, match=rf'rows is {ITEMS + 1}, .* ids up to {ITEMS} need at least {ITEMS + 2}'):
    run_experiment(few, tmp_path / 'few')


@pytest.mark.slow
def test_a_tower_of_padded_windows_is_served_as_it_was_measured(experiment, tmp_path):
  workdir = tmp_path / 'run'
  run_experiment(apply_overrides(experiment, {'model.tower.backbone': 'padded_sasrec'}), workdir)
  test, results = _results(workdir, 'test'), json.loads((workdir / 'results.json').read_text())
  assert test['retrieval/tower/hr@10'] > 2 * test['retrieval/popularity/hr@10']
  for name in ('hr@10', 'ndcg@10', 'ndcg@5'):
    assert results[f'bundle/float32/tower/{name}'] == pytest.approx(test[f'retrieval/tower/{name}'], rel=1e-5)
  _recommends(workdir, test['retrieval/all/tower/hr@5'])
