"""`pinfm bench serving --parts int4`: what quantised tables change in a finished run's evaluation."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pinfm_jax.bench.results import Figure
from pinfm_jax.errors import UserError
from pinfm_jax.evaluate.bootstrap import Lift, paired_bootstrap
from pinfm_jax.evaluate.metrics import PresortedAuc
from pinfm_jax.evaluate.ranking import RankingPredictions
from pinfm_jax.launch import saved_experiment
from pinfm_jax.stages.context import Run
from pinfm_jax.stages.export import export_arm, pinfm_arms, served_predictions

ASKED = 0.001  # the paper loses 0.06 %


@dataclass(frozen=True)
class Int4Sizes:
  """What is measured.

  Attributes:
    workdir: of a finished run whose data have impressions.
    resamples: of the bootstrap over users.
  """

  workdir: str | Path
  resamples: int = 1000


def measure_int4(directory: Path, sizes: Int4Sizes) -> list[Figure]:
  """Scores the run's evaluation with float32 tables and with int4 tables, through bundles.

  Args:
    directory: where the two bundles are made; they are removed again.
    sizes: what is measured.

  Returns:
    The change of the main label's AUC with its 95 % interval, which is asked to lie inside +-0.001.

  Raises:
    UserError: the run is not finished, or none of its rankers has PinFM.
  """
  run = Run(saved_experiment(sizes.workdir), Path(sizes.workdir))
  arms = pinfm_arms(run)
  if not arms:
    raise UserError(f'{sizes.workdir} has no ranker with PinFM, hence no tables to quantise; name another --workdir')
  served = {}
  for storage in ('float32', 'int4'):
    bundle = export_arm(run, directory / f'bundle_{storage}', arms[-1].name, storage=storage, overwrite=True)
    served[storage] = served_predictions(run, arms[-1], bundle)
    shutil.rmtree(bundle)
  label = run.experiment.evaluate.main_label
  change = auc_change(served['float32'], served['int4'], label, sizes.resamples)
  text = f'{run.experiment.name}, {label} AUC'
  return [
    Figure(
      'int4/auc/change', f'{text}: int4 less float32, with its 95 % interval', change.difference,
      change.difference_low, change.difference_high, unit='',
    ),
    Figure('int4/auc/low', f'{text}: low end of the interval', change.difference_low, unit='', at_least=-ASKED),
    Figure('int4/auc/high', f'{text}: high end of the interval', change.difference_high, unit='', at_most=ASKED),
    Figure('int4/auc/relative', f'{text}: relative change', 100 * change.relative, unit='%'),
    Figure('int4/users', 'users of the evaluation', len(np.unique(served['int4'].user_M)), unit=''),
  ]  # fmt: skip


def auc_change(exact: RankingPredictions, quantised: RankingPredictions, label: str, resamples: int) -> Lift:
  """The change of a label's AUC between predictions of the same rows, paired over resampled users."""
  users, user_M = np.unique(exact.user_M, return_inverse=True)
  column = exact.label(label)
  before, after = (PresortedAuc(p.labels_MT[:, column], p.scores_MT[:, column], user_M) for p in (exact, quantised))
  return paired_bootstrap(before, after, len(users), resamples)
