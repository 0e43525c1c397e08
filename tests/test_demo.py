"""`pinfm demo`: what it shows is what the bundle says, and what it says when there is no demo."""

import json
import re

import numpy as np
import pytest
import toy_bundle

from pinfm_jax.cli import main
from pinfm_jax.errors import UserError
from pinfm_jax.serve.from_dataset import dataset_requests
from pinfm_jax.serve.offline import demo as module
from pinfm_jax.serve.offline.demo import demo, demo_folder
from pinfm_jax.serve.scorer import Scorer

LENGTHS = [0, 5, 20]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('demo')
  toy_bundle.make_toy().export(folder / 'bundle', storage='float32')
  documents = list(dataset_requests(toy_bundle.ToyDataset(LENGTHS), range(3), toy_bundle.LENGTH))
  (folder / 'requests.jsonl').write_text(''.join(json.dumps(document) + '\n' for document in documents))
  write_truth(folder, lambda scores, label: [1 - score[label] for score in scores])
  return folder


def results(folder):
  documents = [json.loads(line) for line in (folder / 'requests.jsonl').read_text().splitlines()]
  return list(Scorer.load(folder / 'bundle').score(documents))


def write_truth(folder, true):
  truths = []
  for result in results(folder):
    columns = {label: true(result['scores'], label) for label in toy_bundle.UTILITY}
    truths.append({'request_id': result['request_id'], 'true': columns})
  (folder / 'truth.jsonl').write_text(''.join(json.dumps(truth) + '\n' for truth in truths))


def test_it_shows_what_the_bundle_says(folder, capsys):
  assert main(['demo', '--folder', str(folder), '--requests', '2', '--top', '3']) == 0
  text = capsys.readouterr().out
  scored = results(folder)
  assert [f'Request r{i}: 5 candidates, a history of {n} events' in text for i, n in enumerate(LENGTHS)] == [1, 1, 0]
  rows = [line for line in text.splitlines() if re.match(r'item/\d+ ', line)]
  best = [sorted(result['scores'], key=lambda s: -s['utility'])[:3] for result in scored[:2]]
  for row, score in zip(rows, [score for part in best for score in part], strict=True):
    cells = f'{score["click"]:.2f} | {1 - score["click"]:.2f}', f'{score["hide"]:.2f} | {1 - score["hide"]:.2f}'
    assert re.split(r' {2,}', row)[:4] == [score['item_id'], *cells, f'{score["utility"]:+.3f}']
  # Every truth is the opposite of the prediction.
  assert [row.split()[-3:] for row in rows[:3]] == [['5', 'of', '5'], ['4', 'of', '5'], ['3', 'of', '5']]
  assert '0 % of the pairs of a request are in the true order' in text
  assert '3 requests, 15 candidates' in text


def test_a_perfect_model_orders_every_pair(folder, tmp_path):
  write_truth(folder, lambda scores, label: [score[label] for score in scores])
  text = demo(folder)
  assert '100 % of the pairs' in text
  places = [line.split()[-3] for line in text.splitlines() if line.startswith('item/')]
  assert places == ['1', '2', '3', '4', '5'] * 3


def test_without_a_demo_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(module, 'PACKAGED', tmp_path / 'nothing')
  assert main(['demo']) == 2
  message = capsys.readouterr().err
  for word in ('--folder DIR', 'pinfm run experiments/demo.py', 'pinfm demo --run'):
    assert word in message
  with pytest.raises(UserError, match='is no demo folder: it has no bundle'):
    demo_folder(tmp_path)
  assert main(['demo', '--save', 'x']) == 2
  assert 'give --run WORKDIR too' in capsys.readouterr().err


def test_order_of_pairs_is_counted_by_hand():
  result = [{'scores': [{'utility': u} for u in (3.0, 1.0, 2.0, 2.0)]}]
  truth = [{'true': {'save': [0.9, 0.5, 0.1, 0.1]}}]
  # Of the five pairs whose order both tell: 3 > 1, 3 > 2, 3 > 2 are right, 1 < 2, 1 < 2 are wrong.
  assert module._agreement(result, truth, {'save': 2.0}).startswith('60 %')
  assert np.isfinite(module._utility({'save': [0.5]}, {'save': 1.0})).all()
