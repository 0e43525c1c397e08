"""Equal tuning: every block tries as many settings, and the best one on the validation split is taken."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pinfm_jax.config import Arm, EvaluateConfig
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.evaluate.tables import Table
from pinfm_jax.study.consistency import metric_of
from pinfm_jax.sweep.plan import Plan
from pinfm_jax.workdir import is_done


@dataclass(frozen=True)
class Trial:
  """One setting that a block tried.

  Attributes:
    arm: its name as an arm.
    settings: what it sets besides the block's own settings, as text.
    value: of the metric on the validation split; NaN where the run failed or the metric is undefined.
  """

  arm: str
  settings: str
  value: float


def read_trials(
  plan: Plan, candidates: Mapping[str, Sequence[Arm]], metric: str, evaluate: EvaluateConfig
) -> dict[str, tuple[Trial, ...]]:
  """Block -> its trials, in the order of the file."""
  directories = {name: runs[0].directory for name, runs in plan.of('ranker').items()}
  values: dict = {}

  def value(arm: Arm) -> float:
    directory = directories[arm.name]
    if directory not in values:
      values[directory] = math.nan
      if is_done(directory):
        predictions = RankingPredictions.load(directory / 'predictions.npz')
        values[directory] = metric_of(predictions, metric, evaluate.main_label, evaluate.utility)
    return values[directory]

  return {
    name: tuple(Trial(arm.name, arm.name.removeprefix(name).strip(), value(arm)) for arm in arms)
    for name, arms in candidates.items()
  }


def best_trials(trials: Mapping[str, Sequence[Trial]], metric: str) -> dict[str, Trial]:
  """Block -> its best trial, of equal ones the first; a block without a defined value has none."""
  sign = -1 if metric == 'logloss' else 1
  defined = {name: [trial for trial in tried if not math.isnan(trial.value)] for name, tried in trials.items()}
  return {name: max(tried, key=lambda trial: sign * trial.value) for name, tried in defined.items() if tried}


def tuning_table(trials: Mapping[str, Sequence[Trial]], metric: str, label: str) -> Table:
  """What every block tried, and what was chosen."""
  best, rows = best_trials(trials, metric), []
  for name, tried in trials.items():
    for trial in tried:
      value = '–' if math.isnan(trial.value) else f'{trial.value:.4f}'
      rows.append((name, trial.settings or 'as listed', value, 'yes' if best.get(name) is trial else ''))
  header = ('block', 'settings', metric, 'chosen')
  return Table(f'Tuning: {label} {metric} on the validation split', header, tuple(rows))
