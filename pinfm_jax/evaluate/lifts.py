"""Figures of many arms on the same resamples, and what one arm changes against another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pinfm_jax.evaluate import bootstrap, metrics
from pinfm_jax.evaluate.bootstrap import Lift, Ratio
from pinfm_jax.evaluate.ranking import HIT_K, RankingPredictions, figure_name, grouped_requests, slices
from pinfm_jax.evaluate.sorted_auc import SortedScores
from pinfm_jax.progress import Progress

Arms = Mapping[str, Sequence[RankingPredictions]]  # an arm's predictions, one a seed
_EXACT_BELOW = 4096  # up to here the AUC of a resample is computed as such, see `auc_terms`


@dataclass(frozen=True)
class Resampled:
  """A figure of A arms, each its mean over the seeds: on all rows, and on R resamples."""

  value_A: np.ndarray
  samples_RA: np.ndarray

  def lift(self, arm: int, over: int) -> Lift:
    """What one arm changes against another."""
    columns = self.samples_RA[:, over], self.samples_RA[:, arm]
    return bootstrap.lift(float(self.value_A[over]), float(self.value_A[arm]), *columns)


@dataclass(frozen=True)
class _Seed:
  """The rows of one seed, the same for all arms, and where they lie among what is drawn."""

  runs: Sequence[RankingPredictions]  # one an arm
  requests: Sequence[metrics.GroupedRequests]  # one an arm
  unit_M: np.ndarray
  unit_R: np.ndarray  # of each request
  user_M: np.ndarray

  @classmethod
  def of(
    cls,
    runs: Sequence[RankingPredictions],
    weights: Mapping[str, float],
    users: np.ndarray,
    requests: np.ndarray | None,
  ) -> '_Seed':
    """Sorts and groups; `requests` is None where users are drawn."""
    first, user_M = runs[0], np.searchsorted(users, runs[0].user_M)
    unit_M = user_M if requests is None else np.searchsorted(requests, first.request_M)
    _, first_row_R = np.unique(first.request_M, return_index=True)
    return cls(runs, [grouped_requests(run, weights) for run in runs], unit_M, unit_M[first_row_R], user_M)


def resampled_figures(
  arms: Arms,
  weights: Mapping[str, float],
  age_edges_hours: Sequence[float],
  resamples: int = 1000,
  resample: str = 'users',
) -> dict[str, Resampled]:
  """AUC and HIT@3 overall and by bucket (`ranking.slices`), per-user AUC and logloss overall.

  The resamples are the same for all arms and seeds, so an interval is about users (or requests); the spread over seeds
  is the std in the tables. The mean of the users' own AUCs is resampled over users in any case.

  Args:
    arms: each arm's predictions, one a seed, paired.
    weights: of the utility.
    age_edges_hours: edges of the item-age buckets.
    resamples: how many.
    resample: what is drawn: 'users' or 'requests'.

  Returns:
    {'save/auc': ..., 'save/age<24h/hit@3': ..., 'save/logloss': ...}, columns in the order of `arms`.
  """
  users = distinct(arms, 'user_M')
  requests = distinct(arms, 'request_M') if resample == 'requests' else None
  user_draws_RU = bootstrap.draws(users.size, resamples)
  draws_RU = user_draws_RU if requests is None else bootstrap.draws(requests.size, resamples)
  seeds = [_Seed.of(runs, weights, users, requests) for runs in zip(*arms.values(), strict=True)]
  rows_of = [{(label, bucket): rows for label, bucket, rows in slices(s.runs[0], age_edges_hours)} for s in seeds]
  nothing = [np.zeros(s.unit_M.size, bool) for s in seeds]
  progress, figures = Progress('bootstrap', len(rows_of[0]), 'figures'), {}
  for number, (name, bucket) in enumerate(rows_of[0], 1):
    rows = [masks.get((name, bucket), none) for masks, none in zip(rows_of, nothing, strict=True)]
    label = seeds[0].runs[0].label(name)
    for metric, figure in _figures(seeds, label, rows, draws_RU, not bucket):
      figures[figure_name(name, bucket, metric)] = figure
    if not bucket:
      terms = [_per_user_auc(s, label, users.size) for s in seeds]
      figures[figure_name(name, '', 'per_user_auc')] = _mean_over_seeds(terms, bootstrap.ratios(terms, user_draws_RU))
    progress.update(number)
  progress.close()
  return figures


def same_rows(arms: Arms) -> dict[str, tuple[RankingPredictions, ...]]:
  """The arms with one set of ages and unseen items a seed, so that all are measured on the same rows.

  These are facts about the rows, not about an arm, but a file of an earlier version may not hold the unseen items:
  they are taken from the first arm that does.
  """
  filled = []
  for runs in zip(*arms.values(), strict=True):
    known = next((run for run in runs if run.unseen_M is not None), runs[0])
    filled.append([replace(run, age_hours_M=known.age_hours_M, unseen_M=known.unseen_M) for run in runs])
  return dict(zip(arms, zip(*filled, strict=True), strict=True))


def distinct(arms: Arms, name: str) -> np.ndarray:
  """The distinct values of a column of all predictions, ascending."""
  return np.unique(np.concatenate([getattr(run, name) for runs in arms.values() for run in runs]))


def auc_terms(
  scores: Sequence[SortedScores], rows_M: np.ndarray, unit_M: np.ndarray, units: int
) -> tuple[Ratio, Ratio]:
  """The AUC of every arm in two means: of the positives' shares and of the negatives' (`AucShares`).

  Each mean over all rows is the AUC. On a resample, mean + mean - AUC is the AUC of the resample but for the
  interaction of drawn positives with drawn negatives, which is smaller by the root of the number of units (the
  structural components of DeLong et al. 1988, summed by unit as Obuchowski 1997 does for clustered data).

  Args:
    scores: one an arm, of the same rows.
    rows_M: mask of the rows that count.
    unit_M: the unit (a user, say) of each row.
    units: how many there are.
  """
  shares = [each.shares(rows_M) for each in scores]
  positives = [np.bincount(unit_M[each.positive_P], each.below_P, units) for each in shares]
  negatives = [np.bincount(unit_M[each.negative_N], each.above_N, units) for each in shares]
  counts = (np.bincount(unit_M[rows], minlength=units) for rows in (shares[0].positive_P, shares[0].negative_N))
  return tuple(
    Ratio(np.stack(sums, axis=1), count.astype(np.float64))
    for sums, count in zip((positives, negatives), counts, strict=True)
  )


def _figures(
  seeds: Sequence[_Seed], label: int, rows: Sequence[np.ndarray], draws_RU: np.ndarray, overall: bool
) -> Iterator[tuple[str, Resampled]]:
  units = draws_RU.shape[1]
  parts = list(zip(seeds, rows, strict=True))
  hits = [_hits(s, label, rows_M, units) for s, rows_M in parts]
  aucs = [auc_terms([run.sorted_scores[label] for run in s.runs], rows_M, s.unit_M, units) for s, rows_M in parts]
  losses = [_logloss(s, label, units) for s in seeds] if overall else []
  samples = iter(bootstrap.ratios([*hits, *(term for pair in aucs for term in pair), *losses], draws_RU))
  yield 'hit@3', _mean_over_seeds(hits, [next(samples) for _ in seeds])
  below = [pair[0] for pair in aucs]
  auc_samples = [next(samples) + next(samples) - term.means() for term in below]
  for number, (s, rows_M) in enumerate(parts):
    if rows_M.sum() <= _EXACT_BELOW:
      auc_samples[number] = _exact_aucs(s, label, rows_M, draws_RU)
  yield 'auc', _mean_over_seeds(below, auc_samples)
  if overall:
    yield 'logloss', _mean_over_seeds(losses, list(samples))


def _mean_over_seeds(terms: Sequence[Ratio], samples: Sequence[np.ndarray]) -> Resampled:
  return Resampled(np.mean([term.means() for term in terms], axis=0), np.mean(samples, axis=0))


def _hits(seed: _Seed, label: int, rows_M: np.ndarray, units: int) -> Ratio:
  labels_M = seed.runs[0].labels_MT[:, label] * rows_M
  hits = [requests.hit_at_k(labels_M, HIT_K) for requests in seed.requests]
  unit_Q = seed.unit_R[np.searchsorted(seed.requests[0].requests, hits[0].request_Q)]
  return Ratio.of(np.stack([each.hit_Q for each in hits], axis=1), unit_Q, units)


def _logloss(seed: _Seed, label: int, units: int) -> Ratio:
  losses = [metrics.logloss_rows(run.labels_MT[:, label], run.scores_MT[:, label]) for run in seed.runs]
  return Ratio.of(np.stack(losses, axis=1), seed.unit_M, units)


def _per_user_auc(seed: _Seed, label: int, users: int) -> Ratio:
  each = [run.sorted_scores[label].user_aucs(seed.user_M) for run in seed.runs]
  return Ratio.of(np.stack([aucs.auc_U for aucs in each], axis=1), each[0].user_U, users)


def _exact_aucs(seed: _Seed, label: int, rows_M: np.ndarray, draws_RU: np.ndarray) -> np.ndarray:
  """The AUC of every resample as such: the rows are few, and maybe too few for `auc_terms`."""
  drawn, unit = np.unique(seed.unit_M[rows_M], return_inverse=True)
  columns = [(run.labels_MT[rows_M, label], run.scores_MT[rows_M, label]) for run in seed.runs]
  statistics = [metrics.PresortedAuc(*each, unit) for each in columns]
  # int64: see PresortedAuc
  return np.array([[statistic(w) for statistic in statistics] for w in draws_RU[:, drawn].astype(np.int64)])
