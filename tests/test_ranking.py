"""Predictions on disk, metrics by label and age, and the comparison of arms."""

import dataclasses
import re

import numpy as np
import pytest

from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.evaluate.comparison import compare
from pinfm_jax.evaluate.ranking import (
  RankingPredictions,
  age_buckets,
  best_attainable,
  ranking_metrics,
  reliability,
  utility,
  utility_weights,
)
from pinfm_jax.evaluate.tables import Table, interval, mean_std, percent_interval

LABELS = ('save', 'hide')
WEIGHTS = {'save': 1.0, 'hide': -0.5}


def made_predictions(noise=0.1, seed=0, users=80, requests=160, candidates=6, reference=True):
  """Labels drawn from known probabilities; scores are these probabilities with noise."""
  truth = np.random.default_rng(0)
  rows = requests * candidates
  request = np.repeat(np.arange(requests), candidates)
  probabilities = truth.beta(1, 4, (rows, 2)).astype(np.float32)
  scores = probabilities + noise * np.random.default_rng(seed + 1).normal(size=probabilities.shape)
  return RankingPredictions(
    request_M=request * 7,
    user_M=request % users + 1000,
    item_key_M=truth.integers(0, 2**63, rows).astype(np.uint64),
    age_hours_M=np.where(truth.random(rows) < 0.1, np.nan, np.exp(truth.normal(4, 2, rows))).astype(np.float32),
    labels_MT=(truth.random((rows, 2)) < probabilities).astype(np.uint8),
    scores_MT=np.clip(scores, 1e-3, 1 - 1e-3).astype(np.float32),
    reference_MT=probabilities if reference else None,
    label_names=LABELS,
    unseen_M=truth.random(rows) < 0.2,
  )


@pytest.mark.parametrize('reference', [True, False])
def test_predictions_come_back_as_they_were_saved(tmp_path, reference):
  predictions = made_predictions(reference=reference)
  path = tmp_path / 'predictions.npz'
  predictions.save(path)
  loaded = RankingPredictions.load(path)
  for field in dataclasses.fields(predictions):
    ours, theirs = getattr(predictions, field.name), getattr(loaded, field.name)
    np.testing.assert_array_equal(ours, theirs) if ours is not None else None
    assert getattr(ours, 'dtype', type(ours)) == getattr(theirs, 'dtype', type(theirs))
  assert [p.name for p in tmp_path.iterdir()] == ['predictions.npz']


def test_a_file_of_an_earlier_version_opens_without_unseen_items(tmp_path):
  path = tmp_path / 'old.npz'
  dataclasses.replace(made_predictions(), unseen_M=None).save(path)
  with np.load(path) as archive:
    assert 'unseen_M' not in archive  # as such a file is
  loaded = RankingPredictions.load(path)
  assert loaded.unseen_M is None
  assert not any('seen' in name for name in ranking_metrics(loaded, WEIGHTS))


def test_every_damage_to_the_file_is_one_clear_line(tmp_path):
  path = tmp_path / 'predictions.npz'
  with pytest.raises(UserError, match='no such file'):
    RankingPredictions.load(path)
  made_predictions().save(path)
  good = path.read_bytes()
  flipped = bytearray(good)
  flipped[len(good) // 2] ^= 1
  for bad in (b'', b'hello', good[: len(good) // 2], good[:-1], bytes(flipped)):
    path.write_bytes(bad)
    with pytest.raises(UserError, match='damaged or foreign') as error:
      RankingPredictions.load(path)
    assert '\n' not in str(error.value)


def test_a_foreign_archive_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', x=np.zeros(3))
  with pytest.raises(UserError, match='damaged or foreign'):
    RankingPredictions.load(tmp_path / 'a.npz')


def test_bad_shapes_and_scores_are_refused():
  good = made_predictions()
  with pytest.raises(ValueError, match='user_M'):
    dataclasses.replace(good, user_M=good.user_M[1:])
  with pytest.raises(ValueError, match='unseen_M'):
    dataclasses.replace(good, unseen_M=good.unseen_M[1:])
  with pytest.raises(UserError, match='diverged'):
    dataclasses.replace(good, scores_MT=np.full_like(good.scores_MT, np.nan))


def test_utility_is_the_weighted_sum_and_checks_its_names():
  scores = np.array([[0.5, 0.2], [0.1, 0.0]], np.float32)
  np.testing.assert_allclose(utility(scores, LABELS, WEIGHTS), [0.4, 0.1], rtol=1e-6)
  np.testing.assert_allclose(utility_weights({'save': 2}, LABELS), [2, 0])
  with pytest.raises(UserError, match="'sav'.*did you mean 'save'"):
    utility_weights({'sav': 1.0}, LABELS)
  for nothing in ({}, {'save': 0.0}):
    with pytest.raises(UserError, match=re.escape('evaluate.utility')):
      utility_weights(nothing, LABELS)


def test_age_buckets_part_the_rows():
  ages = np.array([0, 23.9, 24, 168, 671, 672, 1e9, np.nan], np.float32)
  masks = age_buckets(ages, (24, 168, 672))
  expected = {'age<24h': [0, 1], 'age24-168h': [2], 'age168-672h': [3, 4], 'age>=672h': [5, 6], 'age_unknown': [7]}
  assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == expected
  assert list(age_buckets(np.array([1.0, 30.0]), (24,))) == ['age<24h', 'age>=24h']


def test_ranking_metrics_are_those_of_the_rows_they_name():
  predictions = made_predictions()
  figures = ranking_metrics(predictions, WEIGHTS)
  labels, scores = predictions.labels_MT[:, 0], predictions.scores_MT[:, 0]
  young = predictions.age_hours_M < 24
  order = utility(predictions.scores_MT, LABELS, WEIGHTS)
  of_user = [predictions.user_M == user for user in set(predictions.user_M)]
  each = [metrics.auc(labels[rows], scores[rows]) for rows in of_user]
  expected = {
    'save/auc': metrics.auc(labels, scores),
    'save/per_user_auc': np.nanmean(each),
    'save/logloss': metrics.logloss(labels, scores),
    'save/calibration': metrics.calibration(labels, scores),
    'save/hit@3': metrics.hit_at_k(predictions.request_M, order, labels).hit_Q.mean(),
    'save/hit@3_requests': metrics.hit_at_k(predictions.request_M, order, labels).hit_Q.size,
    'save/positives': labels.sum(),
    'save/age<24h/auc': metrics.auc(labels[young], scores[young]),
    'save/age<24h/positives': labels[young].sum(),
    'save/per_user_auc_users': np.isfinite(each).sum(),
    'save/unseen/auc': metrics.auc(labels[predictions.unseen_M], scores[predictions.unseen_M]),
    'save/seen/positives': labels[~predictions.unseen_M].sum(),
    # a positive of that age in the top 3 of the whole request, not among the young candidates alone
    'save/age<24h/hit@3': metrics.hit_at_k(predictions.request_M, order, labels * young).hit_Q.mean(),
  }
  assert {name: figures[name] for name in expected} == pytest.approx(expected)
  by_age = [value for name, value in figures.items() if re.fullmatch('save/age.*/positives', name)]
  assert sum(by_age) == figures['save/positives']


def test_unknown_ages_give_no_age_figures():
  predictions = dataclasses.replace(made_predictions(), age_hours_M=np.full(960, np.nan, np.float32))
  assert not any('age' in name for name in ranking_metrics(predictions, WEIGHTS))


@pytest.mark.parametrize('share', [0, 1])
def test_items_of_one_kind_only_give_no_figures_of_kinds(share):
  predictions = dataclasses.replace(made_predictions(), unseen_M=np.full(960, bool(share)))
  assert not any('seen' in name for name in ranking_metrics(predictions, WEIGHTS))


def test_reliability_is_that_of_tenths_of_the_rows():
  scores = np.random.default_rng(0).random((2, 960, 2)).astype(np.float32)  # no two are the same
  runs = [dataclasses.replace(made_predictions(), scores_MT=each) for each in scores]
  scores, labels = (np.concatenate([getattr(r, name)[:, 1] for r in runs]) for name in ('scores_MT', 'labels_MT'))
  order = np.argsort(scores, kind='stable')
  for part, found in zip(np.array_split(order, 8), reliability(runs, 'hide', bins=8), strict=True):
    assert found == pytest.approx([scores[part].mean(dtype=float), labels[part].mean(), len(part)])
  constant = dataclasses.replace(runs[0], scores_MT=np.full((960, 2), 0.5, np.float32))
  assert reliability([constant], 'save') == [[0.5, constant.labels_MT[:, 0].mean(), 960]]


def test_best_attainable_scores_with_the_truth():
  predictions = made_predictions(noise=0.3)
  best = best_attainable(predictions, WEIGHTS)
  assert best['save/auc'] == metrics.auc(predictions.labels_MT[:, 0], predictions.reference_MT[:, 0])
  assert best['save/auc'] > ranking_metrics(predictions, WEIGHTS)['save/auc'] + 0.05
  assert best_attainable(made_predictions(reference=False), WEIGHTS) is None


def made_arms():
  return {
    'without': [made_predictions(noise=0.3, seed=s) for s in range(3)],
    'with': [made_predictions(noise=0.05, seed=s + 10) for s in range(3)],
  }


def test_compare_holds_means_stds_lifts_and_the_best():
  arms = made_arms()
  result = compare(arms, 'without', WEIGHTS, labels_shown=('save',), resamples=100)
  figures = result.figures()
  aucs = [ranking_metrics(p, WEIGHTS)['save/auc'] for p in arms['with']]
  base = np.mean([ranking_metrics(p, WEIGHTS)['save/auc'] for p in arms['without']])
  assert figures['with/save/auc/mean'] == pytest.approx(np.mean(aucs))
  assert figures['with/save/auc/std'] == pytest.approx(np.std(aucs, ddof=1))
  assert figures['with/lift/save/auc'] == pytest.approx(np.mean(aucs) / base - 1)
  assert figures['with/lift/save/auc/difference'] == pytest.approx(np.mean(aucs) - base)
  assert 0 < figures['with/lift/save/auc/low'] < figures['with/lift/save/auc'] < figures['with/lift/save/auc/high']
  hit = [ranking_metrics(p, WEIGHTS)['hide/age<24h/hit@3'] for p in arms['with']]
  base_hit = [ranking_metrics(p, WEIGHTS)['hide/age<24h/hit@3'] for p in arms['without']]
  assert figures['with/lift/hide/age<24h/hit@3'] == pytest.approx(np.mean(hit) / np.mean(base_hit) - 1)
  assert figures['best_attainable/save/auc'] > figures['with/save/auc/mean']
  assert (figures['ranking/seeds'], figures['ranking/users']) == (3, 80)
  assert not any(name.startswith('without/lift') for name in figures)
  assert np.isfinite(list(figures.values())).all()


def test_the_tables_show_every_arm_the_lift_the_best_and_the_positives():
  result = compare(made_arms(), 'without', WEIGHTS, resamples=50)
  hit, auc, own, probabilities, save, hide = result.tables()
  assert [row[0] for row in hit.rows] == ['without', 'with', 'lift of with', 'best attainable', 'requests counted']
  assert hit.header == ('', 'save', 'hide (lower is better)')
  assert auc.header == ('', 'save', 'hide')
  positives = int(made_predictions().labels_MT[:, 0].sum())
  assert auc.rows[-1][:2] == ('positives', f'{positives:,}')
  assert own.rows[-1][:2] == ('users counted', f'{result.figures()["without/save/per_user_auc_users/mean"]:.0f}')
  assert [row[:2] for row in probabilities.rows] == [(arm, label) for label in LABELS for arm in ('without', 'with')]
  assert [row[0] for row in save.rows] == ['<24h', '24-168h', '168-672h', '>=672h', 'age unknown', 'seen', 'unseen']
  assert hide.header[2] == 'HIT@3 (lower is better) lift'
  lift = result.lifts['with']['save/unseen/auc']
  assert save.rows[-1][4] == percent_interval(lift.relative, lift.low, lift.high)
  for text in (result.markdown(), result.text()):
    assert f'{result.figures()["with/save/auc/mean"]:.4f} ± ' in text


def test_the_logloss_of_both_arms_stands_beside_its_change():
  result = compare(made_arms(), 'without', WEIGHTS, resamples=50)
  (base, ours) = (row for row in result.tables()[3].rows if row[1] == 'save')
  losses = [
    np.mean([metrics.logloss(p.labels_MT[:, 0], p.scores_MT[:, 0]) for p in runs]) for runs in made_arms().values()
  ]
  assert (base[2][:6], ours[2][:6]) == tuple(f'{loss:.4f}' for loss in losses)
  assert base[3] == ''
  assert ours[3].startswith(f'{losses[1] - losses[0]:+.4f} [')


def test_the_challenger_has_a_table_against_every_other_arm():
  arms = {**made_arms(), 'third': made_arms()['with']}
  result = compare(arms, 'without', WEIGHTS, resamples=50, challenger='with')
  hit, auc = (table for table in result.tables() if 'against' in table.title)
  assert (hit.title, auc.title) == ('HIT@3: with against', 'AUC: with against')
  assert [row[0] for row in auc.rows] == ['without', 'third']
  lift = result.lifts['with']['save/auc']
  assert auc.rows[0][1] == interval(lift.difference, lift.difference_low, lift.difference_high)
  assert auc.rows[1][1] == '+0.0000 [+0.0000, +0.0000]'
  with pytest.raises(ValueError, match='challenger'):
    compare(arms, 'without', WEIGHTS, challenger='fourth')


def test_the_papers_figure_stands_beside_the_hit_rate_of_its_arm_and_nowhere_else():
  result = compare(made_arms(), 'without', WEIGHTS, resamples=20, paper={'with': '+3.76 %', 'without': ''})
  hit, auc, *_ = result.tables()
  assert hit.header[-1] == 'paper'
  assert [row[-1] for row in hit.rows] == ['', '', '+3.76 %', '', '']
  assert 'other data' in hit.note
  assert 'paper' not in auc.header
  assert 'paper' not in compare(made_arms(), 'without', WEIGHTS, resamples=20, paper={'with': ''}).tables()[0].header


def test_the_note_says_what_was_drawn():
  result = compare(made_arms(), 'without', WEIGHTS, resamples=20, resample='requests')
  hit, _, own, *_ = result.tables()
  assert '160 requests' in hit.note
  assert '80 users' in own.note  # a user's own AUC is not one of a request
  assert (
    result.lifts['with']['save/auc'].low
    != compare(made_arms(), 'without', WEIGHTS, resamples=20).lifts['with']['save/auc'].low
  )


def test_one_seed_has_no_std_and_real_data_no_best():
  one = {name: [made_predictions(seed=i, reference=False)] for i, name in enumerate(('a', 'b'))}
  result = compare(one, 'a', WEIGHTS, resamples=20)
  assert not any(name.endswith('/std') or name.startswith('best') for name in result.figures())
  assert '±' not in result.markdown()
  assert 'best attainable' not in result.markdown()


def test_arms_that_cannot_be_paired_are_refused():
  ours, theirs = made_predictions(), made_predictions(requests=150)
  with pytest.raises(ValueError, match='same rows'):
    compare({'a': [ours], 'b': [theirs]}, 'a', WEIGHTS)
  with pytest.raises(ValueError, match='2 seeds'):
    compare({'a': [ours], 'b': [ours, ours]}, 'a', WEIGHTS)
  with pytest.raises(ValueError, match='baseline'):
    compare({'a': [ours]}, 'c', WEIGHTS)


def test_a_label_to_show_must_be_one_of_the_data():
  with pytest.raises(UserError, match="'sav'.*save, hide"):
    compare({'a': [made_predictions()]}, 'a', WEIGHTS, labels_shown=('sav',))


def test_a_table_is_markdown_and_aligned_text():
  table = Table('AUC', ('', 'a|b'), (('x', '0.5'), ('longer', '–')), note='A note.')
  assert table.markdown() == '### AUC\n\n|  | a\\|b |\n| --- | ---: |\n| x | 0.5 |\n| longer | – |\n\nA note.\n'
  assert table.text() == 'AUC\n\n        a|b\n------  ---\nx       0.5\nlonger    –\n\nA note.\n'
  with pytest.raises(ValueError, match='expected 2'):
    Table('AUC', ('', 'a'), (('x',),))


def test_cells_say_what_is_not_known():
  nan = float('nan')
  assert (mean_std(0.5, 0.01), mean_std(0.5, nan), mean_std(nan, nan)) == ('0.5000 ± 0.0100', '0.5000', '–')
  assert percent_interval(0.0231, 0.011, 0.0352) == '+2.31 % [+1.10, +3.52]'
  assert percent_interval(-0.1, nan, nan, digits=1) == '-10.0 % [too few]'
  assert percent_interval(nan, nan, nan) == '–'
  assert interval(-0.01234, -0.02, 0.001) == '-0.0123 [-0.0200, +0.0010]'
  assert (interval(0.5, nan, nan, 1), interval(nan, nan, nan)) == ('+0.5 [too few]', '–')
