"""Paired bootstrap over users (or requests): how sure a lift is.

`paired_bootstrap` takes any statistic and calls it once a resample; `ratios` evaluates many means at once, as one
matrix product, which the comparison of many arms needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# A figure of one resample: called with the users' weights (how often each was drawn), returns a number or NaN.
Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Lift:
  """What an arm changes against its baseline: relative (arm / baseline - 1) and absolute, with 95 % intervals."""

  relative: float
  low: float
  high: float
  difference: float
  difference_low: float
  difference_high: float


@dataclass(frozen=True)
class Ratio:
  """A mean, of A arms at once, as what each drawn unit (a user, say) adds to its sum and its count.

  Attributes:
    sums_UA: float64, a unit's share of the sum.
    counts_U: float64, its share of the count, the same for all arms.
  """

  sums_UA: np.ndarray
  counts_U: np.ndarray

  @classmethod
  def of(cls, values_QA: np.ndarray, unit_Q: np.ndarray, units: int) -> 'Ratio':
    """The mean of values, one column an arm, whose rows belong to units."""
    sums = [np.bincount(unit_Q, values, minlength=units) for values in values_QA.T]
    return cls(np.stack(sums, axis=1), np.bincount(unit_Q, minlength=units).astype(np.float64))

  def means(self) -> np.ndarray:
    """[A], over all units; NaN without any value."""
    with np.errstate(invalid='ignore'):
      return self.sums_UA.sum(axis=0) / self.counts_U.sum()


def draws(units: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
  """How often each unit is drawn in each resample: [resamples, units] uint8.

  Resample r draws `units` units with replacement from its own generator (seed, r): figures from two calls with one
  seed are paired. (That a unit is drawn more than 255 times has no chance that a float could hold.)
  """
  counts = np.empty((resamples, units), np.uint8)
  for r in range(resamples):
    counts[r] = np.bincount(np.random.default_rng((seed, r)).integers(0, units, units), minlength=units)
  return counts


def ratios(terms: Sequence[Ratio], draws_RU: np.ndarray) -> list[np.ndarray]:
  """Every term on every resample.

  Args:
    terms: means over the same units.
    draws_RU: how often each unit is drawn.

  Returns:
    A term's [R, A] float64; NaN where a resample has no value to average.
  """
  columns = np.concatenate([np.column_stack([term.sums_UA, term.counts_U]) for term in terms], axis=1)
  block = max(1, (1 << 22) // max(draws_RU.shape[1], 1))  # float64 copies of 32 MB at most
  totals = [draws_RU[r : r + block].astype(np.float64) @ columns for r in range(0, len(draws_RU), block)]
  ends = np.cumsum([term.sums_UA.shape[1] + 1 for term in terms])
  parts = np.split(np.concatenate(totals), ends[:-1], axis=1)
  with np.errstate(invalid='ignore'):
    # A sum over nobody is 0, so an empty resample is 0 / 0.
    return [part[:, :-1] / part[:, -1:] for part in parts]


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
    baseline: statistic of the baseline (`PresortedAuc`, or any function of the users' weights).
    arm: statistic of the arm.
    num_users: how many users there are.
    resamples: how many draws.
    seed: of the draws.

  Returns:
    The lift with 95 % intervals, see `lift`.
  """
  # int64: see PresortedAuc
  weights_RU = draws(num_users, resamples, seed)
  baseline_R, arm_R = (np.array([f(w.astype(np.int64)) for w in weights_RU]) for f in (baseline, arm))
  everyone = np.ones(num_users, np.int64)
  return lift(baseline(everyone), arm(everyone), baseline_R, arm_R)


def _interval(samples_R: np.ndarray) -> tuple[float, float]:
  defined = samples_R[np.isfinite(samples_R)]
  if not defined.size or defined.size < 0.95 * samples_R.size:
    return float('nan'), float('nan')
  low, high = np.quantile(defined, (0.025, 0.975))
  return float(low), float(high)
