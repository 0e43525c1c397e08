"""What longer pretraining is worth, from none at all (PinFM Figure 3).

Command:   pinfm sweep experiments/kuairand.py --arms experiments/ablations/pretraining_length.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/pretraining_length.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/pretraining_length.py --split test
Hardware:  2 CPU cores, 6 GB of memory
Time:      kuairand: 22 minutes a seed on one core; quickstart: 12; globo: 36
Expected:  kuairand, 2.5 days of training: longer is better (experiments/README.md); so on globo up
           to twice the launch file's steps, on quickstart up to them

Multiples of the launch file's pretrain.steps, each with its own learning-rate schedule; a warm-up longer than a quarter
of the steps is cut to that. 'scratch' is no pretraining: tower and tables from scratch, at the ranker's full rate.
"""

from fractions import Fraction

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import SCRATCH, WITHOUT_PINFM

REFERENCE = 'scratch'
about = (
  "Steps of pretraining, as multiples of the launch file's. In the paper's figure HIT@3 of Save and Hide improve "
  'nearly monotonically from 0 to 640,000 steps.'
)
baseline = REFERENCE


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  steps, warmup = experiment.pretrain.steps, experiment.pretrain.update.warmup_steps
  rows = []
  for factor in (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4)):
    count = max(1, round(steps * factor))
    overrides = {'pretrain.steps': count, 'pretrain.update.warmup_steps': min(warmup, max(1, count // 4))}
    rows.append(Arm(f'{factor} x pretraining', {} if factor == 1 else overrides))
  return (Arm(REFERENCE, SCRATCH), *rows, WITHOUT_PINFM)
