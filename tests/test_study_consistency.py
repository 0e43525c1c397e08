"""Reproducibility and stability against plain loops: what two trainings disagree on, how a split is parted."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.study.consistency import disagreement, make_slices, metric_of, rank_correlation, top_candidates

WEIGHTS = {'save': 1.0, 'hide': -0.5}


def predictions(seed, requests=40):
  """Requests of 1 to 8 candidates in mixed order; labels and candidates are the same for every seed."""
  rng = np.random.default_rng(0)
  request_M = rng.permutation(np.repeat(np.arange(requests) * 3, rng.integers(1, 9, requests)))
  rows = len(request_M)
  labels_MT = (rng.random((rows, 2)) < 0.3).astype(np.uint8)
  scores_MT = np.random.default_rng(seed).random((rows, 2)).round(1).astype(np.float32)  # with ties
  return RankingPredictions(
    request_M, request_M % 7, np.arange(rows, dtype=np.uint64), np.full(rows, np.nan, np.float32), labels_MT, scores_MT,
    None, ('save', 'hide'),
  )  # fmt: skip


def top_of(run, request):
  """The three of highest utility, the earlier row first among equals; float64."""
  rows = [i for i in range(len(run.request_M)) if run.request_M[i] == request]
  value = {i: np.float64(run.scores_MT[i, 0]) - 0.5 * np.float64(run.scores_MT[i, 1]) for i in rows}
  return rows, set(sorted(rows, key=lambda i: (-value[i], i))[:3])


def ranks(values):
  """Rank of each value from 1, ties at their mean."""
  return [np.mean([j + 1 for j, w in enumerate(sorted(values)) if w == v]) for v in values]


def test_the_disagreement_of_three_retrains_against_loops():
  runs = [predictions(seed) for seed in (1, 2, 3)]
  differences, correlations, changes = [], [], []
  for a, b in itertools.combinations(runs, 2):
    first, second = (run.scores_MT[:, 0].astype(np.float64) for run in (a, b))
    differences.append(np.mean([abs(x - y) for x, y in zip(first, second, strict=True)]))
    correlations.append(np.corrcoef(ranks(first), ranks(second))[0, 1])
    changed = []
    for request in set(a.request_M):
      rows, top = top_of(a, request)
      if len(rows) > 3:
        changed.append(top != top_of(b, request)[1])
    changes.append(np.mean(changed))
  found = disagreement(runs, 'save', WEIGHTS)
  assert found.mean_difference == pytest.approx(np.mean(differences), rel=1e-12)
  assert found.rank_correlation == pytest.approx(np.mean(correlations), rel=1e-12)
  assert found.changed_top == pytest.approx(np.mean(changes), rel=1e-12)
  assert 0 < found.changed_top < 1


def test_equal_runs_agree_and_a_single_one_says_nothing():
  run = predictions(1)
  found = disagreement([run, run], 'save', WEIGHTS)
  assert (found.mean_difference, found.changed_top) == (0, 0)
  assert found.rank_correlation == pytest.approx(1, abs=1e-12)
  assert disagreement([run], 'save', WEIGHTS) is None


def test_opposite_scores_have_correlation_minus_one():
  run = predictions(1)
  opposite = replace(run, scores_MT=1 - run.scores_MT)
  assert disagreement([run, opposite], 'save', WEIGHTS).rank_correlation == pytest.approx(-1, abs=1e-12)
  assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_runs_of_other_candidates_are_refused():
  run = predictions(1)
  with pytest.raises(UserError, match='two runs predicted other candidates'):
    disagreement([run, replace(run, item_key_M=run.item_key_M + np.uint64(1))], 'save', WEIGHTS)


def test_small_requests_cannot_change_their_top():
  run = predictions(1)
  few = np.isin(run.request_M, [r for r in set(run.request_M) if (run.request_M == r).sum() <= 3])
  cut = {name: getattr(run, name)[few] for name in ('request_M', 'user_M', 'item_key_M', 'age_hours_M', 'labels_MT')}
  runs = [replace(run, **cut, scores_MT=predictions(seed).scores_MT[few]) for seed in (1, 2)]
  assert np.isnan(disagreement(runs, 'save', WEIGHTS).changed_top)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20), st.integers(1, 4))
def test_the_top_candidates_of_any_requests(rows, k):
  requests = np.array([r for r, _ in rows], np.int64)
  values = np.array([v for _, v in rows], np.float64)
  expected = np.zeros(len(rows), bool)
  for request in set(requests.tolist()):
    own = sorted(np.flatnonzero(requests == request), key=lambda i: (-values[i], i))
    expected[own[:k]] = True
  np.testing.assert_array_equal(top_candidates(requests, values, k), expected)


def test_slices_part_the_rows_by_time_and_by_events():
  rng = np.random.default_rng(0)
  request_M = np.repeat(np.arange(30), 2)
  time_M, events_M = rng.integers(0, 9_000, 30)[request_M], rng.integers(0, 50, 30)[request_M]
  time_M[0], time_M[-1] = 0, 8_999
  found = make_slices(request_M, time_M, events_M, (5.0, 20.0))
  for i in range(3):
    np.testing.assert_array_equal(found.masks[f'time {i + 1}'], (time_M >= 3000 * i) & (time_M < 3000 * (i + 1)))
  np.testing.assert_array_equal(found.masks['new users'], events_M < 5)
  np.testing.assert_array_equal(found.masks['light users'], (events_M >= 5) & (events_M < 20))
  np.testing.assert_array_equal(found.masks['heavy users'], events_M >= 20)
  assert 'fewer than 5 events' in found.note
  assert '20 or more' in found.note


def test_thirds_count_each_request_once():
  """A request of many candidates weighs no more than another: 3 requests, of which one has 10 rows."""
  request_M = np.array([0] * 10 + [1, 2])
  events_M = np.array([4] * 10 + [8, 20])
  found = make_slices(request_M, np.arange(12), events_M)
  assert {name: int(mask.sum()) for name, mask in found.masks.items() if 'users' in name} == {
    'new users': 10, 'light users': 1, 'heavy users': 1
  }  # fmt: skip


@pytest.mark.parametrize('edges', [(5.0,), (5.0, 5.0), (20.0, 5.0), (1.0, 2.0, 3.0)])
def test_wrong_segments_are_refused(edges):
  with pytest.raises(UserError, match='--segments got .*; expected two ascending numbers'):
    make_slices(np.zeros(2), np.arange(2), np.arange(2), edges)


def test_a_part_without_rows_is_left_out():
  found = make_slices(np.arange(4), np.array([0, 1, 2, 99]), np.full(4, 7), (5.0, 6.0))
  assert set(found.masks) == {'time 1', 'time 3', 'heavy users'}


def test_metrics_of_a_part_are_those_of_its_rows_alone():
  run = predictions(1)
  mask = run.request_M < 60
  labels, scores = run.labels_MT[mask, 0], run.scores_MT[mask, 0]
  assert metric_of(run, 'auc', 'save', WEIGHTS, mask) == metrics.auc(labels, scores)
  assert metric_of(run, 'logloss', 'save', WEIGHTS, mask) == metrics.logloss(labels, scores)
  hits = []
  for request in set(run.request_M[mask]):
    rows, _ = top_of(run, request)
    positives = [i for i in rows if run.labels_MT[i, 0]]
    if len(rows) > 3 and positives:
      value = {i: np.float64(run.scores_MT[i, 0]) - 0.5 * np.float64(run.scores_MT[i, 1]) for i in rows}
      ahead = min(sum(not run.labels_MT[j, 0] and value[j] >= value[i] for j in rows) for i in positives)
      hits.append(ahead < 3)
  assert metric_of(run, 'hit@3', 'save', WEIGHTS, mask) == pytest.approx(np.mean(hits), rel=1e-12)
