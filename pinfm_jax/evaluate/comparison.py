"""Arms side by side: mean and std over seeds, lifts over a baseline with intervals, the tables that show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.evaluate import bootstrap, metrics
from pinfm_jax.evaluate.bootstrap import Lift
from pinfm_jax.evaluate.ranking import (
  AGE_EDGES_HOURS,
  HIT_K,
  RankingPredictions,
  best_attainable,
  figure_name,
  grouped_requests,
  ranking_metrics,
  slices,
)
from pinfm_jax.evaluate.tables import Table, mean_std, percent_interval
from pinfm_jax.progress import Progress

Arms = Mapping[str, Sequence[RankingPredictions]]  # an arm's predictions, one a seed
LIFTED = {'hit@3': 'HIT@3', 'auc': 'AUC'}  # the metrics that get lifts, and how tables call them


@dataclass(frozen=True)
class RankingComparison:
  """The result of `compare`."""

  baseline: str
  seeds: int
  users: int
  labels_shown: tuple[str, ...]
  lower_is_better: frozenset[str]  # labels of negative utility: a hide in the top 3 is a failure
  metrics: Mapping[str, Mapping[str, tuple[float, float]]]  # arm -> figure -> (mean, std over seeds)
  best: Mapping[str, float] | None
  lifts: Mapping[str, Mapping[str, Lift]]  # arm (other than the baseline) -> figure -> lift

  def figures(self) -> dict[str, float]:
    """Flat named figures for results.json; what is undefined (NaN) is left out.

    'ARM/save/auc/mean' and '/std', 'ARM/lift/save/auc' with '/low', '/high' (relative) and '/difference',
    'best_attainable/save/auc', 'ranking/seeds', 'ranking/users'.
    """
    flat = {'ranking/seeds': float(self.seeds), 'ranking/users': float(self.users)}
    for arm, figures in self.metrics.items():
      for name, (mean, std) in figures.items():
        flat |= {f'{arm}/{name}/mean': mean, f'{arm}/{name}/std': std}
    for arm, lifts in self.lifts.items():
      for name, lift in lifts.items():
        key = f'{arm}/lift/{name}'
        flat |= {key: lift.relative, f'{key}/low': lift.low, f'{key}/high': lift.high}
        flat[f'{key}/difference'] = lift.difference
    flat |= {f'best_attainable/{name}': value for name, value in (self.best or {}).items()}
    return {name: value for name, value in flat.items() if np.isfinite(value)}

  def tables(self) -> tuple[Table, ...]:
    """One table a lifted metric, then (where ages are known) the AUC lift by item age."""
    by_age = [self._age_table(arm) for arm in self.lifts]
    return (*(self._metric_table(metric) for metric in LIFTED), *(table for table in by_age if table.rows))

  def markdown(self) -> str:
    """The tables for results.md."""
    return '\n'.join(table.markdown() for table in self.tables())

  def text(self) -> str:
    """The tables for the terminal."""
    return '\n'.join(table.text() for table in self.tables())

  def _metric_table(self, metric: str) -> Table:
    names = [figure_name(label, '', metric) for label in self.labels_shown]
    rows = [(arm, *(mean_std(*values[name]) for name in names)) for arm, values in self.metrics.items()]
    rows += [(f'lift of {arm}', *(_lift_text(lifts[name]) for name in names)) for arm, lifts in self.lifts.items()]
    if self.best is not None:
      rows.append(('best attainable', *(mean_std(self.best[name], float('nan')) for name in names)))
    counted = 'hit@3_requests' if metric == 'hit@3' else 'positives'
    counts = [self.metrics[self.baseline][figure_name(label, '', counted)][0] for label in self.labels_shown]
    rows.append(('requests counted' if metric == 'hit@3' else 'positives', *(f'{count:,.0f}' for count in counts)))
    marked = [f'{label} (lower is better)' if self._falls(label, metric) else label for label in self.labels_shown]
    note = (
      f'Mean{" ± std" if self.seeds > 1 else ""} over {self.seeds} seed{"s" if self.seeds > 1 else ""}. Lifts are '
      f'relative to {self.baseline}, with 95 % intervals of a paired bootstrap over {self.users:,} users.'
    )
    return Table(LIFTED[metric], ('', *marked), tuple(rows), note)

  def _age_table(self, arm: str) -> Table:
    figures = self.metrics[arm]
    ages = dict.fromkeys(name.split('/')[1] for name in figures if '/age' in name)
    rows = []
    for age in ages:
      cells = []
      for label in self.labels_shown:
        positives = figures[figure_name(label, age, 'positives')][0]
        lift = _lift_text(self.lifts[arm][figure_name(label, age, 'auc')], digits=1)
        cells.append(f'{lift} ({positives:,.0f})')
      rows.append((age.replace('age_unknown', 'unknown').removeprefix('age'), *cells))
    note = 'In parentheses: the positives of that age.'
    return Table(f'AUC lift of {arm} by item age', ('age', *self.labels_shown), tuple(rows), note)

  def _falls(self, label: str, metric: str) -> bool:
    return metric == 'hit@3' and label in self.lower_is_better


def compare(
  arms: Arms,
  baseline: str,
  weights: Mapping[str, float],
  labels_shown: Sequence[str] = (),
  age_edges_hours: Sequence[float] = AGE_EDGES_HOURS,
  resamples: int = 1000,
) -> RankingComparison:
  """Measures every arm and its lift over the baseline.

  Args:
    arms: each arm's predictions, one a seed; the same rows in the same order for all arms of a seed.
    baseline: the arm that lifts are relative to.
    weights: of the utility that orders a request.
    labels_shown: the labels of the tables, in order; empty = all. The figures hold all labels.
    age_edges_hours: edges of the item-age buckets.
    resamples: of the bootstrap.

  Returns:
    The comparison.

  Raises:
    ValueError: the arms do not have the same rows, or the baseline is not among them.
    UserError: a weight or a label to show names no label of the data.
  """
  _check_paired(arms, baseline)
  names = arms[baseline][0].label_names
  for label in labels_shown:
    if label not in names:
      raise UserError(
        f"got '{label}' among the labels to show; expected some of {', '.join(names)}: set evaluate.labels"
      )
  by_arm = {
    arm: [ranking_metrics(predictions, weights, age_edges_hours) for predictions in runs] for arm, runs in arms.items()
  }
  best = [best_attainable(predictions, weights, age_edges_hours) for predictions in arms[baseline]]
  return RankingComparison(
    baseline=baseline,
    seeds=len(arms[baseline]),
    users=_users(arms).size,
    labels_shown=tuple(labels_shown) or names,
    lower_is_better=frozenset(name for name, weight in weights.items() if weight < 0),
    metrics={arm: _over_seeds(figures) for arm, figures in by_arm.items()},
    best=None if None in best else {name: mean for name, (mean, _) in _over_seeds(best).items()},
    lifts=lifts(arms, baseline, weights, age_edges_hours, resamples),
  )


def lifts(
  arms: Arms,
  baseline: str,
  weights: Mapping[str, float],
  age_edges_hours: Sequence[float] = AGE_EDGES_HOURS,
  resamples: int = 1000,
) -> dict[str, dict[str, Lift]]:
  """Relative lifts of AUC and HIT@3, overall and by item age, of every arm over the baseline.

  An arm's figure is its mean over the seeds; the bootstrap resamples users, the same for all arms and seeds, so an
  interval is about the users (the spread over seeds is the std in the table).

  Args:
    arms: each arm's predictions, one a seed; paired as in `compare`.
    baseline: the arm that lifts are relative to.
    weights: of the utility.
    age_edges_hours: edges of the item-age buckets.
    resamples: of the bootstrap.

  Returns:
    {arm: {'save/auc': Lift, 'save/age<24h/hit@3': Lift, ...}} for every arm but the baseline.
  """
  users = _users(arms)
  statistics = {arm: _statistics(runs, weights, age_edges_hours, users) for arm, runs in arms.items()}
  flat = [statistic for named in statistics.values() for statistic in named.values()]
  progress = Progress('bootstrap', resamples, 'resamples')
  samples = iter(bootstrap.resampled(flat, users.size, resamples, progress=progress).T)
  progress.close()
  everyone = np.ones(users.size, np.int64)
  results = {
    arm: {name: (statistic(everyone), next(samples)) for name, statistic in named.items()}
    for arm, named in statistics.items()
  }
  base = results.pop(baseline)
  return {
    arm: {name: bootstrap.lift(base[name][0], value, base[name][1], drawn) for name, (value, drawn) in named.items()}
    for arm, named in results.items()
  }


def _statistics(
  runs: Sequence[RankingPredictions], weights: Mapping[str, float], edges: Sequence[float], users: np.ndarray
) -> dict[str, bootstrap.Statistic]:
  """Each lifted figure of an arm as a function of the users' weights: the mean over the arm's seeds."""
  by_name: dict[str, list[bootstrap.Statistic]] = {}
  for predictions in runs:
    user_M = np.searchsorted(users, predictions.user_M)
    requests = grouped_requests(predictions, weights)
    _, first_row_R = np.unique(predictions.request_M, return_index=True)
    for label, bucket, rows in slices(predictions, edges):
      column = predictions.label(label)
      auc = metrics.PresortedAuc(predictions.labels_MT[rows, column], predictions.scores_MT[rows, column], user_M[rows])
      hit = requests.hit_at_k(predictions.labels_MT[:, column] * rows, HIT_K)
      user_Q = user_M[first_row_R[np.searchsorted(requests.requests, hit.request_Q)]]
      for metric, statistic in (('auc', auc), ('hit@3', bootstrap.UserMean(hit.hit_Q, user_Q))):
        by_name.setdefault(figure_name(label, bucket, metric), []).append(statistic)
  return {name: _mean_of(statistics) for name, statistics in by_name.items()}


def _mean_of(statistics: Sequence[bootstrap.Statistic]) -> bootstrap.Statistic:
  return lambda weights_U: sum(statistic(weights_U) for statistic in statistics) / len(statistics)


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
  means = {}
  for name in runs[0]:
    values = np.array([run.get(name, np.nan) for run in runs])
    means[name] = (float(values.mean()), float(values.std(ddof=1)) if len(runs) > 1 else float('nan'))
  return means


def _users(arms: Arms) -> np.ndarray:
  return np.unique(np.concatenate([predictions.user_M for runs in arms.values() for predictions in runs]))


def _check_paired(arms: Arms, baseline: str) -> None:
  if baseline not in arms:
    raise ValueError(f"got the baseline '{baseline}'; expected one of {', '.join(arms)}")
  for arm, runs in arms.items():
    if len(runs) != len(arms[baseline]):
      raise ValueError(f"got {len(runs)} seeds of '{arm}'; expected {len(arms[baseline])} as of '{baseline}'")
    for ours, theirs in zip(runs, arms[baseline], strict=True):
      same = ours.label_names == theirs.label_names and all(
        np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ('request_M', 'item_key_M', 'labels_MT')
      )
      if not same:
        raise ValueError(f"got other rows for '{arm}' than for '{baseline}'; lifts need the same rows in one order")


def _lift_text(lift: Lift, digits: int = 2) -> str:
  return percent_interval(lift.relative, lift.low, lift.high, digits)
