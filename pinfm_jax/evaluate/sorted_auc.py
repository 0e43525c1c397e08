"""The AUC of many subsets of rows whose scores are sorted once, and the two means that it is made of."""

from typing import NamedTuple

import numpy as np


class AucShares(NamedTuple):
  """What rows add to an AUC; the mean of `below_P`, and that of `above_N`, is the AUC.

  Attributes:
    positive_P: places of the positives among all rows.
    below_P: the share of the negatives that each positive outscores.
    negative_N: places of the negatives.
    above_N: the share of the positives that outscore each negative.
  """

  positive_P: np.ndarray
  below_P: np.ndarray
  negative_N: np.ndarray
  above_N: np.ndarray


class UserAucs(NamedTuple):
  """AUC user by user: user_U (ascending; those with both classes) and auc_U."""

  user_U: np.ndarray
  auc_U: np.ndarray


class SortedScores:
  """Scores of one label, sorted once; ties count half throughout."""

  def __init__(self, labels_M: np.ndarray, scores_M: np.ndarray):
    """Sorts finite scores; labels are 0 or 1."""
    self._order = np.argsort(scores_M)
    self._labels = np.asarray(labels_M)[self._order].astype(bool)
    self._scores = np.asarray(scores_M)[self._order]

  def auc(self, rows_M: np.ndarray) -> float:
    """The AUC among the rows of a mask; NaN when one class is missing."""
    _, labels, ends, tie = self._ties(rows_M)
    negatives = np.append(0, np.cumsum(~labels)[ends])
    pairs = int(labels.sum()) * int(negatives[-1])
    # The negatives below and those below or tied; whole numbers, so that the order of the sum does not matter.
    return float(np.sum((negatives[:-1] + negatives[1:])[tie[labels]]) / 2 / pairs) if pairs else float('nan')

  def shares(self, rows_M: np.ndarray) -> AucShares:
    """What each row of a mask adds to their AUC; nothing when one class is missing."""
    rows, labels, ends, tie = self._ties(rows_M)
    positives, negatives = (np.append(0, np.cumsum(flags)[ends]) for flags in (labels, ~labels))
    if not positives[-1] or not negatives[-1]:
      return AucShares(rows[:0], np.zeros(0), rows[:0], np.zeros(0))
    below = (negatives[:-1] + negatives[1:]) / (2 * negatives[-1])
    above = 1 - (positives[:-1] + positives[1:]) / (2 * positives[-1])
    return AucShares(rows[labels], below[tie[labels]], rows[~labels], above[tie[~labels]])

  def user_aucs(self, user_M: np.ndarray) -> UserAucs:
    """The AUC among each user's own rows; users are small whole numbers, and those without both classes left out."""
    if not user_M.size:
      return UserAucs(user_M, np.zeros(0))
    user = user_M[self._order].astype(np.min_scalar_type(user_M.max()))  # up to 16 bits the stable sort is much faster
    order = np.argsort(user, kind='stable')
    user, score, label = user[order].astype(np.int64), self._scores[order], self._labels[order]
    rows = np.arange(user.size)
    new_user = np.append(True, user[1:] != user[:-1])
    new_tie = new_user | np.append(True, score[1:] != score[:-1])
    first_of_tie = rows[new_tie]
    last_of_tie = np.append(first_of_tie[1:], rows.size) - 1
    first_of_user = rows[new_user][np.cumsum(new_user) - 1]
    rank_M = (first_of_tie + last_of_tie)[np.cumsum(new_tie) - 1] / 2 - first_of_user  # mid-rank, from 0
    positives_U = np.bincount(user, label)
    negatives_U = np.bincount(user) - positives_U
    won_U = np.bincount(user, rank_M * label) - positives_U * (positives_U - 1) / 2
    both = (positives_U > 0) & (negatives_U > 0)
    return UserAucs(np.flatnonzero(both), won_U[both] / (positives_U * negatives_U)[both])

  def _ties(self, rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the mask's rows by ascending score: their places, labels, where each tie ends, and the tie of each."""
    chosen = np.asarray(rows_M, bool)[self._order]
    scores = self._scores[chosen]
    last = np.append(scores[1:] != scores[:-1], True)[: scores.size]
    tie = np.cumsum(last) - last
    return self._order[chosen], self._labels[chosen], np.flatnonzero(last), tie
