"""Amazon Beauty: the pretrained tower as a sequential recommender, leave-one-out over the whole catalogue.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/beauty.py   (DIR holds amazon/)
           pinfm sweep experiments/sequential/beauty.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      not measured yet
Expected:  not measured yet

The protocol and the settings are those of `pinfm_jax.sequential`; the choice of the settings is told in
experiments/README.md. Terms of the data: none stated by the source, research use only.
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
  epochs=40,
)
