"""What more rows of the item tables are worth (PinFM Table 7: 20 M to 160 M rows of a sub-table).

Command:   pinfm sweep experiments/kuairand.py --arms experiments/ablations/table_rows.py --split test
           pinfm sweep experiments/globo.py --arms experiments/ablations/table_rows.py --split test
           pinfm sweep experiments/quickstart.py --arms experiments/ablations/table_rows.py --split test
Hardware:  2 CPU cores, 6 GB of memory
Time:      kuairand: 15 minutes a seed on one core; globo: four towers, 2:11 each on one core, and five rankers, 1:40 to
           3:35; quickstart: 9 minutes a seed on one core
Expected:  kuairand, 2.5 days of training: none beyond seeds from 10,000 rows on; globo: none in HIT@3
           (experiments/README.md), nor in the quickstart

A quarter, a half, all and twice the launch file's rows, as 20 M, 40 M, 80 M and 160 M are to the paper's 80 M.
"""

from fractions import Fraction

from pinfm_jax.config import Arm, Experiment
from pinfm_jax.sweep.ablations import WITHOUT_PINFM

REFERENCE = '1/4 x rows'
about = (
  "Rows of each sub-table, as multiples of the launch file's. The paper's figures are lifts of HIT@3 on Home Feed over "
  '20 M rows: Save / Hide (lower is better).'
)
baseline = REFERENCE


def arms(experiment: Experiment) -> tuple[Arm, ...]:
  """The rows, the reference first."""
  papers = {
    Fraction(1, 4): '0 / 0',
    Fraction(1, 2): '+0.81 / -0.34 %',
    Fraction(1): '+0.91 / +0.31 %',
    Fraction(2): '+1.98 / +0.92 %',
  }
  rows = experiment.model.tables.rows
  sizes = {factor: max(1, round(rows * factor)) for factor in papers}
  arms = [Arm(f'{factor} x rows', {'model.tables.rows': sizes[factor]}, paper) for factor, paper in papers.items()]
  return (*arms, WITHOUT_PINFM)
