"""Arms side by side: mean and std over seeds, lifts over a baseline and over each other, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.bootstrap import Lift
from pinfm_jax.evaluate.comparison_tables import ranking_tables
from pinfm_jax.evaluate.lifts import Arms, distinct, resampled_figures, same_rows
from pinfm_jax.evaluate.ranking import AGE_EDGES_HOURS, best_attainable, ranking_metrics
from pinfm_jax.evaluate.tables import Table


@dataclass(frozen=True)
class RankingComparison:
  """The result of `compare`."""

  baseline: str
  seeds: int
  users: int
  requests: int
  labels_shown: tuple[str, ...]
  lower_is_better: frozenset[str]  # labels of negative utility: a hide in the top 3 is a failure
  metrics: Mapping[str, Mapping[str, tuple[float, float]]]  # arm -> figure -> (mean, std over seeds)
  best: Mapping[str, float] | None
  lifts: Mapping[str, Mapping[str, Lift]]  # arm (other than the baseline) -> figure -> lift
  resample: str = 'users'
  challenger: str = ''
  against: Mapping[str, Mapping[str, Lift]] = field(default_factory=dict)  # arm -> the challenger's lift over it
  paper: Mapping[str, str] = field(default_factory=dict)  # arm -> the paper's own figure

  def figures(self) -> dict[str, float]:
    """Flat named figures for results.json; what is undefined (NaN) is left out.

    'ARM/save/auc/mean' and '/std'; 'ARM/lift/save/auc' with '/low', '/high' (relative) and '/difference' (with '/low',
    '/high'); 'CHALLENGER/against/ARM/save/auc' (a difference) with '/low', '/high'; 'best_attainable/save/auc';
    'ranking/seeds', 'ranking/users', 'ranking/requests'.
    """
    flat = {f'ranking/{name}': float(getattr(self, name)) for name in ('seeds', 'users', 'requests')}
    for arm, figures in self.metrics.items():
      for name, (mean, std) in figures.items():
        flat |= {f'{arm}/{name}/mean': mean, f'{arm}/{name}/std': std}
    for arm, lifts in self.lifts.items():
      for name, lift in lifts.items():
        key = f'{arm}/lift/{name}'
        flat |= {key: lift.relative, f'{key}/low': lift.low, f'{key}/high': lift.high}
        flat |= _difference(f'{key}/difference', lift)
    for arm, lifts in self.against.items():
      for name, lift in lifts.items():
        flat |= _difference(f'{self.challenger}/against/{arm}/{name}', lift)
    flat |= {f'best_attainable/{name}': value for name, value in (self.best or {}).items()}
    return {name: value for name, value in flat.items() if np.isfinite(value)}

  def tables(self) -> tuple[Table, ...]:
    """See `comparison_tables.ranking_tables`."""
    return ranking_tables(self)

  def markdown(self) -> str:
    """The tables for results.md."""
    return '\n'.join(table.markdown() for table in self.tables())

  def text(self) -> str:
    """The tables for the terminal."""
    return '\n'.join(table.text() for table in self.tables())


def compare(
  arms: Arms,
  baseline: str,
  weights: Mapping[str, float],
  labels_shown: Sequence[str] = (),
  age_edges_hours: Sequence[float] = AGE_EDGES_HOURS,
  resamples: int = 1000,
  *,
  resample: str = 'users',
  challenger: str = '',
  paper: Mapping[str, str] | None = None,
) -> RankingComparison:
  """Measures every arm, its lift over the baseline, and the challenger's over every other arm.

  Args:
    arms: each arm's predictions, one a seed; the same rows in the same order for all arms of a seed.
    baseline: the arm that lifts are relative to.
    weights: of the utility that orders a request.
    labels_shown: the labels of the tables, in order; empty = all. The figures hold all labels.
    age_edges_hours: edges of the item-age buckets.
    resamples: of the bootstrap.
    resample: what it draws, 'users' or 'requests'.
    challenger: an arm that is compared with each other one; '' = none.
    paper: the paper's own figure of some arms, shown beside theirs.

  Returns:
    The comparison.

  Raises:
    ValueError: the arms do not have the same rows, or the baseline or challenger is not among them.
    UserError: a weight or a label to show names no label of the data.
  """
  _check_paired(arms, baseline)
  _check_names(arms, baseline, labels_shown, challenger)
  names, arms = arms[baseline][0].label_names, same_rows(arms)
  by_arm = {
    arm: [ranking_metrics(predictions, weights, age_edges_hours) for predictions in runs] for arm, runs in arms.items()
  }
  best = [best_attainable(predictions, weights, age_edges_hours) for predictions in arms[baseline]]
  drawn, place = resampled_figures(arms, weights, age_edges_hours, resamples, resample), list(arms).index

  def lifts(arm: str, over: str) -> dict[str, Lift]:
    return {name: figure.lift(place(arm), place(over)) for name, figure in drawn.items()}

  return RankingComparison(
    baseline=baseline,
    seeds=len(arms[baseline]),
    users=distinct(arms, 'user_M').size,
    requests=distinct(arms, 'request_M').size,
    labels_shown=tuple(labels_shown) or names,
    lower_is_better=frozenset(name for name, weight in weights.items() if weight < 0),
    metrics={arm: _over_seeds(figures) for arm, figures in by_arm.items()},
    best=None if None in best else {name: mean for name, (mean, _) in _over_seeds(best).items()},
    lifts={arm: lifts(arm, baseline) for arm in arms if arm != baseline},
    resample=resample,
    challenger=challenger,
    against={arm: lifts(challenger, arm) for arm in arms if arm != challenger} if challenger else {},
    paper={arm: text for arm, text in (paper or {}).items() if text and arm in arms},
  )


def _check_names(arms: Arms, baseline: str, labels_shown: Sequence[str], challenger: str) -> None:
  names = arms[baseline][0].label_names
  for label in labels_shown:
    if label not in names:
      raise UserError(
        f"got '{label}' among the labels to show; expected some of {', '.join(names)}: set evaluate.labels"
      )
  if challenger and challenger not in arms:
    raise ValueError(f"got the challenger '{challenger}'; expected one of {', '.join(arms)}")


def _difference(key: str, lift: Lift) -> dict[str, float]:
  return {key: lift.difference, f'{key}/low': lift.difference_low, f'{key}/high': lift.difference_high}


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
  means = {}
  for name in runs[0]:
    values = np.array([run.get(name, np.nan) for run in runs])
    means[name] = (float(values.mean()), float(values.std(ddof=1)) if len(runs) > 1 else float('nan'))
  return means


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
