"""Paired bootstrap over users: how sure a relative lift is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pinfm_jax.progress import Progress

# A figure of one resample: called with the users' weights (how often each was drawn), returns a number or NaN.
Statistic = Callable[[np.ndarray], float]


class UserMean:
  """Mean of values under weights of their users: the statistic of HIT@k."""

  def __init__(self, values_Q: np.ndarray, user_Q: np.ndarray):
    """Sums values by user; user_Q indexes a call's weights."""
    self._users, index_Q = np.unique(user_Q, return_inverse=True)
    self._sums = np.bincount(index_Q, values_Q, minlength=self._users.size)
    self._counts = np.bincount(index_Q, minlength=self._users.size)

  def __call__(self, weights_U: np.ndarray) -> float:
    """The weighted mean; NaN when no drawn user has a value."""
    weights = weights_U[self._users]
    count = weights @ self._counts
    return float(weights @ self._sums / count) if count > 0 else float('nan')


@dataclass(frozen=True)
class Lift:
  """What an arm changes against its baseline: relative (arm / baseline - 1) and absolute, with 95 % intervals."""

  relative: float
  low: float
  high: float
  difference: float
  difference_low: float
  difference_high: float


def resampled(
  statistics: Sequence[Statistic],
  num_users: int,
  resamples: int = 1000,
  seed: int = 0,
  progress: Progress | None = None,
) -> np.ndarray:
  """Every statistic on the same resamples of the users.

  Resample r draws num_users users with replacement from its own generator (seed, r): the numbers do not depend on
  which other statistics are asked for, and figures from two calls with one seed are paired as well.

  Args:
    statistics: S functions of the users' weights.
    num_users: how many users there are.
    resamples: how many draws.
    seed: of the draws.
    progress: is told of every finished resample.

  Returns:
    [resamples, S] float64.
  """

  samples = np.empty((resamples, len(statistics)))
  for r in range(resamples):
    drawn = np.random.default_rng((seed, r)).integers(0, num_users, num_users)
    weights_U = np.bincount(drawn, minlength=num_users)
    samples[r] = [statistic(weights_U) for statistic in statistics]
    if progress:
      progress.update(r + 1)
  return samples


def lift(baseline: float, arm: float, baseline_samples_R: np.ndarray, arm_samples_R: np.ndarray) -> Lift:
  """The lift of `arm` over `baseline` with percentile intervals from paired resamples.

  Args:
    baseline: the baseline's figure on all users.
    arm: the arm's.
    baseline_samples_R: the baseline's figure on each resample.
    arm_samples_R: the arm's on the same resamples.

  Returns:
    The lift. An interval is NaN when more than 5 % of the resamples leave the figure undefined (too few positives for
    any claim); relative figures are NaN when the baseline is 0.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    relative = np.divide(arm - baseline, baseline, dtype=np.float64)
    relative_R = (arm_samples_R - baseline_samples_R) / baseline_samples_R
  difference_low, difference_high = _interval(arm_samples_R - baseline_samples_R)
  low, high = _interval(relative_R)
  return Lift(
    float(relative) if np.isfinite(relative) else float('nan'),
    low,
    high,
    arm - baseline,
    difference_low,
    difference_high,
  )


def paired_bootstrap(baseline: Statistic, arm: Statistic, num_users: int, resamples: int = 1000, seed: int = 0) -> Lift:
  """The lift of one statistic over another, both on the same resamples of the users.

  Args:
    baseline: statistic of the baseline (`PresortedAuc`, `UserMean`, or any function of the users' weights).
    arm: statistic of the arm.
    num_users: how many users there are.
    resamples: how many draws.
    seed: of the draws.

  Returns:
    The lift with 95 % intervals, see `lift`.
  """
  samples = resampled((baseline, arm), num_users, resamples, seed)
  everyone = np.ones(num_users, np.int64)
  return lift(baseline(everyone), arm(everyone), samples[:, 0], samples[:, 1])


def _interval(samples_R: np.ndarray) -> tuple[float, float]:
  defined = samples_R[np.isfinite(samples_R)]
  if not defined.size or defined.size < 0.95 * samples_R.size:
    return float('nan'), float('nan')
  low, high = np.quantile(defined, (0.025, 0.975))
  return float(low), float(high)
