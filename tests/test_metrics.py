"""Metrics against brute force and hand-made cases; the bootstrap against simulated truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfm_jax.evaluate import bootstrap, metrics
from pinfm_jax.evaluate.sorted_auc import SortedScores

ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=25)


def brute_force_auc(labels, scores, weights):
  won = total = 0.0
  for i in range(len(labels)):
    for j in range(len(labels)):
      if labels[i] == 1 and labels[j] == 0:
        pair = weights[i] * weights[j]
        total += pair
        won += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
  return won / total if total else float('nan')


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_auc_is_the_brute_force_one_with_ties_and_weights(rows):
  labels, scores, weights, _ = np.array(rows, int).reshape(-1, 4).T
  np.testing.assert_allclose(
    metrics.auc(labels, scores / 4, weights), brute_force_auc(labels, scores, weights), atol=1e-12
  )


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_integer_and_float_weights_and_duplicated_rows_agree(rows):
  labels, scores, weights, _ = np.array(rows, int).reshape(-1, 4).T
  duplicated = metrics.auc(np.repeat(labels, weights), np.repeat(scores, weights))
  np.testing.assert_allclose(metrics.auc(labels, scores, weights), duplicated)
  presorted = metrics.PresortedAuc(labels, scores, np.arange(labels.size))
  np.testing.assert_allclose(presorted(weights), duplicated)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_per_user_auc_is_the_mean_over_users_with_both_classes(rows):
  labels, scores, _, users = np.array(rows, int).reshape(-1, 4).T
  each = [brute_force_auc(labels[users == u], scores[users == u], np.ones(25)) for u in set(users)]
  each = [value for value in each if value == value]
  expected = np.mean(each) if each else float('nan')
  found = SortedScores(labels, scores).user_aucs(users).auc_U
  np.testing.assert_allclose(found.mean() if found.size else np.nan, expected)


def test_one_class_has_no_auc():
  assert np.isnan(metrics.auc([1, 1], [0.1, 0.2]))
  assert np.isnan(metrics.auc([], []))
  assert np.isnan(metrics.auc([0, 1], [0.1, 0.2], [1, 0]))


@pytest.mark.parametrize(
  ('labels', 'scores', 'message'),
  [([0, 1], [0.1], 'length'), ([0, 2], [0.1, 0.2], 'neither'), ([0, 1], [0.1, np.nan], 'diverged')],
)
def test_bad_rows_are_refused(labels, scores, message):
  for metric in (metrics.auc, metrics.logloss):
    with pytest.raises(ValueError, match=message):
      metric(np.array(labels), np.array(scores))


def test_logloss_entropy_and_calibration_by_hand():
  labels, probabilities = np.array([1, 0, 0, 0]), np.array([0.5, 0.25, 0.25, 0.0])
  expected = -(np.log(0.5) + 2 * np.log(0.75)) / 4
  assert metrics.logloss(labels, probabilities) == pytest.approx(expected, abs=1e-6)
  assert metrics.calibration(labels, probabilities) == pytest.approx(1.0)
  assert metrics.normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)
  assert np.isfinite(metrics.logloss(np.array([1]), np.array([0.0])))
  assert np.isnan(metrics.calibration(np.zeros(2), np.ones(2)))
  assert np.isnan(metrics.normalised_entropy(np.zeros(2), np.ones(2)))


def hits_of(*requests, k=3):
  """Each request is a list of (utility, label)."""
  ids = np.repeat(np.arange(len(requests)) * 10, [len(r) for r in requests])
  utility, labels = (np.array([row[i] for r in requests for row in r], float) for i in (0, 1))
  order = np.random.default_rng(0).permutation(len(ids))  # rows may come in any order
  hits = metrics.hit_at_k(ids[order], utility[order], labels[order], k)
  return dict(zip(hits.request_Q.tolist(), hits.hit_Q.tolist(), strict=True))


def test_hit_at_3_by_hand():
  assert hits_of(
    [(4, 0), (3, 0), (2, 1), (1, 0)],  # third: a hit
    [(4, 0), (3, 0), (2, 0), (1, 1)],  # fourth: a miss
    [(4, 0), (3, 0), (2, 1)],  # three candidates: not counted
    [(4, 0), (3, 0), (2, 0), (1, 0)],  # no positive: not counted
    [(1, 1), (1, 0), (1, 0), (1, 0)],  # tied with three: after them, a miss
    [(2, 0), (1, 0), (1, 1), (1, 1), (0, 0)],  # after the negative it ties with, third: a hit
    [(9, 1), (8, 1), (7, 1), (6, 1)],  # positives only
  ) == {0: 1.0, 10: 0.0, 40: 0.0, 50: 1.0, 60: 1.0}
  assert hits_of([(2, 0), (1, 1)], k=1) == {0: 0.0}


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_hit_at_k_is_a_pessimistic_sort(rows, k):
  labels, utility, _, requests = np.array(rows, int).reshape(-1, 4).T
  expected = {}
  for request in set(requests.tolist()):
    ranked = sorted((-u, y) for u, y, r in zip(utility, labels, requests, strict=True) if r == request)
    if len(ranked) > k and any(y for _, y in ranked):
      expected[request] = float(any(y for _, y in ranked[:k]))  # at one utility, label 0 sorts first
  hits = metrics.hit_at_k(requests, utility, labels, k)
  assert dict(zip(hits.request_Q.tolist(), hits.hit_Q.tolist(), strict=True)) == expected


def test_rank_metrics_by_hand():
  ranks = np.array([1, 2, 11])
  assert metrics.hr_at_k(ranks, 10) == pytest.approx(2 / 3)
  assert metrics.ndcg_at_k(ranks, 10) == pytest.approx((1 + 1 / np.log2(3)) / 3)
  assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 2 + 1 / 11) / 3)
  assert np.isnan(metrics.mrr(np.zeros(0)))


def user_mean(values, user):
  sums, counts = np.bincount(user, values), np.bincount(user)
  return lambda weights: weights @ sums / (weights @ counts)


def test_the_interval_covers_the_true_lift_as_often_as_it_says():
  rng = np.random.default_rng(1)
  covered = 0
  for trial in range(100):  # rows of a user share an effect: an interval over rows would be far too narrow
    user = np.repeat(np.arange(60), 5)
    shared = rng.normal(size=60)[user]
    a, b = (user_mean(1.0 + shift + shared + rng.normal(size=300), user) for shift in (0.0, 0.2))
    lift = bootstrap.paired_bootstrap(a, b, 60, resamples=200, seed=trial)
    covered += lift.difference_low <= 0.2 <= lift.difference_high
  assert 88 <= covered <= 99


def test_the_pairing_removes_what_both_arms_share():
  rng = np.random.default_rng(2)
  user = np.arange(200)
  shared = rng.normal(5, 3, size=200)
  lift = bootstrap.paired_bootstrap(user_mean(shared, user), user_mean(1.1 * shared, user), 200)
  assert lift.relative == pytest.approx(0.1)
  assert lift.high - lift.low < 1e-9  # unpaired it would be about 0.25 wide
  assert lift.difference == pytest.approx(0.1 * shared.mean())


def test_resamples_depend_on_the_seed_alone():
  alone = bootstrap.draws(20, 30, seed=3)
  np.testing.assert_array_equal(alone, bootstrap.draws(20, 50, seed=3)[:30])
  assert (alone != bootstrap.draws(20, 30, seed=4)).any()
  assert (alone.sum(axis=1) == 20).all()


def test_too_few_positives_give_no_interval():
  labels, scores, user = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3]), np.arange(4)
  auc = metrics.PresortedAuc(labels, scores, user)  # a third of the resamples miss the only positive
  lift = bootstrap.paired_bootstrap(auc, auc, 4, resamples=200)
  assert lift.relative == 0.0
  assert np.isnan([lift.low, lift.high, lift.difference_low]).all()


def test_a_baseline_of_zero_has_no_relative_lift():
  lift = bootstrap.lift(0.0, 0.5, np.zeros(100), np.full(100, 0.5))
  assert np.isnan(lift.relative)
  assert np.isnan(lift.low)
  assert (lift.difference, lift.difference_low) == (0.5, 0.5)
