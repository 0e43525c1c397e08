import json

import numpy as np
import pytest

from pinfm_jax.bench.serving import bench_serving
from pinfm_jax.bench.serving_int4 import auc_change
from pinfm_jax.cli import main
from pinfm_jax.evaluate.metrics import auc
from pinfm_jax.evaluate.ranking import RankingPredictions


@pytest.mark.slow
def test_the_cache_is_measured(tmp_path):
  findings = bench_serving(tmp_path, ('cache',), quick=True)
  figures = {figure.name: figure for figure in findings.figures}
  for name in ('warm_over_cold', 'appended_over_cold', 'cold', 'warm', 'appended'):
    figure = figures[f'cache/quickstart/{name}']
    assert 0 < figure.least <= figure.value <= figure.greatest
    assert figure.met is None  # nothing is asked of tiny sizes
  assert figures['cache/curve/ideal: (L + C) / C/4'].value == (48 + 4) / 4
  stored = json.loads((tmp_path / 'results.json').read_text())
  assert stored['figures'].keys() == figures.keys()
  assert (tmp_path / 'serving_cache.png').stat().st_size > 1000
  assert sorted(path.name for path in tmp_path.iterdir()) == ['results.json', 'results.md', 'serving_cache.png']


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--parts', 'cache,nothing'], "--parts names 'nothing'; expected some of: cache,load,rows,int4"),
    (['--parts', 'int4'], 'the part int4 needs a finished run: give --workdir DIR'),
    (['--parts', 'int4', '--workdir', 'nowhere'], 'nowhere'),
    (['--parts', 'cache', '--out', 'file/x'], 'file/x cannot be made (Not a directory)'),
  ],
)
def test_bad_arguments_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  assert main(['bench', 'serving', *words]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert message in lines[0]


def predictions(scores, labels, users):
  rows = len(scores)
  return RankingPredictions(
    np.arange(rows), users, np.zeros(rows, np.uint64), np.zeros(rows, np.float32),
    labels[:, None].astype(np.uint8), scores[:, None].astype(np.float32), None, ('save',),
  )  # fmt: skip


def test_the_change_of_auc_is_paired_over_users():
  rng = np.random.default_rng(0)
  users, labels = 1000 + rng.integers(0, 40, 2000), rng.random(2000) < 0.3
  scores = (labels + rng.normal(0, 1, 2000)).astype(np.float32)
  exact, noisy = predictions(scores, labels, users), predictions(scores + rng.normal(0, 0.02, 2000), labels, users)
  change = auc_change(exact, noisy, 'save', resamples=200)
  assert change.difference == pytest.approx(auc(labels, noisy.scores_MT[:, 0]) - auc(labels, scores), abs=1e-7)
  assert change.difference_low < change.difference < change.difference_high
  assert change.difference_high - change.difference_low < 0.003  # unpaired, it would be ten times as wide
  assert auc_change(exact, exact, 'save', resamples=20).difference_high == 0
