"""A study's tables, JSON, plots and recommendation, from predictions and costs that are made up."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from statistics import median

import numpy as np
import pytest

from pinfm_jax.config import Arm
from pinfm_jax.evaluate.predict import predictions_of
from pinfm_jax.evaluate.ranking import RankingPredictions, ranking_metrics
from pinfm_jax.study import costs as costs_module
from pinfm_jax.study.consistency import disagreement, metric_of, slices_of
from pinfm_jax.study.costs import AGAIN, Cost, Costs, one_request
from pinfm_jax.study.findings import find
from pinfm_jax.study.plots import trade_off
from pinfm_jax.study.recommend import Limits
from pinfm_jax.study.rows import Decision
from pinfm_jax.study.tuning import Trial
from pinfm_jax.workdir import write_json

MACHINE = {'processor': 'a processor', 'device': 'cpu', 'platform': 'cpu', 'threads': 2, 'load_at_start': 0.0}
NAMES = ('base', 'a & b', 'slow')
STEP = {'base': (2.0, 4.0, 3.0), 'a & b': (1.0, 2.0, 6.0), 'slow': (4.0, 8.0, 6.0)}
SERVE = {'base': (1.0, 1.0, 2.0), 'a & b': (0.5, 0.9, 1.0), 'slow': (3.0, 3.0, 3.0)}


@pytest.fixture(scope='module')
def study(toy_run, tmp_path_factory):
  """Three blocks, two seeds: 'slow' knows most of the labels, 'a & b' some, 'base' nothing."""
  folder = tmp_path_factory.mktemp('predictions')
  own = toy_run.of_arm(Arm('alone', {'ranker.sequence': 'none'}))
  requests = own.requests('test')
  arms = (
    Arm('base', {'ranker.interaction': 'dcnv2'}),
    Arm('a & b', {'finetune.update.learning_rate': 0.1}),
    Arm('slow'),
  )
  experiment = replace(own.experiment, arms=arms, baseline='base', challenger='', seeds=(0, 1))
  paths = {}
  known = predictions_of(requests, np.zeros(_shape(requests), np.float32))
  for strength, name in enumerate(NAMES):
    for seed in (0, 1):
      rng = np.random.default_rng(10 * seed + strength)
      scores = 0.2 + 0.15 * strength * known.labels_MT + 0.5 * rng.random(known.labels_MT.shape)
      path = folder / f'{strength}_{seed}.npz'
      replace(known, scores_MT=scores.astype(np.float32)).save(path)
      paths.setdefault(name, []).append(path)
  costs = {
    name: Cost(1000 + i, 100 * i, 1_000_000 + 20_000 * i, STEP[name], SERVE[name]) for i, name in enumerate(NAMES)
  }
  costs['base' + AGAIN] = replace(costs['base'], step_s=(2.2, 4.4, 3.3))
  costs = Costs(costs, 8, 64, MACHINE)
  decision = Decision('auc', Limits(0.05, 0.0, 0.6), 10e6, '10MB')
  run = replace(toy_run, experiment=experiment)
  return (
    find(run, paths, costs, decision),
    {n: [RankingPredictions.load(p) for p in ps] for n, ps in paths.items()},
    run,
  )


def _shape(requests):
  count = sum(
    min(len(requests.dataset.request(int(row)).item) - first, requests.config.candidates)
    for row, first in zip(requests.request_row, requests.first, strict=True)
  )
  return count, len(requests.schema.labels)


def test_rows_hold_what_was_measured(study):
  found, runs, run = study
  for i, (name, row) in enumerate(zip(NAMES, found.rows, strict=True)):
    utility = run.experiment.evaluate.utility
    each = [ranking_metrics(one, utility) for one in runs[name]]
    for figure in ('save/auc', 'save/hit@3', 'hide/hit@3', 'save/logloss'):
      assert row.figures[figure] == tuple(values[figure] for values in each)
    assert row.memory == pytest.approx(1 + 0.02 * i)
    assert row.share == pytest.approx((1_000_000 + 20_000 * i) / 10e6)
    assert row.step.median == pytest.approx(median(a / b for a, b in zip(STEP[name], STEP['base'], strict=True)))
    assert row.latency.median == pytest.approx(median(a / b for a, b in zip(SERVE[name], SERVE['base'], strict=True)))
    assert row.disagreement == disagreement(runs[name], 'save', utility)
    for part, mask in slices_of(runs[name][0], run.dataset).masks.items():
      expected = np.mean([metric_of(one, 'auc', 'save', utility, mask) for one in runs[name]])
      assert row.slices[part] == pytest.approx(expected, nan_ok=True)


def test_slices_use_the_events_that_were_known_at_the_request(study):
  _, runs, run = study
  predictions = runs['base'][0]
  mask = slices_of(predictions, run.dataset, (3.0, 10.0)).masks['heavy users']
  for row in range(0, len(mask), 17):
    assert mask[row] == (run.dataset.request(int(predictions.request_M[row])).history_end >= 10)


def test_the_recommendation_keeps_the_limits(study):
  found, _, _ = study
  assert found.recommendation.name == 'a & b'
  assert set(found.recommendation.excluded) == {'slow'}
  assert 'latency at most +0 % of base, training within 60 % of 10MB' in found.verdict()
  assert set(found.fronts()['latency']) == {'a & b', 'slow'}  # the baseline is slower and worse than 'a & b'


def test_an_unsteady_machine_is_told(study):
  found, _, _ = study
  assert 'equal programs differed' not in found.verdict()
  costs = found.costs.costs | {'base' + AGAIN: replace(found.costs.costs['base'], serve_s=(1.3, 1.3, 2.6))}
  assert (
    'equal programs differed by +30 % in latency' in replace(found, costs=replace(found.costs, costs=costs)).verdict()
  )


def test_the_files_say_it_all(study, tmp_path):
  found, _, _ = study
  trials = {'base': (Trial('base', 'ranker.mlp=(8,)', 0.5), Trial('base 2', 'ranker.mlp=(4,)', math.nan))}
  found.write(tmp_path, 'About the data.', trials, ('x: not finished',))
  page = (tmp_path / 'results.md').read_text()
  for words in (
    'About the data.', 'Recommended: a & b.', 'hide HIT@3 (low is good)', '1.00x', 'interaction=dcnv2',
    'update.learning_rate=0.1', 'The same programs made twice differ by +10.0 % at the median (step)',
    'with 64 requests', 'new users', '- x: not finished', 'ranker.mlp=(8,)', 'a training step of 8 requests',
    'beyond seed noise',
  ):  # fmt: skip
    assert words in page, words
  assert 'nan' not in page
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['recommended'] == 'a & b'
  assert results['blocks']['slow']['memory_ratio'] == pytest.approx(1.04)
  assert results['blocks']['base']['seeds']['save/auc'] == list(found.rows[0].figures['save/auc'])
  assert results['difference']['value'] > 0
  for kind in ('latency', 'memory'):
    root = ET.fromstring((tmp_path / f'{kind}.svg').read_text())
    text = ''.join(root.itertext())
    assert all(name in text for name in NAMES)
    assert float(root.attrib['width']) > 100
  assert 'Recommended' in found.text().splitlines()[-1]


def test_what_is_undefined_is_null(study, tmp_path):
  found, _, _ = study
  rows = tuple(replace(row, figures=row.figures | {'hide/hit@3': (math.nan, math.nan)}) for row in found.rows)
  replace(found, rows=rows).write(tmp_path, 'About.')
  results = json.loads((tmp_path / 'results.json').read_text(), parse_constant=pytest.fail)
  assert results['blocks']['base']['seeds']['hide/hit@3'] == [None, None]


def test_one_seed_has_no_reproducibility(study):
  found, _, _ = study
  rows = tuple(
    replace(row, figures={k: v[:1] for k, v in row.figures.items()}, disagreement=None) for row in found.rows
  )
  _, reproducibility, _ = replace(found, rows=rows).tables()
  assert reproducibility.rows[0][1:6] == ('', *('–',) * 4)
  assert 'from one seed' in reproducibility.rows[1][1]


def test_a_plot_of_undefined_points_is_drawn():
  svg = trade_off('t', {'a': (1.0, math.nan), 'b': (2.0, 0.5)}, ('b',), 'x', 'y')
  assert ET.fromstring(svg).tag.endswith('svg')
  assert ET.fromstring(trade_off('t', {'a': (1.0, math.nan)}, (), 'x', 'y')).tag.endswith('svg')


def test_one_request_has_the_real_candidates_of_a_batch_again_and_again():
  mask = np.array([[True, False], [True, True]])
  batch = {
    'candidate_mask': mask,
    'candidate_dense': np.arange(12.0).reshape(2, 2, 3),
    'candidate_embedding': np.zeros((2, 2, 0)),
    'history_item': np.arange(4).reshape(2, 2),
  }
  found = one_request(batch, 7)
  assert found['candidate_mask'].shape == (1, 7)
  assert found['candidate_mask'].all()
  rows = batch['candidate_dense'].reshape(4, 3)[[0, 2, 3, 0, 2, 3, 0]]
  np.testing.assert_array_equal(found['candidate_dense'], rows[None])
  assert found['candidate_embedding'].shape == (1, 7, 0)
  np.testing.assert_array_equal(found['history_item'], [[0, 1]])


def test_costs_that_stand_are_read_and_others_are_measured(toy_run, tmp_path, monkeypatch):
  experiment, options, started = toy_run.experiment, costs_module.CostOptions(), []

  def run(command, input, **options):
    started.append(command)
    found = Costs({'base': Cost(1, 2, 3, (0.1,), (0.2,))}, 8, 8, MACHINE)
    write_json(tmp_path / 'costs.json', {'request': json.loads(input), **asdict(found)})
    return type('Done', (), {'returncode': 0})

  monkeypatch.setattr(costs_module.subprocess, 'run', run)
  first = costs_module.measured_costs(experiment, tmp_path, options, tmp_path / 'costs.json')
  assert first.costs['base'] == Cost(1, 2, 3, (0.1,), (0.2,))
  assert costs_module.measured_costs(experiment, tmp_path, options, tmp_path / 'costs.json') == first
  assert len(started) == 1
  other = replace(experiment, evaluate=replace(experiment.evaluate, split='validation'))
  assert other != experiment
  assert costs_module.measured_costs(other, tmp_path, options, tmp_path / 'costs.json') == first  # of any split
  costs_module.measured_costs(experiment, tmp_path, replace(options, rounds=3), tmp_path / 'costs.json')
  assert len(started) == 2
