"""The scale and bias of a row that lose least when it is rounded to int4 or int8, by search (`quantise(clip=True)`).

Min-max keeps a row's extremes exact and pays with a wide step for all values. Here nine ranges, with the least and the
greatest value moved inwards, are tried. Each gives codes, whose best scale and bias are a linear regression of
the values on them. The best of the nine is refined by the same two steps in turn, which never raises the error.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

_SHRINK = (0.0, 0.04, 0.08)  # of the range, at either end
_REFITS = 3
_CHUNK_VALUES = 1 << 17  # the working set of a chunk stays in a processor's own cache


def fitted_constants(rows_GE: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
  """Scale and bias of each row.

  Args:
    rows_GE: float32, finite, within float16.
    levels: the greatest code.

  Returns:
    float16 [G, 1] each; a row's squared error with them is at most that of min-max.
  """
  step = max(1, _CHUNK_VALUES // rows_GE.shape[1])
  chunks = [rows_GE[start : start + step] for start in range(0, len(rows_GE), step)]
  if not chunks:
    return np.zeros((0, 1), '<f2'), np.zeros((0, 1), '<f2')
  fit = partial(_fit, levels=levels)
  threads = min(len(chunks), len(os.sched_getaffinity(0)))
  if threads == 1:
    parts = list(map(fit, chunks))
  else:
    with ThreadPoolExecutor(threads) as pool:  # NumPy's loops run without Python's lock
      parts = list(pool.map(fit, chunks))
  scale_G, bias_G = (np.concatenate(column) for column in zip(*parts, strict=True))
  return scale_G[:, None], bias_G[:, None]


def _fit(rows_GE: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
  rows_EG = np.ascontiguousarray(rows_GE.T)  # so that every sum over a row is a sum of whole vectors
  low_G = rows_EG.min(axis=0)
  span_G = rows_EG.max(axis=0) - low_G
  plain = (span_G / np.float32(levels)).astype('<f2'), low_G.astype('<f2')
  mean_G = rows_EG.mean(axis=0)
  centred_EG = rows_EG - mean_G
  # A row far beyond or below float16's range gives NaN or infinity here, which lose the last comparison.
  with np.errstate(all='ignore'):
    best = None
    for bottom in _SHRINK:
      for top in _SHRINK:
        scale_G = span_G * np.float32((1 - bottom - top) / levels)
        found = _refit(centred_EG, scale_G, low_G - mean_G + np.float32(bottom) * span_G, levels)
        best = found if best is None else _better(found, best)
    for _ in range(_REFITS):
      best = _refit(centred_EG, *best[:2], levels)
    fitted = best[0].astype('<f2'), (best[1] + mean_G).astype('<f2')
    wins_G = _squared_error(rows_EG, *fitted, levels) < _squared_error(rows_EG, *plain, levels)
  return np.where(wins_G, fitted[0], plain[0]), np.where(wins_G, fitted[1], plain[1])


def _refit(
  centred_EG: np.ndarray, scale_G: np.ndarray, bias_G: np.ndarray, levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The regression of the values on the codes that they have now: scale, bias, and the share that it explains."""
  codes_EG = _codes(centred_EG, scale_G, bias_G, levels)
  mean_G = codes_EG.mean(axis=0)
  covariance_G = np.einsum('eg,eg->g', codes_EG, centred_EG)  # the values' mean is 0
  variance_G = np.einsum('eg,eg->g', codes_EG, codes_EG) - mean_G * mean_G * np.float32(len(centred_EG))
  scale_G = covariance_G / variance_G
  return scale_G, -scale_G * mean_G, scale_G * covariance_G


def _better(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
  wins_G = one[2] > other[2]
  return tuple(np.where(wins_G, a, b) for a, b in zip(one, other, strict=True))


def _squared_error(rows_EG: np.ndarray, scale_G: np.ndarray, bias_G: np.ndarray, levels: int) -> np.ndarray:
  scale_G, bias_G = scale_G.astype(np.float32), bias_G.astype(np.float32)
  off_EG = _codes(rows_EG, np.where(scale_G > 0, scale_G, 1), bias_G, levels) * scale_G + bias_G - rows_EG
  return np.einsum('eg,eg->g', off_EG, off_EG)


def _codes(rows_EG: np.ndarray, scale_G: np.ndarray, bias_G: np.ndarray, levels: int) -> np.ndarray:
  codes_EG = rows_EG - bias_G
  codes_EG /= scale_G
  np.rint(codes_EG, out=codes_EG)
  return np.clip(codes_EG, 0, levels, out=codes_EG)
