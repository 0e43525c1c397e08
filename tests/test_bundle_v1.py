"""Bundles of format 1, kept as written (tests/golden/make_bundle_v1.py), open and give the scores they gave."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pinfm_jax.serve.scorer import Scorer

ARCHIVE = Path(__file__).parent / 'golden' / 'bundle_v1.tar.xz'
NAMES = ('plain', 'inputs', 'none')


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
  folder = tmp_path_factory.mktemp('v1')
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter='data')
  return folder / 'bundle_v1'


def json_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def flat_scores(results):
  return np.array([[s['click'], s['hide'], s['utility']] for result in results for s in result['scores']])


@pytest.mark.parametrize('name', NAMES)
def test_the_scores_are_the_same(bundles, name):
  expected = json_lines(bundles / f'{name}.scores.jsonl')
  results = list(Scorer.load(bundles / name).score(json_lines(bundles / f'{name}.requests.jsonl')))
  assert [result['request_id'] for result in results] == [result['request_id'] for result in expected]
  assert np.ptp(flat_scores(expected), axis=0).min() > 0.1  # the comparison can fail
  np.testing.assert_allclose(flat_scores(results), flat_scores(expected), atol=1e-5)
