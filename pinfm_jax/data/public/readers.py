"""Vectors of articles from who has read them so far: inductive, so that an article of this morning has one.

In the spirit of GraphSAGE: a user's vector is learned from the clicks before a fixed time (a truncated SVD of the
matrix of users x articles, beside one of users x session context); an article's vector at some moment is the mean
of the vectors of those who had clicked it before the UTC hour of that moment began.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse

from pinfm_jax.data.public.click_log import ClickLog, hour_of

ARTICLE_WIDTH, CONTEXT_WIDTH = 24, 8
WIDTH = ARTICLE_WIDTH + CONTEXT_WIDTH
_FIXED_POINT = 1 << 20  # sums of whole numbers are exact: they do not depend on what else is in the log
_MIN_READERS = 5


@dataclass(frozen=True)
class ReaderVectors:
  """Snapshots of the articles' vectors, one after each hour in which an article found new readers.

  Attributes:
    keys: int64, ascending: article << 24 | hour since 1970.
    sums: int64 [keys, W], fixed-point sum of the vectors of all readers up to the end of that hour.
    counts: int64 [keys], how many readers those are.
  """

  keys: np.ndarray
  sums: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, log: ClickLog, until_ms: int) -> 'ReaderVectors':
    """Of the readers that clicked before `until_ms`, whose vectors those clicks alone decide."""
    vectors, known = user_vectors(log, until_ms)
    reads = log.first_reads
    reads = reads[known[log.user[reads]]]
    key = log.item[reads] << 24 | hour_of(log.timestamp[reads])
    order = np.argsort(key, kind='stable')
    key, user = key[order], log.user[reads][order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.zeros(0, np.int64)
    fixed = np.round(vectors * _FIXED_POINT).astype(np.int64)
    sums, counts = np.zeros((len(starts), WIDTH), np.int64), np.diff(np.r_[starts, len(key)])
    for column in range(WIDTH):  # one at a time: all of them would be a copy of every read
      sums[:, column] = np.add.reduceat(fixed[user, column], starts) if len(starts) else 0
    keys = key[starts]
    return cls(keys, _running(sums, keys >> 24), _running(counts[:, None], keys >> 24)[:, 0])

  def at(self, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Vectors [n, W] float32 of articles at the start of the hour of each time; zeros without a known reader."""
    if not len(self.keys):
      return np.zeros((len(item), WIDTH), np.float32)
    place = np.searchsorted(self.keys, item << 24 | hour_of(timestamp)) - 1
    found = (place >= 0) & (self.keys[np.maximum(place, 0)] >> 24 == item)
    place = np.maximum(place, 0)
    mean = self.sums[place] / (self.counts[place, None] * float(_FIXED_POINT))
    return np.where(found[:, None], mean, 0).astype(np.float32)


def user_vectors(log: ClickLog, until_ms: int) -> tuple[np.ndarray, np.ndarray]:
  """Vectors [users, W] from the clicks before a time, and which users have one (the others' rows are zeros)."""
  rows = np.arange(np.searchsorted(log.timestamp, until_ms))
  known = np.zeros(len(log.user_ids), bool)
  known[log.user[rows]] = True
  vectors = np.zeros((len(log.user_ids), WIDTH))
  if not len(rows):
    return vectors, known
  reads = log.first_reads[log.first_reads < len(rows)]
  users, place = np.unique(log.user[rows], return_inverse=True)
  row_of = np.zeros(len(log.user_ids), np.int64)
  row_of[users] = np.arange(len(users))
  items, item = np.unique(log.item[reads], return_inverse=True)
  readers = np.bincount(item)
  weight = np.where(readers >= _MIN_READERS, np.log(len(users) / readers), 0)
  matrix = sparse.csr_matrix((weight[item], (row_of[log.user[reads]], item)), (len(users), len(items)))
  vectors[users, :ARTICLE_WIDTH] = _reduced(matrix, ARTICLE_WIDTH)
  columns = [np.unique(log.context[rows, c], return_inverse=True)[1] for c in range(log.context.shape[1])]
  widths = [column.max() + 1 for column in columns]
  starts = np.cumsum([0, *widths[:-1]])
  data = np.ones(len(rows) * len(columns))
  place = np.tile(place, len(columns))
  seen = np.concatenate([column + start for column, start in zip(columns, starts, strict=True)])
  context = sparse.csr_matrix((data, (place, seen)), (len(users), sum(widths)))
  common = np.asarray((context > 0).mean(axis=0)).ravel()
  context = _unit(context) @ sparse.diags(np.sqrt(1 - np.minimum(common, 1)))
  vectors[users, ARTICLE_WIDTH:] = _reduced(context.tocsr(), CONTEXT_WIDTH)
  return vectors, known


def _reduced(matrix: sparse.csr_matrix, width: int) -> np.ndarray:
  """Unit rows [n, width]: the matrix's unit rows on its first right singular vectors, by subspace iteration."""
  matrix = _unit(matrix)
  rank = min(width, *matrix.shape)
  rng = np.random.default_rng(0)
  basis = rng.normal(size=(matrix.shape[1], min(rank + 8, matrix.shape[1])))
  for _ in range(6):
    basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
  _, _, right = np.linalg.svd(matrix @ basis, full_matrices=False)
  made = np.zeros((matrix.shape[0], width))
  made[:, :rank] = matrix @ (basis @ right[:rank].T)
  length = np.linalg.norm(made, axis=1, keepdims=True)
  return made / np.where(length > 0, length, 1)


def _unit(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
  length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
  return sparse.diags(1 / np.where(length > 0, length, 1)) @ matrix


def _running(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Running sums [n, k] within runs of equal `group`; whole numbers, hence exact."""
  total = np.cumsum(values, axis=0)
  starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, np.int64)
  lengths = np.diff(np.r_[starts, len(group)])
  return total - np.repeat(total[starts] - values[starts], lengths, axis=0)
