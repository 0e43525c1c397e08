"""`pinfm bench dcat`: all forms compute the same thing, figures come from what ran, FLOPs are counted."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pinfm_jax.bench import dcat
from pinfm_jax.bench.dcat_runs import FORMS, pass_flops, serving_runs
from pinfm_jax.cli import main
from pinfm_jax.config import TowerConfig

CASE = dcat.QUICK.cases[0]


SECONDS = {'DCAT': (1.0, 2.0), 'gather': (8.0, 8.0), 'dense': (40.0, 60.0)}  # of two rounds


@pytest.fixture
def given_times(monkeypatch):
  """Programs are not run (compiling them is slow): these are their times."""
  monkeypatch.setattr(dcat, 'interleave', lambda runs, *_, **__: {name: SECONDS.get(name, (4.0, 4.0)) for name in runs})


@pytest.mark.slow
def test_forms_compute_the_same_outputs():
  users = replace(CASE, users=2)
  outputs = {name: np.asarray(run.call(0)) for name, run in serving_runs(users).items()}
  width = CASE.tower.output_width
  ours_UCO = outputs['DCAT']
  assert ours_UCO.shape == (2, CASE.candidates, width)
  for form in ('gather', 'gather in chunks'):
    np.testing.assert_allclose(outputs[form].reshape(ours_UCO.shape), ours_UCO, atol=1e-5)
  assert np.abs(outputs['rotate-replace'].reshape(ours_UCO.shape) - ours_UCO).max() > 1e-4  # the window is full
  np.testing.assert_allclose(outputs['dense'], outputs['dense, last output'], atol=1e-5)
  assert len(outputs['dense']) == users.dense_rows
  np.testing.assert_allclose(outputs['dense'][0], ours_UCO[0, 0], atol=1e-5)


def test_figures_follow_from_the_times(tmp_path, given_times):
  findings = dcat.bench_dcat(tmp_path, sizes=dcat.QUICK)
  figures = {figure.name: figure for figure in findings.figures}
  assert figures['serving/quickstart/DCAT'].value == (8 / 1 + 8 / 2) / 2  # 8 candidates
  # Dense took 4 candidates: 10 and 15 seconds each, against 1/8 and 2/8.
  assert figures['serving/quickstart/over dense'].value == (80 + 60) / 2
  assert figures['serving/quickstart/over gather'].value == (8 + 4) / 2
  assert figures['training/quickstart/over dense'].value == (40 + 30) / 2
  assert figures['training/quickstart/dense'].value == (4 / 40 + 4 / 60) / 2
  assert figures['curve/candidates/4/gather'].value == 4 / 8
  assert figures['curve/length/8/flops'].value == pass_flops(CASE.tower, 8, CASE.candidates) / CASE.candidates
  assert all(figure.met is None for figure in findings.figures)  # nothing is asked of tiny sizes
  assert json.loads((tmp_path / 'results.json').read_text())['figures'].keys() == figures.keys()
  for name in ('serving', 'training', 'curve'):
    assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_full_sizes_ask_what_the_claim_is(tmp_path, given_times):
  figures = dcat.bench_dcat(tmp_path, ('serving', 'training'), replace(dcat.QUICK, quick=False)).figures
  asked = {figure.name: (figure.at_least, figure.met) for figure in figures if figure.at_least}
  assert asked == {
    'serving/quickstart/over dense': (100, False),
    'serving/quickstart/over gather': (4, True),
    'training/quickstart/over dense': (5, True),
  }


@pytest.mark.slow
def test_command_runs_all_parts(tmp_path):
  assert main(['bench', 'dcat', '--quick', '--out', str(tmp_path)]) == 0
  figures = json.loads((tmp_path / 'results.json').read_text())['figures']
  assert {f'serving/quickstart/{form}' for form in FORMS} < set(figures)
  assert all(figure['value'] > 0 for figure in figures.values())


def test_flops_by_hand():
  tower = TowerConfig(layers=1, width=4, heads=1, mlp_ratio=2, output_width=3)
  # A candidate: phi_in 2 matmuls 4 x 4; QKV and output 4 of them; MLP 4 x 8 and 8 x 4; scores and mix of 6 keys.
  candidate = 2 * (2 * 16 + 4 * 16 + 2 * 32 + 2 * 4 * 6 + 4 * 4 + 4 * 3)
  history = 5 * 2 * (2 * 16 + 2 * 16)  # phi_in, keys and values alone in the last layer
  assert pass_flops(tower, length=5, candidates=7) == history + 7 * candidate


def test_unknown_part_is_one_line(tmp_path, capsys):
  assert main(['bench', 'dcat', '--quick', '--parts', 'serve', '--out', str(tmp_path)]) == 2
  assert "--parts names 'serve'; expected some of: serving,training,curve" in capsys.readouterr().err
