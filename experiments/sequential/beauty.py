"""Amazon Beauty: the pretrained tower as a sequential recommender, all items ranked for each user.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/beauty.py   (DIR holds amazon/)
           pinfm sweep experiments/sequential/beauty.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol and shared settings: `pinfm_jax.sequential`. Each user's last event tests, the one before chooses the epoch;
items that the user has had are not ranked; both holdouts and a popularity row are printed. The settings were
chosen by hand on the validation events (experiments/README.md); search.py does it with equal budgets.
Terms of the data: none stated by the source, research use only.
"""

import os

from pinfm_jax.config import DataConfig
from pinfm_jax.sequential import SequenceData, sequential_experiment

experiment = sequential_experiment(
  'sequential_beauty',
  DataConfig(
    source='amazon',
    path=os.path.join(os.environ['PINFM_DATA'], 'amazon') if 'PINFM_DATA' in os.environ else '',
    options={'category': 'Beauty'},
  ),
  SequenceData(items=12101, events=153776, length=50, rows=16),
  epochs=20,
)
