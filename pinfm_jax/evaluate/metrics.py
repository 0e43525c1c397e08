"""Point metrics of ranking and retrieval: pure NumPy, vectorised, deterministic.

Shapes: M rows (one candidate each), Q requests that a metric counts, N retrieval queries. A metric that its data leave
undefined (no positives, say) is NaN, never a made-up number.
"""

from typing import NamedTuple

import numpy as np


class PresortedAuc:
  """AUC whose rows are sorted once and whose weights, one a group of rows, change from call to call.

  The groups are users in a bootstrap. A call costs one gather and one cumulative sum over the negatives; nothing is
  sorted again.
  """

  def __init__(self, labels_M: np.ndarray, scores_M: np.ndarray, group_M: np.ndarray):
    """Sorts the rows.

    Args:
      labels_M: 0/1 labels.
      scores_M: finite scores, higher for positives.
      group_M: the index into a call's weights for each row.

    Raises:
      ValueError: shapes differ, a score is not finite or a label is neither 0 nor 1.
    """
    labels_M, scores_M = _checked(labels_M, scores_M)
    group_M = np.asarray(group_M)
    if group_M.shape != labels_M.shape:
      raise ValueError(f'got {group_M.size} groups for {labels_M.size} rows; expected one group a row')
    negative_scores = scores_M[~labels_M]
    order = np.argsort(negative_scores, kind='stable')
    negative_scores = negative_scores[order]
    self._negative_group = group_M[~labels_M][order]
    self._positive_group = group_M[labels_M]
    self._below = np.searchsorted(negative_scores, scores_M[labels_M], side='left')
    self._below_or_tied = np.searchsorted(negative_scores, scores_M[labels_M], side='right')

  def __call__(self, weights_G: np.ndarray) -> float:
    """The AUC with row weights weights_G[group] (float64 or int64); NaN when either class has no weight."""
    # Integer weights, a bootstrap's, stay integers: their cumulative sum is eight times as fast as that of floats.
    cumulative = np.zeros(self._negative_group.size + 1, weights_G.dtype)
    np.cumsum(weights_G[self._negative_group], out=cumulative[1:])
    positive = weights_G[self._positive_group].astype(np.float64)
    pairs = positive.sum() * float(cumulative[-1])
    if pairs <= 0:
      return float('nan')
    # A tie counts half: the mean of "ties lost" and "ties won".
    won = positive @ (cumulative[self._below] + cumulative[self._below_or_tied]).astype(np.float64) / 2
    return float(won / pairs)


def auc(labels_M: np.ndarray, scores_M: np.ndarray, weights_M: np.ndarray | None = None) -> float:
  """Area under the ROC curve: the chance that a positive outscores a negative, ties counted half.

  Args:
    labels_M: 0/1 labels.
    scores_M: finite scores.
    weights_M: non-negative row weights; a weight of 2 is the row twice.

  Returns:
    The AUC, NaN when one class is missing.

  Raises:
    ValueError: shapes differ, a score is not finite or a label is neither 0 nor 1.
  """
  rows = np.arange(np.size(labels_M))
  weights_M = np.ones(rows.size) if weights_M is None else np.asarray(weights_M, np.float64)
  if weights_M.shape != rows.shape or (weights_M < 0).any():
    raise ValueError(f'got weights of shape {weights_M.shape}; expected {rows.size} non-negative numbers')
  return PresortedAuc(labels_M, scores_M, rows)(weights_M)


def logloss_rows(labels_M: np.ndarray, probabilities_M: np.ndarray) -> np.ndarray:
  """Binary cross-entropy of each row in nats; probabilities are kept 1e-7 away from 0 and 1."""
  labels_M, probabilities_M = _checked(labels_M, probabilities_M)
  p = np.clip(probabilities_M.astype(np.float64), 1e-7, 1 - 1e-7)
  return -np.where(labels_M, np.log(p), np.log1p(-p))


def logloss(labels_M: np.ndarray, probabilities_M: np.ndarray) -> float:
  """Mean of `logloss_rows`."""
  return _mean(logloss_rows(labels_M, probabilities_M))


def normalised_entropy(labels_M: np.ndarray, probabilities_M: np.ndarray) -> float:
  """Logloss over that of always predicting the base rate; below 1 is better than knowing nothing of a row."""
  rate = float(np.mean(labels_M)) if np.size(labels_M) else 0.0
  if not 0 < rate < 1:
    return float('nan')
  return logloss(labels_M, probabilities_M) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def calibration(labels_M: np.ndarray, probabilities_M: np.ndarray) -> float:
  """Mean prediction over mean label: above 1 the model promises too much; NaN without positives."""
  labels_M, probabilities_M = _checked(labels_M, probabilities_M)
  return float(probabilities_M.astype(np.float64).sum() / labels_M.sum()) if labels_M.any() else float('nan')


class Hits(NamedTuple):
  """HIT@k request by request: request_Q (ids, ascending) and hit_Q (0.0 or 1.0)."""

  request_Q: np.ndarray
  hit_Q: np.ndarray


class GroupedRequests:
  """HIT@k whose rows are grouped by request once, for many labels."""

  def __init__(self, requests_M: np.ndarray, utility_M: np.ndarray):
    """Groups the rows.

    Args:
      requests_M: request id of each row, in any order.
      utility_M: finite utilities, higher is ranked earlier.

    Raises:
      ValueError: shapes differ or a utility is not finite.
    """
    requests_M, utility_M = np.asarray(requests_M), np.asarray(utility_M)
    _check(requests_M, utility_M)
    self._order = np.argsort(requests_M, kind='stable')
    self._utility = utility_M[self._order]
    self.requests, self._starts, self._sizes = np.unique(requests_M[self._order], return_index=True, return_counts=True)

  def hit_at_k(self, labels_M: np.ndarray, k: int = 3) -> Hits:
    """See `metrics.hit_at_k`."""
    labels_M, _ = _checked(labels_M, self._utility)
    if not labels_M.size:
      return Hits(self.requests, np.zeros(0))
    labels = labels_M[self._order]
    best_R = np.maximum.reduceat(np.where(labels, self._utility, -np.inf), self._starts)
    # All that is ranked before the best positive is negative, so its rank is 1 + the negatives at or above it.
    ahead = ~labels & (self._utility >= np.repeat(best_R, self._sizes))
    ahead_R = np.add.reduceat(ahead, self._starts, dtype=np.int64)
    counted = (self._sizes > k) & (best_R > -np.inf)
    return Hits(self.requests[counted], (ahead_R[counted] < k).astype(np.float64))


def hit_at_k(requests_M: np.ndarray, utility_M: np.ndarray, labels_M: np.ndarray, k: int = 3) -> Hits:
  """Whether a positive is among each request's k candidates of highest utility.

  Counted are the requests with more than k candidates (with fewer the answer is no news) and at least one positive.
  Ties in utility are taken pessimistically, a positive after the negatives it ties with, so that a constant score
  earns nothing.

  Args:
    requests_M: request id of each row, in any order.
    utility_M: finite utilities, higher is ranked earlier.
    labels_M: 0/1 labels.
    k: how many candidates are shown.

  Returns:
    The counted requests and their hits; the metric is the mean of hit_Q.

  Raises:
    ValueError: shapes differ, a utility is not finite or a label is neither 0 nor 1.
  """
  return GroupedRequests(requests_M, utility_M).hit_at_k(labels_M, k)


def hr_at_k(ranks_N: np.ndarray, k: int) -> float:
  """Share of queries whose target has rank k or better (rank 1 = best)."""
  return _mean(np.asarray(ranks_N) <= k)


def ndcg_at_k(ranks_N: np.ndarray, k: int) -> float:
  """NDCG@k with one relevant item a query: the mean of 1/log2(1 + rank) for ranks up to k."""
  ranks_N = np.asarray(ranks_N)
  return _mean(np.where(ranks_N <= k, 1 / np.log2(1.0 + ranks_N), 0.0))


def mrr(ranks_N: np.ndarray) -> float:
  """Mean reciprocal rank (rank 1 = best)."""
  return _mean(1.0 / np.asarray(ranks_N))


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values)) if values.size else float('nan')


def _checked(labels_M: np.ndarray, scores_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  labels_M, scores_M = np.asarray(labels_M), np.asarray(scores_M)
  _check(labels_M, scores_M)
  if not ((labels_M == 0) | (labels_M == 1)).all():
    raise ValueError('got a label that is neither 0 nor 1')
  return labels_M.astype(bool), scores_M


def _check(rows_M: np.ndarray, scores_M: np.ndarray) -> None:
  if rows_M.ndim != 1 or rows_M.shape != scores_M.shape:
    raise ValueError(f'got shapes {rows_M.shape} and {scores_M.shape}; expected two vectors of one length')
  if not np.isfinite(scores_M).all():
    raise ValueError('got a score that is NaN or infinite; a diverged model has no metrics')
