"""Amazon Toys and Games: the pretrained tower as a sequential recommender, all items ranked for each user.

Command:   PINFM_DATA=DIR pinfm run experiments/sequential/toys.py   (DIR holds amazon/)
           pinfm sweep experiments/sequential/toys.py --arms experiments/sequential/baselines.py --split test
Hardware:  2 CPU cores, 3 GB of memory
Time:      see experiments/README.md
Expected:  see experiments/README.md

Protocol and shared settings: `pinfm_jax.sequential`. Each user's last event tests, the one before chooses the epoch;
items that the user has had are not ranked; both holdouts and a popularity row are printed. The settings are
Beauty's, chosen there by hand on the validation events; search.py found none better here by more than .0005 of NDCG@10.
Terms of the data: none stated by the source, research use only.
"""

import os

from pinfm_jax.config import DataConfig
from pinfm_jax.sequential import SequenceData, sequential_experiment

experiment = sequential_experiment(
  'sequential_toys',
  DataConfig(
    source='amazon',
    path=os.path.join(os.environ['PINFM_DATA'], 'amazon') if 'PINFM_DATA' in os.environ else '',
    options={'category': 'Toys_and_Games'},
  ),
  SequenceData(items=11924, events=128773, length=50, rows=16),
  epochs=20,
)
