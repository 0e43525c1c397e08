"""Reproducibility and stability of a ranker: what two trainings disagree on, and how it does on parts of the data."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import metrics
from pinfm_jax.evaluate.ranking import HIT_K, RankingPredictions, utility

TIME_SLICES = 3


@dataclass(frozen=True)
class Disagreement:
  """How far two trainings with the same settings, or the mean over several pairs, are from each other.

  Attributes:
    mean_difference: mean absolute difference of the predicted probability of a label.
    rank_correlation: Spearman's, of that probability over all candidates.
    changed_top: share of the requests of more than 3 candidates whose top 3 by utility is another set.
  """

  mean_difference: float
  rank_correlation: float
  changed_top: float


def disagreement(runs: Sequence[RankingPredictions], label: str, weights: Mapping[str, float]) -> Disagreement | None:
  """Mean disagreement over all pairs of runs; None of a single one.

  Args:
    runs: predictions of the same candidates, one a seed.
    label: whose probability is compared.
    weights: of the utility that orders a request.

  Raises:
    UserError: the runs are of other candidates.
  """
  pairs = [_pair(*pair, label, weights) for pair in itertools.combinations(runs, 2)]
  if not pairs:
    return None
  return Disagreement(*(float(np.mean(values)) for values in zip(*pairs, strict=True)))


def _pair(first: RankingPredictions, second: RankingPredictions, label: str, weights: Mapping[str, float]):
  for name in ('request_M', 'item_key_M'):
    if not np.array_equal(getattr(first, name), getattr(second, name)):
      raise UserError('two runs predicted other candidates, so they cannot be compared; measure both on one split')
  a_M, b_M = (run.scores_MT[:, run.label(label)].astype(np.float64) for run in (first, second))
  tops = [top_candidates(run.request_M, utility(run.scores_MT, run.label_names, weights)) for run in (first, second)]
  requests, inverse_M, sizes = np.unique(first.request_M, return_inverse=True, return_counts=True)
  changed_Q = np.bincount(inverse_M, tops[0] != tops[1], minlength=len(requests))[sizes > HIT_K] > 0
  changed = float(changed_Q.mean()) if changed_Q.size else float('nan')
  return float(np.abs(a_M - b_M).mean()), rank_correlation(a_M, b_M), changed


def rank_correlation(first_M: np.ndarray, second_M: np.ndarray) -> float:
  """Spearman's rank correlation, ties at their mean rank; NaN where one of the two is constant."""
  a_M, b_M = (rankdata(x) - (len(x) + 1) / 2 for x in (first_M, second_M))
  scale = np.sqrt((a_M @ a_M) * (b_M @ b_M))
  return float(a_M @ b_M / scale) if scale else float('nan')


def top_candidates(requests_M: np.ndarray, utility_M: np.ndarray, k: int = HIT_K) -> np.ndarray:
  """Which rows are among the k of highest utility in their request; of equal ones the earlier row."""
  order = np.lexsort((-utility_M, requests_M))
  ordered = requests_M[order]
  starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, np.int64)
  place = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
  top_M = np.zeros(len(order), bool)
  top_M[order] = place < k
  return top_M


@dataclass(frozen=True)
class Slices:
  """Parts of an evaluation split.

  Attributes:
    masks: name -> bool, the rows of the part; empty parts are left out.
    note: how they were made.
  """

  masks: Mapping[str, np.ndarray]
  note: str


def make_slices(
  request_M: np.ndarray,
  time_M: np.ndarray,
  events_M: np.ndarray,
  edges: Sequence[float] = (),
) -> Slices:
  """Equal lengths of the split's time, and users by the events that their history has at the request.

  Args:
    request_M: request of each row.
    time_M: ms, time of the request.
    events_M: events of the user's history at the request.
    edges: two numbers of events; new users have fewer than the first, heavy ones at least the second. Empty =
      the thirds of the requests.

  Raises:
    UserError: edges that are not two ascending numbers.
  """
  if edges and (len(edges) != 2 or not edges[0] < edges[1]):
    raise UserError(f'--segments got {",".join(f"{e:g}" for e in edges)}; expected two ascending numbers of events')
  begin, end = int(time_M.min()), int(time_M.max()) + 1
  part_M = (time_M - begin) * TIME_SLICES // (end - begin)
  masks = {f'time {i + 1}': part_M == i for i in range(TIME_SLICES)}
  if not edges:
    first = np.unique(request_M, return_index=True)[1]
    edges = [float(np.ceil(edge)) for edge in np.quantile(events_M[first], [1 / 3, 2 / 3])]
  segment_M = np.searchsorted(edges, events_M, side='right')
  masks |= {f'{name} users': segment_M == i for i, name in enumerate(('new', 'light', 'heavy'))}
  hours = (end - begin) / TIME_SLICES / 3_600_000
  note = (
    f'Time slices are {hours:.3g} hours each, from the first request to the last. New users have fewer than '
    f'{edges[0]:g} events in their history at the request, heavy ones {edges[1]:g} or more.'
  )
  return Slices({name: mask for name, mask in masks.items() if mask.any()}, note)


def slices_of(predictions: RankingPredictions, dataset: PreparedDataset, edges: Sequence[float] = ()) -> Slices:
  """`make_slices` of the requests that were predicted."""
  rows, inverse_M = np.unique(predictions.request_M, return_inverse=True)
  time = dataset.requests['timestamp'].to_numpy()[rows]
  events = np.array([dataset.request(int(row)).history_end for row in rows])
  return make_slices(predictions.request_M, time[inverse_M], events[inverse_M], edges)


def metric_of(
  predictions: RankingPredictions,
  metric: str,
  label: str,
  weights: Mapping[str, float],
  rows_M: np.ndarray | None = None,
) -> float:
  """AUC, HIT@3 or logloss of a label, over all rows or some; a request's rows belong to the same part."""
  rows_M = np.ones(len(predictions.request_M), bool) if rows_M is None else rows_M
  column = predictions.label(label)
  labels, scores = predictions.labels_MT[rows_M, column], predictions.scores_MT[rows_M, column]
  if metric == 'auc':
    return metrics.auc(labels, scores)
  if metric == 'logloss':
    return metrics.logloss(labels, scores)
  utility_M = utility(predictions.scores_MT[rows_M], predictions.label_names, weights)
  hit_Q = metrics.hit_at_k(predictions.request_M[rows_M], utility_M, labels, HIT_K).hit_Q
  return float(hit_Q.mean()) if hit_Q.size else float('nan')
