"""Resampled figures of many arms against row-by-row oracles, planted effects, and the large-sample AUC."""

import dataclasses

import numpy as np
import pytest

from pinfm_jax.evaluate import bootstrap, lifts, metrics
from pinfm_jax.evaluate.comparison import compare
from pinfm_jax.evaluate.lifts import resampled_figures, same_rows
from pinfm_jax.evaluate.ranking import RankingPredictions, utility
from pinfm_jax.evaluate.sorted_auc import SortedScores

WEIGHTS = {'save': 1.0, 'hide': -0.5}
EDGES = (24.0, 168.0)


def made_rows(requests=60, users=25, candidates=5, seed=0):
  """Requests in no order of users, with labels, ages and items that pretraining did not see; scores come later."""
  rng = np.random.default_rng(seed)
  rows = requests * candidates
  request = np.repeat(np.arange(requests), candidates)
  return {
    'request_M': request * 3 + 5,
    'user_M': rng.integers(0, users, requests)[request] * 11,
    'item_key_M': rng.integers(0, 99, rows).astype(np.uint64),
    'age_hours_M': rng.choice([2.0, 50.0, 900.0, np.nan], rows).astype(np.float32),
    'labels_MT': (rng.random((rows, 2)) < (0.3, 0.2)).astype(np.uint8),
    'reference_MT': None,
    'label_names': ('save', 'hide'),
    'unseen_M': rng.random(rows) < 0.3,
  }


def scored(rows, signal, seed):
  """Scores that follow the labels as strongly as `signal`, rounded so that some tie."""
  noise = np.random.default_rng(seed).normal(size=rows['labels_MT'].shape)
  scores = 1 / (1 + np.exp(-(signal * rows['labels_MT'] - 1 + noise)))
  return RankingPredictions(scores_MT=np.round(scores, 2).clip(0.01, 0.99).astype(np.float32), **rows)


@pytest.fixture(scope='module')
def arms():
  rows = [made_rows(seed=s) for s in range(2)]
  return {
    name: tuple(scored(r, signal, 10 * i + s) for s, r in enumerate(rows))
    for i, (name, signal) in enumerate((('none', 0.0), ('weak', 0.5), ('strong', 2.0)))
  }


def drawn_rows(column_M, ids, draw_U):
  """Places of the rows of a resample: all rows of a drawn unit, as often as it was drawn."""
  return np.repeat(np.arange(len(column_M)), draw_U[np.searchsorted(ids, column_M)])


def oracle(run, label, bucket, metric, column_M, ids, draw_U):
  """A figure of one resample, from copied rows."""
  masks = {
    '': np.ones(len(run.request_M), bool),
    'age<24h': run.age_hours_M < 24,
    'age_unknown': np.isnan(run.age_hours_M),
    'unseen': run.unseen_M,
  }
  mask, t = masks[bucket], run.label_names.index(label)
  labels, scores = run.labels_MT[:, t], run.scores_MT[:, t].astype(np.float64)
  if metric == 'auc':
    rows = drawn_rows(column_M, ids, draw_U)
    rows = rows[mask[rows]]
    return metrics.auc(labels[rows], scores[rows])
  if metric == 'logloss':
    rows = drawn_rows(column_M, ids, draw_U)
    return -np.mean(np.where(labels[rows], np.log(scores[rows]), np.log(1 - scores[rows])))
  if metric == 'per_user_auc':
    users = [u for u, times in zip(ids, draw_U, strict=True) for _ in range(times)]
    each = [metrics.auc(labels[run.user_M == u], scores[run.user_M == u]) for u in users]
    return np.nanmean(each)
  hits = []
  order = utility(run.scores_MT, run.label_names, WEIGHTS)
  for request in np.unique(run.request_M):
    rows = np.flatnonzero(run.request_M == request)
    ranked = sorted(rows, key=lambda row: (-order[row], labels[row] * mask[row]))
    if labels[rows][mask[rows]].any():
      times = draw_U[np.searchsorted(ids, column_M[rows[0]])]
      hits += [bool((labels * mask)[ranked[:3]].any())] * times
  return np.mean(hits)


@pytest.mark.parametrize('resample', ['users', 'requests'])
def test_every_resample_is_that_of_copied_rows(arms, resample):
  found = resampled_figures(arms, WEIGHTS, EDGES, 4, resample)
  name = {'users': 'user_M', 'requests': 'request_M'}
  figures = [
    ('save', '', 'auc'), ('save', '', 'hit@3'), ('hide', '', 'logloss'), ('save', '', 'per_user_auc'),
    ('save', 'age<24h', 'auc'), ('hide', 'age_unknown', 'hit@3'), ('save', 'unseen', 'auc'),
    ('hide', 'unseen', 'hit@3'),
  ]  # fmt: skip
  for label, bucket, metric in figures:
    figure = found['/'.join(part for part in (label, bucket, metric) if part)]
    column = name['users' if metric == 'per_user_auc' else resample]
    ids = lifts.distinct(arms, column)
    draws_RU = bootstrap.draws(len(ids), 4)
    for place, runs in enumerate(arms.values()):
      of = lambda draw_U: np.mean([  # noqa: E731
        oracle(run, label, bucket, metric, getattr(run, column), ids, draw_U) for run in runs  # noqa: B023
      ])  # fmt: skip
      assert figure.value_A[place] == pytest.approx(of(np.ones(len(ids), int)), abs=1e-6), (label, bucket, metric)
      expected_R = [of(draw_U) for draw_U in draws_RU]
      np.testing.assert_allclose(figure.samples_RA[:, place], expected_R, atol=1e-6, err_msg=f'{label} {metric}')


def test_the_auc_of_many_rows_has_the_interval_of_the_exact_one(monkeypatch):
  rows = made_rows(requests=600, users=250, candidates=6, seed=3)
  arms = {name: (scored(rows, signal, i),) for i, (name, signal) in enumerate((('a', 0.5), ('b', 0.8)))}
  exact = resampled_figures(arms, WEIGHTS, EDGES, 400)['save/auc']
  monkeypatch.setattr(lifts, '_EXACT_BELOW', 100)
  fast = resampled_figures(arms, WEIGHTS, EDGES, 400)['save/auc']
  np.testing.assert_array_equal(fast.value_A, exact.value_A)
  assert not np.array_equal(fast.samples_RA, exact.samples_RA)
  spread = exact.samples_RA.std(axis=0)
  assert np.all(np.abs(fast.samples_RA - exact.samples_RA).max(axis=0) < 0.35 * spread)
  a, b = exact.lift(1, 0), fast.lift(1, 0)
  width = a.difference_high - a.difference_low
  assert b.difference_low == pytest.approx(a.difference_low, abs=0.04 * width)
  assert b.difference_high == pytest.approx(a.difference_high, abs=0.04 * width)


@pytest.mark.parametrize('ties', [False, True])
def test_shares_average_to_the_auc_and_add_up_by_unit(ties):
  rng = np.random.default_rng(4)
  labels, scores, unit = rng.random(80) < 0.3, rng.random(80), rng.integers(0, 9, 80)
  scores = np.round(scores, 1) if ties else scores
  rows = rng.random(80) < 0.7
  expected = metrics.auc(labels[rows], scores[rows])
  assert SortedScores(labels, scores).auc(rows) == expected
  shares = SortedScores(labels, scores).shares(rows)
  pair = lambda p, n: 1.0 if scores[p] > scores[n] else 0.5 if scores[p] == scores[n] else 0.0  # noqa: E731
  positives, negatives = np.flatnonzero(rows & labels), np.flatnonzero(rows & ~labels)
  assert sorted(shares.positive_P) == positives.tolist()
  for p, share in zip(shares.positive_P, shares.below_P, strict=True):
    assert share == pytest.approx(np.mean([pair(p, n) for n in negatives]))
  for n, share in zip(shares.negative_N, shares.above_N, strict=True):
    assert share == pytest.approx(np.mean([pair(p, n) for p in positives]))
  for term in lifts.auc_terms([SortedScores(labels, scores)], rows, unit, 9):
    assert term.means() == pytest.approx([expected])
  assert np.isnan(SortedScores(labels, scores).auc(rows & labels))
  assert SortedScores(labels, scores).shares(rows & labels).below_P.size == 0


def test_a_planted_effect_is_found_and_none_is_not(arms):
  result = compare(arms, 'none', WEIGHTS, age_edges_hours=EDGES, resamples=300, challenger='strong')
  for over in ('none', 'weak'):
    lift = result.against[over]['save/auc']
    assert 0 < lift.difference_low < lift.difference < lift.difference_high
  figures = result.figures()
  assert figures['strong/against/weak/save/auc'] == pytest.approx(
    figures['strong/save/auc/mean'] - figures['weak/save/auc/mean']
  )
  assert figures['strong/against/weak/save/auc/low'] > 0
  same = compare({'a': arms['weak'], 'b': arms['weak']}, 'a', WEIGHTS, resamples=50, challenger='b').against['a']
  assert (same['save/auc'].difference_low, same['save/auc'].difference_high) == (0, 0)


def test_effects_on_unseen_items_show_in_their_bucket_alone(arms):
  rows = made_rows(requests=300, users=80)
  base = scored(rows, 0.0, 1)
  better = scored(rows, 3.0, 2).scores_MT
  helped = dataclasses.replace(base, scores_MT=np.where(rows['unseen_M'][:, None], better, base.scores_MT))
  lift = compare({'a': [base], 'b': [helped]}, 'a', WEIGHTS, resamples=100).lifts['b']
  assert lift['save/unseen/auc'].low > 0.2
  assert lift['save/seen/auc'].relative == 0


def test_the_buckets_part_what_is_counted(arms):
  figures = compare(arms, 'none', WEIGHTS, age_edges_hours=EDGES, resamples=10).metrics['weak']
  for label in ('save', 'hide'):
    total = figures[f'{label}/positives'][0]
    assert figures[f'{label}/seen/positives'][0] + figures[f'{label}/unseen/positives'][0] == total
    ages = ('age<24h', 'age24-168h', 'age>=168h', 'age_unknown')
    assert sum(figures[f'{label}/{age}/positives'][0] for age in ages) == total


def test_arms_of_an_earlier_version_take_their_buckets_from_one_that_has_them(arms):
  old = {**arms, 'none': [dataclasses.replace(run, unseen_M=None) for run in arms['none']]}
  filled = same_rows(old)
  np.testing.assert_array_equal(filled['none'][1].unseen_M, arms['weak'][1].unseen_M)
  whole, partly = (compare(a, 'none', WEIGHTS, resamples=10).figures() for a in (arms, old))
  assert partly == whole
  none = {name: [dataclasses.replace(run, unseen_M=None) for run in runs] for name, runs in arms.items()}
  assert not any('seen' in name for name in compare(none, 'none', WEIGHTS, resamples=10).figures())


def test_a_resample_of_nobody_is_undefined():
  term = bootstrap.Ratio.of(np.array([[1.0], [0.0]]), np.array([1, 1]), 3)
  (samples,) = bootstrap.ratios([term], np.array([[3, 0, 0], [1, 2, 0]], np.uint8))
  np.testing.assert_array_equal(samples, [[np.nan], [0.5]])
  assert term.means() == [0.5]
